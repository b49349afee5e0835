"""What a loaded ``transformers`` model holds for each weight, against the run's canonical checkpoint."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bitnet_train.export.canonical import CanonicalCheckpoint, assemble_decoder
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.huggingface.model_config import hf_name
from bitnet_train.export.huggingface.variant import Storage, Variant
from bitnet_train.export.huggingface.writer import effective_scale, stored_scale
from bitnet_train.export.report import VerificationReport
from bitnet_train.nn.decoder import Decoder
from bitnet_train.quant.weights import Codes

# The consumer of master weights sums in float32 and multiplies by a reciprocal, so a weight that lies on a threshold
# may fall on its other side; in bfloat16 the weights themselves are rounded (to eight bits).
MASTER_CODES_ALLOWED = {ExportDtype.float32: 1e-5, ExportDtype.bfloat16: 5e-3}
MASTER_SCALE_TOLERANCE = {ExportDtype.float32: 1e-5, ExportDtype.bfloat16: 5e-3}


def check_weights(report: VerificationReport, model: Any, canonical: CanonicalCheckpoint, variant: Variant) -> None:
    """Rows for the quantised layers: codes one by one, scales or dense weights exact to the export's number type."""
    if variant.storage is Storage.packed:
        _check_packed(report, model, canonical, variant)
        return
    _check_stored(report, model, canonical, variant)
    if variant.storage is Storage.master:
        _check_ternarised(report, model, canonical, variant)


def check_tensors(report: VerificationReport, model: Any, canonical: CanonicalCheckpoint, variant: Variant) -> None:
    """A row for every other tensor, exact to the export's number type."""
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wrong = [
        name
        for name in canonical.tensor_names
        if not _equal(parameters[hf_name(name)], canonical.tensor(name).to(variant.torch_dtype))
    ]
    _row(report, "unquantised tensors", wrong, len(canonical.tensor_names), variant)


def reference_decoder(model: Any, canonical: CanonicalCheckpoint, variant: Variant) -> Decoder:
    """Our decoder with the numbers that the export can hold, so that what is left of a difference is the consumer's."""
    if variant.storage is Storage.dense:
        canonical = canonical.with_float_activations()
    if variant.storage is not Storage.master:
        return canonical.decoder(
            number_type=variant.torch_dtype, scale_of=lambda scale: effective_scale(scale, variant)
        )
    # The consumer's own codes, which check_weights held against the run's.
    codes = {layer: _ternarised(model.get_submodule(hf_name(layer))) for layer in canonical.quantised}
    tensors = {n: canonical.tensor(n).to(variant.torch_dtype).float() for n in canonical.tensor_names}
    return assemble_decoder(canonical.cfg, canonical.spec, codes, tensors)


def _check_packed(report: VerificationReport, model: Any, canonical: CanonicalCheckpoint, variant: Variant) -> None:
    from transformers.integrations.bitnet import unpack_weights

    differing, total, wrong_scales, rounding = 0, 0, [], 0.0
    for layer, wanted, module in _layers(model, canonical):
        found = module.weight.detach().cpu()
        if found.dtype is torch.uint8:  # BitLinear unpacks in its forward pass
            found = unpack_weights(found, dtype=torch.float32)
        total += wanted.codes.numel()
        same_shape = found.shape == wanted.codes.shape
        differing += int((found != wanted.codes.to(found.dtype)).sum()) if same_shape else wanted.codes.numel()
        scale = getattr(module, "weight_scale", torch.tensor([torch.nan])).detach().cpu().float()
        exact = stored_scale(wanted.scale, variant).float()
        rounding = max(rounding, float((effective_scale(wanted.scale, variant) / wanted.scale - 1).abs().max()))
        if not torch.equal(scale, exact):
            wrong_scales.append(f"{layer}: {float(scale.flatten()[0]):.6g} instead of {float(exact[0]):.6g}")
    report.add("codes", f"{differing:,} of {total:,} differ", "0 differ", differing == 0)
    measured = f"{len(wrong_scales)} of {len(canonical.quantised)} differ"
    measured += f", {wrong_scales[0]}" if wrong_scales else ""
    if rounding > torch.finfo(torch.float32).eps:
        measured += f"; rounded to {variant.dtype.value} by up to {rounding:.1e}"
    convention = "inverse, " if variant.inverse_scales else ""
    report.add("scales", measured, f"{convention}exact to {variant.dtype.value}", not wrong_scales)


def _check_stored(report: VerificationReport, model: Any, canonical: CanonicalCheckpoint, variant: Variant) -> None:
    wrong = []
    for layer, codes, module in _layers(model, canonical):
        master = variant.storage is Storage.master
        wanted = canonical.tensor(f"{layer}.weight") if master else codes.dequantise()
        if not _equal(module.weight, wanted.to(variant.torch_dtype)):
            wrong.append(layer)
    name = "master weights" if variant.storage is Storage.master else "codes times scales"
    _row(report, name, wrong, len(canonical.quantised), variant)


def _check_ternarised(report: VerificationReport, model: Any, canonical: CanonicalCheckpoint, variant: Variant) -> None:
    differing, total, worst = 0, 0, 0.0
    for _, wanted, module in _layers(model, canonical):
        found = _ternarised(module)
        differing += int((found.codes != wanted.codes).sum())
        total += wanted.codes.numel()
        worst = max(worst, float((found.scale / wanted.scale - 1).abs().max()))
    allowed = MASTER_CODES_ALLOWED[variant.dtype]
    measured = f"{differing:,} of {total:,} differ"
    report.add("codes made by the consumer", measured, f"{allowed:.0e} of them", differing <= allowed * total)
    limit = MASTER_SCALE_TOLERANCE[variant.dtype]
    report.add("scales made by the consumer", f"{worst:.1e}", f"{limit:.0e}", worst <= limit)


def _ternarised(module: Any) -> Codes:
    """What the consumer's own quantiser makes of master weights in float32."""
    from transformers.integrations.bitnet import WeightQuant

    values = WeightQuant.apply(module.weight.detach().cpu().float())
    scale = values.abs().amax().reshape(1)
    return Codes(values.sign().to(torch.int8), scale if float(scale) else torch.full((1,), 1e-5))


def _layers(model: Any, canonical: CanonicalCheckpoint) -> Iterator[tuple[str, Codes, Any]]:
    for layer in canonical.quantised:
        yield layer, canonical.codes(layer), model.get_submodule(hf_name(layer))


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.detach().cpu().float(), wanted.float())


def _row(report: VerificationReport, name: str, wrong: list[str], count: int, variant: Variant) -> None:
    measured = f"{len(wrong)} of {count} differ" + (f", {wrong[0]}" if wrong else "")
    report.add(name, measured, f"exact to {variant.dtype.value}", not wrong)
