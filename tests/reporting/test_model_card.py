"""Model cards: what they claim is what the run was."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bitnet_train.config import Config
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.report import VerificationReport
from bitnet_train.export.rules import FORMAT_RULES
from bitnet_train.export.sizes import ExportSize
from bitnet_train.quant.config import ActivationQuantConfig, QuantConfig, WeightQuantConfig, WeightScheme
from bitnet_train.reporting.metrics import Metrics
from bitnet_train.reporting.model_card import CardFacts, write_card
from bitnet_train.training.run_folder import RunFolder
from tests.reporting.test_run_page import make_run


def write(folder: Path, cfg: Config, run: RunFolder, name: str = "hf-packed", step: int = 30, **export: str) -> str:
    report = VerificationReport(name, str(folder), "somebody 1.0", step)
    report.add("config: hidden_size", "64", "= 64", True)
    report.add("codes", "0 of 9 | all equal", "0 differ", True)
    size = ExportSize(3_000_000, 1_000_000, 2_000_000, 4_000_000 if name != "hf-dense" else 0)
    write_card(CardFacts(cfg, "small", run, ExportConfig(**export), size, report), folder)  # type: ignore[arg-type]
    return (folder / "README.md").read_text()


@pytest.fixture
def made(tmp_path: Path) -> tuple[Config, RunFolder, Path]:
    cfg, run = make_run(tmp_path / "run")
    folder = tmp_path / "hf-packed"
    folder.mkdir()
    return cfg, run, folder


def test_it_says_what_was_trained_and_what_was_verified(made: tuple[Config, RunFolder, Path]) -> None:
    cfg, run, folder = made
    text = write(folder, cfg, run, license="apache-2.0")
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "transformers"
    assert "ternary" in head["tags"]
    assert "of them ternary, trained from scratch with bitnet_train. This folder is step 30 of the run." in text
    assert "| bits per byte of held-out text | 0.0667 |" in text
    assert "| bits per quantised weight | 2.000 (ideal: 1.585) |" in text
    assert "Reloaded with somebody 1.0 and compared with the run: passed." in text
    assert "| codes | 0 of 9 \\| all equal | 0 differ | ok |" in text
    assert "hidden_size" not in text  # fields that are as they should be are not listed
    assert "![loss and bits per byte over the run](curve.png)" in text
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_those_of_the_exported_step(made: tuple[Config, RunFolder, Path]) -> None:
    cfg, run, folder = made
    text = write(folder, cfg, run, step=19)
    assert "| bits per byte of held-out text | 0.2000 |" in text  # of step 10, the last before
    metrics = Metrics({"a": ([1, 5, 9], [1.0, 2.0, 3.0]), "b": ([7], [1.0])}).until(5)
    assert metrics.series("a") == ([1, 5], [1.0, 2.0])
    assert metrics.series("b") == ([], [])


def test_it_does_not_claim_what_is_not_so(made: tuple[Config, RunFolder, Path]) -> None:
    cfg, run, folder = made
    setattr(cfg.init, "from", "runs/other")
    assert "started from runs/other and trained with bitnet_train" in write(folder, cfg, run)
    weights = WeightQuantConfig(scheme=WeightScheme.float)
    dense = replace(cfg, quant=QuantConfig(weight=weights, activation=ActivationQuantConfig(bits=None)))
    text = write(folder, dense, run, "hf-dense")
    assert "ternary" not in text
    assert "codes times scales" not in text
    assert "quantised" not in text
    report = VerificationReport("hf-packed", str(folder), "somebody", 30)
    report.add("codes", "3 of 9 differ", "0 differ", False)
    write_card(CardFacts(cfg, "x", run, ExportConfig(), ExportSize(1, 1, 1, 1), report), folder)
    assert "**FAILED**" in (folder / "README.md").read_text()


def test_a_run_without_metrics_has_a_card_without_a_curve(made: tuple[Config, RunFolder, Path]) -> None:
    cfg, run, folder = made
    run.metrics_file.unlink()
    text = write(folder, cfg, run)
    assert "curve.png" not in text
    assert not (folder / "curve.png").exists()


@pytest.mark.parametrize("name", FORMAT_RULES)
def test_every_format_says_how_it_is_run(name: str, made: tuple[Config, RunFolder, Path]) -> None:
    cfg, run, folder = made
    (folder / "model.gguf").write_text("")
    text = write(folder, cfg, run, name)
    usage = text.split("## Use")[1].split("## Training")[0]
    assert "hf-packed" in usage  # the folder's name
    assert "NAME" not in usage
    assert "FILE" not in usage
    assert ("model.gguf" in usage) == name.startswith("gguf")
