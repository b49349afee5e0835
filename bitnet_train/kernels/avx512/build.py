"""Compiles the C++ kernels for this machine, once, and loads them."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = ("quantise.cpp", "matmul.cpp", "weight_gradient.cpp")
HEADERS = ("common.h", "rows.h", "panels.h")
CPU_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
OPTIONS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp",
    "-ffp-contract=off",  # a fused multiply-add would give other codes
    "-mfma", *(f"-m{flag.replace('_', '')}" for flag in CPU_FLAGS),
)  # fmt: skip


@functools.cache
def load() -> "ctypes.CDLL | str":
    """The kernels as a C library, or one clause that says why this machine cannot have them."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return f"it needs x86-64 Linux, not {platform.machine()} on {platform.system()}"
    missing = [flag for flag in CPU_FLAGS if flag not in _cpu_flags()]
    if missing:
        return f"this CPU lacks {', '.join(missing)}"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "there is no C++ compiler (g++ or clang++)"
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
        return f"compiling its kernels with {compiler} failed ({lines[0]})"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "").split())


def _build(compiler: str) -> Path:
    """The compiled library, from the cache if these sources were compiled with these options before."""
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    openmp = _openmp()
    key = hashlib.sha256()
    for part in (*OPTIONS, version, str(openmp), *((here / name).read_text() for name in (*SOURCES, *HEADERS))):
        key.update(part.encode() + b"\0")
    library = _cache() / f"avx512-{key.hexdigest()[:20]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved, so that a second process never loads half a library.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *OPTIONS, *(str(here / name) for name in SOURCES), "-o", str(made)]
            subprocess.run([*command, *openmp], capture_output=True, text=True, check=True, timeout=300)
            made.replace(library)
    return library


def _openmp() -> list[str]:
    """PyTorch's own OpenMP runtime to link with: a second one would keep a second team of threads spinning."""
    bundled = sorted(Path(torch.__file__).parent.parent.glob("torch*/**/libgomp*.so*"))
    return [str(bundled[0]), f"-Wl,-rpath,{bundled[0].parent}"] if bundled else []


def _cache() -> Path:
    """``$BITNET_TRAIN_CACHE``, or ``bitnet_train`` in the user's cache folder."""
    chosen = os.environ.get("BITNET_TRAIN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "bitnet_train"
