"""The memory of this process: how much more it can take, and how much it holds and has held.

What it can take is what the kernel has and what the cgroups around the process leave. A container or a SLURM job sees
the whole machine in /proc/meminfo and is killed at its cgroup's limit, so the smaller figure counts. What it holds is
the kernel's count of resident memory. No torch here.
"""

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Per hierarchy: its mount, the limit, the usage, and the entry of memory.stat that can be dropped (page cache).
Hierarchy = tuple[tuple[str, ...], str, str, str]
UNIFIED: Hierarchy = (("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file")
MEMORY_V1: Hierarchy = (
    ("sys/fs/cgroup/memory",),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take, or None where the system does not tell.

    Where there is no /proc (macOS, whose memory can be exceeded without being killed) it is the physical memory.
    ``root`` is where /proc and /sys are looked for.
    """
    meminfo = _entries(root / "proc/meminfo").get("MemAvailable:")
    found = [] if meminfo is None else [1024 * meminfo]
    found += _left_in_cgroups(root)
    if found:
        return max(0, min(found))
    if "SC_PHYS_PAGES" in os.sysconf_names and not (root / "proc").is_dir():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


class ResidentMemory:
    """This process's resident memory and its high-water mark, in bytes, as Linux counts them.

    proc_pid_status(5) has both figures, proc_pid_clear_refs(5) resets the mark. Raises OSError where it cannot be
    reset.
    """

    def __init__(self) -> None:
        self.reset_peak()

    def now(self) -> int:
        """Bytes resident."""
        return self._read("VmRSS:")

    def peak(self) -> int:
        """The most bytes resident since the mark was reset."""
        return self._read("VmHWM:")

    def reset_peak(self) -> None:
        """Put the mark to what is resident now."""
        Path("/proc/self/clear_refs").write_text("5")

    def _read(self, name: str) -> int:
        found = _entries(Path("/proc/self/status")).get(name)
        if found is None:
            raise OSError(f"/proc/self/status has no {name}")
        return 1024 * found


def give_back_free_memory() -> None:
    """Return to the system what nothing refers to any more: glibc keeps freed blocks of up to 32 MB."""
    gc.collect()
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """What the limit of each cgroup above this process leaves; a limit holds for everything below it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts, limit, usage, droppable = UNIFIED
        elif "memory" in controllers.split(","):
            mounts, limit, usage, droppable = MEMORY_V1
        else:
            continue
        # A container may see its own cgroup as the mount's root and still be told the host's path: files that are not
        # there say nothing.
        inside = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for part in (inside, *inside.parents) if path != "/" else (PurePosixPath(),):
                folder = root / mount / part
                most, used = _number(folder / limit), _number(folder / usage)
                if most is not None and used is not None:
                    yield most - used + _entries(folder / "memory.stat").get(droppable, 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The file's number; None for "max" and for a file that is not there."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _entries(path: Path) -> dict[str, int]:
    """Lines of a name and a number; a unit behind them is left out."""
    fields = [line.split() for line in _text(path).splitlines()]
    return {f[0]: int(f[1]) for f in fields if len(f) > 1 and f[1].isdigit()}
