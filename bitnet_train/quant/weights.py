"""Weights to codes and scales. Plain PyTorch; the oracle for every fused kernel.

A *scale* is always direct: ``value = code * scale``. Statistics are taken from the master weights before anything is
quantised, and the same scale serves both directions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_train.quant.spec import LayerQuant

SCALE_FLOOR = 1e-5


class Codes(NamedTuple):
    """Quantised weights: ``codes`` int8 of shape (out, in) and ``scale`` float32 of shape (groups,)."""

    codes: Tensor
    scale: Tensor

    def row_scale(self) -> Tensor:
        """One float32 scale per output row, shape (out,): each group's scale repeated over its rows."""
        return self.scale[:, None].expand(-1, self.codes.shape[0] // self.scale.shape[0]).reshape(-1)

    def dequantise(self) -> Tensor:
        """The float32 weights that the codes stand for, shape (out, in)."""
        return self.codes.float() * self.row_scale()[:, None]


def absmean_scale(weight: Tensor, groups: int) -> Tensor:
    """Mean of ``|W|`` per group of rows, float32 of shape (groups,), clamped at 1e-5.

    Summed in float64 and rounded once, so that neither the order of the sum nor the device flips a code.
    A NaN or infinite weight makes the scale NaN or infinite, so that it shows in every output of the group.
    """
    grouped = weight.detach().float().reshape(groups, -1)
    return grouped.abs().sum(dim=1, dtype=torch.float64).div(grouped.shape[1]).float().clamp(min=SCALE_FLOOR)


def absmedian_scale(weight: Tensor, groups: int) -> Tensor:
    """Median of ``|W|`` per group of rows (the lower one of two), float32 of shape (groups,), clamped at 1e-5.

    The scale of "b1.58 Reloaded" (arXiv 2407.09527, section 3). A NaN weight makes the scale NaN.
    """
    return weight.detach().float().reshape(groups, -1).abs().median(dim=1).values.clamp(min=SCALE_FLOOR)


def symmetric_scale(weight: Tensor, groups: int, largest: int, statistic: str) -> Tensor:
    """Scale of weights whose codes go from ``-largest`` to ``largest``, float32 of shape (groups,), at least 1e-5.

    ``absmax``: ``max|W| / largest``, so that nothing is clipped. ``absmean``: ``2 * mean|W| / sqrt(largest)``, what LSQ
    starts from (arXiv 1902.08153, section 2.1), which clips a few large weights for finer steps.
    """
    if statistic == "absmean":
        mean = absmean_scale(weight, groups)
        return (mean * (2.0 / math.sqrt(largest))).clamp(min=SCALE_FLOOR)
    absmax = torch.linalg.vector_norm(weight.detach().float().reshape(groups, -1), torch.inf, dim=1)
    return (absmax / torch.full_like(absmax, float(largest))).clamp(min=SCALE_FLOOR)


def statistic_scale(weight: Tensor, layer: LayerQuant) -> Tensor:
    """The scale of a master weight (out, in) by the layer's own statistic, float32 of shape (groups,)."""
    groups = layer.group_count(weight.shape[0])
    if layer.scheme == "symmetric":
        return symmetric_scale(weight, groups, layer.largest_code, layer.statistic)
    return (absmedian_scale if layer.statistic == "absmedian" else absmean_scale)(weight, groups)


def ternarise(weight: Tensor, threshold: float = 0.5, groups: int = 1, scale: Tensor | None = None) -> Codes:
    """Master weight (out, in) to ternary codes and one scale per group of rows.

    With ``scale = mean|W|`` of the group, unless it is given::

        code = sign(W)  if |W| / scale > threshold  else  0

    At the default ``threshold`` of 0.5 this is ``clip(round(W / scale), -1, 1)`` with rounding half to even, the
    absmean quantiser of BitNet b1.58 (arXiv 2402.17764, equations 1-3). The scale does not depend on the threshold.
    """
    scale = absmean_scale(weight, groups) if scale is None else scale
    ratio = weight.detach().float().reshape(groups, -1) / scale[:, None]
    codes = (ratio > threshold).to(torch.int8) - (ratio < -threshold).to(torch.int8)
    return Codes(codes.reshape(weight.shape), scale)


def binarise(weight: Tensor, groups: int = 1, scale: Tensor | None = None) -> Codes:
    """Master weight (out, in) to codes in {-1, 1} and one scale per group of rows.

    ``code = sign(W - alpha)`` with ``alpha = mean W`` and sign(0) = +1, ``scale = beta = mean|W|`` unless it is given,
    all per group (BitNet, arXiv 2310.11453, equations 1-3 and 12).
    """
    grouped = weight.detach().float().reshape(groups, -1)
    alpha = grouped.sum(dim=1, dtype=torch.float64).div(grouped.shape[1]).float()
    codes = torch.where(grouped >= alpha[:, None], 1, -1).to(torch.int8)
    return Codes(codes.reshape(weight.shape), absmean_scale(weight, groups) if scale is None else scale)


def round_to_codes(weight: Tensor, scale: Tensor, largest: int) -> Codes:
    """``clip(round(W / scale), -largest, largest)``, half to even: b-bit symmetric codes (out, in)."""
    ratio = weight.detach().float().reshape(len(scale), -1) / scale[:, None]
    # What is not finite has a scale that says so; the codes are arbitrary.
    codes = torch.nan_to_num(torch.round(ratio)).clamp(-largest, largest).to(torch.int8)
    return Codes(codes.reshape(weight.shape), scale)


# Add a quantiser: a function (master weight, LayerQuant, scale) -> Codes, and its name in config.WeightScheme.
WEIGHT_QUANTISERS: dict[str, Callable[[Tensor, LayerQuant, Tensor], Codes]] = {
    "ternary": lambda weight, layer, scale: ternarise(weight, layer.threshold, len(scale), scale),
    "binary": lambda weight, layer, scale: binarise(weight, len(scale), scale),
    "symmetric": lambda weight, layer, scale: round_to_codes(weight, scale, layer.largest_code),
}


@torch.no_grad()
def quantise_weight(weight: Tensor, layer: LayerQuant, scale: Tensor | None = None) -> Codes:
    """Codes and scales of a master weight (out, in) under ``layer``.

    ``scale`` float32 (groups,) is a learned one, in the place of the layer's statistic. A group with a weight that is
    not finite has a scale that is not finite either, so that it shows in every output. Raises ValueError for a float
    layer and ConfigError when the groups do not divide the rows.
    """
    if not layer.quantised:
        raise ValueError("a float layer has no codes")
    blind = scale is not None or layer.statistic == "absmedian"
    if scale is None:
        scale = statistic_scale(weight, layer)
    if blind:  # neither a learned scale nor a median depends on every weight
        absmax = torch.linalg.vector_norm(weight.detach().float().reshape(len(scale), -1), torch.inf, dim=1)
        scale = torch.where(torch.isfinite(absmax), scale, torch.nan)
    return WEIGHT_QUANTISERS[layer.scheme](weight, layer, scale.detach().float().clamp(min=SCALE_FLOOR))


def _groups_of_rows(layer: LayerQuant, first: int, count: int, rows: int, device: torch.device) -> Tensor:
    """The group of each of ``count`` rows from row ``first`` on of a weight of ``rows`` rows, int64 (count,)."""
    return torch.arange(first, first + count, device=device) // (rows // layer.group_count(rows))


@torch.no_grad()
def row_statistics(part: Tensor, layer: LayerQuant, first: int, rows: int) -> Tensor:
    """What rows ``first`` and following, ``part`` (n, in), of a master weight (``rows``, in) add to its statistics.

    float64 (1, groups), or (2, groups) for binary weights: the sums of ``|W|``, and of ``W``. Sums of the parts give
    :func:`scales_from_statistics`. A weight that is not finite makes its group's sum so.
    """
    groups = layer.group_count(rows)
    values = part.detach().float()
    sums = [values.abs().sum(dim=1, dtype=torch.float64)]
    if layer.scheme == "binary":
        sums.append(values.sum(dim=1, dtype=torch.float64))
    where = _groups_of_rows(layer, first, len(part), rows, part.device)
    return torch.zeros(len(sums), groups, dtype=torch.float64, device=part.device).index_add_(
        1, where, torch.stack(sums)
    )


def scales_from_statistics(sums: Tensor, size: int, layer: LayerQuant) -> tuple[Tensor, Tensor]:
    """Scales and means float32 (groups,) from the whole weight's :func:`row_statistics`, ``size`` weights in a group.

    The scales are those of :func:`statistic_scale`, for the statistic absmean.
    """
    means = sums.div(size).float()
    scale = means[0].clamp(min=SCALE_FLOOR)
    if layer.scheme == "symmetric":
        scale = (scale * (2.0 / math.sqrt(layer.largest_code))).clamp(min=SCALE_FLOOR)
    return scale, means[-1]


@torch.no_grad()
def rows_to_codes(part: Tensor, layer: LayerQuant, scale: Tensor, mean: Tensor, first: int, rows: int) -> Tensor:
    """Codes int8 (n, in) of rows ``first`` and following of a master weight (``rows``, in), given its whole scales and
    means (:func:`scales_from_statistics`): the same rows of what :func:`quantise_weight` gives for all of it."""
    if not len(part):  # more processes than rows
        return part.new_empty(part.shape, dtype=torch.int8)
    where = _groups_of_rows(layer, first, len(part), rows, part.device)
    if layer.scheme == "binary":
        return torch.where(part.detach().float() >= mean[where][:, None], 1, -1).to(torch.int8)
    return WEIGHT_QUANTISERS[layer.scheme](part, layer, scale[where]).codes


@torch.no_grad()
def scale_gradient(weight: Tensor, grad: Tensor, codes: Codes, largest: int) -> Tensor:
    """Gradient of a learned scale, float32 (groups,), from the gradient of the weights (LSQ, arXiv 1902.08153, eq. 3).

    ``weight``, ``grad`` (out, in): the master weight and its straight-through gradient, which is that of the values
    ``code * scale``. Per weight ``d value / d scale`` is ``code - W / scale`` inside the range of the codes and
    ``code`` beyond it. The sum over a group is divided by ``sqrt(weights in the group * largest)``, so that scales
    move at the pace of weights (section 2.2 there).
    """
    groups = len(codes.scale)
    ratio = weight.detach().float().reshape(groups, -1) / codes.scale[:, None]
    values = codes.codes.reshape(groups, -1).float()
    slope = torch.where(ratio.abs() <= largest, values - ratio, values)
    total = (grad.float().reshape(groups, -1) * slope).sum(dim=1)
    return total / math.sqrt(ratio.shape[1] * largest)


@torch.no_grad()
def masters_from_codes(codes: Codes, layer: LayerQuant) -> Tensor:
    """Master weights float32 (out, in) that :func:`quantise_weight` turns into exactly these codes and scales.

    Ternary: all nonzero weights of a group get one magnitude, scale / share of nonzeros, whose mean is the scale; some
    of them the next larger float32, so that the mean rounds to the scale itself. Binary: the scale. A group without any
    nonzero code becomes zero, whatever its scale was, which nothing depends on. Symmetric, and layers whose scale is
    learned or the median: ``code * scale``; with a learned scale they are those codes under ``codes.scale`` as that
    scale. Raises ValueError when the quantiser of ``layer`` does not give the codes back (a binary layer of equal
    signs, a threshold above one, symmetric codes that do not reach the largest).
    """
    if layer.trainable_scale:
        plain = codes.dequantise()
        if not torch.equal(quantise_weight(plain, layer, codes.scale).codes, codes.codes):
            raise ValueError("these codes are none that the layer's quantiser makes")
        return plain
    if layer.scheme == "symmetric" or layer.statistic == "absmedian":
        plain = codes.dequantise()
        found = quantise_weight(plain, layer)
        if not torch.equal(found.codes, codes.codes) or not torch.equal(found.scale, codes.scale):
            raise ValueError("these codes are none that the layer's quantiser makes")
        return plain
    groups = len(codes.scale)
    signs = codes.codes.reshape(groups, -1).float()
    masters = torch.empty_like(signs)
    for group in range(groups):
        nonzero = signs[group].nonzero().flatten()
        scale = float(codes.scale[group])
        if not len(nonzero):
            masters[group] = 0.0
            continue
        total = scale * signs.shape[1]
        magnitude = torch.tensor(total / len(nonzero), dtype=torch.float32)
        if float(magnitude) * len(nonzero) > total:
            magnitude = torch.nextafter(magnitude, torch.tensor(0.0))
        above = torch.nextafter(magnitude, torch.tensor(torch.inf))
        raised = round((total - float(magnitude) * len(nonzero)) / float(above - magnitude))
        masters[group] = signs[group] * magnitude
        masters[group, nonzero[:raised]] = signs[group, nonzero[:raised]] * above
    masters = masters.reshape(codes.codes.shape)
    again = quantise_weight(masters, layer)
    if not torch.equal(again.codes, codes.codes) or not bool(
        ((again.scale == codes.scale) | ~codes.codes.reshape(groups, -1).any(1)).all()
    ):
        raise ValueError("these codes are none that the layer's quantiser makes")
    return masters
