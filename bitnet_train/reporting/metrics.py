"""metrics.csv as columns of numbers."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from bitnet_train.errors import ConfigError


@dataclass(frozen=True)
class Metrics:
    """Name -> (steps, values) of every column, rows without a value left out, steps ascending."""

    columns: dict[str, tuple[list[int], list[float]]]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column; empty lists when there are none."""
        return self.columns.get(name, ([], []))

    def until(self, step: int) -> "Metrics":
        """Only what was written up to ``step``."""
        cut = {name: sum(s <= step for s in steps) for name, (steps, _) in self.columns.items()}
        return Metrics(
            {n: (steps[: cut[n]], values[: cut[n]]) for n, (steps, values) in self.columns.items() if cut[n]}
        )

    def last(self, name: str) -> float | None:
        """The last value of a column."""
        values = self.series(name)[1]
        return values[-1] if values else None

    def best(self, name: str) -> float | None:
        """The least finite value of a column."""
        return min((v for v in self.series(name)[1] if math.isfinite(v)), default=None)

    def most(self, name: str) -> float | None:
        """The largest finite value of a column."""
        return max((v for v in self.series(name)[1] if math.isfinite(v)), default=None)


def read_metrics(path: Path) -> Metrics:
    """The columns of a run's metrics.csv. Raises ConfigError when it is missing or unreadable."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    try:
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                # A crash may have cut the last row short.
                if None in row.values() or not row.get("step"):
                    continue
                for name, text in row.items():
                    if text and name != "step":
                        steps, values = columns.setdefault(name, ([], []))
                        steps.append(int(row["step"]))
                        values.append(float(text))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read ({error}): the run has no metrics to report.") from None
    return Metrics(columns)
