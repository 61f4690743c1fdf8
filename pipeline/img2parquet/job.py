"""Define the job file: parse and validate it into a `JobSpec`, and report mistakes with their place in the file.

- Sources and outputs are the classes in `read.SOURCES` and `outputs.OUTPUTS`; their `kind` chooses among them.
- Descriptions of classes and fields end up in `img2parquet schema`, which editors show.
"""

from __future__ import annotations

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
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from img2parquet.errors import InputError, JobError, nearest
from img2parquet.images import decode
from img2parquet.models import Mode, ModelSpec
from img2parquet.models.prompts import PLAIN, ClassPrompts, class_prompts
from img2parquet.outputs import OUTPUTS, Output
from img2parquet.read import SOURCES, Source
from img2parquet.read.settings import LISTS, StorageOptions
from img2parquet.schema import RESERVED_COLUMNS
from img2parquet.storage import holds_secret, name_of, redact, resolve
from img2parquet.storage.fsspec_backend import check_writable

Device = Literal["auto", "cpu", "cuda"]


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
    """The base of the job file's classes: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def _split_library(model: str) -> tuple[str, str]:
    """Split `transformers:org/name` into its prefix, which is empty for most models, and the rest."""
    library = next((prefix for prefix in ("transformers:", "timm:") if model.startswith(prefix)), "")
    return library, model.removeprefix(library)


def _split_library_without_secrets(model: str) -> tuple[str, str]:
    library, location = _split_library(model)
    return library, name_of(location)


class ModelJob(Settings):
    """A model and the outputs to write."""

    model: str = Field(
        min_length=1,
        description="The checkpoint: `org/name` or `org/name@revision` on the Hugging Face hub, a folder, or the URI "
        "of a folder. Prefix it with `transformers:`, or write `timm:<name>`, to let that library compute the model",
    )
    name: str = Field(
        default="",
        description="Name of the results' partition `model=<name>`; default: the last segment of `model`, without a "
        "revision",
    )
    outputs: tuple[AnyOutput, ...] = Field(min_length=1, description="The outputs to write for each image")
    image_size: int | tuple[int, int] | None = Field(
        default=None,
        description="Side, or [height, width], of the model's input in pixels; default: the checkpoint's. Where images "
        "are neither cropped nor resized to one size, those that do not come out at this size are rejected",
    )
    weights: str | None = Field(
        default=None,
        pattern=r"^random\(\d+\)$",
        description="`random(seed)`: use a published architecture with seeded random weights, for rehearsals and "
        "benchmarks",
    )

    prompts: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] | None = Field(
        default=None,
        description="Classes described by words, which make a CLIP or SigLIP a classifier for `labels` and `logits`: "
        "names; or, by class, one or several prompts; or the path or URI of a file with either",
    )
    templates: str | tuple[str, ...] = Field(
        default=PLAIN,
        description="Sentences with `{}` that turn the names of `prompts` into prompts: `plain`, `imagenet` (80), or a "
        "list",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_prompts(cls, values: Any) -> Any:
        """Replace `prompts` by the prompts of each class, so that the run's record and identity hold them."""
        if not isinstance(values, dict) or values.get("prompts") is None:
            if isinstance(values, dict) and "templates" in values and values["templates"] != PLAIN:
                raise ValueError("`templates` needs `prompts`")
            return values
        try:
            found = class_prompts(values["prompts"], values.get("templates", PLAIN))
        except InputError as error:
            raise ValueError(str(error)) from None
        by_name = dict(zip(found.names, found.prompts, strict=True))
        return {**values, "prompts": by_name, "templates": PLAIN}

    @property
    def class_prompts(self) -> ClassPrompts | None:
        return None if self.prompts is None else class_prompts(self.prompts)

    @model_serializer(mode="wrap")
    def _without_prompts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not said, and templates that are filled in: records from before stay as they are."""
        values: dict[str, Any] = serialize(self)
        left_out = ("templates",) if self.prompts else ("prompts", "templates")
        return {name: value for name, value in values.items() if name not in left_out}

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name") and isinstance(values.get("model"), str):
            last = _split_library_without_secrets(values["model"])[1].rstrip("/").split("/")[-1]
            return {**values, "name": last.split("@")[0].split(":")[-1]}
        return values

    @field_validator("model")
    @classmethod
    def _make_absolute(cls, model: str) -> str:
        """Resolve a relative path, since workers may run in another folder than the command."""
        library, location = _split_library(model)
        return library + resolve(location) if Path(location).is_dir() else model

    @field_serializer("model")
    def _without_secrets(self, model: str) -> str:
        return "".join(_split_library_without_secrets(model))

    @model_validator(mode="after")
    def _check(self) -> ModelJob:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", self.name):
            raise ValueError(
                f"`name: {self.name}` becomes the folder model=<name>: use only letters, digits, `.`, `_`, `+` and `-`"
            )
        owners: dict[str, str] = {}
        for output in self.outputs:
            for column in output.column_names():
                if column in owners:
                    both = f"outputs `{owners[column]}` and `{output.kind}`"
                    raise ValueError(f"{both} both write the column `{column}`; give one of them another `name:`")
                owners[column] = output.kind
        return self


def _plain_uri(uri: str) -> str:
    """Check and resolve an output's URI. It is printed and recorded, so unlike an input's it must hold no secret."""
    if holds_secret(uri):
        raise ValueError(
            f"{redact(uri)} holds a login or a signature; remove it and set credentials in the environment"
        )
    resolved = resolve(uri)
    try:
        check_writable(resolved)
    except InputError as error:
        raise ValueError(f"{error.message}; write to {', '.join(error.known)}") from None
    return resolved


class OutputJob(Settings):
    """Where results are written, and how they are split into files."""

    uri: Annotated[str, AfterValidator(_plain_uri)] = Field(
        min_length=1, description="Folder or prefix for the results: a path, or a URI such as s3://bucket/prefix"
    )
    rows_per_part: int = Field(default=16_384, ge=1, description="Maximum number of images in one part file")
    storage_options: StorageOptions = Field(
        default_factory=dict, description="Options of the output's filesystem (endpoint_url, profile, ...); no secrets"
    )


class DecodeJob(Settings):
    """How images that are not upright 8-bit RGB are decoded."""

    exif: Literal["apply", "ignore"] = Field(
        default="apply", description="`apply`: turn the image upright by its EXIF orientation; `ignore`: leave it as is"
    )
    alpha: Literal["white", "drop"] = Field(
        default="white", description="`white`: composite transparency on white; `drop`: drop the alpha channel"
    )
    max_pixels: int = Field(
        default=89_478_485, ge=1, description="Reject images with more pixels than this, going by their header"
    )
    salvage: bool = Field(
        default=False, description="Accept damaged JPEGs, with the warning `salvaged` in the row, instead of a reject"
    )

    def policy(self) -> decode.DecodePolicy:
        """Return the same settings for the decoder."""
        return decode.DecodePolicy(**self.model_dump())


# the bound is on the number alone: pydantic would compare a bound on the whole field with "auto", a TypeError
Count = Annotated[int, Field(ge=1)]


def _one_gpu(count: float) -> float:
    if count > 1:
        raise ValueError("a worker computes on one GPU; `1` starts one worker for each GPU, of every node")
    return count


class Resources(Settings):
    """Workers and their resources. Each `auto` is resolved once, recorded in `_run.json` and reused on resume."""

    workers: Count | Literal["auto"] = Field(
        default="auto", description="Number of worker threads (local) or actors (ray)"
    )
    threads_per_worker: int = Field(default=1, ge=1, description="CPU threads that one worker uses for matrix products")
    batch_size: Count | Literal["auto"] = Field(default="auto", description="Images per forward pass")
    gpus_per_worker: Annotated[float, Field(ge=0), AfterValidator(_one_gpu)] | Literal["auto"] = Field(
        default="auto",
        description="GPUs of each Ray actor: 1, or a fraction where several share one; `auto`: 1 where the cluster has "
        "GPUs, or adds them on demand",
    )
    image_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Reject an image as `timed_out` when decoding it takes longer than this, in seconds, twice. "
        "Embedding a batch may take this long for each of its images, and at least a minute",
    )
    stall_s: float = Field(
        default=600.0,
        gt=0,
        description="Seconds without a finished batch after which the job reports where it hangs; on ray, new workers "
        "then run the unfinished parts",
    )
    grace_s: float = Field(
        default=25.0,
        gt=0,
        description="Seconds that parts in progress get to finish after a first SIGTERM or Ctrl-C",
    )
    device: Device = Field(
        default="auto",
        description="`auto`: use GPUs where there are any, and fail if they cannot be used; `cpu`: leave GPUs idle; "
        "`cuda`: require a GPU",
    )


class JobSpec(Settings):
    """A job: images to read, models to run on them, and a folder for the results."""

    input: AnySource = Field(description="The images to read")
    models: tuple[ModelJob, ...] = Field(min_length=1, description="The models to run, each with its outputs")
    output: OutputJob = Field(description="Where the results are written")
    preprocess: Mode = Field(
        default="exact",
        description="`exact`: the model's input equals that of the checkpoint's own processor (its torchvision "
        "backend) in every uint8 value; `pil`: it equals that of the processor's PIL backend, or of timm; `fast`: as "
        "`exact`, but decode large JPEGs at 1/2 or 1/4 of their size, as long as that is twice the size they are "
        "resized to",
    )
    decode: DecodeJob = Field(default=DecodeJob(), description="How to treat EXIF, alpha, large and damaged images")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type that models compute in; `auto`: bfloat16 where the processor has matrix units for it, "
        "float16 on a T4 or V100, else float32. float16 is slow on CPUs; an image whose values it cannot hold is "
        "rejected",
    )
    resources: Resources = Field(default=Resources(), description="Workers, threads, GPUs, batch size and timeouts")
    reject_limit: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Fail the job when more than this share of the images is rejected; the others are committed",
    )

    def spec_of(self, model: ModelJob) -> ModelSpec:
        """Return one of the job's models without its outputs, as `load_model` and `read_card` take it."""
        return ModelSpec(
            model.model,
            model.name,
            model.image_size,
            model.weights,
            prompts=model.class_prompts,
            preprocess=self.preprocess,
        )

    @model_validator(mode="after")
    def _check(self) -> JobSpec:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are named `{name}`: give one of them another `name:`")
        passthrough = set(self.input.passthrough().names)
        for column in sorted(passthrough & RESERVED_COLUMNS.keys()):
            raise ValueError(f"input.keep lists `{column}`, a column that every result row already has: remove it")
        for model in self.models:
            for output in model.outputs:
                for column in sorted(set(output.columns_read()) - passthrough):
                    where = f"model `{model.name}`: output `{output.kind}` reads the column `{column}`"
                    kept = f" (it lists {', '.join(sorted(passthrough))})" if passthrough else ""
                    raise ValueError(f"{where}, which `input.keep` does not list{kept}: add it there")
            written = {column for output in model.outputs for column in output.column_names()}
            for column in sorted(written & (passthrough | RESERVED_COLUMNS.keys())):
                owner = "input.keep" if column in passthrough else "every result row"
                where = f"model `{model.name}`: an output's column `{column}`"
                raise ValueError(f"{where} is also a column of {owner}; give the output another `name:`")
        return self


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a YAML job file, apply overrides such as `output.uri=out/try`, and validate it.

    Raises JobError when the file cannot be read or has a mistake."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in Path(path).parent.glob("*.yaml")] if Path(path).parent.is_dir() else []
        raise JobError(f"{path}: no such job file", hint=nearest(Path(path).name, siblings)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot read the job file: {error}") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise JobError(f"{path}: expected a mapping with the fields `input`, `models` and `output`")
    return parse_job(document, overrides, where=str(path))


def parse_job(document: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "job") -> JobSpec:
    """Validate a job given as dicts and lists, after applying overrides such as `output.uri=out/try`.

    where: the start of error messages, usually the file's path. Raises JobError for the first mistake."""
    document = json.loads(json.dumps(document, default=str))
    for text in overrides:
        override(document, text)
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise _explain(error, where) from None


def as_job(given: JobSpec | Mapping[str, Any] | str | Path) -> JobSpec:
    """Return a job that is given parsed, as dicts and lists, or as the path of its file. Raises JobError."""
    if isinstance(given, JobSpec):
        return given
    return parse_job(given) if isinstance(given, Mapping) else load_job(given)


def override(document: Any, text: str) -> None:
    """Apply `a.b=c`, `models.0.name=c` or `models[0].name=c` in place; the value is parsed as YAML.

    Raises JobError when the job has no such place, or the value is not YAML."""
    path, equals, value = text.partition("=")
    steps = [step for step in re.split(r"[.\[\]]+", path) if step]
    if not equals or not steps:
        raise JobError(f"--set {text}: expected a.b=value", hint="for example --set output.uri=out/try")
    try:
        for step in steps[:-1]:
            document = document[int(step)] if isinstance(document, list) else document.setdefault(step, {})
        document[int(steps[-1]) if isinstance(document, list) else steps[-1]] = yaml.safe_load(value)
    except (ValueError, IndexError, TypeError, AttributeError):
        raise JobError(f"--set {text}: this job has no `{path}`", hint="list items are numbered from 0") from None
    except yaml.YAMLError:
        raise JobError(f"--set {text}: `{value}` is not a valid YAML value") from None


_CLASSES: dict[str, type[BaseModel]] = {
    "models": ModelJob,
    "output": OutputJob,
    "resources": Resources,
    "decode": DecodeJob,
    **SOURCE_CLASSES,
    **OUTPUT_CLASSES,
}


def _explain(error: ValidationError, where: str) -> JobError:
    """Turn pydantic's first error into a JobError with its place in the file and the nearest known word."""
    first = error.errors()[0]
    steps = [step for step in first["loc"] if step not in SOURCE_CLASSES and step not in OUTPUT_CLASSES]
    field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = sorted(_class_at(first["loc"][:-1]).model_fields)
        name = str(first["loc"][-1])
        return JobError(f"{where}: unknown field `{field}`", known=known, hint=nearest(name, known))
    if first["type"] == "union_tag_invalid":
        known = sorted(SOURCE_CLASSES if field == "input" else OUTPUT_CLASSES)
        tag = str(first.get("ctx", {}).get("tag", ""))
        return JobError(f"{where}: {field}: unknown kind `{tag}`", known=known, hint=nearest(tag, known))
    if first["type"] == "union_tag_not_found":
        known = sorted(SOURCE_CLASSES if field == "input" else OUTPUT_CLASSES)
        return JobError(f"{where}: {field}: `kind` is missing", known=known)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return JobError(f"{where}: `{field}` is missing")
    return JobError(f"{where}: {field}: {message}" if field else f"{where}: {message}")


def _class_at(loc: Iterable[Any]) -> type[BaseModel]:
    found: type[BaseModel] = JobSpec
    for step in loc:
        found = _CLASSES.get(step, found) if isinstance(step, str) else found
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of job files, for completion and validation in editors."""
    schema = JobSpec.model_json_schema()
    for source in SOURCE_CLASSES.values():
        properties = schema["$defs"][source.__name__]["properties"]
        for name in LISTS & properties.keys():
            listed = {
                key: properties[name].pop(key) for key in ("type", "items", "minItems") if key in properties[name]
            }
            properties[name]["anyOf"] = [{"type": "string"}, listed]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "img2parquet job"}
