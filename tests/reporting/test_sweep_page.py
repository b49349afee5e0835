"""The page of a sweep: ranked by the best held-out figure, with what the runs differ in."""

from pathlib import Path

import pytest
import yaml

from bitnet_train.errors import ConfigError
from bitnet_train.reporting.metrics import read_metrics
from bitnet_train.reporting.sweep_page import sweep_page
from tests.reporting.test_run_page import Page


def make_job(folder: Path, lr: float, figures: list[float | None], **more: object) -> None:
    folder.mkdir(parents=True)
    config = {"optimizer": {"lr": lr, "name": "adamw"}, "seed": 1, "run_name": folder.name, "export": {"x": lr}, **more}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [f"{i},{i},{5 - i},{'' if v is None else v}" for i, v in enumerate(figures, start=1)]
    (folder / "metrics.csv").write_text("step,tokens,train/loss,val/bits_per_byte\n" + "\n".join(rows) + "\n")


def test_runs_are_ranked_by_their_best_figure(tmp_path: Path) -> None:
    make_job(tmp_path / "lr=1", 0.1, [3.0, None, 2.0])
    make_job(tmp_path / "lr=2", 0.2, [3.0, 1.5, 1.8])  # the best on the way, not at the end
    make_job(tmp_path / "deeper" / "lr=3", 0.3, [None])
    (tmp_path / "waiting").mkdir()
    (tmp_path / "waiting" / "config.yaml").write_text("seed: 1")
    page = Page(sweep_page(tmp_path))
    assert page.open == []
    text = " ".join(page.text.split())
    order = [
        text.index(f"{rank} {name}")
        for rank, name in ((1, "lr=2 1.5000 1.8000"), (2, "lr=1 2.0000"), (3, "deeper/lr=3 -"))
    ]
    assert order == sorted(order)
    assert "They differ in optimizer.lr." in text
    assert "waiting" not in text
    assert "3 runs" in text
    assert "lr=2 best run" in text


def test_a_sweep_without_any_metrics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match="holds no run with metrics"):
        sweep_page(tmp_path)


def test_columns_leave_out_rows_without_a_value(tmp_path: Path) -> None:
    make_job(tmp_path / "a", 0.1, [3.0, None, 2.0])
    metrics = read_metrics(tmp_path / "a" / "metrics.csv")
    assert metrics.series("val/bits_per_byte") == ([1, 3], [3.0, 2.0])
    assert metrics.series("train/loss") == ([1, 2, 3], [4.0, 3.0, 2.0])
    assert (metrics.last("val/bits_per_byte"), metrics.best("train/loss")) == (2.0, 2.0)
    assert metrics.series("none") == ([], [])
    assert metrics.last("none") is None
