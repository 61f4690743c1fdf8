"""Run the commands that analyse an output: index, search, duplicates, probe, relabel, evaluate."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2parquet.cli.output import json_line, say
from img2parquet.errors import InputError

if TYPE_CHECKING:
    from img2parquet.results.evaluation.mistakes import MistakesSummary
    from img2parquet.results.probe.linear_probe import ProbeSummary
    from img2parquet.results.probe.relabel import RelabelSummary

Command = Callable[[argparse.Namespace], int]
Add = Callable[[Any, str, object, str], argparse.ArgumentParser]
DONE = 0
MOST_CLASSES, MOST_MISTAKES = 20, 5  # printed


def add_commands(commands: Any, add: Add) -> None:
    """Add these six commands to the command line."""
    _add_index(commands, add)
    _add_search(commands, add)
    _add_duplicates(commands, add)
    _add_probe(commands, add)
    _add_relabel(commands, add)
    _add_evaluate(commands, add)


def _add_index(commands: Any, add: Add) -> None:
    parser = _analysis_parser(
        commands, add, "index", _index, "build a vector index of the committed embeddings, or add new parts"
    )
    parser.add_argument("--to", help="the folder of the index; default: OUT/_index-<model>")
    parser.add_argument("--json", action="store_true", help="print what was built as JSON")
    _example(parser, "img2parquet index out/demo/results")


def _add_search(commands: Any, add: Add) -> None:
    parser = _analysis_parser(commands, add, "search", _search, "find the images that are most like an image or words")
    query = parser.add_mutually_exclusive_group()
    query.add_argument("--image", help="path or URI of the query image, embedded with the run's own model and settings")
    query.add_argument("--key", help="the key of a row of the output, as the query")
    parser.add_argument("--shard", help="the shard of --key, if several shards have that key")
    parser.add_argument(
        "--text", action="append", default=[], help="what the image shows, for CLIP and SigLIP; may be repeated"
    )
    parser.add_argument(
        "--not", action="append", default=[], dest="without", metavar="TEXT", help="what it does not show"
    )
    parser.add_argument("--where", metavar="FILTER", help="only rows that pass, as 'width > 512 and label == \"cat\"'")
    parser.add_argument("-k", type=int, default=12, help="number of results (default: 12)")
    parser.add_argument("--index", help="the folder of an index outside the output")
    parser.add_argument("--exact", action="store_true", help="compare with every vector even if there is an index")
    parser.add_argument("--checkpoint", help="where the run's checkpoint is now, if it was moved")
    parser.add_argument("--html", help="write a page with thumbnails to this file")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    _example(parser, "img2parquet search out/demo/results --image cat.jpg -k 12 --html cats.html --open")


def _add_duplicates(commands: Any, add: Add) -> None:
    parser = _analysis_parser(
        commands, add, "duplicates", _duplicates, "find groups of near-duplicates and write them to a Parquet file"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.95, help="least cosine similarity of a pair (default: 0.95)"
    )
    parser.add_argument("--to", required=True, help="the Parquet file to write; never overwritten")
    parser.add_argument("--index", action="store_true", help="compare each row only with its neighbours in the index")
    parser.add_argument("--exact", action="store_true", help="compare all pairs of rows, however many there are")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    _example(parser, "img2parquet duplicates out/demo/results --threshold 0.95 --to dups.parquet")


def _add_probe(commands: Any, add: Add) -> None:
    parser = _analysis_parser(
        commands, add, "probe", _probe, "label all rows from a few labelled ones; the same command resumes"
    )
    parser.add_argument("--labels", required=True, help="a CSV: key,label[,shard]")
    parser.add_argument("--name", help="the new partition; default: <model>+probe")
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds and of the held-out rows (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _example(parser, "img2parquet probe out/demo/results --labels labels.csv")


def _add_relabel(commands: Any, add: Add) -> None:
    parser = _analysis_parser(
        commands, add, "relabel", _relabel, "label all rows by prompts, without reading an image (CLIP, SigLIP)"
    )
    parser.add_argument(
        "--prompts", required=True, help="a file: one class a line, or JSON or YAML of {class: [prompts]}"
    )
    parser.add_argument(
        "--templates", action="append", metavar="TEMPLATE", help="`plain` (default), `imagenet` (80 sentences), or a "
        "sentence with {} where the class goes; may be repeated",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, default=5, help="most classes of a row (default: 5)")
    parser.add_argument("--threshold", type=float, default=0.0, help="leave out classes below this score")
    parser.add_argument("--name", help="the new partition; default: <model>+prompts-<hash>")
    parser.add_argument("--checkpoint", help="where the run's checkpoint is now, if it was moved")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    _example(parser, "img2parquet relabel out/clip --prompts classes.txt --templates imagenet")


def _add_evaluate(commands: Any, add: Add) -> None:
    parser = _analysis_parser(commands, add, "evaluate", _evaluate, "measure accuracy against a ground-truth column")
    parser.add_argument("--truth", required=True, help="the ground-truth column: one that the job kept (`input.keep`)")
    parser.add_argument(
        "--mistakes", metavar="FILE", help="also write the rows whose ground truth is probably wrong to this CSV"
    )
    parser.add_argument("--json", action="store_true", help="print everything, with the confusion matrix, as JSON")
    _example(parser, "img2parquet evaluate out/demo/results --truth label")


def _analysis_parser(commands: Any, add: Add, name: str, function: Command, text: str) -> argparse.ArgumentParser:
    parser = add(commands, name, function, text)
    parser.add_argument("uri", metavar="OUT", help="the job's output.uri")
    parser.add_argument("--model", help="the model's partition; required if several have a suitable column")
    parser.add_argument("--column", help="the column to use; required if the model has several suitable ones")
    return parser


def _example(parser: argparse.ArgumentParser, text: str) -> None:
    parser.epilog = f"example: {text}"


def _index(arguments: argparse.Namespace) -> int:
    from img2parquet.results.search.index import build_index

    built = build_index(arguments.uri, arguments.model, arguments.column, to=arguments.to)
    if arguments.json:
        return _print_json(vars(built))
    say(f"index      {built.uri}, generation {built.generation}")
    say(f"rows       {built.rows:,} of {built.parts} parts ({built.parts_added} added now)")
    say(f"size       {built.size_bytes:,} bytes in {built.segments} segments")
    recall = "not measured: fewer than two rows" if built.recall is None else f"{built.recall:.4f}"
    say(f"recall@10  {recall} against brute force, among {built.recall_rows:,} rows")
    return DONE


def _search(arguments: argparse.Namespace) -> int:
    from img2parquet.results.search.search import search

    result = search(
        arguments.uri,
        arguments.image,
        key=arguments.key,
        text=arguments.text,
        without=arguments.without,
        where=arguments.where,
        shard=arguments.shard,
        model=arguments.model,
        column=arguments.column,
        k=arguments.k,
        index=arguments.index,
        exact=arguments.exact,
        checkpoint=arguments.checkpoint,
    )
    for hit in result.hits:
        if arguments.json:
            _print_json(vars_of(hit))
        else:
            say(f"{hit.score:.4f}  {_one_line(hit.key)}  {_one_line(hit.shard)}")
    fresh = f", {len(result.not_indexed)} parts are not indexed yet" if result.not_indexed else ""
    say(f"{len(result.hits)} nearest of {result.compared:,} rows ({result.how}{fresh})", file=sys.stderr)
    if arguments.html or arguments.open:
        _write_page(arguments, result)
    return DONE


def _write_page(arguments: argparse.Namespace, result: Any) -> None:
    """Write a page of thumbnails under a temporary name, then rename it over the result of an earlier search."""
    from img2parquet.results.search.html_page import page_of

    path = Path(arguments.html or "img2parquet-search.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--html {path}: use a name that ends in .html")
    text = page_of(arguments.uri, result, arguments.image, key=arguments.key)
    try:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"--html {path} cannot be written: {error.strerror}") from None
    say(f"page       {path}", file=sys.stderr)
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())


def _duplicates(arguments: argparse.Namespace) -> int:
    from img2parquet.results.search.duplicates import find_duplicates

    found = find_duplicates(
        arguments.uri,
        arguments.to,
        arguments.threshold,
        model=arguments.model,
        column=arguments.column,
        index=arguments.index,
        exact=arguments.exact,
    )
    if arguments.json:
        return _print_json({**vars(found), "redundant": found.redundant})
    say(f"groups     {found.groups:,} in {found.rows:,} rows, the largest has {found.largest:,} rows")
    say(f"redundant  {found.redundant:,} rows, not counting one representative per group")
    say(f"written    {found.uri}")
    return DONE


def _probe(arguments: argparse.Namespace) -> int:
    from img2parquet.results.probe.linear_probe import fit_probe

    made = fit_probe(
        arguments.uri, arguments.labels, arguments.model, arguments.column, name=arguments.name, seed=arguments.seed
    )
    if arguments.json:
        return _print_json(vars(made))
    report = made.report
    how = "held out" if report["judged_by"] == "held_out" else f"{report['folds']}-fold cross-validation"
    say(f"labelled   {report['rows']} rows of {len(report['per_class'])} classes")
    say(f"classifier {report['chosen']}, temperature {report['temperature']:.3g}")
    say(f"accuracy   {report['accuracy']:.4f} on {report['judged_rows']} rows ({how})")
    if "f1" in report:
        say(f"baseline   {report['majority']:.4f} by each class's more frequent answer; pairs of row and class count")
        say(f"F1         {report['f1']:.4f} over these pairs, from a score of 0.5 on")
    else:
        say(f"baseline   {report['majority']:.4f} by always predicting the most frequent class")
    before = report["calibration_error_before"]
    say(f"calibrated expected calibration error {report['calibration_error']:.4f}, before {before:.4f}")
    _print_partition(made, "probe")
    return DONE


def _relabel(arguments: argparse.Namespace) -> int:
    from img2parquet.models.prompts import PLAIN, TEMPLATES
    from img2parquet.results.probe.relabel import relabel

    given = arguments.templates or [PLAIN]
    made = relabel(
        arguments.uri,
        arguments.prompts,
        arguments.model,
        arguments.column,
        templates=given[0] if len(given) == 1 else [text for one in given for text in TEMPLATES.get(one, (one,))],
        top_k=arguments.top_k,
        threshold=arguments.threshold,
        name=arguments.name,
        checkpoint=arguments.checkpoint,
    )
    if arguments.json:
        return _print_json(vars(made))
    shown = ", ".join(made.classes[:5]) + (", ..." if len(made.classes) > 5 else "")
    say(f"classes    {len(made.classes)}: {shown}")
    _print_partition(made, "relabel")
    return DONE


def _print_partition(made: ProbeSummary | RelabelSummary, command: str) -> None:
    say(f"written    {made.rows:,} rows to model={made.model}, {made.parts_now} of {made.parts} parts now")
    for name in made.left_out:
        say(f"left out   the kept column `{name}`: `{command}` writes a column of that name")
    if made.retry_files:
        say(f"retries    these include rows recovered by retries, in {made.retry_files} files")
    if made.retry_files_left:
        say(f"pending    rows of a retry in {made.retry_files_left} files; run the same command once it has ended")
    if made.parts_left:
        say(f"pending    {made.parts_left} parts are not committed; run the same command once they are")


def _evaluate(arguments: argparse.Namespace) -> int:
    from img2parquet.results.evaluation.evaluate import evaluate

    found = evaluate(arguments.uri, arguments.truth, arguments.model, arguments.column)
    mistakes = _mistakes(arguments) if arguments.mistakes else None
    if arguments.json:
        return _print_json({**found.to_json(), **({"mistakes": vars(mistakes)} if mistakes else {})})
    say(f"model      {found.model}, column {found.column}, ground truth {found.truth}")
    say(f"rows       {found.rows:,} with ground truth, {found.rows_without_truth:,} without")
    for name, score in found.headline.items():
        say(f"{name.replace('_', ' '):<17} {score:.4f}")
    if found.resized:
        say(f"{found.resized:,} masks were resized to their ground truth")
    if found.threshold is not None:
        best = f"the highest F1 is {found.best_f1:.4f}, from {found.best_threshold:g} on"
        say(f"{'threshold':<17} {found.threshold:g}; {best}")
    if found.truncated:
        say(f"{found.truncated:,} rows have as many labels as were written: others may be missing; evaluate `logits`")
    _classes(found)
    if mistakes:
        say(f"suspects   {mistakes.suspects:,} rows whose ground truth is probably wrong: {mistakes.uri}")
    return DONE


def _mistakes(arguments: argparse.Namespace) -> MistakesSummary:
    from img2parquet.results.evaluation.mistakes import find_mistakes

    return find_mistakes(arguments.uri, arguments.truth, arguments.mistakes, arguments.model, arguments.column)


def _classes(found: Any) -> None:
    """Print the largest classes and the most frequent mistakes."""
    if not found.classes:
        return
    what = "iou" if found.task == "mask" else "f1"
    say(f"{'class':<24} {'rows':>10} {'precision':>9} {'recall':>9} {what:>9}")
    largest = sorted(found.classes, key=lambda score: (-score.rows, score.id))
    for score in largest[:MOST_CLASSES]:
        numbers = " ".join(f"{_number(value):>9}" for value in (score.precision, score.recall, getattr(score, what)))
        say(f"{_cell(score.name):<24} {score.rows:>10,} {numbers}")
    if len(largest) > MOST_CLASSES:
        say(f"and {len(largest) - MOST_CLASSES} more classes; --json prints all of them")
    names = {score.id: _one_line(score.name) for score in found.classes}
    wrong = sorted(((n, t, p) for (t, p), n in found.confusion.items() if t != p), key=lambda x: (-x[0], x[1:]))
    for count, truth, said in wrong[:MOST_MISTAKES]:
        say(f"mistaken   {names[truth]} for {names.get(said, 'no class')}: {count:,}")


def _cell(name: str) -> str:
    """Shorten a name to 24 characters in its middle, since names may differ in a class id at their end."""
    line = _one_line(name)
    return line if len(line) <= 24 else f"{line[:15]}…{line[-8:]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def vars_of(hit: Any) -> dict[str, Any]:
    return {name: getattr(hit, name) for name in ("key", "shard", "score")}


def _print_json(values: object) -> int:
    print(json_line(values))
    return DONE


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")
