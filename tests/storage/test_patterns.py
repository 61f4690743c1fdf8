"""Braces and globs against bash's own answers, written down once, and against Python's glob."""

from __future__ import annotations

import glob
import os
import random
from pathlib import Path

import pytest

from img2parquet.errors import InputError
from img2parquet.storage import Store, patterns, resolve
from img2parquet.storage.patterns import expand_braces, glob_regex

BRACES = {  # as `echo` of bash 5.2 prints them
    "a": ["a"],
    "{a,b}": ["a", "b"],
    "x{1..3}y": ["x1y", "x2y", "x3y"],
    "{008..011}": ["008", "009", "010", "011"],
    "{1..010}": ["001", "002", "003", "004", "005", "006", "007", "008", "009", "010"],
    "{3..1}": ["3", "2", "1"],
    "{0..10..5}": ["0", "5", "10"],
    "{10..0..5}": ["10", "5", "0"],
    "{-1..1}": ["-1", "0", "1"],
    "{-01..1}": ["-01", "000", "001"],
    "{a..c}": ["a", "b", "c"],
    "{a,b{1..2},}": ["a", "b1", "b2", ""],
    "{a,b}{1,2}": ["a1", "a2", "b1", "b2"],
    "{{a,b},c}": ["a", "b", "c"],
    "x{}y": ["x{}y"],
    "{one}": ["{one}"],
    "{one{a,b}}": ["{onea}", "{oneb}"],
    "open{a": ["open{a"],
    "open{a{1,2}": ["open{a1", "open{a2"],
    "{1..x}": ["{1..x}"],
}
FILES = [
    "a.tar", "b.tar", "b.txt", "ab.tar", "x[1].tar", ".hidden.tar", "1.tar", "sub/a.tar", "sub/deep/c.tar",
    "sub/.h/d.tar", "other/sub/a.tar", "a-b.tar", "^.tar",
]  # fmt: skip
GLOBS = [
    "*.tar", "?.tar", "[ab].tar", "[!ab].tar", "[^a].tar", "[]a].tar", "[a-c]*.tar", "x[[]1].tar", "a[-]b.tar",
    "*b.t??", ".*.tar", "sub/.h/*", "sub/*", "*/a.tar", "**/a.tar", "**/*.tar", "s*/**/*.tar", "**/*/c.tar", "**",
]  # fmt: skip


@pytest.mark.parametrize("text", BRACES)
def test_braces_are_read_as_bash_reads_them(text: str) -> None:
    assert list(expand_braces(text)) == BRACES[text]


def test_a_range_without_end_is_refused_before_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_NAMES", 1000)
    with pytest.raises(InputError, match="more than 1000 files"):
        list(patterns.count_limit("{1..99999999999}", expand_braces("{1..99999999999}")))


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs_find_what_python_finds(pattern: str, tmp_path: Path) -> None:
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    found = [entry.uri for entry in Store().expand([f"{tmp_path}/{pattern}"])]
    python = pattern.replace("[^", "[!")
    expected = {p for p in glob.glob(f"{tmp_path}/{python}", recursive=True) if Path(p).is_file()}  # noqa: PTH207
    assert expected
    assert found == sorted(expected)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("v[2]/{0..1}.tar", ["v[2]/0.tar", "v[2]/1.tar"]),
        ("v[2]/*", ["v[2]/0.tar", "v[2]/1.tar"]),
        ("{a,b}/*.tar", ["{a,b}/[c].tar"]),
        ("{a,b}/[c].tar", ["{a,b}/[c].tar"]),
        ("w[2]/*", ["w2/2.tar"]),  # a pattern before it is a name
    ],
)
def test_brackets_and_braces_are_letters_where_they_match_nothing(
    tmp_path: Path, pattern: str, found: list[str]
) -> None:
    for name in ("v[2]/0.tar", "v[2]/1.tar", "{a,b}/[c].tar", "w2/2.tar", "w[2]/3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [entry.uri for entry in Store().expand([f"{tmp_path}/{pattern}"])] == [
        f"{tmp_path}/{name}" for name in found
    ]


def test_random_patterns_match_as_pythons_do() -> None:
    rng = random.Random(7)
    names = ["".join(rng.choices("ab/.", k=rng.randint(1, 6))) for _ in range(400)]
    names = [name for name in names if "//" not in name and not name.startswith("/") and not name.endswith("/")]
    for _ in range(150):
        pattern = "".join(rng.choices(["a", "b", ".", "*", "?", "/", "[ab]", "[!a]"], k=rng.randint(1, 5)))
        regex = glob_regex(pattern)
        python = _translated(pattern)
        for name in names:
            assert bool(regex.fullmatch(name)) == python(name), (pattern, name)


def _translated(pattern: str):  # type: ignore[no-untyped-def]
    import fnmatch

    segments = pattern.split("/")

    def one(part: str, segment: str) -> bool:
        hidden = part.startswith(".") and segment[:1] in ("*", "?", "[")
        return not hidden and fnmatch.fnmatchcase(part, segment)

    def matches(name: str) -> bool:
        parts = name.split("/")
        return len(parts) == len(segments) and all(map(one, parts, segments))

    return matches


def test_one_spelling_for_every_way_to_name_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("a/../b") == resolve("file://" + os.fspath(tmp_path) + "/b") == f"{tmp_path}/b"
    assert resolve("a/") == f"{tmp_path}/a/"
    assert resolve("~/a") == f"{tmp_path}/~/a"
    assert resolve("/") == "/"
    assert resolve("s3a://b/k?x=1") == "s3://b/k?x=1"


@pytest.mark.parametrize("uri", ["", "s3://key:secret@bucket/a", "simplecache::s3://b/k", "zip://a.jpg::s3://b/k.zip"])
def test_uris_that_cannot_be_used(uri: str) -> None:
    with pytest.raises(InputError) as refused:
        resolve(uri)
    assert "secret" not in str(refused.value)
