"""Weight initialisation.

======================  ================================================
parameter               distribution
======================  ================================================
embedding, head         normal(0, embedding_std or std)
linear layers           normal(0, std)
o_proj, down_proj       depth_scaled: normal(0, std / sqrt(2 * layers))
sub-norm weights        sub_norm_gain
learned scales          the statistic of their weights
other norm weights      1
biases                  0
======================  ================================================
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.config import DecoderConfig, DepthScaledInit, InitConfig, NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.quant.spec import QuantSpec

RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight")

# Norms whose result goes straight into a residual writer.
SUB_NORMS = ("sub_norm.weight", "o_proj_norm.weight", "down_proj_norm.weight")

EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def _normal(cfg: NormalInit, name: str, layers: int) -> float:
    return cfg.embedding_std or cfg.std if name in EMBEDDINGS else cfg.std


def _depth_scaled(cfg: DepthScaledInit, name: str, layers: int) -> float:
    return _normal(cfg, name, layers) / math.sqrt(2 * layers if name.endswith(RESIDUAL_WRITERS) else 1)


# Config type -> function (config, parameter name, number of blocks) -> standard deviation of that matrix.
INIT_STD: dict[type[InitConfig], Callable[..., float]] = {NormalInit: _normal, DepthScaledInit: _depth_scaled}


@torch.no_grad()
def init_weights(model: Decoder, cfg: InitConfig, seed: int) -> None:
    """Fill all parameters of ``model`` in place, from a generator of its own on the CPU.

    The same seed gives the same weights whatever else has drawn random numbers and on whatever device. Raises
    ConfigError when ``cfg`` is of an unregistered type.
    """
    if type(cfg) not in INIT_STD:
        raise ConfigError(f"init={cfg.name} has no entry in bitnet_train.nn.init.INIT_STD")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            continue
        if parameter.dim() < 2:
            gain = cfg.sub_norm_gain if name.endswith(SUB_NORMS) else 1.0
            parameter.fill_(0.0 if name.endswith("bias") else gain)
        else:
            std = INIT_STD[type(cfg)](cfg, name, model.cfg.layers)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
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
