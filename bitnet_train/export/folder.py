"""An export's folder: it appears whole or not at all, and says in ``bitnet_train.json`` what it was made from."""

import json
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitnet_train.durable import remove_leftovers, sync_file, sync_folder, working_name
from bitnet_train.errors import ConfigError

ORIGIN_FILE = "bitnet_train.json"
# No such file of an export is longer; what is, is damaged or hostile, and is not read.
JSON_BYTES = 16 << 20
# Longer names are cut in messages.
LONGEST_NAME = 120


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A context manager that gives a new empty folder and at its end puts it in the place of ``folder``.

    When the body raises, ``folder`` stays as it was. Raises ConfigError when a file cannot be written.
    """
    partial, replaced = (working_name(folder, kind, hidden=True) for kind in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                sync_file(path)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ConfigError(f"The export {folder} cannot be written: {error.strerror or error}.") from None
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable UTF-8 JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of an export. Raises ConfigError when it is missing, too long or damaged."""
    try:
        if path.stat().st_size > limit:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, which no such file has: it is damaged.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(unreadable(path, error)) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged (it holds no object): export again.")
    return content


def unreadable(path: Path, error: Exception) -> str:
    """The sentence for a file of an export that is missing or damaged."""
    if not path.is_file():
        return f"{path} is missing: {path.parent} is no complete export; export again."
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} is damaged ({reason}): export again."


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """A context manager that makes a ValueError of a panic in a library written in Rust, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(shown(str(error))) from None


def shown(name: str) -> str:
    """A name out of a file of unknown origin, fit for a sentence: as it is, unless it is endless or breaks the line."""
    return name if name.isprintable() and len(name) <= LONGEST_NAME else reprlib.repr(name)


def write_origin(folder: Path, format_name: str, step: int) -> None:
    """Write which format and which step of the run ``folder`` holds."""
    write_json(folder / ORIGIN_FILE, {"format": format_name, "step": step})


def read_step(folder: Path) -> int | None:
    """The step that :func:`write_origin` wrote, or None when it is not readable."""
    try:
        step = read_json(folder / ORIGIN_FILE).get("step")
    except ConfigError:
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
