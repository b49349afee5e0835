"""Runs here write no pages; command lines run in an empty folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitnet_train.__main__ import answer
from tests.composing import fresh_recipes
from tests.pages import no_pages

__all__ = ["no_pages"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line in an empty folder; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def execute(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = answer(list(arguments))
        out = capsys.readouterr()
        return code, out.out, out.err

    with fresh_recipes():
        yield execute


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
