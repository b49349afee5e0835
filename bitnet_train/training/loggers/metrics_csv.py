"""metrics.csv: one row per logged step, complete before the checkpoint that it belongs to."""

import csv
import io
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from bitnet_train.durable import append_whole, reason, sync_file
from bitnet_train.training.loggers.csv_rows import cut_rows

COLUMNS = (
    "step", "tokens", "train/loss", "val/loss", "val/bits_per_byte", "lr", "weight_decay", "grad_norm",
    "clip_threshold", "grad_norm_clipped", "skipped", "tokens_per_second", "model_flops_share", "codes/zeros",
    "codes/flips", "elapsed_seconds",
    "loss/total", "loss/z", "loss/distillation", "loss/regulariser",
    # Of image classifiers, in place of val/bits_per_byte and tokens.
    "val/accuracy", "images", "images_per_second",
)  # fmt: skip


class MetricsCsv(Logger):
    """Appends rows to a CSV file; values of the same step share a row.

    The row at hand is written when the next step's begins, and by :meth:`save`, which callbacks call before a
    checkpoint is saved. :meth:`cut` drops rows of steps that a continued run will do again.

    Rows that the disk does not take are kept and written later, in their order; ``say`` hears of it once. A checkpoint
    is not saved without its rows: :meth:`save` raises OSError then.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        super().__init__()
        self.path, self.say = path, say
        self._row: dict[str, Any] = {}
        self._waiting: list[dict[str, Any]] = []
        self._failing = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder's config.yaml holds them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError("metrics.csv needs the step of each row")
        unknown = set(metrics) - set(COLUMNS)
        if unknown:
            raise ValueError(f"metrics.csv has no column {sorted(unknown)[0]}")
        if self._row and self._row["step"] != step:
            self._try_flush()
        self._row |= {"step": step, **metrics}

    def flush(self) -> None:
        """Write the row at hand, and those that wait. Raises OSError when the disk does not take them."""
        if self._row:
            self._waiting.append({key: _text(value) for key, value in self._row.items()})
            self._row = {}
        if not self._waiting:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        writer.writerows(self._waiting)
        append_whole(self.path, text.getvalue())
        self._waiting = []
        if self._failing:
            self._failing = False
            self.say(f"{self.path} is written again; no row is lost")

    def _try_flush(self) -> None:
        try:
            self.flush()
        except OSError as error:
            if not self._failing:
                self.say(f"warning: {self.path} is not written ({reason(error)}): its rows wait")
            self._failing = True

    def save(self) -> None:
        """Write all rows and wait until the disk has them. Raises OSError when it does not take them."""
        self.flush()
        if self.path.exists():
            sync_file(self.path)

    def finalize(self, status: str) -> None:
        self._try_flush()

    def cut(self, after_step: int) -> None:
        """Drop all rows of steps past ``after_step``, and a last row that a crash cut short."""
        cut_rows(self.path, COLUMNS, after_step)


def _text(value: Any) -> Any:
    # repr of a float is the shortest text that reads back to the same number, so rows compare bit for bit.
    return repr(value) if isinstance(value, float) else value
