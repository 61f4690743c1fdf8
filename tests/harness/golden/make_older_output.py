"""Write tests/golden/older_output.zip: outputs of an older version, which today's code has to read and resume.

The older version is driven by its command line, against a moto server in this process, so that URIs and etags are the
same wherever the outputs are uploaded again:

    python -m tests.harness.golden.make_older_output OLD/.venv/bin/img2parquet

The stored files were written by commit e12d8bb (0.1.0, the last version whose import name was `pipeline`), with torch
2.13.0, pyarrow 26.0.1 and pillow 13.0.0. The archive holds:

    tiny/            the checkpoint, an untrained LeViT
    jobs/            the job files, which name the checkpoint relative to this folder
    bucket/in/       three shards of eight images, two of them broken; loose images and two lists of them
    bucket/shards/   the output of jobs/shards.yaml: three parts, finished
    bucket/lists/    the output of jobs/lists.yaml: finished, with a retry (generation 1), an extension (2)

Embeddings are stored as int8, so that the last bit of a float does not decide whether two machines agree on a file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped, unused-ignore]
from moto.server import ThreadedMotoServer

from tests.conftest import ENVIRONMENT, FOREIGN
from tests.models.oracle import saved
from tests.support.small_job import jpeg, make_shards

BUCKET = "older-output"
ARCHIVE = Path(__file__).parents[2] / "golden" / "older_output.zip"
FOLDER = Path(tempfile.gettempdir(), "older-output")  # a fixed path, since `_run.json` names the checkpoint's
SHARDS, PER_SHARD = 3, 8
LISTED = {"list-0.csv": range(6), "list-1.csv": range(6, 8)}
ABSENT, NO_IMAGE = 2, 4  # listed images: one is uploaded only before the retry, one is a text file


def main(command: str) -> None:
    make_checkpoint(FOLDER / "tiny")
    (FOLDER / "jobs").mkdir()
    for name, text in job_files().items():
        (FOLDER / "jobs" / name).write_text(text)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="testing", aws_secret_access_key="testing")
    client.create_bucket(Bucket=BUCKET)
    try:
        write_outputs(command, endpoint, client)
        download(client)
    finally:
        server.stop()
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(FOLDER))
    shutil.rmtree(FOLDER)


def make_checkpoint(folder: Path) -> None:
    """Save a LeViT as small as the family allows, for 64 pixels and 5 labels."""
    from transformers import LevitConfig, LevitForImageClassificationWithTeacher

    folder.mkdir(parents=True)
    config = LevitConfig(
        image_size=64, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[8, 8, 8],
        id2label={i: f"class {i}" for i in range(5)}, label2id={f"class {i}": i for i in range(5)},
    )  # fmt: skip
    saved(LevitForImageClassificationWithTeacher(config), folder, 0)
    geometry = {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 64}
    (folder / "preprocessor_config.json").write_text(json.dumps(geometry))


def job_files() -> dict[str, str]:
    shards = {"kind": "webdataset", "uris": [f"s3://{BUCKET}/in/*.tar"], "keep": ["label:int64", "caption"]}
    lists = {"kind": "table", "uris": [f"s3://{BUCKET}/in/list-*.csv"], "keep": ["n:int64"]}
    return {
        "shards.yaml": job_file("shards", {**shards, "shards_per_part": 1}),
        "lists.yaml": job_file("lists", lists),
    }


def job_file(name: str, given: dict[str, Any]) -> str:
    document = {
        "input": given,
        "models": [
            {
                "model": "./tiny",
                "name": "tiny",
                "outputs": [{"kind": "embedding", "normalize": "l2", "dtype": "int8"}],
            }
        ],
        "output": {"uri": f"s3://{BUCKET}/{name}", "rows_per_part": 3},
        "dtype": "float32",
        "reject_limit": 0.5,
        "resources": {"workers": 1, "batch_size": 4},
    }
    return json.dumps(document, indent=1) + "\n"


def write_outputs(command: str, endpoint: str, client: Any) -> None:
    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=BUCKET, Key=f"in/{name}", Body=data)

    def img2parquet(*arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        environment |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}
        subprocess.run([command, *arguments, "--runner", "local"], cwd=FOLDER, env=environment, check=True)

    with tempfile.TemporaryDirectory() as folder:
        for path in make_shards(Path(folder), SHARDS, PER_SHARD):
            put(path.name, path.read_bytes())
    for n in (*LISTED["list-0.csv"], *LISTED["list-1.csv"]):
        if n != ABSENT:
            put(f"img/{n}.jpg", b"no image" if n == NO_IMAGE else jpeg(n))
    img2parquet("run", "jobs/shards.yaml")
    put("list-0.csv", list_of("list-0.csv"))
    img2parquet("run", "jobs/lists.yaml")
    put(f"img/{ABSENT}.jpg", jpeg(ABSENT))
    img2parquet("retry", f"s3://{BUCKET}/lists", "--reason", "not_found")
    put("list-1.csv", list_of("list-1.csv"))
    img2parquet("run", "jobs/lists.yaml", "--extend")


def list_of(name: str) -> bytes:
    return ("uri,n\n" + "".join(f"img/{n}.jpg,{n}\n" for n in LISTED[name])).encode()


def download(client: Any) -> None:
    for entry in client.list_objects_v2(Bucket=BUCKET)["Contents"]:
        path = FOLDER / "bucket" / entry["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read())


if __name__ == "__main__":
    main(sys.argv[1])
