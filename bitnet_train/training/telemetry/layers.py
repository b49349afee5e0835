"""layers.csv: what happens in every quantised layer, and warnings when one collapses."""

import csv
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from bitnet_train.nn.bit_linear import BitLinear, SharedInput, quantiser_input
from bitnet_train.nn.sharded_codes import whole
from bitnet_train.quant.activations import quantise_inputs
from bitnet_train.quant.hadamard import rotate
from bitnet_train.training.callbacks.quantisation import state_at
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due
from bitnet_train.training.log_files import LogFile
from bitnet_train.training.loggers.csv_rows import cut_rows, read_rows
from bitnet_train.training.loggers.metrics_csv import MetricsCsv
from bitnet_train.training.module import TrainingModule

# zeros, flips: shares of the codes (flips since the step before). scale: mean of the layer's scales. input_absmax and
# input_saturated: the largest quantised input, and the share of inputs whose code is the first or last, in one sequence
# (or image) of the step's batch. grad_norm and grad_norm_clipped: L2 norm of the weights' gradient before and after
# clipping.
COLUMNS = (
    "step", "layer", "zeros", "flips", "scale", "input_absmax", "input_saturated", "grad_norm", "grad_norm_clipped",
)  # fmt: skip


# A layer whose codes stay the same in so many logged steps is reported, if it has so many that this is no chance.
STILL_STEPS, STILL_CODES = 3, 4096


class LayerTelemetry(StepCallback):
    """Appends a row per quantised layer every ``telemetry.every_steps`` steps, and says once when a layer goes wrong:
    nearly all of its codes zero, none of them changing any more, a scale running away."""

    def __init__(self, clock: TrainingClock, path: Path, console: Console) -> None:
        self.clock, self.path, self.console = clock, path, console
        self.log_file = LogFile(path, lambda line: console.print(line, markup=False))
        self._layers: dict[str, BitLinear] = {}
        self._before: list[Tensor] = []
        self._batch: Any = None
        # By layer and by the bits of its stage on the way to its codes: each has scales of its own kind.
        self._first_scales: dict[tuple[str, int | None], float] = {}
        # Logged steps in a row without a flip, by layer.
        self._still: dict[str, int] = {}
        self._warned: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, TrainingModule)
        self._layers = {n: m for n, m in pl_module.network.named_modules() if isinstance(m, BitLinear)}
        for row in read_rows(self.path):
            self._first_scales.setdefault(
                self._quantiser(pl_module, row["layer"], int(row["step"])), float(row["scale"])
            )

    @staticmethod
    def _quantiser(module: TrainingModule, layer: str, step: int) -> tuple[str, int | None]:
        return layer, state_at(module.cfg, module.network, step - 1).spec.stage_bits  # type: ignore[arg-type]

    def _due(self, module: TrainingModule, step: int) -> bool:
        return bool(self._layers) and due(step, module.cfg.telemetry.every_steps, module.cfg.trainer.max_steps)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self._due(pl_module, trainer.global_step + 1):
            pl_module.code_cache.measure_next()
            self._before = self._gradient_norms()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._batch = None

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        if not self._due(module, step):
            return
        with self.clock.paused():
            rows = self._rows(trainer, module)
            self._write(step, rows)
            for logger in trainer.loggers:
                if not isinstance(logger, MetricsCsv):  # its columns are fixed
                    flat = {f"layers/{n}/{key}": v for n, row in rows.items() for key, v in row.items()}
                    logger.log_metrics(flat, step)
            self._warn(module, step, rows)

    def _rows(self, trainer: L.Trainer, module: TrainingModule) -> dict[str, dict[str, float]]:
        assert module.code_cache is not None
        statistics = module.code_cache.statistics
        assert statistics is not None
        codes = statistics.by_layer()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            inputs = self._inputs(module)
        # The gradients are still there: they are cleared when the next step begins.
        before, after = (torch.stack(norms).tolist() for norms in (self._before, self._gradient_norms()))
        rows: dict[str, dict[str, float]] = {}
        for number, (name, layer) in enumerate(self._layers.items()):
            kept = layer.kept
            assert kept is not None
            absmax, saturated = inputs.get(name, (math.nan, math.nan))
            figures = (*codes[name], float(kept.scale.mean()), absmax, saturated, before[number], after[number])
            rows[name] = dict(zip(COLUMNS[2:], figures, strict=True))
        return rows

    def _gradient_norms(self) -> list[Tensor]:
        grads = [layer.weight.grad for layer in self._layers.values()]
        nothing = torch.zeros(())
        return [nothing if grad is None else whole(torch.linalg.vector_norm(grad.detach().float())) for grad in grads]

    def _inputs(self, module: TrainingModule) -> dict[str, tuple[float, float]]:
        """Largest magnitude and share of saturated codes of every layer's quantised input, on one sequence or image."""
        found: dict[str, tuple[float, float]] = {}
        names = {id(layer): name for name, layer in self._layers.items()}

        def look(shared: Any, _: Any, options: dict[str, Any], returned: tuple[list[Tensor], Tensor]) -> None:
            x = quantiser_input(shared, options, returned)
            for layer in shared.bit_layers:
                quant = layer.quant.inputs
                read = rotate(x) if quant.hadamard else x
                saturated = math.nan
                if quant.bits is not None:
                    codes, largest = quantise_inputs(read, quant).codes, 2 ** (quant.bits - 1) - 1
                    saturated = float(((codes >= largest) | (codes <= -largest)).float().mean())
                found[names[id(layer)]] = float(read.abs().max()), saturated

        with hooked(module, look):
            module.probe(self._batch)
        return found

    def _write(self, step: int, rows: dict[str, dict[str, float]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        for name, row in rows.items():
            writer.writerow({"step": step, "layer": name, **{key: repr(value) for key, value in row.items()}})
        self.log_file.append(text.getvalue())

    def _warn(self, module: TrainingModule, step: int, rows: dict[str, dict[str, float]]) -> None:
        cfg = module.cfg.telemetry
        for name, row in rows.items():
            first = self._first_scales.setdefault(self._quantiser(module, name, step), row["scale"])
            ternary = self._layers[name].quant.scheme == "ternary"
            if ternary and row["zeros"] > cfg.most_zeros:
                self._say(f"zeros {name}", step, f"{row['zeros']:.1%} of the codes of {name} are zero: the layer is "
                          "dying; lower optimizer.weight_decay or optimizer.lr")  # fmt: skip
            if not first / cfg.scale_factor <= row["scale"] <= first * cfg.scale_factor:
                self._say(f"scale {name}", step, f"the scale of {name} went from {first:.3g} to {row['scale']:.3g}: "
                          "it is running away; lower optimizer.lr or clip harder")  # fmt: skip
        if module.guard is None or not module.guard.skipped_last():
            self._warn_of_stillness(module, step, rows)

    def _warn_of_stillness(self, module: TrainingModule, step: int, rows: dict[str, dict[str, float]]) -> None:
        groups = module.optimizers(use_pl_optimizer=False).param_groups  # type: ignore[union-attr]
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        # A layer without a rate is meant to stay as it is.
        flips = {n: row["flips"] for n, row in rows.items() if rates.get(id(self._layers[n].weight), 0) > 0}
        if flips and not any(flips.values()):
            self._say("flips", step, "no code of any layer changed in this step: the weights are too far from their "
                      "thresholds for the learning rate; raise optimizer.lr")  # fmt: skip
            return
        for name, share in flips.items():
            self._still[name] = 0 if share else self._still.get(name, 0) + 1
            if self._still[name] == STILL_STEPS and self._layers[name].weight.numel() >= STILL_CODES:
                self._say(f"flips {name}", step, f"no code of {name} changed in the last {STILL_STEPS} steps that were "
                          "logged, and those of other layers did: it has stopped learning; see its gradient in "
                          "layers.csv, and raise its rate with optimizer.groups")  # fmt: skip

    def _say(self, what: str, step: int, sentence: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self.console.print(f"warning at step {step}: {sentence}", markup=False)


@contextmanager
def hooked(module: L.LightningModule, look: Any) -> Iterator[None]:
    """``look`` is called after every :class:`SharedInput` of ``module`` (see there for the arguments)."""
    handles = [
        inner.register_forward_hook(look, with_kwargs=True)
        for inner in module.modules()
        if isinstance(inner, SharedInput)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut_layers(path: Path, after_step: int) -> None:
    """Drop the rows of steps past ``after_step``, which a continued run writes again."""
    cut_rows(path, COLUMNS, after_step)
