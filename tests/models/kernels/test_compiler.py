"""C++ kernels are compiled once, never trusted blindly, and never required.

About 15 s on an idle machine, most of it compiling in fresh folders.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from img2parquet.models.kernels import attention, compiler, group_norm

SOURCES = {source.name: source for source in (group_norm.SOURCE, attention.SOURCE)}
BROKEN = {"group_norm": ("mean * gamma[c]", "mean"), "attention": ("2.402264791363012e-1f", "2.5e-1f")}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> compiler.KernelSource:
    return SOURCES[request.param]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "img2parquet"


def test_a_compiler_is_used_where_there_is_one(source: compiler.KernelSource) -> None:
    assert compiler.library(source) is not None, "this machine has g++: other tests must be about the compiled kernels"


def test_it_is_compiled_once(fresh: Path, source: compiler.KernelSource) -> None:
    assert compiler.library(source) is not None
    (made,) = fresh.iterdir()
    written = made.stat().st_mtime_ns
    assert compiler.library(source) is not None
    assert made.stat().st_mtime_ns == written


def test_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch, source: compiler.KernelSource) -> None:
    monkeypatch.setenv("IMG2PARQUET_NATIVE", "0")
    assert compiler.library(source) is None
    assert not fresh.exists()


def test_without_a_compiler_it_says_so(
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    source: compiler.KernelSource,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert compiler.library(source) is None
    assert "install g++" in caplog.text and source.without in caplog.text


@pytest.mark.parametrize("script", ["exit 1", "cp /bin/true $5"])
def test_a_compiler_that_fails_is_as_none(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, script: str, source: compiler.KernelSource
) -> None:
    broken = fresh.parent / "broken"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert compiler.library(source) is None


def test_a_kernel_that_computes_something_else_is_not_used(fresh: Path, source: compiler.KernelSource) -> None:
    right, wrong = BROKEN[source.name]
    assert right in source.code
    assert compiler.library(replace(source, code=source.code.replace(right, wrong))) is None


def test_a_damaged_file_is_made_again(fresh: Path, source: compiler.KernelSource) -> None:
    fresh.mkdir()
    path = fresh / f"{source.name}-{source.key}.so"
    path.write_bytes(b"not a library")
    assert compiler.library(source) is not None
    assert list(fresh.iterdir()) == [path] and path.stat().st_size > 4096


def test_a_folder_that_others_can_write_to_is_not_trusted(fresh: Path, source: compiler.KernelSource) -> None:
    fresh.mkdir()
    fresh.chmod(0o777)
    assert compiler.library(source) is not None, "compiled in a private folder"
    assert not list(fresh.iterdir())


def test_several_may_compile_at_once(fresh: Path, source: compiler.KernelSource) -> None:
    fresh.mkdir()
    with ThreadPoolExecutor(2) as pool:  # only files could collide, for threads as for processes
        libraries = list(pool.map(lambda folder: compiler.load(source, folder), [fresh] * 2))
    assert all(map(source.agrees, libraries)) and len(list(fresh.iterdir())) == 1
