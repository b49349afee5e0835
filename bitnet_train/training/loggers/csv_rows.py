"""CSV files with a ``step`` column that runs append to and, when they are continued, cut."""

import csv
from collections.abc import Sequence
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without a last one that a crash cut short; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if None not in row.values()]


def cut_rows(path: Path, columns: Sequence[str], after_step: int) -> None:
    """Drop all rows of steps past ``after_step``, and a last row that a crash cut short."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if int(row["step"]) <= after_step]
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
