"""metrics.csv: one row per step, values of one step together, rows of lost steps cut."""

import csv
from pathlib import Path

import pytest

from bitnet_train.training.loggers.metrics_csv import COLUMNS, MetricsCsv


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_values_of_one_step_share_a_row_and_floats_read_back_exactly(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 0.1 + 0.2, "lr": 1e-3}, 10)
    log.log_metrics({"val/loss": 2.5}, 10)
    log.log_metrics({"train/loss": 1.0}, 20)
    log.flush()
    first, second = rows(log.path)
    assert list(first) == list(COLUMNS)
    assert (first["step"], float(first["train/loss"]), first["val/loss"]) == ("10", 0.1 + 0.2, "2.5")
    assert (second["step"], second["val/loss"]) == ("20", "")


def test_cutting_keeps_rows_up_to_the_step_and_drops_a_torn_one(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        log.log_metrics({"train/loss": float(step)}, step)
    log.flush()
    with log.path.open("a") as stream:
        stream.write("4,123,0.5")
    log.cut(4)
    assert [row["step"] for row in rows(log.path)] == ["1", "2", "3"]
    log.cut(2)
    assert [row["step"] for row in rows(log.path)] == ["1", "2"]
    log.log_metrics({"train/loss": 3.5}, 3)
    log.flush()
    assert [row["train/loss"] for row in rows(log.path)] == ["1.0", "2.0", "3.5"]


def test_a_file_without_a_whole_header_is_started_again(tmp_path: Path) -> None:
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.path.write_text("step,tok")
    log.cut(5)
    log.log_metrics({"train/loss": 1.0}, 6)
    log.flush()
    assert [row["step"] for row in rows(log.path)] == ["6"]


def test_an_unknown_column_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val/los"):
        MetricsCsv(tmp_path / "metrics.csv").log_metrics({"val/los": 1.0}, 1)
