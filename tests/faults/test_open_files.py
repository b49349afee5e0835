"""Commands in one process, again and again: no file is left open, no thread, and no process."""

import contextlib
import gc
import multiprocessing
import threading
from pathlib import Path

import pytest

from tests.faults.conftest import RUN, Place

TRAIN = (*RUN, "data.workers=1")
EXPORT = ("command=export", "run=runs/a", "export.formats=[packed]", "export.verify_tokens=64")


def opened(folder: Path) -> set[str]:
    """The files of this process that are open or mapped under ``folder``."""
    gc.collect()
    found = set()
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(number.readlink()))
    mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return {name for name in found | mapped if name.startswith(str(folder))}


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells")
def test_no_file_stays_open(place: Place) -> None:
    commands = {
        "train": (*TRAIN, "run_name=a"),
        "again": (*TRAIN, "run_name=a"),
        "export": EXPORT,
        "evaluate": ("command=evaluate", "run=runs/a"),
        "generate": ("command=generate", "run=runs/a", "generate.max_new_tokens=4"),
        "generate from the export": ("command=generate", "run=runs/a/export/packed", "generate.max_new_tokens=4"),
        "prepare": ("command=prepare", "data.rebuild=true"),
    }
    for name, command in commands.items():
        place.done(*command)
        assert opened(place.folder) == set(), name
    # Refusals too.
    place.at_step[4] = lambda: (_ for _ in ()).throw(OSError(5, "Input/output error", "somewhere"))
    assert "a file somewhere cannot be read or written (Input/output error)" in place.refused(*TRAIN, "run_name=b")
    assert opened(place.folder) == set()
    before = descriptors(), threading.active_count()
    for number in range(3):
        place.done(*TRAIN, f"run_name=c{number}")
    assert (descriptors(), threading.active_count()) == before
    assert multiprocessing.active_children() == []
