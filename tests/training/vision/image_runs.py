"""Short runs of image classifiers and what they left behind."""

import csv
from collections.abc import Callable
from pathlib import Path

SHORT = (
    "trainer.max_steps=2", "data.batch_size=4", "trainer.precision=32-true", "trainer.validate_every=2",
    "trainer.log_every=1", "trainer.compile=false", "schedule.warmup=0",
)  # fmt: skip
SAME = ("train/loss", "val/loss", "val/accuracy", "lr", "grad_norm", "codes/flips", "codes/zeros", "images")

# Exit code, stdout and stderr of a command.
Run = Callable[..., tuple[int, str, str]]


def rows(name: str) -> list[dict[str, str]]:
    with (Path("runs") / name / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def figures(name: str) -> dict[str, tuple[str, ...]]:
    return {row["step"]: tuple(row[column] for column in SAME) for row in rows(name)}
