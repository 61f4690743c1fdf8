"""Check that the allocator's settings take effect. Each runs in its own process, since they cannot be undone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")

ARENAS = """
import ctypes, sys, threading
def work():
    block = ctypes.create_string_buffer(5000)
    met.wait()
met = threading.Barrier(4)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL("libc.so.6")
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""
FAULTS = """
import ctypes, resource
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.memset.argtypes, libc.free.argtypes = (
    ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), (ctypes.c_void_p,)
)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(100 << 20)
    libc.memset(block, 1, 100 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def output_of(*code: str) -> str:
    base = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", "\n".join(code)]
    return subprocess.run(command, env=base, capture_output=True, text=True, check=True).stdout


def test_threads_of_the_command_share_one_arena() -> None:
    begin = 'from img2parquet.cli import main\ntry: main(["--version"])\nexcept SystemExit: pass'
    assert output_of(ARENAS).count("<heap nr=") > 1, "by default each thread has its own"
    assert output_of(begin, ARENAS).count("<heap nr=") == 1


def test_freed_memory_is_kept() -> None:
    keep = "from img2parquet.inference.allocator import keep_freed_memory; keep_freed_memory()"
    fresh, kept = int(output_of(FAULTS)), int(output_of(keep, FAULTS))
    assert kept < fresh / 4, (kept, fresh)  # fresh: 25,600, or 50 where the kernel gives pages of 2 MiB
