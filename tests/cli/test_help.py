"""Each command's `--help` ends in examples that can be copied: whole on their lines, and understood by the parser."""

from __future__ import annotations

import argparse
import shlex

import pytest

from img2parquet.cli.console import build_parser


def parsers() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """The lines of an epilog that are commands, as its help prints them."""
    printed = parser.format_help()
    assert parser.epilog and parser.epilog in printed, "its example is rewrapped"
    lines = [line.strip().removeprefix("example: ") for line in parser.epilog.splitlines()]
    return [line for line in lines if line.startswith("img2parquet ")]


def test_the_commands_that_are_promised() -> None:
    of_outputs = "status verify rejects retry report export index search duplicates probe relabel evaluate"
    assert not {*of_outputs.split(), "run", "plan", "models", "schema", "demo"} - set(parsers())


@pytest.mark.parametrize("name", sorted(parsers()))
def test_help_has_an_example_that_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # a narrow terminal
    found = examples(parsers()[name])
    assert found, f"`img2parquet {name} --help` has no example"
    for line in found:
        words = shlex.split(line)
        words = words[: words.index(">")] if ">" in words else words
        assert words[1] == name, line
        assert callable(build_parser().parse_args(words[1:]).command), line


def test_help_without_a_command_lists_them_all() -> None:
    said = build_parser().format_help()
    assert all(f"\n    {name}" in said for name in parsers())
