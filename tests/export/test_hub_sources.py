"""``init.from=OWNER/NAME``: when a hub repository is meant, and what is said when it cannot be had."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.export.hub import looks_like_hub_name
from bitnet_train.export.initial import read_initial
from bitnet_train.quant.spec import QuantSpec
from tests.export.conftest import MakeRun, decoder_config


def test_a_repository_is_meant_by_two_words_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for source, hub in (
        ("microsoft/bitnet-b1.58-2B-4T-bf16", True),
        ("Qwen/Qwen3-0.6B@main", True),
        ("runs/tiny", False),  # the first word is a folder: a run that is missing
        ("./a/b", False),
        ("/a/b", False),
        ("~/a", False),
        ("tiny", False),
        ("a/b/c", False),
        ("../b", False),
    ):
        assert looks_like_hub_name(source) == hub, source


def test_a_repository_is_read_like_a_folder(
    small_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run("2b4t")
    folder = run.write(tmp_path / "snapshot", "hf-master")
    asked: list[Any] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    initial = read_initial("someone/model@v2", run.canonical.cfg, QuantSpec())
    assert all(torch.equal(tensor, run.canonical.tensor(name)) for name, tensor in initial.masters.items())
    read_initial("someone/model", run.canonical.cfg, QuantSpec())
    assert [entry[:2] for entry in asked] == [("someone/model", "v2"), ("someone/model", None)]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked[0][2])


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("[Errno -3] Temporary failure in name resolution\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigError, match=r"init\.from=Qwen/Qwen3-0\.6B is no folder here, and the .* hub") as caught:
        read_initial("Qwen/Qwen3-0.6B", decoder_config(), QuantSpec())
    assert "\n" not in str(caught.value)
    assert "Temporary failure in name resolution" in str(caught.value)
