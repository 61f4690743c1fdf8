"""Expand braces and match globs as bash does: `{000..127}`, `{a,b{1..3}}`, `*`, `?`, `[a-z]`, `**`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from img2parquet.errors import InputError

MAX_NAMES = 1_000_000
NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.(-?\d+))?")
MAGIC = re.compile(r"[*?\[]")


def expand_braces(text: str) -> Iterator[str]:
    """Expand `x{1,2}.tar` to `x1.tar` and `x2.tar`; a brace that is neither a list nor a range stays as it is."""
    for opening in (match.start() for match in re.finditer("{", text)):
        choices = _choices(text, opening)
        if choices is None:
            continue
        words, closing = choices
        rests = list(expand_braces(text[closing + 1 :]))
        for word in words:
            yield from (text[:opening] + word + rest for rest in rests)
        return
    yield text


def count_limit(pattern: str, names: Iterator[str]) -> Iterator[str]:
    for number, name in enumerate(names):
        if number >= MAX_NAMES:
            raise InputError(f"{pattern}: names more than {MAX_NAMES} files", hint="use a glob, or a `table` of URIs")
        yield name


def has_magic(text: str) -> bool:
    return MAGIC.search(text) is not None


def fixed_prefix(pattern: str) -> str:
    """Return the text before the first wildcard."""
    return MAGIC.split(pattern, maxsplit=1)[0]


def scan_prefix(pattern: str) -> tuple[str, str]:
    """Split a pattern before the first wildcard, and give the text before it without escapes (`[[]` is a bracket)."""
    for match in re.finditer(r"\[\[\]|[*?\[]", pattern):
        if match[0] != "[[]":
            return pattern[: match.start()].replace("[[]", "["), pattern[match.start() :]
    return pattern.replace("[[]", "["), ""


def literal_readings(uri: str) -> Iterator[Iterator[str]]:
    """Yield the patterns of a URI whose brackets, braces or both are letters of names."""
    if "[" in uri:
        yield (name.replace("[", "[[]") for name in expand_braces(uri))
    if "{" in uri:
        yield iter([uri])
    if "[" in uri and "{" in uri:
        yield iter([uri.replace("[", "[[]")])


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Compile a glob for whole URIs; `*` stays within a folder and does not match names that begin with a dot."""
    segments = pattern.split("/")
    regex = "".join(_segment(segment, index == len(segments) - 1) for index, segment in enumerate(segments))
    return re.compile(regex, re.DOTALL)


def _choices(text: str, opening: int) -> tuple[Iterator[str], int] | None:
    """Return the words of the brace that opens here, and where it closes."""
    depth, commas = 0, [opening]
    for at in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "," and depth == 1:
            commas.append(at)
        if depth == 0:
            return _words(text, [*commas, at])
    return None


def _words(text: str, borders: list[int]) -> tuple[Iterator[str], int] | None:
    closing = borders[-1]
    if len(borders) == 2:
        words = _range(text[borders[0] + 1 : closing])
        return None if words is None else (words, closing)
    alternatives = [text[left + 1 : right] for left, right in pairwise(borders)]
    return (word for alternative in alternatives for word in expand_braces(alternative)), closing


def _range(inside: str) -> Iterator[str] | None:
    if match := NUMBERS.fullmatch(inside):
        first, last, step = match.groups()
        width = max(len(first), len(last)) if any(re.match(r"-?0\d", end) for end in (first, last)) else 0
        return (f"{number:0{width}d}" for number in _steps(int(first), int(last), step))
    if match := LETTERS.fullmatch(inside):
        first, last, step = match.groups()
        return (chr(number) for number in _steps(ord(first), ord(last), step))
    return None


def _steps(first: int, last: int, step: str | None) -> range:
    width = abs(int(step or 1)) or 1
    return range(first, last + 1, width) if first <= last else range(first, last - 1, -width)


def _segment(segment: str, is_last: bool) -> str:
    if segment == "**":
        return r"(?:[^./][^/]*/)*[^./][^/]*" if is_last else r"(?:[^./][^/]*/)*"
    hidden = r"(?!\.)" if MAGIC.match(segment) else ""
    tokens = re.findall(r"\*+|\?|\[[!^]?\]?[^\]/]*\]|.", segment, re.DOTALL)
    return hidden + "".join(map(_token, tokens)) + ("" if is_last else "/")


def _token(token: str) -> str:
    if token.startswith("*"):
        return "[^/]*"
    if token == "?":
        return "[^/]"
    if token.startswith("[") and len(token) > 2:
        negated, members = token[1] in "!^", token[2 if token[1] in "!^" else 1 : -1]
        escaped = re.sub(r"([\\\[\]^&~|])", r"\\\1", members)
        return f"[^/{escaped}]" if negated else f"[{escaped}]"
    return re.escape(token)
