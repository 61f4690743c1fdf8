"""Fill a module with a checkpoint's weights, all or nothing, and hash them.

* Weights are read from `model.safetensors`, its sharded form with an index, `pytorch_model.bin` (only through torch's
  reader that runs no code), or `flax_model.msgpack` (through our own reader). An index may only name files in its own
  folder.
* The family's base prefix is removed from names on disk that have it (the reference writes files in which only some
  do); the family's table then maps them to ours, in every dialect.
* float16 and bfloat16 tensors become float32 before anything is computed from them.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from img2parquet.errors import CheckpointError
from img2parquet.models.family import Family, TensorNames
from img2parquet.models.flax_checkpoint import SUFFIX as FLAX
from img2parquet.models.flax_checkpoint import read_flax
from img2parquet.models.wrong_files import (
    ADAPTER,
    MERGE,
    cause_of,
    is_adapter,
    nested_tables,
    no_weights,
    other_weights,
    refuse_stand_in,
    training_checkpoint,
)

WEIGHT_FILES = (  # the first that exists is read; the last two are OpenCLIP's
    "model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # fmt: skip
INDEX = ".index.json"
NAMED_IN_ERRORS = 4
CHUNK_BYTES = 8 << 20
MAX_JSON_BYTES = 64 << 20  # config.json with a million labels has 50 MB
MAX_LAYERS = 1000  # of a stage; published models have 24 to 48 in all
LAYER_COUNTS = ("depths", "num_hidden_layers", "auxiliary_num_convs")
PARTS = ("vision_config", "text_config", "vision_config_dict", "text_config_dict")  # sections of a config.json
REFETCH = "it may be truncated: download it again"
TORCH_FILES = (".pth", ".pt", ".ckpt", ".bin")
FLOATS = {"F64", "F32", "F16", "BF16"}


class Weights(Protocol):
    """The source of a module's numbers: files, or a seed."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about them."""

    def names(self, family: Family) -> frozenset[str]:
        """List the names on disk, base prefix stripped."""

    def hash(self) -> str:
        """Return 64 hex digits that change when any weight does."""

    def check(self, module: nn.Module, family: TensorNames) -> object:
        """Raise CheckpointError unless the weights fit a meta module one to one. Reads no tensor."""

    def fill(self, module: nn.Module, family: TensorNames) -> None:
        """Give every parameter and buffer of a meta module its float32 value, or raise CheckpointError."""


@dataclass(frozen=True)
class FileWeights:
    """The weight files of one checkpoint, in the order of their names."""

    folder: Path
    files: tuple[Path, ...]
    index: Path | None = None  # names the files, where the weights are in several
    notes = ()

    def names(self, family: Family) -> frozenset[str]:
        on_disk = self.listed_names()
        return frozenset(stripped(name, family.PREFIX, on_disk) for name in on_disk)

    def hash(self) -> str:
        """Return the SHA-256 of each file's name, size and bytes."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            for chunk in _chunks(path):
                digest.update(chunk)
        return digest.hexdigest()

    def check(self, module: nn.Module, family: TensorNames) -> dict[str, str]:
        wanted = expected(module)
        listed: dict[str, Listed] = {}
        for entry in (entry for path in self.files for entry in _listed(path)):
            if entry.name in listed:
                hint = "the folder mixes two checkpoints: download it again"
                raise CheckpointError(f"{self.folder}: `{entry.name}` is in two files", hint=hint)
            listed[entry.name] = entry
        found: dict[str, Listed] = {}
        surplus: list[Listed] = []
        for entry in listed.values():
            short = stripped(entry.name, family.PREFIX, listed.keys())
            ours = own_name(short, family.KEYS)
            if ours in found:
                raise CheckpointError(
                    f"{self.folder}: `{entry.name}` and `{found[ours].name}` both mean `{ours}`",
                    hint="the files mix two layouts; save the model again with a single version of its library",
                )
            if ours in wanted:
                found[ours] = entry
            elif not unused(short, family.UNUSED):
                surplus.append(entry)
        self._refuse_misfits(wanted, found, surplus, family, listed.keys())
        return {ours: entry.name for ours, entry in found.items()}

    def fill(self, module: nn.Module, family: TensorNames) -> None:
        ours_of = {name: ours for ours, name in self.check(module, family).items()}
        pairs = (pair for path in self.files for pair in _tensors_in(path, ours_of.keys()))
        assign(module, {ours_of[name]: tensor.detach().to(torch.float32).contiguous() for name, tensor in pairs})

    def listed_names(self) -> frozenset[str]:
        """List the names on disk, as they are. Raises CheckpointError for a file that no reader can read."""
        return frozenset(entry.name for path in self.files for entry in _listed(path))

    def tensors(self) -> dict[str, Tensor]:
        """Read every tensor, by its name on disk."""
        return {name: tensor for path in self.files for name, tensor in _tensors_in(path, _names_in(path))}

    def _refuse_misfits(
        self,
        wanted: Mapping[str, tuple[int, ...]],
        found: Mapping[str, Listed],
        surplus: Sequence[Listed],
        family: TensorNames,
        names: Collection[str],
    ) -> None:
        missing = [f"{disk_name(name, family.KEYS)} {shape}" for name, shape in wanted.items() if name not in found]
        misshapen = [
            f"{entry.name} is {entry.shape}, config.json makes it {wanted[ours]}"
            for ours, entry in found.items()
            if entry.shape != wanted[ours]
        ]
        unexpected = [f"{entry.name} {entry.shape}" for entry in surplus]
        faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
        lines = [f"  {len(names)} {fault}: {_few(names)}" for fault, names in faults.items() if names]
        if lines:
            message = f"{self.folder}: the weights do not fit `{family.MODEL_TYPE}` as config.json describes it"
            fits = {disk_name(name, family.KEYS) for name in wanted}
            cause = cause_of(names, lambda name: stripped(name, family.PREFIX) in fits)
            hint = cause or _what_to_try(missing, unexpected, misshapen)
            raise CheckpointError("\n".join([message, *lines]), hint=hint)
        self._refuse_quantised(found.values())

    def _refuse_quantised(self, entries: Iterable[Listed]) -> None:
        for entry in entries:
            if entry.dtype not in FLOATS:
                message = f"{self.folder}: `{entry.name}` is {entry.dtype}, not one of {', '.join(sorted(FLOATS))}"
                raise CheckpointError(message, hint="quantised checkpoints are not supported; use the float one")


@dataclass(frozen=True)
class Listed:
    """A tensor on disk that has not been read."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class RandomWeights:
    """`weights: random(seed)`: no files, for trial runs and benchmarks. Outputs are neither constant nor NaN."""

    seed: int
    model_type: str
    architecture: str
    config: Mapping[str, Any]

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"no weights are read from a file: they are random({self.seed})",)

    def names(self, family: Family) -> frozenset[str]:
        return frozenset(family.HEADS.get(self.architecture, ()))

    def hash(self) -> str:
        text = json.dumps([self.seed, self.model_type, self.architecture, self.config], sort_keys=True, default=list)
        return hashlib.sha256(f"random {text}".encode()).hexdigest()

    def check(self, module: nn.Module, family: TensorNames) -> None:
        pass

    def fill(self, module: nn.Module, family: TensorNames) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        assign(module, {name: _random(name, shape, generator) for name, shape in expected(module).items()})


def weight_files(folder: Path) -> FileWeights:
    """Find the weights in a checkpoint's folder. Raises CheckpointError if there are none, if files only stand in for
    them (git-lfs pointers, web pages), or if they point elsewhere."""
    files: tuple[Path, ...]
    index: Path | None
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            files, index = (folder / name,), None
        elif (folder / (name + INDEX)).is_file():
            files, index = _indexed(folder, name + INDEX), folder / (name + INDEX)
        else:
            continue
        for path in files:
            refuse_stand_in(path)
        return FileWeights(folder, files, index)
    seen = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in other_weights(seen)[:1]:
        refuse_stand_in(folder / name)
        if name.endswith(TORCH_FILES) and not is_adapter(seen):
            _unpickled(folder / name)
    raise no_weights(folder, seen, WEIGHT_FILES)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for a missing or broken file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: {path.stat().st_size:,} bytes; settings may have at most {MAX_JSON_BYTES:,}"
            )
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "a checkpoint's folder must hold config.json and weights"
        if is_adapter(beside):
            hint = f"the folder holds {ADAPTER}: {MERGE}"
        raise CheckpointError(f"{path}: no such file", hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        if path.is_file():
            refuse_stand_in(path)
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def check_depth(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for an absurd number of layers: a module is built before its weights are looked at."""
    for part in (config.get(name) for name in PARTS):
        if isinstance(part, Mapping):
            check_depth(part)
    for name in LAYER_COUNTS:
        value = config.get(name, ())
        for count in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(count, (int, float)) and count > MAX_LAYERS:
                raise CheckpointError(f"config.json: {name}: {count} layers, more than {MAX_LAYERS}")


def num_labels(config: Mapping[str, Any]) -> int:
    """Return the number of classes that config.json names; the reference's default is 2."""
    if isinstance(config.get("id2label"), Mapping):
        return len(config["id2label"])
    count = config.get("num_labels", 2)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise CheckpointError(f"config.json: num_labels: `{count}` is not a count")
    return count


def has_identity_head(config: Mapping[str, Any]) -> bool:
    """Whether it is a classifier of no classes (`num_labels: 0`), whose logits are what its head would read."""
    names = config.get("architectures")
    named = str(names[0]) if isinstance(names, list | tuple) and names else ""
    return "ForImageClassification" in named and num_labels(config) == 0


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names by id; LABEL_0 and so on if config.json has none."""
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return tuple(f"LABEL_{index}" for index in range(num_labels(config)))
    try:
        by_id = {int(index): str(name) for index, name in names.items()}
    except ValueError:
        raise CheckpointError(f"config.json: id2label: ids must be numbers, not {_few(map(str, names))}") from None
    if sorted(by_id) != list(range(len(by_id))):
        raise CheckpointError(f"config.json: id2label: {len(by_id)} ids that are not 0 to {len(by_id) - 1}")
    return tuple(by_id[index] for index in range(len(by_id)))


def known_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names by id, or () when `id2label` does not name them, which fails outputs that need names."""
    try:
        return label_names(config)
    except CheckpointError:
        return ()


def stripped(name: str, prefix: str | tuple[str, ...], on_disk: Set[str] = frozenset()) -> str:
    """Remove the base prefix from a name, unless the file has another tensor of the short name: BEiT's masked image
    modelling has its own `layernorm` beside the encoder's `beit.layernorm`."""
    known = (prefix,) if isinstance(prefix, str) else prefix
    short = next((name.removeprefix(one) for one in known if name.startswith(one)), name)
    return name if short in on_disk else short


def own_name(name: str, keys: Mapping[str, str]) -> str:
    """Map a name on disk to ours; names that the table does not know stay as they are."""
    for pattern, template in _compiled(tuple(keys.items())):
        match = pattern.match(name)
        if match:
            return template.format(*match.groups()[:-1]) + match.groups()[-1]
    return name


def disk_name(ours: str, keys: Mapping[str, str]) -> str:
    """Map our name to the one on disk, for messages; of several dialects, the one that is first in the table."""
    for key, template in keys.items():
        match = _pattern(template).match(ours)
        if match and template.count("{}") == key.count("{}"):
            return key.format(*match.groups()[:-1]) + match.groups()[-1]
    return ours


def unused(name: str, patterns: Iterable[str]) -> bool:
    return name.endswith("num_batches_tracked") or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def expected(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that a module needs, without the counters that only training reads."""
    return {name: tuple(t.shape) for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked")}


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace a meta module's tensors, and make it ready for inference."""
    counters = {name: torch.tensor(0) for name in module.state_dict() if name.endswith("num_batches_tracked")}
    module.load_state_dict({**tensors, **counters}, strict=True, assign=True)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"buffers made on the meta device: {left}"
    module.eval().requires_grad_(False)


@functools.lru_cache(maxsize=32)
def _compiled(keys: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    longest_first = sorted(keys, key=lambda pair: (-pair[0].count("."), pair[0].count("{}"), pair[0]))
    return tuple((_pattern(key), ours) for key, ours in longest_first)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + r"((?:\..+)?)$")


def _indexed(folder: Path, index_name: str) -> tuple[Path, ...]:
    weight_map = read_json(folder / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index_name}: no `weight_map`")
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{folder / index_name}: `{name}` is outside the checkpoint's folder")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / index_name}: lists `{name}`, which does not exist", hint="download it again"
            )
    return tuple(folder / name for name in files)


def _listed(path: Path) -> Iterator[Listed]:
    if path.suffix == FLAX:
        yield from (Listed(array.name, array.shape, _dtype_name(array.dtype)) for array in read_flax(path))
        return
    if path.suffix != ".safetensors":
        for name, tensor in _unpickled(path).items():
            yield Listed(name, tuple(tensor.shape), _dtype_name(tensor.dtype))
        return
    with _whole(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            entry = file.get_slice(name)
            yield Listed(name, tuple(entry.get_shape()), entry.get_dtype())


def _tensors_in(path: Path, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == FLAX:
        yield from ((array.name, array.tensor()) for array in read_flax(path) if array.name in names)
        return
    if path.suffix != ".safetensors":
        yield from ((name, tensor) for name, tensor in _unpickled(path).items() if name in names)
        return
    with _whole(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name in names:
                yield name, file.get_tensor(name)


def _names_in(path: Path) -> set[str]:
    return {entry.name for entry in _listed(path)}


def _dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name in safetensors."""
    return {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}.get(
        dtype, str(dtype)
    )


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn whatever the library raises about a safetensors file into a CheckpointError."""
    try:
        yield
    except Exception as error:
        refuse_stand_in(path)
        raise CheckpointError(f"{path}: not a whole safetensors file: {_first_line(error)}", hint=REFETCH) from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        content = _torch_load(path)
    except pickle.UnpicklingError:
        refuse_stand_in(path)
        hint = "no code was run; ask the author for safetensors, or save the tensors alone"
        if _mentions(path, b"state_dict"):
            hint = f"it seems to be a training checkpoint, with the weights under `state_dict`; {hint}"
        raise CheckpointError(f"{path}: holds pickled code, or is not a torch file", hint=hint) from None
    except Exception as error:
        refuse_stand_in(path)
        raise CheckpointError(f"{path}: not a whole torch file: {_first_line(error)}", hint=REFETCH) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        tables = nested_tables(content)
        if tables:
            raise training_checkpoint(path, tables)
        raise CheckpointError(f"{path}: not a table of tensors", hint="save `model.state_dict()` alone")
    return content


def _mentions(path: Path, word: bytes) -> bool:
    """Whether a torch file's pickle has a word in its first MiB; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                return word in file.read(1 << 20)
    except (zipfile.BadZipFile, StopIteration, OSError, ValueError, RuntimeError, NotImplementedError, zlib.error):
        with path.open("rb") as file:
            return word in file.read(1 << 20)


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # files of torch before 1.6 are no archives and cannot be mapped
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    leaf = name.rpartition(".")[-1]
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return 1 + 0.05 * torch.rand(shape, generator=generator)
    if len(shape) < 2 or leaf != "weight":
        return 0.02 * torch.randn(shape, generator=generator)
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator).mul_(fan_in**-0.5)


def _what_to_try(missing: Sequence[str], surplus: Sequence[str], misshapen: Sequence[str]) -> str:
    if misshapen and not missing and not surplus:
        return "config.json and the weights belong to different models; take both from the same place"
    if missing and not surplus and not misshapen:
        return "the file is incomplete, or config.json has more layers or heads than were trained"
    return "check that config.json belongs to these weights, and `model_type` to this architecture"


def _few(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:NAMED_IN_ERRORS])
    return shown + (f" and {len(names) - NAMED_IN_ERRORS} more" if len(names) > NAMED_IN_ERRORS else "") or "nothing"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
