from pathlib import Path

import datasets
import pytest

from bitnet_train.__main__ import answer
from tests.composing import fresh_recipes
from tests.training.vision.image_runs import Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None) -> Run:
    """A command in a folder of its own; exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def execute(*arguments: str) -> tuple[int, str, str]:
        with fresh_recipes():
            code = answer(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return execute
