"""Compile C++ kernels with the machine's own compiler, and load them; None if that is not possible.

Used for the few loops that torch has no fast operator for: BiT's `group_norm.py`; LeViT's `conv_stem.py`,
`attention.py` and `feed_forward.py`.
* A kernel is compiled (one to four seconds) when the first model that needs it is folded, never on import, into the
  user's cache folder. The file is named by source, flags and CPU, written under a temporary name and moved into place,
  so any number of processes may compile at once.
* It runs on torch's own OpenMP threads: the library finds `GOMP_parallel` in the process.
* Without a compiler, with IMG2PARQUET_NATIVE=0, or if a self-test disagrees with torch, there is no library, and the
  caller uses plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-fopenmp")
COMPILE_LIMIT_S = 120
DTYPES = (torch.float32, torch.bfloat16)
LANES = 16  # floats in a vector of PRELUDE's

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # hashed by identity: its table of functions cannot be
class KernelSource:
    """A library in C++: its functions with the types of their arguments, and a self-test for this machine."""

    name: str
    code: str  # after PRELUDE
    functions: Mapping[str, Sequence[Any]]  # ctypes
    agrees: Callable[[ctypes.CDLL], bool]
    without: str  # the consequence of not having it, for the log
    wide: bool = False  # its sums fill AVX-512's 32 registers of 16 floats; with AVX2's 16 of 8, torch is twice as fast

    @property
    def text(self) -> str:
        return PRELUDE + self.code

    @property
    def key(self) -> str:
        """A hash of what a compiled file depends on: source, flags, and the CPU that -march=native compiles for."""
        return hashlib.sha256("\0".join((self.text, *FLAGS, platform.machine(), _cpu())).encode()).hexdigest()[:16]


def takes(weights: Sequence[torch.Tensor], whole: int) -> bool:
    """Whether weights, outputs first, suit a float32 CPU kernel that computes `whole` outputs at once."""
    return all(
        weight.device.type == "cpu" and weight.dtype == torch.float32 and len(weight) % whole == 0 for weight in weights
    )


@functools.cache
def native_library(source: KernelSource) -> ctypes.CDLL | None:
    """Return `library(source)`, loaded or compiled once per process."""
    return library(source)


def library(source: KernelSource) -> ctypes.CDLL | None:
    """Load the library of `source`, compiling it unless it is in the cache. Returns None where torch is faster, and,
    with a warning, where it cannot be compiled, loaded or trusted."""
    if os.environ.get("IMG2PARQUET_NATIVE") == "0" or (source.wide and not has_wide_vectors()):
        return None
    try:
        loaded = load(source, _cache_folder())
        if source.agrees(loaded):
            return loaded
        reason = "its self-test disagrees with torch"
    except subprocess.CalledProcessError as error:
        reason = f"the compiler failed: {error.stderr.strip()[-500:]}"
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    log.warning("%s: no compiled %s (%s); install g++ to get it", source.without, source.name, reason)
    return None


def has_wide_vectors() -> bool:
    """Whether torch, and thus code compiled for this processor, uses AVX-512."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def load(source: KernelSource, folder: Path | None) -> ctypes.CDLL:
    """Load from `folder`, compiling into it if needed; without one, use a private temporary folder.

    Raises OSError, SubprocessError."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="img2parquet-") as private:
            return _declared(source, _compile(source.text, Path(private) / f"{source.name}.so"))
    path = folder / f"{source.name}-{source.key}.so"
    if path.exists():
        try:
            return _declared(source, path)
        except (OSError, AttributeError):  # damaged on disk
            log.info("%s cannot be loaded; compiling it again", path)
    return _declared(source, _compile(source.text, path))


def _compile(text: str, path: Path) -> Path:
    """Compile and link beside `path`, then move into place.

    Links without -fopenmp, which could bring a second OpenMP, with a second pool of threads, into torch's process."""
    names = (os.environ.get("CXX", ""), *COMPILERS)
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError(f"none of {', '.join(COMPILERS)} is installed")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as scratch:
        source, compiled, linked = (str(Path(scratch) / f"{path.stem}.{end}") for end in ("cpp", "o", "so"))
        Path(source).write_text(text)
        for command in ((*FLAGS, "-c", source, "-o", compiled), ("-shared", compiled, "-o", linked)):
            run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
            run([compiler, *command], timeout=COMPILE_LIMIT_S)
        return Path(linked).replace(path)


def _declared(source: KernelSource, path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name, arguments in source.functions.items():
        function = getattr(found, name)
        function.restype, function.argtypes = None, list(arguments)
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _cache_folder() -> Path | None:
    """Return a folder that only this user can write to, since code is loaded from it; None if there is none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "img2parquet"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if ours and os.access(folder, os.W_OK) else None


# vectors of 16 floats, split on processors with shorter ones; bfloat16 in memory, float32 in registers
PRELUDE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {
constexpr int LANES = 16;
typedef float F __attribute__((vector_size(LANES * 4)));
typedef uint32_t U __attribute__((vector_size(LANES * 4)));
typedef uint16_t H __attribute__((vector_size(LANES * 2)));
#define UNROLL _Pragma("GCC unroll 16")

inline F load(const float* p) { F v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
#ifdef __AVX512BF16__  // the portable form below takes a third longer
inline F load(const uint16_t* p) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline void store(uint16_t* p, F v) {
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
}
#else
inline F load(const uint16_t* p) {
  H h; std::memcpy(&h, p, sizeof h);
  U u = __builtin_convertvector(h, U) << 16;
  F v; std::memcpy(&v, &u, sizeof v); return v;
}
inline void store(uint16_t* p, F v) {
  U u; std::memcpy(&u, &v, sizeof u);
  u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  H h = __builtin_convertvector(u, H);
  std::memcpy(p, &h, sizeof h);
}
#endif
inline float as_float(float v) { return v; }
inline float as_float(uint16_t v) { uint32_t u = uint32_t(v) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline F all(float x) { return x - F{}; }
inline F hardswish(F x) {
  F y = x + 3.0f, zero{};
  y = y < zero ? zero : y;
  return x * (y > 6.0f ? all(6.0f) : y) * (1.0f / 6.0f);
}

// sum += R rows of `count` factors times `count` rows of V vectors; strides lead from a row to the next. Always
// inlined, so that the sums stay in registers: a sixth of LeViT's time
template <int R, int V>
__attribute__((always_inline)) inline void multiply(const float* x, int64_t x_stride, int64_t count, const float* rows,
                                                    int64_t stride, F (&sum)[R][V]) {
  for (const float* end = x + count; x < end; x++, rows += stride) {
    F y[V];
    UNROLL for (int v = 0; v < V; v++) y[v] = load(rows + v * LANES);
    UNROLL for (int r = 0; r < R; r++) {
      F factor = all(x[r * x_stride]);
      UNROLL for (int v = 0; v < V; v++) sum[r][v] += factor * y[v];
    }
  }
}

// on whole cache lines: a vector that lies across two takes twice as long to load
struct Floats {
  struct Line { alignas(LANES * 4) float at[LANES]; };
  std::vector<Line> lines;
  explicit Floats(int64_t count) : lines((count + LANES - 1) / LANES) {}
  float* data() { return lines.data()->at; }
  float& operator[](int64_t n) { return data()[n]; }
};
}  // namespace
"""
