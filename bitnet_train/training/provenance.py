"""What a run was made with: commit, versions, hardware."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bitnet_train
from bitnet_train.secrets import masked_all

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "numpy", "triton")


def collect_provenance(chosen: dict[str, Any]) -> dict[str, Any]:
    """Commit, versions and hardware of this process, with ``chosen``: what the automatic settings came to."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": masked_all(sys.argv),
        "git": _git(),
        "versions": {"bitnet_train": bitnet_train.__version__, "python": platform.python_version(), **_versions()},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "host": platform.node(),
        },
        "chosen": chosen,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether it was edited; None for an installed wheel."""
    package = Path(bitnet_train.__file__).parent
    if not (package.parent / ".git").exists():
        return None
    try:
        commit = _run_git(package, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_run_git(package, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
