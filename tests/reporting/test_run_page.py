"""The page of a run: what it shows, what it survives, and that it stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitnet_train.config import Config, to_yaml
from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.reporting.page import render
from bitnet_train.reporting.run_page import run_page, write_run_page
from bitnet_train.training.loggers.metrics_csv import MetricsCsv
from bitnet_train.training.run_folder import RunFolder

VOID = {"meta", "br", "img", "link", "path", "use", "input", "hr"}


class Page(HTMLParser):
    """Tags that are open at the end, all attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def make_run(path: Path, steps: int = 30, prompt: str = "def ") -> tuple[Config, RunFolder]:
    """A run's folder with metrics, samples, an export's verification, scores and provenance."""
    cfg = Config(model=DecoderConfig(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, context=64, vocab=300))
    folder = RunFolder(path)
    path.mkdir(parents=True)
    logger = MetricsCsv(folder.metrics_file)
    for step in range(1, steps + 1):
        row = {"tokens": 64 * step, "train/loss": 5 / step, "lr": 1e-3, "weight_decay": 0.1, "grad_norm": 1.0}
        logger.log_metrics(
            {**row, "clip_threshold": 1.0, "tokens_per_second": 100.0, "elapsed_seconds": 1.5 * step}, step
        )
        if step % 10 == 0:
            logger.log_metrics({"val/loss": 4 / step, "val/bits_per_byte": 2 / step}, step)
    logger.flush()
    section = f"## Step {{}}\n\n````text\n{prompt}<b>&amp;x\n````\n\n````text\nelder\n````\n\n"
    folder.samples_file.write_text(section.format(10) + section.format(30).replace("elder", "latest"))
    export = folder.exports / "hf-packed"
    export.mkdir(parents=True)
    checks = [
        {"name": "codes", "measured": "0 of 9 differ", "tolerance": "0", "passed": True},
        {"name": "held-out perplexity", "measured": "3% off", "tolerance": "1%", "passed": False},
    ]
    (export / "verification.json").write_text(json.dumps({"consumer": "transformers 9", "checks": checks}))
    (path / "evaluation.json").write_text(json.dumps({"tasks": {"quiz": {"acc,none": 0.25, "acc_stderr,none": 0.1}}}))
    sessions = [{"started": "today", "command": ["x", "+recipe=a"], "git": {"commit": "abc" * 9, "dirty": True}}]
    folder.provenance_file.write_text(json.dumps({"sessions": sessions}))
    folder.config_file.write_text(to_yaml(cfg))
    return cfg, folder


def test_it_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    cfg, folder = make_run(tmp_path / "run")
    html = run_page(cfg, folder, "small run")
    page = Page(html)
    assert page.open == []
    assert html.startswith("<!doctype html>")
    assert 'name="viewport"' in html
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert (value or "").startswith("#"), (name, value)
    assert "<script" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_it_shows_what_the_folder_holds(tmp_path: Path) -> None:
    cfg, folder = make_run(tmp_path / "run")
    text = " ".join(Page(run_page(cfg, folder, "small run")).text.split())
    assert "small run" in text
    assert "0.0667 bits per byte of held-out text" in text
    assert "30 optimizer steps" in text
    assert "1,920 tokens seen" in text
    for chart in ("Loss (nats per token)", "Learning rate", "Weight decay", "Gradient norm", "Tokens per second"):
        assert chart in text
    assert "Share of codes that are zero" not in text  # no such column has a value
    assert "latest" in text
    assert "elder" not in text  # an older sample
    assert "Written at step 30" in text
    assert "FAILED: held-out perplexity" in text
    assert "0 of 9 differ" in text
    assert "the run quiz acc 0.2500" in text
    assert "abcabcabcabc (edited)" in text
    assert "bitnet_train +recipe=a" in text
    assert "2 12,288" in text  # gate_proj of two blocks
    assert "ternary, 1 scale, 8-bit inputs" in text
    assert "hidden: 64" in text


def test_what_a_model_writes_is_text(tmp_path: Path) -> None:
    cfg, folder = make_run(tmp_path / "run", prompt="</pre><script>alert(1)</script>")
    html = run_page(cfg, folder, "<i>name</i>")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "&lt;i&gt;name" in html
    assert Page(html).open == []


def test_a_young_run_has_a_page_too(tmp_path: Path) -> None:
    cfg, folder = make_run(tmp_path / "run", steps=1)
    for path in (folder.samples_file, folder.provenance_file, folder.path / "evaluation.json"):
        path.unlink()
    (folder.exports / "hf-packed" / "verification.json").write_text("{")
    text = " ".join(Page(write_run_page(cfg, folder, "young").read_text()).text.split())
    assert "- bits per byte" in text
    assert "not verified" in text
    assert "Samples" not in text


@pytest.mark.parametrize("content", [None, "step,train/loss\n1,abc\n"])
def test_without_readable_metrics_there_is_none(content: str | None, tmp_path: Path) -> None:
    cfg, folder = make_run(tmp_path / "run")
    folder.metrics_file.unlink()
    if content is not None:
        folder.metrics_file.write_text(content)
    with pytest.raises(ConfigError, match=r"metrics\.csv cannot be read"):
        run_page(cfg, folder, "x")


def test_values_that_are_not_finite_do_not_stop_it(tmp_path: Path) -> None:
    cfg, folder = make_run(tmp_path / "run")
    with folder.metrics_file.open("a") as stream:
        stream.write("31,1984,nan,inf,inf,0.001,0.1,inf,1.0,5,,,,50\n32,1984,2.0")  # the last row is cut short
    assert Page(run_page(cfg, folder, "x")).open == []


def test_a_section_that_does_not_exist_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="no section sample"):
        render("a", "b", "c", [], [], sample=["x"])
