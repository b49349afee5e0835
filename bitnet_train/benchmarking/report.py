"""Writes what was measured: JSON with everything, Markdown with the tables, a picture."""

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitnet_train.benchmarking.tables import Grid
from bitnet_train.errors import ConfigError
from bitnet_train.training.provenance import collect_provenance
from bitnet_train.training.run_folder import write_atomically

# Packages whose versions matter here, beside those of a run's provenance.
PEER_PACKAGES = ("torchao", "onebitllms", "flash-linear-attention")


def origin(device: str, precision: str, compiled: bool) -> dict[str, Any]:
    """Versions, hardware, threads, commit and command line."""
    provenance = collect_provenance({"device": device, "precision": precision, "compile": compiled})
    for package in PEER_PACKAGES:
        try:
            provenance["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    return provenance


def open_folder(folder: Path) -> None:
    """Make the folder. Raises ConfigError when it cannot be written, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another with paths.runs=.") from None


def write_report(
    folder: Path, kind: str, run_name: str, source: dict[str, Any], content: dict[str, Any],
    grids: Sequence[Grid], notes: Sequence[str],
) -> None:  # fmt: skip
    """``<kind>.json`` and ``<kind>.md`` in ``folder``; ``content`` holds the configuration and the results."""
    write_atomically(folder / f"{kind}.json", json.dumps({**source, **content}, indent=1) + "\n")
    write_atomically(folder / f"{kind}.md", markdown(kind, run_name, source, grids, notes))


def markdown(kind: str, run_name: str, source: dict[str, Any], grids: Sequence[Grid], notes: Sequence[str]) -> str:
    """A page that stands on its own in benchmarks/results/: date, machine, versions, command, tables, notes."""
    hardware, versions = source["hardware"], source["versions"]
    git = source["git"] or {}
    commit = f"{git['commit'][:12]}{' (edited)' if git['dirty'] else ''}" if git else "an installed package"
    machine = ", ".join(hardware["gpus"]) or hardware["cpu"]
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [
        f"# Benchmark of {run_name}: {kind}",
        "",
        f"- date: {source['started']}",
        f"- machine: {machine}; {hardware['threads']} threads on {hardware['cores']} cores",
        f"- versions: {shown}",
        f"- commit: {commit}",
        f"- command: `{shlex.join(['python', '-m', 'bitnet_train', *source['command'][1:]])}`",
        "",
    ]
    return "\n".join([*lines, *(grid.markdown() for grid in grids), *(f"- {note}" for note in notes), ""])
