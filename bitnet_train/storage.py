"""Folders that lie elsewhere: any file system that ``fsspec`` knows (s3://, gs://, az://, memory://, ...).

Credentials come from where each file system looks for them (environment, profiles), never from a configuration.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from bitnet_train.errors import ConfigError, did_you_mean

COPIED_AT_ONCE = 16 << 20
CHECKPOINTS = "checkpoints"
# Copies made by this process, and the URLs of which.
_SOURCES: dict[str, str] = {}
STEP_FILE = re.compile(r"step-(\d{8})\.ckpt")


def is_url(place: str) -> bool:
    """Whether ``place`` is on a file system of fsspec's rather than a local path."""
    return re.match(r"[\w.+-]+://", place) is not None


def check_url(url: str, key: str) -> None:
    """Raises ConfigError, naming ``key``, for what is no URL of a known file system, or holds a password."""
    if not is_url(url):
        raise ConfigError(f"{key}={url} is no URL such as s3://bucket/folder.")
    if re.match(r"[^/]+://[^/]*:[^/]*@", url):
        raise ConfigError(f"{key} holds a password, which would be saved with the run: give it by the environment.")
    import fsspec

    protocol = url.partition("://")[0]
    known = {*fsspec.available_protocols(), *fsspec.registry}
    if protocol not in known:
        raise ConfigError(
            f"{key}={url}: {protocol}:// is no file system of fsspec, such as s3, gs, az or file."
            f"{did_you_mean(protocol, known)}"
        )


class Remote:
    """A folder at a URL. Every method may raise OSError, whatever the file system raises."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[Any, str] | None = None

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            import fsspec

            self._opened = fsspec.core.url_to_fs(self.url)
        return self._opened

    def put(self, stream: Any, name: str) -> tuple[int, str]:
        """Write a stream as ``name``; its size and digest."""
        digest, size = hashlib.blake2b(digest_size=32), 0
        with _as_os_errors(), self._writing(name) as target:
            while data := stream.read(COPIED_AT_ONCE):
                digest.update(data)
                size += len(data)
                target.write(data)
        return size, digest.hexdigest()

    def put_text(self, text: str, name: str) -> None:
        """Write a small file."""
        with _as_os_errors(), self._writing(name) as target:
            target.write(text.encode())

    def _writing(self, name: str) -> Any:
        system, root = self._open()
        path = f"{root}/{name}"
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return system.open(path, "wb")

    def read(self, name: str) -> bytes:
        """A small file. Raises FileNotFoundError."""
        with _as_os_errors():
            system, root = self._open()
            system.invalidate_cache()
            return bytes(system.cat_file(f"{root}/{name}"))

    def fetch(self, name: str, to: Path) -> tuple[int, str]:
        """Copy a file to ``to``, which appears whole; its size and digest."""
        digest, size = hashlib.blake2b(digest_size=32), 0
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f"{to.name}.partial")
        with _as_os_errors():
            system, root = self._open()
            with system.open(f"{root}/{name}", "rb") as source, partial.open("wb") as target:
                while data := source.read(COPIED_AT_ONCE):
                    digest.update(data)
                    size += len(data)
                    target.write(data)
        partial.replace(to)
        return size, digest.hexdigest()

    def files(self) -> list[str]:
        """The names of all files below, sorted; nothing where there is no such folder."""
        with _as_os_errors():
            system, root = self._open()
            system.invalidate_cache()
            found = system.find(root)
            # Names come with or without a leading slash.
            names = (str(path).lstrip("/").removeprefix(root.lstrip("/")).lstrip("/") for path in found)
            return sorted(name for name in names if ".." not in name.split("/"))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        with _as_os_errors():
            system, root = self._open()
            if system.exists(f"{root}/{name}"):
                system.rm(f"{root}/{name}", recursive=True)


class _as_os_errors:
    """Whatever a file system raises becomes an OSError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError):
            raise OSError(f"{type(error).__name__}: {error}") from error


def reason(error: OSError) -> str:
    """What went wrong, in a few words."""
    lines = str(error.strerror or error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def put_checkpoint(remote: Remote, step: int, source: Any) -> None:
    """Copy a checkpoint, an opened file or the path of a folder of shards, and then its marker: sizes and digests."""
    name = checkpoint_name(step)
    remote.remove(f"{name}.json")
    if isinstance(source, Path):
        files = {}
        for path in sorted(source.iterdir()):
            with path.open("rb") as stream:
                files[path.name] = remote.put(stream, f"{name}/{path.name}")
        marker: dict[str, Any] = {"files": files}
    else:
        size, digest = remote.put(source, name)
        marker = {"size": size, "digest": digest}
    remote.put_text(json.dumps(marker) + "\n", f"{name}.json")


def remove_checkpoint(remote: Remote, step: int) -> None:
    """Remove a checkpoint, its marker first."""
    for name in (f"{checkpoint_name(step)}.json", checkpoint_name(step)):
        remote.remove(name)


def checkpoint_name(step: int) -> str:
    """Where a checkpoint is in a run's folder."""
    return f"{CHECKPOINTS}/step-{step:08d}.ckpt"


def _parts(name: str, recorded: dict[str, Any]) -> dict[str, list[Any]]:
    """File -> [size, digest] of a checkpoint, of which ``name`` is the only one or the folder."""
    files = recorded.get("files")
    if isinstance(files, dict):
        return {f"{name}/{part}": list(wanted) for part, wanted in files.items() if "/" not in part}
    return {name: [recorded.get("size"), recorded.get("digest")]}


def complete_steps(remote: Remote, files: list[str]) -> dict[int, dict[str, Any]]:
    """Step -> marker of the checkpoints of a mirrored run that are there with their marker, the newest first."""
    found = {}
    for name in files:
        match = re.fullmatch(rf"{CHECKPOINTS}/{STEP_FILE.pattern}\.json", name)
        if match is None:
            continue
        try:
            recorded = json.loads(remote.read(name))
        except ValueError:
            continue
        if isinstance(recorded, dict) and set(_parts(name.removesuffix(".json"), recorded)) <= set(files):
            found[int(match[1])] = recorded
    return dict(sorted(found.items(), reverse=True))


def fetch_run(
    remote: Remote, folder: Path, step: int | None = None, older: bool = False
) -> tuple[int | None, list[str]]:
    """Copy a mirrored run to ``folder``: its small files, and one checkpoint, of ``step`` or the newest that is whole,
    with ``older`` also those before it.

    Its step, None if there is none, and a sentence for each checkpoint that was left out because it is damaged. Raises
    OSError.
    """
    files, remarks = remote.files(), []
    steps = complete_steps(remote, files)
    chosen = None
    for number, recorded in steps.items():
        if step is not None and number != step:
            continue
        if not _fetch_checkpoint(remote, folder, checkpoint_name(number), recorded):
            remarks.append(f"{remote.url}: the checkpoint of step {number} is damaged there and is left out")
            continue
        if chosen is None:
            _point_last_to(folder / checkpoint_name(number))
            chosen = number
        if not older:
            break
    if steps and chosen is None and step is None:
        return None, remarks
    for name in files:
        if not name.startswith((f"{CHECKPOINTS}/", "export/")):
            remote.fetch(name, folder / name)
    return chosen, remarks


def _fetch_checkpoint(remote: Remote, folder: Path, name: str, recorded: dict[str, Any]) -> bool:
    """Copy a checkpoint unless it is there already; False, and nothing is left of it, when it is damaged."""
    path, parts = folder / name, _parts(name, recorded)
    if all(_is_there(folder / part, wanted) for part, wanted in parts.items()):
        return True
    # What is there under this name is another one. A folder gets its name when it is complete.
    _remove(path)
    partial = path.with_suffix(".partial")
    _remove(partial)
    for part, wanted in parts.items():
        to = path if part == name else partial / part.rpartition("/")[2]
        if list(remote.fetch(part, to)) != wanted:
            _remove(path)
            _remove(partial)
            return False
    if partial.is_dir():
        partial.rename(path)
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _point_last_to(path: Path) -> None:
    last = path.with_name("last.ckpt")
    last.unlink(missing_ok=True)
    if path.is_dir():
        last.symlink_to(path.name)
        return
    try:
        os.link(path, last)
    except OSError:
        shutil.copyfile(path, last)


def _is_there(path: Path, wanted: list[Any]) -> bool:
    if not path.is_file() or path.stat().st_size != wanted[0]:
        return False
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32))
    return bool(digest.hexdigest() == wanted[1])


def local_copy(source: str, key: str) -> str:
    """A local path for ``source``: ``URL`` or ``URL@STEP`` of a mirrored run, or that of an export. Local paths stay.

    Copies lie in ``~/.cache/bitnet_train/remote`` (``BITNET_TRAIN_CACHE`` moves it) and are made anew each time, but
    for a checkpoint that is there already. Raises ConfigError, naming ``key``.
    """
    if not is_url(source):
        return source
    url, _, step = source.rpartition("@") if re.search(r"@\d+$", source) else (source, "", "")
    check_url(url, key)
    cache = Path(os.environ.get("BITNET_TRAIN_CACHE", "~/.cache/bitnet_train")).expanduser()
    name = re.sub(r"[^\w.-]+", "_", url.rstrip("/").rpartition("/")[2]) or "run"
    folder = cache / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    remote = Remote(url)
    try:
        files = remote.files()
        if not files:
            raise ConfigError(f"{key}={source} does not exist, or is an empty folder.")
        if "config.yaml" in files:
            found, remarks = fetch_run(remote, folder, int(step) if step else None)
            if found is None and (step or remarks):
                there = ", ".join(map(str, sorted(complete_steps(remote, files)))) or "none"
                raise ConfigError(f"{key}={source}: that checkpoint is not whole there; steps saved there: {there}.")
        elif step:
            raise ConfigError(f"{key}={source}: only a run has steps to choose from.")
        else:
            for file in files:
                remote.fetch(file, folder / file)
    except OSError as error:
        raise ConfigError(f"{key}={source} cannot be read: {reason(error)}.") from None
    copy = f"{folder}@{step}" if step else str(folder)
    _SOURCES[copy] = source
    return copy


def source_of(path: str) -> str | None:
    """The URL that :func:`local_copy` made ``path`` of in this process; None for a local path."""
    return _SOURCES.get(path)


def put_folder(folder: Path, url: str, key: str) -> None:
    """Copy a finished folder to ``url``. Raises ConfigError, naming ``key``."""
    remote = Remote(url)
    try:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb") as stream:
                remote.put(stream, path.relative_to(folder).as_posix())
    except OSError as error:
        raise ConfigError(f"{key}={url} cannot be written: {reason(error)}; {folder} is whole.") from None
