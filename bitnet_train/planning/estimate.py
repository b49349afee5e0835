"""What a recipe will cost, from its configuration alone: no torch, no weights, no data."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitnet_train.export.config import ExportDtype
from bitnet_train.planning.curve import CurvePoint, characteristic_points
from bitnet_train.planning.fitting import SHARE
from bitnet_train.planning.flops import forward_flops, training_flops_per_token
from bitnet_train.planning.machine_memory import available_memory
from bitnet_train.planning.memory import TrainingMemory, training_memory
from bitnet_train.planning.parameters import ParameterCounts, count_parameters
from bitnet_train.planning.sizes import ExportSize, checkpoint_bytes, export_sizes
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.batch_warmup import BatchPlan
from bitnet_train.training.config import (
    Accelerator,
    RunConfig,
    TrainerConfig,
    batch_plan,
    micro_batches,
    processes,
    step_sequences,
)

# Where a GPU's driver announces itself.
GPU_DRIVER = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Estimate:
    """The figures of one recipe; bytes, operations, steps and tokens."""

    parameters: ParameterCounts
    forward_flops: dict[str, float]
    training_flops_per_token: float
    batch: BatchPlan
    # What trainer.micro_batch=auto was taken for, and why; None when it is given.
    batch_assumption: str | None
    steps: int
    tokens: int
    memory: TrainingMemory
    precision: str
    checkpoint_bytes: int
    exports: list[ExportSize]
    export_dtype: str
    curve: list[CurvePoint]

    @property
    def forward_flops_per_token(self) -> float:
        """Operations of one forward pass per token."""
        return sum(self.forward_flops.values())

    @property
    def training_flops(self) -> float:
        """Operations of the whole run, validation not counted."""
        return self.training_flops_per_token * self.tokens

    def as_dict(self) -> dict[str, Any]:
        """For estimate.json: every field, and the sums that are properties."""
        plain = asdict(self)
        plain["parameters"] |= {
            "total": self.parameters.total,
            "quantised": self.parameters.quantised,
            "quantised_share": self.parameters.quantised_share,
        }
        plain["forward_flops_per_token"] = self.forward_flops_per_token
        plain["training_flops"] = self.training_flops
        plain["memory"]["total"] = self.memory.total
        return plain


def estimate(cfg: RunConfig, export_dtype: ExportDtype) -> Estimate:
    """Everything that can be known about a run before it starts."""
    spec = build_spec(cfg.quant)
    trainer, assumption = assumed_micro_batch(cfg)
    plan = batch_plan(trainer, cfg.text.sequence_length)
    return Estimate(
        parameters=count_parameters(cfg.decoder, spec),
        forward_flops=forward_flops(cfg.decoder, cfg.text.sequence_length),
        training_flops_per_token=training_flops_per_token(cfg.decoder, cfg.text.sequence_length),
        batch=plan,
        batch_assumption=assumption,
        steps=cfg.trainer.max_steps,
        tokens=plan.consumed(cfg.trainer.max_steps) * cfg.text.sequence_length,
        memory=training_memory(
            cfg.decoder,
            spec,
            plan.micro_batch,
            cfg.text.sequence_length,
            cfg.trainer.precision,
            cfg.optimizer,
            trainer.activation_checkpointing,
        ),
        precision=cfg.trainer.precision,
        checkpoint_bytes=checkpoint_bytes(cfg.decoder, spec, cfg.optimizer),
        exports=export_sizes(cfg.decoder, spec, export_dtype),
        export_dtype=export_dtype.value,
        curve=characteristic_points(cfg),
    )


def assumed_micro_batch(cfg: RunConfig) -> tuple[TrainerConfig, str | None]:
    """The trainer's settings with a number for ``micro_batch=auto``, and what that assumes.

    A run on the CPU is reckoned with the memory of this machine; a GPU is not asked, because that takes its libraries.
    """
    trainer = cfg.trainer
    if trainer.micro_batch != "auto":
        return trainer, None
    sequences = step_sequences(trainer, cfg.text.sequence_length)
    on_cpu = trainer.accelerator is Accelerator.cpu or (
        trainer.accelerator is Accelerator.auto and not GPU_DRIVER.exists()
    )
    available = available_memory() if on_cpu else None
    if available is None:
        where = "this system does not tell its memory" if on_cpu else "the GPU decides when training starts"
        return replace(trainer, micro_batch=sequences // processes(trainer)), f"auto, taken for the whole step: {where}"
    spec, length = build_spec(cfg.quant), cfg.text.sequence_length
    sizes = micro_batches(trainer, length)
    needs = {
        size: training_memory(
            cfg.decoder,
            spec,
            size,
            length,
            trainer.precision,
            cfg.optimizer,
            trainer.activation_checkpointing,
        ).total
        for size in sizes
    }
    size = max((size for size, need in needs.items() if need <= SHARE["cpu"] * available), default=None)
    free = f"{available / 1e9:.1f} GB free here"
    if size is None:
        least = "one sequence fits" if sizes[0] == 1 else f"{sizes[0]} sequences fit"
        return replace(trainer, micro_batch=sizes[0]), f"auto, but by this estimate not even {least} into the {free}"
    return replace(trainer, micro_batch=size), f"auto, by this estimate with {SHARE['cpu']:.0%} of the {free}"
