"""What an optimizer keeps for every parameter, from the configuration alone."""

from dataclasses import dataclass

from bitnet_train.nn.config import ModelConfig
from bitnet_train.nn.layout import ParameterInfo, parameter_table
from bitnet_train.training.optimizers.config import MuonConfig, OptimizerConfig
from bitnet_train.training.optimizers.factors import block_number

FLOAT32 = 4


@dataclass(frozen=True)
class OptimizerState:
    """Bytes of the moments, all float32, and the number of tensors, AdamW's step counts included."""

    bytes: int
    tensors: int


def optimizer_state(optimizer: OptimizerConfig, model: ModelConfig) -> OptimizerState:
    """Muon keeps one moment of the matrices of the blocks; AdamW two moments and a step of everything else."""
    moments = {p: 1 if _orthogonalised(optimizer, p) else 2 for p in parameter_table(model)}
    return OptimizerState(
        bytes=sum(FLOAT32 * p.size * kept for p, kept in moments.items()),
        tensors=sum(1 if kept == 1 else 3 for kept in moments.values()),
    )


def _orthogonalised(optimizer: OptimizerConfig, parameter: ParameterInfo) -> bool:
    inside = block_number(parameter.name) is not None
    return isinstance(optimizer, MuonConfig) and inside and len(parameter.shape) == 2
