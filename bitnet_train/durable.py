"""Files that outlive a crash: synced to the disk, checked when they are read, and cleaned up when their writer died.

Nothing but the standard library: every layer above writes something.
"""

import contextlib
import errno
import os
import shutil
import socket
import time
import zipfile
import zlib
from pathlib import Path

# What is wrong with the machine and not with the program: full or failing disks, no permission, a lost file server.
ENVIRONMENT = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
        errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.EMFILE, errno.ENFILE,
    }
)  # fmt: skip
# File systems that cannot sync say so by these.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.ENOSYS, errno.EBADF, errno.EACCES})
_PART = 8 << 20
# What another machine left is taken for abandoned when nothing in it changed for so many seconds.
ABANDONED = 7 * 24 * 3600
# Archives that were read through and found whole, by what would change with their content.
_whole: set[tuple[int, int, int, int]] = set()


def is_environment(error: BaseException) -> bool:
    """Whether ``error`` is the machine's: a full disk, a missing permission, a lost file server."""
    return isinstance(error, OSError) and error.errno in ENVIRONMENT


def reason(error: OSError) -> str:
    """What went wrong, in the system's words, without a path."""
    return error.strerror or str(error) or type(error).__name__


def sync_file(path: Path) -> None:
    """Wait until the disk has the content of ``path``. Raises OSError when it did not get there."""
    with path.open("rb") as stream:
        _sync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk knows the names in ``path``: a rename is lost with the power before that."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(number)
    finally:
        os.close(number)


def _sync(number: int) -> None:
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def replace_durably(partial: Path, path: Path) -> None:
    """Put ``partial`` in the place of ``path`` so that a crash at any moment leaves one of the two whole there."""
    sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` so that a reader or a crash sees the old or the new text, never half of one.

    Raises OSError, with ``path`` as it was and nothing left beside it, when the disk does not take it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        replace_durably(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def append_whole(path: Path, text: str) -> None:
    """Append ``text`` to a file, or nothing of it. Raises OSError when the disk does not take it."""
    before = path.stat().st_size if path.exists() else None
    try:
        with path.open("a", encoding="utf-8", newline="") as stream:
            stream.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            if before is None:
                path.unlink()
            else:
                os.truncate(path, before)
        raise


def check_archive(path: Path) -> None:
    """Compare every byte of what ``torch.save`` wrote with the checksums (CRC-32) that it holds: about 4 GB/s.

    ``torch.load`` does not do that. An archive is read once in a process as long as it does not change. Raises
    ValueError, with the reason in words, when it is truncated, damaged or was not written by ``torch.save``, and
    OSError when it cannot be read.
    """
    found = path.stat()
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if key in _whole:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"its record {record.filename} is compressed, which no checkpoint's is")
                with archive.open(record) as stream:
                    while stream.read(_PART):
                        pass
    except zipfile.BadZipFile as error:
        damaged = "CRC" in str(error)
        raise ValueError("a checksum does not match" if damaged else "it is truncated or no checkpoint") from None
    except (EOFError, zlib.error, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is truncated or damaged ({type(error).__name__})") from None
    if time.time() - found.st_mtime > 1:  # the clock of a file system moves in jumps
        _whole.add(key)


def host_name() -> str:
    """This machine's name, fit for a file name without dashes at its ends."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in socket.gethostname()) or "host"


def is_alive(pid: int) -> bool:
    """Whether another process of this machine with this id runs (in a container, a killed one often had ours)."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def working_name(folder: Path, kind: str, hidden: bool = False) -> Path:
    """The name beside ``folder`` that this process works under: ``NAME.KIND-HOST-PID``."""
    return folder.with_name(f"{'.' if hidden else ''}{folder.name}.{kind}-{host_name()}-{os.getpid()}")


def remove_leftovers(folder: Path) -> None:
    """Clear away what processes that died left beside ``folder`` under their :func:`working_name`.

    One that died between taking the old folder away and putting the new one there leaves ``folder`` missing: then the
    old one comes back. Names without a host are of earlier versions and count as this machine's. The processes of
    another machine, on a shared disk, cannot be asked: what it left goes when it was not touched for a week.
    """
    for kind in ("replaced", "partial"):
        for hidden in ("", "."):
            start = f"{hidden}{folder.name}.{kind}-"
            for stale in sorted(p for p in folder.parent.glob(f"{hidden}*.{kind}-*") if p.name.startswith(start)):
                host, _, pid = stale.name.removeprefix(start).rpartition("-")
                here = host in ("", host_name())
                if not pid.isdigit() or (is_alive(int(pid)) if here else not _abandoned(stale)):
                    continue
                if kind == "replaced" and not folder.exists():
                    with contextlib.suppress(OSError):
                        stale.rename(folder)
                        continue
                shutil.rmtree(stale, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    try:
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:  # somebody is at work there
        return False
    return time.time() - newest > ABANDONED
