"""Weight initialisation.

======================  ====================================================================================
parameter               distribution
======================  ====================================================================================
matrices                normal(0, std), the standard deviation from the variant:
  normal                std; embedding and head embedding_std (of a classifier: first and last layer, positions)
  depth_scaled          as normal, o_proj and down_proj std / sqrt(2 * layers)
  fan_in                gain / sqrt(fan-in); embedding and head embedding_std, or gain / sqrt(hidden)
  small                 sqrt(2 / (5 * hidden)), o_proj and down_proj 2 / (layers * sqrt(hidden))
  mitchell              1 / sqrt(fan-in), o_proj and down_proj of block i / sqrt(2 * (i + 1)) as well; cut off at
                        3 std; embedding and head 1 / sqrt(hidden)
  overrides             the last one that matches the module's name says the std, or multiplies the variant's
sub-norm weights        sub_norm_gain
learned scales          the statistic of their weights
other norm weights      1
biases                  0
======================  ====================================================================================

The codes of a ternary or binary matrix do not depend on its standard deviation, its scale does.
"""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.config import (
    DecoderConfig,
    DepthScaledInit,
    FanInInit,
    InitConfig,
    MitchellInit,
    NormalInit,
    SmallInit,
)
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import ParameterInfo, parameter_table
from bitnet_train.nn.vision.base import Classifier
from bitnet_train.nn.vision.config import ClassifierConfig
from bitnet_train.quant.spec import QuantSpec

RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight")

# Norms whose result goes straight into a residual writer.
SUB_NORMS = ("sub_norm.weight", "o_proj_norm.weight", "down_proj_norm.weight")

# First and last layers, a classifier's included.
EMBEDDINGS = (
    "embed_tokens.weight", "lm_head.weight",
    "input_proj.weight", "patch_embed.weight", "positions.weight", "head.weight",
)  # fmt: skip

# A model whose blocks write to a residual stream, or an MLP.
Shape = DecoderConfig | ClassifierConfig

# Standard deviations at which the variants of TRUNCATED cut off.
CUT_OFF = 3.0
TRUNCATED: tuple[type[InitConfig], ...] = (MitchellInit,)


def _normal(cfg: NormalInit, matrix: ParameterInfo, model: Shape) -> float:
    return cfg.embedding_std or cfg.std if matrix.name in EMBEDDINGS else cfg.std


def _depth_scaled(cfg: DepthScaledInit, matrix: ParameterInfo, model: Shape) -> float:
    writer = matrix.name.endswith(RESIDUAL_WRITERS)
    return _normal(cfg, matrix, model) / math.sqrt(2 * model.layers if writer else 1)


def _fan_in(cfg: FanInInit, matrix: ParameterInfo, model: Shape) -> float:
    if matrix.name in EMBEDDINGS and cfg.embedding_std is not None:
        return cfg.embedding_std
    return cfg.gain / math.sqrt(matrix.shape[1])


def _small(cfg: SmallInit, matrix: ParameterInfo, model: Shape) -> float:
    if matrix.name.endswith(RESIDUAL_WRITERS):
        return 2 / (model.layers * math.sqrt(model.hidden))
    return math.sqrt(2 / (5 * model.hidden))


def _mitchell(cfg: MitchellInit, matrix: ParameterInfo, model: Shape) -> float:
    depth = 1
    if matrix.name.endswith(RESIDUAL_WRITERS):
        depth = 2 * (int(matrix.name.split(".")[1]) + 1)
    return 1 / math.sqrt(matrix.shape[1] * depth)


# Config type -> function (config, weight matrix, model's shape) -> standard deviation of that matrix.
INIT_STD: dict[type[InitConfig], Callable[..., float]] = {
    NormalInit: _normal,
    DepthScaledInit: _depth_scaled,
    FanInInit: _fan_in,
    SmallInit: _small,
    MitchellInit: _mitchell,
}


def standard_deviation(cfg: InitConfig, matrix: ParameterInfo, model: Shape) -> float:
    """Of ``matrix`` under ``cfg``, overrides included. Raises ConfigError when ``cfg`` is of an unregistered type."""
    if type(cfg) not in INIT_STD:
        raise ConfigError(f"init={cfg.name} has no entry in bitnet_train.nn.init.INIT_STD")
    std = INIT_STD[type(cfg)](cfg, matrix, model)
    chosen = [o for o in cfg.overrides if fnmatchcase(matrix.layer_name, o.pattern)]
    if not chosen:
        return std
    override = chosen[-1]
    return override.std if override.std is not None else std * (override.factor or 1.0)


@torch.no_grad()
def init_weights(model: Decoder | Classifier, cfg: InitConfig, seed: int) -> None:
    """Fill all parameters of ``model`` in place, from a generator of its own on the CPU.

    The same seed gives the same weights whatever else has drawn random numbers and on whatever device. Raises
    ConfigError when ``cfg`` is of an unregistered type.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = {matrix.name: matrix for matrix in parameter_table(model.cfg)}
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            continue
        if parameter.dim() < 2:
            gain = cfg.sub_norm_gain if name.endswith(SUB_NORMS) else 1.0
            parameter.fill_(0.0 if name.endswith("bias") else gain)
            continue
        std, fresh = standard_deviation(cfg, matrices[name], model.cfg), torch.empty(parameter.shape)
        if isinstance(cfg, TRUNCATED):
            torch.nn.init.trunc_normal_(fresh, 0.0, std, -CUT_OFF * std, CUT_OFF * std, generator=generator)
        else:
            fresh.normal_(0.0, std, generator=generator)
        parameter.copy_(fresh)
    reset_scales(model)


def reset_scales(model: nn.Module) -> None:
    """Set every learned scale of ``model`` to the statistic of its weights."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.reset_scale()


def build_decoder(
    cfg: DecoderConfig, spec: QuantSpec, init: InitConfig, seed: int, backend: Backend | None = None
) -> Decoder:
    """A Decoder with initialised weights on the CPU; see :class:`Decoder` for the arguments."""
    model = Decoder(cfg, spec, backend)
    init_weights(model, init, seed)
    return model
