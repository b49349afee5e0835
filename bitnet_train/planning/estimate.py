"""What a recipe will cost, from its configuration alone: no torch, no weights, no data."""

from dataclasses import asdict, dataclass
from typing import Any

from bitnet_train.export.config import ExportDtype
from bitnet_train.planning.curve import CurvePoint, characteristic_points
from bitnet_train.planning.flops import forward_flops, training_flops_per_token
from bitnet_train.planning.memory import TrainingMemory, training_memory
from bitnet_train.planning.parameters import ParameterCounts, count_parameters
from bitnet_train.planning.sizes import ExportSize, checkpoint_bytes, export_sizes
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.config import BatchPlan, RunConfig, batch_plan


@dataclass(frozen=True)
class Estimate:
    """The figures of one recipe; bytes, operations, steps and tokens."""

    parameters: ParameterCounts
    forward_flops: dict[str, float]
    training_flops_per_token: float
    batch: BatchPlan
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
    plan = batch_plan(cfg.trainer, cfg.data.sequence_length)
    return Estimate(
        parameters=count_parameters(cfg.model, spec),
        forward_flops=forward_flops(cfg.model, cfg.data.sequence_length),
        training_flops_per_token=training_flops_per_token(cfg.model, cfg.data.sequence_length),
        batch=plan,
        steps=cfg.trainer.max_steps,
        tokens=cfg.trainer.max_steps * cfg.trainer.batch_tokens,
        memory=training_memory(cfg.model, spec, plan.micro_batch, cfg.data.sequence_length, cfg.trainer.precision),
        precision=cfg.trainer.precision,
        checkpoint_bytes=checkpoint_bytes(cfg.model),
        exports=export_sizes(cfg.model, spec, export_dtype),
        export_dtype=export_dtype.value,
        curve=characteristic_points(cfg),
    )
