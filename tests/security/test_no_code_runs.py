"""Nothing that a checkpoint, a shard, a table or an output holds is ever run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import img2parquet
from img2parquet.engine.driver import run
from img2parquet.errors import CheckpointError
from img2parquet.job import parse_job
from img2parquet.results.reader import open_results, read_rejects, status
from img2parquet.results.verify import verify
from tests.support.small_job import add_member, job_dict, jpeg, small_job

ROOT = Path(img2parquet.__file__).parent
# what one of our processes sends to another, over Ray or a pipe
OUR_OWN_PROCESSES = {"ray_data.py", "ray_workers.py", "child_process.py"}

MARK = "IMG2PARQUET_TEST_WAS_RUN"


class Payload:
    """Whoever unpickles it runs a command of ours."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_run, ())


def _run() -> str:
    os.environ[MARK] = "1"
    return "was run"


@pytest.fixture(autouse=True)
def nothing_was_run() -> Iterator[None]:
    os.environ.pop(MARK, None)
    yield
    assert MARK not in os.environ, "a payload was run"


def test_the_payload_works() -> None:
    pickle.loads(pickle.dumps(Payload()))
    assert os.environ.pop(MARK)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def says(call: ast.Call, name: str, value: object) -> bool:
    return any(word.arg == name and ast.literal_eval(word.value) == value for word in call.keywords if word.arg == name)


UNPICKLERS = (
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "dill.loads", "joblib.load", "shelve.open", "marshal.load", "marshal.loads", "pd.read_pickle", "eval", "exec",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "torch.jit.load",
    "torch.package.PackageImporter", "os.system", "os.popen", "__import__",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_calls_nothing_that_runs_what_it_reads(path: Path) -> None:
    for name, call in calls(path):
        where = f"{path.relative_to(ROOT)}:{call.lineno}: {name}"
        if name in UNPICKLERS:
            assert path.name in OUR_OWN_PROCESSES and name in ("pickle.load", "pickle.loads"), where
        if name == "torch.load":
            assert says(call, "weights_only", True), where
        if name.rpartition(".")[2] == "load" and name.startswith(("np.", "numpy.")):
            assert says(call, "allow_pickle", False), where
        assert not name.endswith(("add_safe_globals", "safe_globals", "trust_remote_code")), where
        assert not any(word.arg == "trust_remote_code" for word in call.keywords), where


def test_these_names_are_the_modules_that_they_look_like() -> None:
    """An alias would hide a call from the test above."""
    hiding = {"pickle", "marshal", "shelve", "cloudpickle", "joblib", "dill", "yaml", "torch"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                aliases = [alias.asname for alias in node.names if alias.name in hiding]
                assert not any(aliases), f"{path}: {aliases}"
            if isinstance(node, ast.ImportFrom) and node.module in hiding - {"torch"}:
                raise AssertionError(f"{path}: from {node.module} import ...")
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "load" not in [alias.name for alias in node.names], path


def poisoned(folder: Path, checkpoint: Path, content: object, name: str = "pytorch_model.bin") -> Path:
    folder.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (folder / file).write_bytes((checkpoint / file).read_bytes())
    torch.save(content, folder / name)
    return folder


@pytest.mark.parametrize(
    "content", [Payload(), {"weight": Payload()}, {"weight": torch.zeros(1), "extra": [Payload()]}]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_code_is_refused(content: object, legacy: bool, checkpoint: Path, tmp_path: Path) -> None:
    folder = poisoned(tmp_path / "poisoned", checkpoint, {})
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="pickled code"):
        img2parquet.load_model(str(folder))


def test_a_bare_pickle_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = poisoned(tmp_path / "poisoned", checkpoint, {})
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol))
        with pytest.raises(CheckpointError):
            img2parquet.load_model(str(folder))


def test_a_pickle_in_safetensors_clothes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = poisoned(tmp_path / "poisoned", checkpoint, {"weight": Payload()}, "model.safetensors")
    with pytest.raises(CheckpointError, match="safetensors"):
        img2parquet.load_model(str(folder))


def test_code_in_a_sharded_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = poisoned(tmp_path / "poisoned", checkpoint, {"a": Payload()}, "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="pickled code"):
        img2parquet.load_model(str(folder))


def test_a_checkpoints_own_modules_are_not_imported(checkpoint: Path, tmp_path: Path) -> None:
    """What `trust_remote_code` would run: a model class, a config class, a processor that lie beside the weights."""
    folder = tmp_path / "poisoned"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("modeling_levit.py", "configuration_levit.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(f"import os; os.environ[{MARK!r}] = '1'")
    config = json.loads((folder / "config.json").read_text())
    modules = {"AutoConfig": "configuration_levit.LevitConfig", "AutoModel": "modeling_levit.LevitModel"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": modules}))
    img2parquet.load_model(str(folder))


def test_pickles_among_a_shards_members_are_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """webdataset's own decoders open .pyd, .pkl, .pth and .npy; here they are members that nobody asked for."""
    code = pickle.dumps(Payload())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for extension in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "json", "cls", "txt"):
            add_member(tar, f"0.{extension}", code)
        add_member(tar, "0.jpg", jpeg(1))
        add_member(tar, "1.jpg", code)
        add_member(tar, "2.pkl", code)
    object_array = tmp_path / "o.npy"
    np.save(object_array, np.array([Payload()], dtype=object), allow_pickle=True)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        add_member(tar, "3.npy", object_array.read_bytes())
        add_member(tar, "3.png", object_array.read_bytes())
    document = job_dict(f"{tmp_path}/*.tar", checkpoint, str(tmp_path / "out"), reject_limit=1.0)
    document["input"]["keep"] = ["json", "cls", "txt", "label:int64"]
    run(parse_job(document), "local")
    table = open_results(str(tmp_path / "out")).to_table()
    assert table.column("key").to_pylist() == ["0"]
    assert set(read_rejects(str(tmp_path / "out")).column("reason").to_pylist()) == {"not_an_image"}


class Tagged(pa.ExtensionType):
    """An extension type whose metadata is a pickle, as pyarrow's own PyExtensionType had it."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "arrow.py_extension_type")

    def __arrow_ext_serialize__(self) -> bytes:
        return pickle.dumps(Payload())

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, data: bytes) -> Tagged:
        raise AssertionError("never registered")


def test_metadata_of_parquet_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    code = pickle.dumps(Payload())
    images = pa.ExtensionArray.from_storage(Tagged(), pa.array([jpeg(1), jpeg(2)], pa.binary()))
    table = pa.table({"id": ["a", "b"], "image": images, "note": [code, code]})
    pandas = json.dumps({"columns": [{"numpy_type": "object", "pandas_type": "pickle", "metadata": None}]})
    table = table.replace_schema_metadata({"pandas": pandas, "pickle": code, "huggingface": code})
    pq.write_table(table, tmp_path / "a.parquet")
    job = job_dict("unused", checkpoint, str(tmp_path / "out"))
    job["input"] = {"kind": "parquet", "uris": [f"{tmp_path}/a.parquet"], "key": "id", "keep": ["note"]}
    assert run(parse_job(job), "local").rows_written == {"tiny": 2}  # an unknown type is what it is stored as


def test_an_output_is_read_as_data(checkpoint: Path, tmp_path: Path) -> None:
    """Plan, footers, records and rejects are JSON and Parquet: a pickle in their place is refused as broken."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "0.jpg", jpeg(1))
    job = small_job(f"{tmp_path}/a.tar", checkpoint, str(tmp_path / "out"))
    run(job, "local")
    code = pickle.dumps(Payload())
    for name in ("_SUCCESS", "_manifest.parquet", "_rejects.parquet", "_run.json", "_plan.parquet"):
        kept = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(code)
        for look in (
            lambda: verify(job.output.uri),
            lambda: status(job.output.uri),
            lambda: run(job, "local"),
        ):
            try:
                look()
            except Exception as error:
                assert not isinstance(error, AssertionError), name
        (tmp_path / "out" / name).write_bytes(kept)
