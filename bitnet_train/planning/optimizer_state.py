"""What an optimizer keeps for every parameter, from the configuration alone."""

from dataclasses import dataclass

from bitnet_train.nn.config import ModelConfig
from bitnet_train.nn.layout import ParameterInfo, parameter_table
from bitnet_train.training.optimizers.config import AdamW8bitConfig, MuonConfig, OptimizerConfig
from bitnet_train.training.optimizers.factors import block_number

FLOAT32 = 4


@dataclass(frozen=True)
class OptimizerState:
    """Bytes of the moments, and the number of tensors, AdamW's step counts included."""

    bytes: int
    tensors: int


def optimizer_state(optimizer: OptimizerConfig, model: ModelConfig) -> OptimizerState:
    """Muon keeps one moment of the matrices of the blocks; AdamW two moments and a step of everything else.

    With moments of 8 bits a number takes a byte, and a block of them a scale.
    """
    size = tensors = 0
    for parameter in parameter_table(model):
        if isinstance(optimizer, AdamW8bitConfig) and _quantised(optimizer, parameter):
            size += 2 * (parameter.size + FLOAT32 * parameter.size // optimizer.block_size)
            tensors += 5
        elif _orthogonalised(optimizer, parameter):
            size += FLOAT32 * parameter.size
            tensors += 1
        else:
            size += 2 * FLOAT32 * parameter.size
            tensors += 3
    return OptimizerState(size, tensors)


def _quantised(optimizer: AdamW8bitConfig, parameter: ParameterInfo) -> bool:
    """What torchao quantises."""
    return parameter.size >= 4096 and parameter.size % optimizer.block_size == 0


def _orthogonalised(optimizer: OptimizerConfig, parameter: ParameterInfo) -> bool:
    inside = block_number(parameter.name) is not None
    return isinstance(optimizer, MuonConfig) and inside and len(parameter.shape) == 2
