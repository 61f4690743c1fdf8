"""A job file to a `JobSpec`, with errors that say where; and the run identity of each of its models."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from pipeline import decode, preprocess, shrink
from pipeline.errors import InputError, JobError, nearest
from pipeline.gpus import Device
from pipeline.models import Card
from pipeline.outputs import OUTPUTS, Output
from pipeline.read import SOURCES, Source
from pipeline.read.settings import StorageOptions
from pipeline.schema import RESERVED_COLUMNS
from pipeline.storage import holds_secret, name_of, redact, resolve
from pipeline.storage.remote import check_writable

RESULT_VERSION = 1  # raised by hand when the same job would give other numbers


def _classes(table: Mapping[str, tuple[str, str]]) -> dict[str, type[BaseModel]]:
    return {kind: getattr(import_module(module), name) for kind, (module, name) in table.items()}


SOURCE_CLASSES, OUTPUT_CLASSES = _classes(SOURCES), _classes(OUTPUTS)

if TYPE_CHECKING:
    AnySource = Source
    AnyOutput = Output
else:
    AnySource = Annotated[Union[tuple(SOURCE_CLASSES.values())], Field(discriminator="kind")]  # noqa: UP007
    AnyOutput = Annotated[Union[tuple(OUTPUT_CLASSES.values())], Field(discriminator="kind")]  # noqa: UP007


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def _library_and_place(model: str) -> tuple[str, str]:
    """`transformers:org/name` -> its prefix, which other models do not have, and the rest."""
    library = next((prefix for prefix in ("transformers:", "timm:") if model.startswith(prefix)), "")
    return library, model.removeprefix(library)


def _named(model: str) -> tuple[str, str]:
    """The same, without what only opens a URI."""
    library, place = _library_and_place(model)
    return library, name_of(place)


class ModelJob(Settings):
    """One model and what is wanted of it."""

    model: str = Field(
        min_length=1,
        description="`org/name` or `org/name@revision` on the hub, a folder, or the URI of a folder; with "
        "`transformers:` before it, or as `timm:<name>`, what that library computes",
    )
    name: str = Field(
        default="", description="The partition `model=<name>`; default: the last segment of `model`, without a revision"
    )
    outputs: tuple[AnyOutput, ...] = Field(min_length=1, description="What to write for each image")
    image_size: int | tuple[int, int] | None = Field(
        default=None, description="Side, or [height, width], of the model's input; default: the checkpoint's own"
    )
    weights: str | None = Field(
        default=None,
        pattern=r"^random\(\d+\)$",
        description="`random(seed)`: a published architecture with seeded weights, for rehearsals and benchmarks",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name") and isinstance(values.get("model"), str):
            last = _named(values["model"])[1].rstrip("/").split("/")[-1]
            return {**values, "name": last.split("@")[0].split(":")[-1]}
        return values

    @field_validator("model")
    @classmethod
    def _make_absolute(cls, model: str) -> str:
        """A worker may run in another folder than the command that was given a relative path."""
        library, place = _library_and_place(model)
        return library + resolve(place) if Path(place).is_dir() else model

    @field_serializer("model")
    def _without_secrets(self, model: str) -> str:
        return "".join(_named(model))

    @model_validator(mode="after")
    def _check(self) -> ModelJob:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", self.name):
            raise ValueError(
                f"`name: {self.name}` becomes the folder model=<name>: use letters, digits, `.`, `_`, `+`, `-`"
            )
        owners: dict[str, str] = {}
        for output in self.outputs:
            for column in output.column_names():
                if column in owners:
                    both = f"outputs `{owners[column]}` and `{output.kind}`"
                    raise ValueError(f"{both} both write the column `{column}`; give one a `name:`")
                owners[column] = output.kind
        return self


def _plain_uri(uri: str) -> str:
    """It is printed, and recorded: unlike an input's, an output's URI holds nothing but a name."""
    if holds_secret(uri):
        raise ValueError(f"{redact(uri)} holds a login or a signature; credentials come from the environment")
    resolved = resolve(uri)
    try:
        check_writable(resolved)
    except InputError as error:
        raise ValueError(f"{error.message}; write to {', '.join(error.known)}") from None
    return resolved


class OutputJob(Settings):
    """Where results go, and how they are cut."""

    uri: Annotated[str, AfterValidator(_plain_uri)] = Field(
        min_length=1, description="Folder or prefix of the results: a path, or a URI such as s3://bucket/prefix"
    )
    rows_per_part: int = Field(default=16_384, ge=1, description="At most so many images in one part file")
    storage_options: StorageOptions = Field(
        default_factory=dict, description="Options of the output's filesystem (endpoint_url, profile, ...); no secrets"
    )


class DecodeJob(Settings):
    """The policy for images that are not upright 8-bit RGB."""

    exif: Literal["apply", "ignore"] = Field(default="apply", description="What to do with an EXIF orientation")
    alpha: Literal["white", "drop"] = Field(default="white", description="Composite transparency on white, or drop it")
    max_pixels: int = Field(default=89_478_485, ge=1, description="Reject images whose header says more")
    salvage: bool = Field(default=False, description="Accept damaged JPEGs, with a warning in the row")

    def policy(self) -> decode.DecodePolicy:
        return decode.DecodePolicy(**self.model_dump())


# a bound on the whole field would be held against "auto" too, which is a TypeError
Count = Annotated[int, Field(ge=1)]


class Resources(Settings):
    """What one worker gets. `auto` is resolved once, recorded in _run.json and reused when the job resumes."""

    workers: Count | Literal["auto"] = Field(default="auto", description="Worker threads (local) or actors (ray)")
    threads_per_worker: int = Field(default=1, ge=1, description="Threads of one worker's matrix products")
    batch_size: Count | Literal["auto"] = Field(default="auto", description="Images per forward pass")
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="GPUs of one Ray actor"
    )
    image_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="An image that takes longer than this to decode, twice, is rejected as `timed_out`; a batch may "
        "take as long for each of its images, and a minute at least, to embed",
    )
    stall_s: float = Field(
        default=600.0,
        gt=0,
        description="When no batch came for so long, say where it hangs; ray then runs what is left with new workers",
    )
    grace_s: float = Field(
        default=25.0, gt=0, description="What a first SIGTERM or Ctrl-C leaves to parts that are under way"
    )
    device: Device = Field(
        default="auto",
        description="auto: GPUs where there are any, and an error where they could not be used; cpu: leave them idle",
    )


class JobSpec(Settings):
    """Everything that a job file may say."""

    input: AnySource = Field(description="Where the images are")
    models: tuple[ModelJob, ...] = Field(min_length=1, description="Backbones, each with its outputs")
    output: OutputJob = Field(description="Where the results go")
    preprocess: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: pixels equal the checkpoint's own processor to the last uint8; fast: large JPEGs are "
        "decoded at 1/2 or 1/4 while twice the resize's size is left",
    )
    decode: DecodeJob = Field(default=DecodeJob(), description="Policy for EXIF, alpha, size and damage")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Of the backbone; auto: bfloat16 where the processor has matrix units for it"
    )
    resources: Resources = Field(default=Resources(), description="Workers, threads, batch size")
    reject_limit: float = Field(
        default=0.05, ge=0, le=1, description="Fail the job, after committing, when more of the images were rejected"
    )

    @model_validator(mode="after")
    def _check(self) -> JobSpec:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are named `{name}`: give one another `name:`")
        passthrough = set(self.input.passthrough().names)
        for column in sorted(passthrough & RESERVED_COLUMNS.keys()):
            raise ValueError(f"input.keep names `{column}`, which every result row already has")
        for model in self.models:
            for output in model.outputs:
                for column in sorted(set(output.columns_read()) - passthrough):
                    place = f"model `{model.name}`: output `{output.kind}` reads the column `{column}`"
                    known = f"; kept: {', '.join(sorted(passthrough))}" if passthrough else ""
                    raise ValueError(f"{place}, which `input.keep` does not name{known}")
            written = {column for output in model.outputs for column in output.column_names()}
            for column in sorted(written & (passthrough | RESERVED_COLUMNS.keys())):
                owner = "input.keep" if column in passthrough else "every result row"
                place = f"model `{model.name}`: column `{column}` of an output"
                raise ValueError(f"{place} is also one of {owner}; give the output a `name:`")
        return self


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """A YAML job file, with `a.b=c` overrides applied, as a JobSpec. Raises JobError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in Path(path).parent.glob("*.yaml")] if Path(path).parent.is_dir() else []
        raise JobError(f"{path}: no such job file", hint=nearest(Path(path).name, siblings)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read: {error}") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise JobError(f"{path}: a job file is a mapping with input, models and output")
    return parse_job(document, overrides, where=str(path))


def parse_job(document: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "job") -> JobSpec:
    """A job as plain dicts and lists to a JobSpec. Raises JobError."""
    document = json.loads(json.dumps(document, default=str))
    for text in overrides:
        override(document, text)
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise _explain(error, where) from None


def override(document: Any, text: str) -> None:
    """Apply `a.b=c` or `models.0.name=c` (also `models[0].name=c`); the value is read as YAML."""
    path, equals, value = text.partition("=")
    steps = [step for step in re.split(r"[.\[\]]+", path) if step]
    if not equals or not steps:
        raise JobError(f"--set {text}: expected a.b=value", hint="for example --set output.uri=out/try")
    try:
        for step in steps[:-1]:
            document = document[int(step)] if isinstance(document, list) else document.setdefault(step, {})
        document[int(steps[-1]) if isinstance(document, list) else steps[-1]] = yaml.safe_load(value)
    except (ValueError, IndexError, TypeError, AttributeError):
        raise JobError(f"--set {text}: there is no `{path}` in this job") from None
    except yaml.YAMLError:
        raise JobError(f"--set {text}: `{value}` is not a YAML value") from None


_CLASSES: dict[str, type[BaseModel]] = {
    "models": ModelJob,
    "output": OutputJob,
    "resources": Resources,
    "decode": DecodeJob,
    **SOURCE_CLASSES,
    **OUTPUT_CLASSES,
}


def _explain(error: ValidationError, where: str) -> JobError:
    """pydantic's first complaint as one of ours: what, where, and the nearest known word."""
    first = error.errors()[0]
    steps = [step for step in first["loc"] if step not in SOURCE_CLASSES and step not in OUTPUT_CLASSES]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = sorted(_class_at(first["loc"][:-1]).model_fields)
        name = str(first["loc"][-1])
        return JobError(f"{where}: unknown field `{place}`", known=known, hint=nearest(name, known))
    if first["type"] == "union_tag_invalid":
        known = sorted(SOURCE_CLASSES if place == "input" else OUTPUT_CLASSES)
        tag = str(first.get("ctx", {}).get("tag", ""))
        return JobError(f"{where}: {place}: unknown kind `{tag}`", known=known, hint=nearest(tag, known))
    if first["type"] == "union_tag_not_found":
        known = sorted(SOURCE_CLASSES if place == "input" else OUTPUT_CLASSES)
        return JobError(f"{where}: {place}: `kind` is missing", known=known)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return JobError(f"{where}: `{place}` is missing")
    return JobError(f"{where}: {place}: {message}" if place else f"{where}: {message}")


def _class_at(loc: Iterable[Any]) -> type[BaseModel]:
    found: type[BaseModel] = JobSpec
    for step in loc:
        found = _CLASSES.get(step, found) if isinstance(step, str) else found
    return found


def json_schema() -> dict[str, Any]:
    """The job file's JSON Schema, for editors."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "img2parquet job"}


# ---- run identity ------------------------------------------------------------------------------------------------

PLACES_AND_SPEED = {"uris", "storage_options", "shards_per_part", "split_above_bytes"}  # of an input: not its result


def identity(job: JobSpec, model: ModelJob, card: Card, dtype: str, beside: Iterable[Card] = ()) -> dict[str, Any]:
    """Everything that changes this model's rows, as resolved: what two runs must share to be the same run.

    beside: the cards of the job's models; with `preprocess: fast` they decide together how images are decoded."""
    fast = {"shrink": shrink.describe([one.preprocess for one in (card, *beside)])} if job.preprocess == "fast" else {}
    return {
        "result_version": RESULT_VERSION,
        "family": card.family,
        "weights": card.weights_hash,
        "config": json.loads(json.dumps(card.config, sort_keys=True, default=str)),
        "preprocess": {"mode": job.preprocess, **preprocess.describe(card.preprocess), **fast},
        "decode": decode.describe(job.decode.policy()),
        "input": _plain(job.input, exclude=PLACES_AND_SPEED),
        "outputs": [_plain(output) for output in model.outputs],
        "dtype": dtype,
        **({"reduces_labels": True} if card.reduces_labels else {}),
        **({"implementation": card.implementation} if card.implementation != "native" else {}),
    }


def identity_hash(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two identities differ, one line each: `dtype: bfloat16, was float32`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        return [line for k in keys for line in differences(ours.get(k), theirs.get(k), f"{place}.{k}".lstrip("."))]
    return [] if ours == theirs else [f"{place}: {json.dumps(ours)}, was {json.dumps(theirs)}"]


def _plain(settings: object, exclude: Iterable[str] = ()) -> dict[str, Any]:
    assert isinstance(settings, BaseModel)
    return settings.model_dump(mode="json", exclude=set(exclude))
