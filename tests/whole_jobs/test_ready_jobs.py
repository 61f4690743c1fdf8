"""Validate every job in `jobs/` and run it on the demo's images, with local inputs and models in place of its own."""

from __future__ import annotations

import csv
import importlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from img2parquet.engine.driver import run
from img2parquet.errors import Img2ParquetError
from img2parquet.job import json_schema, load_job
from img2parquet.results.reader import open_results

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
CHECKPOINTS = ROOT / "infra" / "demo" / "checkpoints"
LEVIT, BEIT = f"model={CHECKPOINTS / 'levit-photos'}", f"model={CHECKPOINTS / 'beit-textures'}"
REHEARSED = ("weights=random(0)", "image_size=32")  # a published architecture, as small as its patches allow
IMAGES = 6
WHAT = {  # the settings that replace each model, and a column with its type for each partition
    "demo": ([()], {"levit-photos": ("labels", "list<")}),
    "demo_textures": ([()], {"beit-textures": ("mask", "binary")}),
    "embed_clip": (
        [("model={photos}/clip",), ("weights=random(0)", "image_size=28")],
        {"clip": ("embedding", "fixed_size_list<element: halffloat"), "dinov2-base": ("embedding", "fixed_size_list<")},
    ),
    "embed_folder": ([REHEARSED], {"vit-msn-base": ("embedding", "fixed_size_list<element: halffloat")}),
    "embed_for_search": ([REHEARSED], {"vit-msn-base": ("embedding", "fixed_size_list<element: int8")}),
    "embed_parquet": ([REHEARSED], {"beit-base-patch16-224": ("logits", "fixed_size_list<")}),
    "few_shot_labels": ([REHEARSED], {"vit-msn-small": ("embedding", "fixed_size_list<element: float")}),
    "four_families": (
        [(), (), ("image_size=32",), ("image_size=32",)],
        {"levit-photos": ("labels", "list<"), "beit-textures": ("mask", "list<"), "bit-50": ("embedding", "fixed")},
    ),
    "label_photos": ([(LEVIT,)], {"levit-photos": ("labels", "list<")}),
    "masked_tokens": ([REHEARSED], {"beit-base-patch16-224-pt22k": ("visual_tokens", "list<")}),
    "rehearse": ([()], {"levit-128S": ("labels", "list<")}),
    "segment_list": ([(BEIT,)], {"beit-textures": ("mask", "binary")}),
    "several_models": (
        [(LEVIT,), REHEARSED, REHEARSED],
        {
            "levit-photos": ("labels", "list<"),
            "beit-base-patch16-224": ("labels", "list<"),
            "vit-msn-base": ("embedding", "fixed_size_list<"),
        },
    ),
    "text_search": ([("model={photos}/clip",)], {"clip": ("embedding", "fixed_size_list<element: int8")}),
    "zero_shot_labels": ([("model={photos}/clip",)], {"clip": ("embedding", "fixed_size_list<element: halffloat")}),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a tar, a folder, a Parquet file and a list of a few of the demo's crops."""
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "infra" / "demo"))
        demo = importlib.import_module("make_shards")
        demo.make_shards(folder / "all", demo.Recipe(crops=48, shards=1))
    members: dict[str, bytes] = {}
    with tarfile.open(folder / "all" / "photos-00.tar") as whole, tarfile.open(folder / "some.tar", "w") as some:
        sidecars = {}
        for member in whole:
            body = whole.extractfile(member)
            assert body
            if member.name.endswith(".json"):
                sidecars[member.name.removesuffix(".json")] = (member, body.read())
            elif member.name.endswith(".jpg"):
                members[member.name] = body.read()
        good = {name: data for name, data in members.items() if len(data) > 1500 and data[:2] == b"\xff\xd8"}
        members = dict(list(good.items())[:IMAGES])
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            some.addfile(entry, pa.BufferReader(data))
            member, text = sidecars[name.removesuffix(".jpg")]
            some.addfile(member, pa.BufferReader(text))
    assert len(members) == IMAGES
    for n, (_, data) in enumerate(members.items()):
        (folder / "tree" / f"class-{n % 2}").mkdir(parents=True, exist_ok=True)
        (folder / "tree" / f"class-{n % 2}" / f"{n}.jpg").write_bytes(data)
    rows = [{"image": {"bytes": data, "path": name}} for name, data in members.items()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "camera", "taken_at"])
        writer.writerows([path.relative_to(folder), "north", "2024"] for path in sorted(folder.glob("tree/*/*.jpg")))
    _make_clip(folder / "clip")
    yield folder


def _make_clip(folder: Path) -> None:
    """Save a minimal CLIP checkpoint in the hub's layout."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, patch_size=8, image_size=32,
        projection_dim=12,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def overrides(name: str, kind: str, photos: Path, out: Path) -> list[str]:
    """Return the `--set` overrides: local inputs, output and models."""
    places = {"webdataset": "some.tar", "folder": "tree", "parquet": "images.parquet", "table": "images.csv"}
    changes, _ = WHAT[name]
    models = [
        f"models.{n}.{change}".replace("{photos}", str(photos)) for n, given in enumerate(changes) for change in given
    ]
    here = [f"input.uris=[{photos / places[kind]}]", f"output.uri={out}", "dtype=float32", "reject_limit=0.5"]
    return [*here, "resources.batch_size=3", *models]


def test_each_job_has_a_case() -> None:
    assert {path.stem for path in JOBS} == set(WHAT)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_valid_and_says_what_it_is_for(path: Path) -> None:
    from jsonschema import Draft202012Validator

    text = path.read_text()
    assert text.startswith("# ")
    assert not list(Draft202012Validator(json_schema()).iter_errors(yaml.safe_load(text)))
    try:
        load_job(path)
    except Img2ParquetError as error:  # pragma: no cover: the message is what a failing test shows
        pytest.fail(str(error))


def test_the_schema_refuses_what_no_job_may_say() -> None:
    from jsonschema import Draft202012Validator

    document = yaml.safe_load((ROOT / "jobs" / "rehearse.yaml").read_text())
    document["models"][0]["outputs"][0]["kind"] = "embeding"
    assert list(Draft202012Validator(json_schema()).iter_errors(document))


@pytest.mark.slow
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_runs_on_the_demos_images(path: Path, photos: Path, tmp_path: Path) -> None:
    kind = yaml.safe_load(path.read_text())["input"]["kind"]
    job = load_job(path, overrides(path.stem, kind, photos, tmp_path / "out"))
    summary = run(job, "local")
    assert (summary.rows_in, summary.rejected) == (IMAGES, {})
    assert summary.rows_written == {model.name: IMAGES for model in job.models}
    for name, (column, type_) in WHAT[path.stem][1].items():
        table = open_results(str(tmp_path / "out"), name).to_table()
        assert str(table.schema.field(column).type).startswith(type_), table.schema.field(column).type
        assert table.num_rows == IMAGES and table.column(column).null_count == 0
