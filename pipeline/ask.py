"""The commands that ask a finished output something: index, search, duplicates, probe, evaluate."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.tell import json_line, say

Command = Callable[[argparse.Namespace], int]
Add = Callable[[Any, str, object, str], argparse.ArgumentParser]
DONE = 0
MOST_CLASSES, MOST_MISTAKES = 20, 5  # printed


def add_commands(commands: Any, add: Add) -> None:
    """Give the command line these five."""
    _add_index(commands, add)
    _add_search(commands, add)
    _add_duplicates(commands, add)
    _add_probe(commands, add)
    _add_evaluate(commands, add)


def _add_index(commands: Any, add: Add) -> None:
    parser = _asking(
        commands, add, "index", _index, "build a vector index of the committed embeddings, or add new parts"
    )
    parser.add_argument("--to", help="a folder for the index; default: OUT/_index-<model>")
    parser.add_argument("--json", action="store_true", help="print what was built as JSON")
    _example(parser, "img2parquet index out/demo/results")


def _add_search(commands: Any, add: Add) -> None:
    parser = _asking(commands, add, "search", _search, "the rows that look most like an image")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--image", help="path or URI of an image, embedded as the run embedded its own")
    query.add_argument("--key", help="the key of a row that is there")
    parser.add_argument("--shard", help="of --key, where several shards have it")
    parser.add_argument("-k", type=int, default=12, help="how many (12)")
    parser.add_argument("--index", help="the folder of an index that does not lie in the output")
    parser.add_argument("--exact", action="store_true", help="compare with every vector, also where there is an index")
    parser.add_argument("--checkpoint", help="where the run's model lies now, if it was moved")
    parser.add_argument("--html", help="write a sheet with thumbnails to this file")
    parser.add_argument("--open", action="store_true", help="show the sheet in a browser")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    _example(parser, "img2parquet search out/demo/results --image cat.jpg -k 12 --html cats.html --open")


def _add_duplicates(commands: Any, add: Add) -> None:
    parser = _asking(commands, add, "duplicates", _duplicates, "groups of near-duplicates, as a Parquet file")
    parser.add_argument("--threshold", type=float, default=0.95, help="least cosine of a pair (0.95)")
    parser.add_argument("--to", required=True, help="the Parquet file to write; never overwritten")
    parser.add_argument("--index", action="store_true", help="compare rows with what the index finds, not with all")
    parser.add_argument("--exact", action="store_true", help="compare all rows, however many there are")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    _example(parser, "img2parquet duplicates out/demo/results --threshold 0.95 --to dups.parquet")


def _add_probe(commands: Any, add: Add) -> None:
    parser = _asking(commands, add, "probe", _probe, "label all rows from a few labelled keys; resumes")
    parser.add_argument("--labels", required=True, help="a CSV: key,label[,shard]")
    parser.add_argument("--name", help="the new partition; default: <model>+probe")
    parser.add_argument("--seed", type=int, default=0, help="of the folds and of what is held out (0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _example(parser, "img2parquet probe out/demo/results --labels labels.csv")


def _add_evaluate(commands: Any, add: Add) -> None:
    parser = _asking(commands, add, "evaluate", _evaluate, "how right a model is, by a column that says what is true")
    parser.add_argument("--truth", required=True, help="a passthrough column of the job (`input.keep`)")
    parser.add_argument("--json", action="store_true", help="everything, with the confusion, as JSON")
    _example(parser, "img2parquet evaluate out/demo/results --truth label")


def _asking(commands: Any, add: Add, name: str, function: Command, text: str) -> argparse.ArgumentParser:
    parser = add(commands, name, function, text)
    parser.add_argument("uri", metavar="OUT", help="the job's output.uri")
    parser.add_argument("--model", help="which model's rows; needed where several have what is asked for")
    parser.add_argument("--column", help="which column; needed where a model has several of the kind")
    return parser


def _example(parser: argparse.ArgumentParser, text: str) -> None:
    parser.epilog = f"example: {text}"


def _index(arguments: argparse.Namespace) -> int:
    from pipeline.embeddings import open_vectors
    from pipeline.index import build

    built = build(open_vectors(arguments.uri, arguments.model, arguments.column), arguments.to)
    if arguments.json:
        return _print_json(vars(built))
    say(f"index      {built.uri}, generation {built.generation}")
    say(f"rows       {built.rows:,} of {built.parts} parts ({built.parts_added} added now)")
    say(f"size       {built.size_bytes:,} bytes in {built.segments} segments")
    recall = "not measured: fewer than two rows" if built.recall is None else f"{built.recall:.4f}"
    say(f"recall@10  {recall} against brute force, among {built.recall_rows:,} rows")
    return DONE


def _search(arguments: argparse.Namespace) -> int:
    from pipeline.embeddings import open_vectors
    from pipeline.search import search

    vectors = open_vectors(arguments.uri, arguments.model, arguments.column)
    own = -1
    if arguments.key is not None:
        own, query_D = vectors.vector(arguments.key, arguments.shard)
    else:
        from pipeline.embed_image import embed_image

        query_D = embed_image(vectors, arguments.image, arguments.checkpoint)
    answer = search(vectors, query_D, arguments.k, index=arguments.index, exact=arguments.exact, without=own)
    for hit in answer.hits:
        if arguments.json:
            _print_json(vars_of(hit))
        else:
            say(f"{hit.score:.4f}  {_one_line(hit.key)}  {_one_line(hit.shard)}")
    fresh = f", {len(answer.not_indexed)} parts are not in it yet" if answer.not_indexed else ""
    say(f"{len(answer.hits)} nearest of {answer.compared:,} rows ({answer.how}{fresh})", file=sys.stderr)
    if arguments.html or arguments.open:
        _sheet(arguments, vectors, answer)
    return DONE


def _sheet(arguments: argparse.Namespace, vectors: Any, answer: Any) -> None:
    """Written beside, then renamed: the file is the user's own, and may be there from an earlier search."""
    from pipeline.sheet import picture_of_file, pictures_of, sheet

    path = Path(arguments.html or "img2parquet-search.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--html {path}: give a name that ends in .html")
    what = f"Rows like {arguments.image or arguments.key}"
    about = f"model {vectors.model}, {len(answer.hits)} nearest of {answer.compared:,} rows by cosine ({answer.how})"
    query = picture_of_file(vectors.output.store, arguments.image) if arguments.image else None
    text = sheet(what, about, answer.hits, pictures_of(vectors, answer.hits), query)
    try:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise InputError(f"--html {path}: cannot be written: {error.strerror}") from None
    say(f"sheet      {path}", file=sys.stderr)
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())


def _duplicates(arguments: argparse.Namespace) -> int:
    from pipeline.duplicates import duplicates
    from pipeline.embeddings import open_vectors

    vectors = open_vectors(arguments.uri, arguments.model, arguments.column)
    found = duplicates(vectors, arguments.to, arguments.threshold, index=arguments.index, exact=arguments.exact)
    if arguments.json:
        return _print_json({**vars(found), "redundant": found.redundant})
    say(f"groups     {found.groups:,} of {found.rows:,} rows, the largest has {found.largest:,}")
    say(f"redundant  {found.redundant:,} rows beside each group's representative")
    say(f"written    {found.uri}")
    return DONE


def _probe(arguments: argparse.Namespace) -> int:
    from pipeline.linear_probe import probe

    made = probe(
        arguments.uri, arguments.labels, arguments.model, arguments.column, name=arguments.name, seed=arguments.seed
    )
    if arguments.json:
        return _print_json(vars(made))
    report = made.report
    how = "held out" if report["judged_by"] == "held_out" else f"{report['folds']}-fold cross-validation"
    say(f"labelled   {report['rows']} rows of {len(report['per_class'])} classes")
    say(f"chosen     {report['chosen']}, temperature {report['temperature']:.3g}")
    say(
        f"accuracy   {report['accuracy']:.4f} on {report['judged_rows']} rows ({how}); the commonest class alone "
        f"{report['majority']:.4f}"
    )
    before = report["calibration_error_before"]
    say(f"calibrated expected error {report['calibration_error']:.4f}, {before:.4f} before")
    say(f"written    {made.rows:,} rows to model={made.model}, {made.parts_now} of {made.parts} parts now")
    for name in made.left_out:
        say(f"left out   the kept column `{name}`, whose name the probe's own has")
    if made.retry_files:
        say(f"retries    the rows that they won are among these, in {made.retry_files} files")
    if made.retry_files_left:
        say(f"not yet    rows of a retry in {made.retry_files_left} files; run the same command when it has ended")
    if made.parts_left:
        say(f"not yet    {made.parts_left} parts are not committed; run the same command when they are")
    return DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from pipeline.evaluate import evaluate

    found = evaluate(arguments.uri, arguments.truth, arguments.model, arguments.column)
    if arguments.json:
        return _print_json(found.to_json())
    say(f"model      {found.model}, column {found.column}, by {found.truth}")
    say(f"rows       {found.rows:,} with a truth, {found.rows_without_truth:,} without")
    for name, score in found.headline.items():
        say(f"{name.replace('_', ' '):<17} {score:.4f}")
    if found.resized:
        say(f"{found.resized:,} masks were made as large as their truth")
    _classes(found)
    return DONE


def _classes(found: Any) -> None:
    """The largest classes, and the commonest mistakes."""
    if not found.classes:
        return
    what = "iou" if found.task == "mask" else "f1"
    say(f"{'class':<24} {'rows':>10} {'precision':>9} {'recall':>9} {what:>9}")
    largest = sorted(found.classes, key=lambda score: (-score.rows, score.id))
    for score in largest[:MOST_CLASSES]:
        numbers = " ".join(f"{_number(value):>9}" for value in (score.precision, score.recall, getattr(score, what)))
        say(f"{_one_line(score.name)[:24]:<24} {score.rows:>10,} {numbers}")
    if len(largest) > MOST_CLASSES:
        say(f"and {len(largest) - MOST_CLASSES} more classes; --json has them all")
    names = {score.id: _one_line(score.name) for score in found.classes}
    wrong = sorted(((n, t, p) for (t, p), n in found.confusion.items() if t != p), key=lambda x: (-x[0], x[1:]))
    for count, truth, said in wrong[:MOST_MISTAKES]:
        say(f"mistaken   {names[truth]} for {names.get(said, 'no class')}: {count:,}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def vars_of(hit: Any) -> dict[str, Any]:
    return {name: getattr(hit, name) for name in ("key", "shard", "score")}


def _print_json(values: object) -> int:
    print(json_line(values))
    return DONE


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")
