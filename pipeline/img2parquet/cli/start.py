"""Run the commands that start from images instead of a job file: embed, label, segment, init.

The first three write the job file that they stand for beside the results, then run it; `run` of that file goes on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2parquet.cli.output import say
from img2parquet.errors import UserError

if TYPE_CHECKING:
    from img2parquet.read.recognize import Recognized

Command = Callable[[argparse.Namespace], int]
Add = Callable[[Any, str, Any, str], argparse.ArgumentParser]
DONE = 0


@dataclass(frozen=True)
class Task:
    """outputs: what a job file says under `models[].outputs`, one by one; columns: those that they write."""

    model: str
    outputs: tuple[dict[str, Any], ...]
    columns: tuple[str, ...]
    help: str


TASKS = {
    "embed": Task(
        "facebook/dinov2-small",
        ({"kind": "embedding", "normalize": "l2"},),
        ("embedding",),
        "compute a vector of each image, for search, clustering or a probe",
    ),
    "label": Task(
        "facebook/levit-256",
        ({"kind": "labels", "top_k": 5},),
        ("labels",),
        "label each image with the model's most probable classes",
    ),
    "segment": Task(
        "microsoft/beit-base-finetuned-ade-640-640",
        ({"kind": "segmentation"},),
        ("segmentation",),
        "compute the class of each pixel",
    ),
}
KNOWS_WORDS = "openai/clip-vit-base-patch32"
INIT_EXAMPLE = """examples:
  img2parquet init photos/
  img2parquet init list.csv --task label --to s3://photos/labels --job labels.yaml"""


def add_commands(
    commands: Any, add: Add, run: Command, add_run_options: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add these commands to the command line. run: runs the job file `arguments.job`."""

    def quick(arguments: argparse.Namespace) -> int:
        arguments.job = _write_job(arguments)
        return run(arguments)

    for name, task in TASKS.items():
        parser = add(commands, name, quick, task.help)
        parser.epilog = f"example: img2parquet {name} photos/ --model {task.model} --to out/photos"
        parser.set_defaults(task=name, is_supervised=True, shard=None, extend=False)
        _add_sources(parser, task.model)
        parser.add_argument("--to", required=True, metavar="OUT", help="the folder or prefix for the results")
        if name == "label":
            parser.add_argument(
                "--prompts", metavar="FILE", help="label by words: a file with one class a line, or JSON or YAML of "
                f"{{class: [prompts]}} (default of --model: {KNOWS_WORDS}); the vectors are written too",
            )  # fmt: skip
        parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="set any field of the job")
        add_run_options(parser)
    init = add(commands, "init", _init, "write a commented job file for the images at hand")
    init.epilog = INIT_EXAMPLE
    _add_sources(init, "the task's")
    init.add_argument("--task", choices=TASKS, default="embed", help="what to compute (default: embed)")
    init.add_argument("--to", metavar="OUT", help="the job's output.uri; default: out/ and the source's name")
    init.add_argument(
        "--job", dest="file", default="job.yaml", metavar="FILE", help="the file to write (default: job.yaml)"
    )


def _add_sources(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "source", nargs="+", help="a folder of images, tars, Parquet files or lists of URIs; paths, URIs and globs"
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"a name on the hub, a folder, or a URI; see `models` (default: {default})"
    )


def _write_job(arguments: argparse.Namespace) -> str:
    """Write the job file beside the results, unless it is there; return its path.

    Raises JobError for a job that cannot work, before anything is written, and UserError when another file is there."""
    from img2parquet.job import override, parse_job

    task = TASKS[arguments.task]
    found = _recognized(arguments.source, task)
    document = _document(found, task, arguments.model, arguments.to, getattr(arguments, "prompts", None))
    for text in arguments.set:
        override(document, text)
    arguments.set = []
    job = parse_job(document, where=f"img2parquet {arguments.task}")
    if arguments.task == "embed":
        _choose_pool(job, document)
    path = _beside(arguments.to)
    name = json.dumps(str(path)) if " " in str(path) else str(path)
    title = f"{task.help[0].upper()}{task.help[1:]}. This runs the job, or what is left of it: img2parquet run {name}"
    _create(path, job_text(document, found, title))
    say(f"The job is {path}", file=sys.stderr)
    return str(path)


def _init(arguments: argparse.Namespace) -> int:
    task = TASKS[arguments.task]
    found = _recognized(arguments.source, task)
    document = _document(found, task, arguments.model, arguments.to or f"out/{found.name}")
    path = Path(arguments.file)
    title = f"{task.help[0].upper()}{task.help[1:]}. All fields: `img2parquet schema`, infra/docs/jobs.md"
    _create(path, job_text(document, found, title, choices=True))
    say(f"wrote      {path}\ncheck it   img2parquet plan {path}\nrun it     img2parquet run {path}")
    return DONE


def _recognized(sources: Sequence[str], task: Task) -> Recognized:
    from img2parquet.read.recognize import recognize

    found = recognize(sources, reserved=task.columns)
    say(f"Found {found.about}", file=sys.stderr)
    return found


def _document(found: Recognized, task: Task, model: str | None, to: str, prompts: str | None = None) -> dict[str, Any]:
    name = model or (KNOWS_WORDS if prompts else task.model)
    outputs: list[Any] = list(map(dict, task.outputs))
    models = [{"model": _resolved(name) if Path(name).is_dir() else name, "outputs": outputs}]
    if prompts:
        models[0]["prompts"] = _resolved(prompts)
        outputs.append({"kind": "embedding", "normalize": "l2"})
    return {"input": found.input, "models": models, "output": {"uri": _resolved(to)}}


def _resolved(uri: str) -> str:
    from img2parquet.storage import resolve

    return resolve(str(Path(uri).expanduser()) if uri.startswith("~") else uri)


def _choose_pool(job: Any, document: dict[str, Any]) -> None:
    """Take the class token, or the mean over patches, of a checkpoint that has no pooled vector of its own."""
    from img2parquet.inference.capabilities import read_model_card
    from img2parquet.outputs.embedding import FEATURES

    for model, wanted in zip(document["models"], job.models, strict=True):
        gives = read_model_card(job, wanted).gives
        for output in model["outputs"]:
            if output["kind"] == "embedding" and "pool" not in output and "pooled" not in gives:
                output.update(pool=next((pool for pool in ("cls", "mean") if FEATURES[pool] in gives), "model"))


def _beside(output: str) -> Path:
    """Return `out/photos.yaml` for `out/photos`; for results in a store, a file in the current folder."""
    from img2parquet.storage.backend import scheme_of

    at = _resolved(output).rstrip("/")
    return Path(f"{at.rpartition('/')[2] or 'job'}.yaml") if scheme_of(at) else Path(f"{at}.yaml")


def _create(path: Path, text: str) -> None:
    """Write a job file, unless it is there already. Raises UserError where another one, or none, can be there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        if not _is_same_job(path, text):
            hint = f"run that one (img2parquet run {path}), or name another place"
            raise UserError(f"{path} exists, and describes another job", hint=hint) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _is_same_job(path: Path, text: str) -> bool:
    """Compare without comments, which count the files of the day."""
    import yaml

    try:
        return bool(yaml.safe_load(path.read_text(encoding="utf-8")) == yaml.safe_load(text))
    except (OSError, ValueError, yaml.YAMLError):
        return False


def job_text(document: dict[str, Any], found: Recognized, title: str, choices: bool = False) -> str:
    """Return a job file as text. choices: add comments on what one may want to change."""
    lines = [f"# {title}", "input:", f"  # {found.about}"]
    lines += [f"  {name}: {_flow(value)}" for name, value in document["input"].items()]
    if choices:
        lines += _keep_hint(document["input"])
    lines.append("models:")
    for model in document["models"]:
        lines += [f"  - model: {_flow(model['model'])}" + "  # others: `img2parquet models`" * choices]
        lines += [f"    {name}: {_flow(value)}" for name, value in model.items() if name not in ("model", "outputs")]
        lines += ["    outputs:", *(f"      - {_flow(output)}" for output in model["outputs"])]
        if choices:
            lines += ["      # also: embedding, labels, logits, segmentation, tokens, feature_maps, attentions"]
    lines += ["output:", *(f"  {name}: {_flow(value)}" for name, value in document["output"].items())]
    for name, value in document.items():
        if name not in ("input", "models", "output"):
            lines.append(f"{name}: {_flow(value)}")
    if choices:
        lines += [
            "# preprocess: fast        # decodes photographs of 1,000 pixels and more at a smaller scale",
            "# dtype: float32          # auto: bfloat16 where the processor has matrix units for it",
            "# reject_limit: 0.05      # the share of rejected images that fails the job",
        ]
    return "\n".join(lines) + "\n"


def _keep_hint(given: dict[str, Any]) -> list[str]:
    if given["kind"] == "webdataset" and "keep" not in given:
        return ['  # keep: [caption, "id:int64"]  # fields of each image\'s .json sidecar, copied to the results']
    return []


def _flow(value: Any) -> str:
    """Format a value as one line of YAML; plain words need no quotes."""
    import yaml

    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
