"""Penalties on master weights, with their gradients written out.

They depend on the weights and not on the batch, so their gradients are added once per optimizer step, whatever the
accumulation, a layer at a time and without a graph. Codes and scales are taken as constants: the ones that the forward
passes of the step have used. Nothing here waits for the device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.sharded_codes import shard_like, whole
from bitnet_train.quant.spec import LayerQuant, QuantSpec
from bitnet_train.quant.weights import Codes
from bitnet_train.training.regularisers.config import (
    CodeDistance,
    CodesRegulariser,
    CodeTarget,
    EntropyRegulariser,
    NoRegulariser,
    RegulariserConfig,
    ScheduledRegulariser,
    strength_at,
)

# A penalty of one layer: its value, and the gradient with respect to its master weight (out, in), both float32.
Penalty = tuple[Tensor, Tensor]


def fixed_point(codes: Codes, layer: LayerQuant) -> Tensor:
    """The magnitude m, in units of the scale, where weights ``c * m * s`` give the scale s back, (groups, 1).

    The scale is the mean magnitude: m = 1 / mean |c|, which for codes of -1, 0 and 1 is one over the share of nonzero
    ones. LSQ's ``2 * mean / sqrt(largest)`` (symmetric, absmean): m = sqrt(largest) / (2 * mean |c|). The largest
    magnitude, the median (of codes that are mostly not 0) and a learned scale, which the weights do not move: m = 1.
    """
    if layer.trainable_scale or layer.statistic != "absmean":
        return torch.ones_like(codes.scale)[:, None]
    magnitudes = codes.codes.float().abs().reshape(len(codes.scale), -1)
    mean = magnitudes.mean(1, keepdim=True).clamp(min=1 / magnitudes.shape[1])
    return (0.5 * math.sqrt(layer.largest_code) if layer.scheme == "symmetric" else 1.0) / mean


def code_penalty(
    weight: Tensor, codes: Codes, distance: CodeDistance, target: CodeTarget, layer: LayerQuant
) -> Penalty:
    """The mean over weights of ``(w / s - c * m)^2`` or ``|w / s - c * m|``, with s the scale of the weight's group.

    weight (out, in). With ``target=scale``, m = 1: the mean squared quantisation error, a regulariser of arXiv
    1809.00095, here in units of each group's own scale, so that layers of any spread count alike. With
    ``target=fixed_point``, m is :func:`fixed_point` of ``layer``: where all weights lie there, codes and scale stay.
    With n weights::

        d/dw = 2 * (w / s - c * m) / (s * n)     or     sign(w / s - c * m) / (s * n)
    """
    scale = codes.row_scale()[:, None]
    wanted = codes.codes.float()
    if target is CodeTarget.fixed_point:
        wanted = (wanted.reshape(len(codes.scale), -1) * fixed_point(codes, layer)).reshape(wanted.shape)
    off = weight.detach().float() / scale - wanted
    if distance is CodeDistance.squared:
        return off.square().mean(), off * (2 / (off.numel() * scale))
    return off.abs().mean(), off.sign() / (off.numel() * scale)


def entropy_penalty(
    weight: Tensor, row_scale: Tensor, threshold: float, floor: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """``max(0, floor - H)`` with H the entropy in bits of a layer's soft code histogram.

    weight (out, in), row_scale (out,). Soft assignments and the entropy of their histogram are those of arXiv
    1704.00648, section 3: a weight u = w / s belongs to code k by the softmax q_k of ``(k * u - |k| * threshold) /
    temperature``, whose steps lie where the quantiser's are and sharpen to them as the temperature goes to 0; at a
    threshold of 0.5 it is the softmax of ``-(u - k)^2 / (2 * temperature)``. With n weights::

        p_k = mean q_k      H = -sum p_k * log2(p_k)
        dH/dw = -sum_k log2(p_k) * q_k * (k - (q_1 - q_-1)) / (temperature * s * n)
    """
    scale = row_scale[:, None]
    u = weight.detach().float() / scale
    q = torch.softmax(torch.stack([-u - threshold, torch.zeros_like(u), u - threshold]) / temperature, dim=0)
    p = q.mean(dim=(1, 2))
    bits = -torch.log2(p.clamp(min=torch.finfo(p.dtype).tiny))
    entropy = (p * bits).sum()
    mean = q[2] - q[0]
    # The sum over k of bits_k * q_k * (k - mean).
    slope = bits[2] * q[2] - bits[0] * q[0] - (bits[:, None, None] * q).sum(0) * mean
    below = (entropy < floor).to(p.dtype)
    return (floor - entropy).clamp(min=0), slope * (-below / (temperature * u.numel() * scale))


class Regulariser:
    """A penalty on every BitLinear layer that it is for, averaged over them.

    While a layer has other codes than it will ship with (the stages of quant/progressive=bits), it is left alone.
    """

    def __init__(self, cfg: ScheduledRegulariser, model: nn.Module, spec: QuantSpec, total_steps: int) -> None:
        self.cfg, self.total_steps = cfg, total_steps
        found = [(m, spec.for_layer(name)) for name, m in model.named_modules() if isinstance(m, BitLinear)]
        ternary_only = isinstance(cfg, EntropyRegulariser)
        # Each layer with the scheme and bits that it has in the end.
        self.layers = [(m, (q.scheme, q.bits)) for m, q in found if q.scheme == "ternary" or not ternary_only]

    def penalty(self, layer: BitLinear) -> Penalty:
        """Of one layer, without the strength."""
        return PENALTIES[type(self.cfg)](self.cfg, layer)

    @torch.no_grad()
    def add_gradients(self, step: int) -> Tensor | None:
        """Add the penalty's gradients to those of the weights, at optimizer step ``step`` (from 0).

        Returns the penalty with its strength, a scalar that stays on the device; None while the strength is 0.
        """
        strength = strength_at(self.cfg, step, self.total_steps)
        if not strength:
            return None
        values = []
        for layer, final in self.layers:
            if (layer.quant.scheme, layer.quant.bits) != final:
                continue
            value, grad = self.penalty(layer)
            values.append(value)
            grad = shard_like(layer.weight, (grad * (strength / len(self.layers))).to(layer.weight.dtype))
            if layer.weight.grad is None:
                layer.weight.grad = grad
            else:
                layer.weight.grad += grad
        return strength * torch.stack(values).sum() / len(self.layers) if values else None


def _codes(cfg: CodesRegulariser, layer: BitLinear) -> Penalty:
    return code_penalty(whole(layer.weight), layer.quantised(), cfg.distance, cfg.target, layer.quant)


def _entropy(cfg: EntropyRegulariser, layer: BitLinear) -> Penalty:
    row_scale = layer.quantised().row_scale()
    return entropy_penalty(
        whole(layer.weight), row_scale, layer.quant.threshold, min(cfg.floor, math.log2(3)), cfg.temperature
    )


# Add a regulariser: a dataclass in config.REGULARISER_CONFIGS, and a function (config, layer) -> Penalty here.
PENALTIES: dict[type[RegulariserConfig], Callable[..., Penalty]] = {
    CodesRegulariser: _codes,
    EntropyRegulariser: _entropy,
}


def build_regulariser(
    cfg: RegulariserConfig, model: nn.Module, spec: QuantSpec, total_steps: int
) -> Regulariser | None:
    """The regulariser of a configuration over the layers of ``model``, which ``spec`` describes in the end; or None."""
    if isinstance(cfg, NoRegulariser):
        return None
    if type(cfg) not in PENALTIES or not isinstance(cfg, ScheduledRegulariser):
        raise ConfigError(
            f"regulariser={cfg.name} has no entry in bitnet_train.training.regularisers.penalties.PENALTIES"
        )
    return Regulariser(cfg, model, spec, total_steps)
