"""Faults that only inverse scales, master weights or dense weights can have are rejected as well."""

from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from bitnet_train.export.config import ExportDtype, LinearClass
from tests.export.conftest import MakeExport, edit_json
from tests.export.huggingface.planting import (
    Plant,
    config_fault,
    flip_one_code,
    invert_scales,
    nudge,
    swap,
    tensor_fault,
)

pytest.importorskip("transformers")

UP = "model.layers.1.mlp.up_proj.weight"


class Fault(NamedTuple):
    """A kind of model, what is planted, and the checks that must fail."""

    kind: str
    plant: Plant
    checks: set[str]


def times(name: str, factor: float) -> Plant:
    """A tensor multiplied by a number."""
    return tensor_fault(lambda tensors: tensors[name].mul_(factor))


def add_to_one(name: str, step: float) -> Plant:
    """One weight moved."""
    return tensor_fault(lambda tensors: tensors[name][5, 7].add_(step))


def negate(tensors: dict[str, Tensor]) -> None:
    tensors[UP].neg_()


def without_quantisation(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))


def with_quantisation(folder: Path) -> None:
    quantisation = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=quantisation))


def quantisation_field(key: str, value: object) -> Plant:
    return config_fault("quantization_config", key, value=value)


LINEARS, MODE = "linears fed our inputs", "config: quantization_config.quantization_mode"
BITLINEAR = {
    "read as direct": Fault("llama", quantisation_field("linear_class", "autobitlinear"), {"scales", LINEARS}),
    "one scale not inverted": Fault("llama", invert_scales("layers.0.mlp.up_proj"), {"scales", LINEARS}),
    "no scale inverted": Fault("2b4t", invert_scales(""), {"scales", LINEARS}),
    "one scale nudged": Fault("llama", times(f"{UP}_scale", 1.00001), {"scales", LINEARS}),
    "one code": Fault("2b4t", tensor_fault(flip_one_code), {"codes", LINEARS}),
    "q and k swapped": Fault("2b4t", swap("q_proj", "k_proj"), {"codes", LINEARS}),
    "norm eps": Fault("llama", config_fault("rms_norm_eps", value=1e-6), {"RMSNorms fed quiet inputs"}),
    "rope theta": Fault(
        "llama", config_fault("rope_parameters", "rope_theta", value=1e4), {"attention fed our q, k, v"}
    ),
    "extra norm": Fault("llama", quantisation_field("use_rms_norm", True), {"loads"}),
    "online": Fault("llama", quantisation_field("quantization_mode", "online"), {MODE}),
}  # fmt: skip
MASTER = {
    "one weight nudged": Fault("2b4t", add_to_one(UP, 1e-3), {"master weights"}),
    "one weight, llama": Fault("llama", add_to_one(UP, 1e-3), {"master weights"}),
    "one layer scaled": Fault("2b4t", times(UP, 1.01), {"master weights", "scales made by the consumer"}),
    "one layer negated": Fault("2b4t", tensor_fault(negate), {"master weights", "codes made by the consumer"}),
    "q and k swapped": Fault("2b4t", swap("q_proj", "k_proj"), {"master weights", "codes made by the consumer"}),
    "offline": Fault("2b4t", quantisation_field("quantization_mode", "offline"), {"loads"}),
    "bitlinear": Fault("2b4t", quantisation_field("linear_class", "bitlinear"), {"loads"}),
    "a layer left dense": Fault(
        "2b4t", quantisation_field("modules_to_not_convert", ["lm_head", UP.removesuffix(".weight")]), {LINEARS}
    ),
    "not quantised": Fault("2b4t", without_quantisation, {LINEARS, "config: quantization_config.linear_class"}),
    "embedding": Fault("2b4t", nudge("model.embed_tokens.weight"), {"unquantised tensors"}),
    "a float layer": Fault("some float", nudge(UP), {"unquantised tensors", LINEARS}),
    "norm eps": Fault("2b4t", config_fault("rms_norm_eps", value=1e-6), {"RMSNorms fed quiet inputs"}),
}  # fmt: skip
DENSE = {
    "one weight nudged": Fault("2b4t", add_to_one(UP, 1e-4), {"codes times scales", LINEARS}),
    "one weight, llama": Fault("llama", add_to_one(UP, 1e-4), {"codes times scales"}),
    # What quantising ternary weights once more does to their scale.
    "quantised twice": Fault("2b4t", times(UP, 0.69), {"codes times scales", LINEARS}),
    "gate and up swapped": Fault("silu", swap("gate_proj", "up_proj"), {"codes times scales", LINEARS}),
    "quantised by the consumer": Fault("2b4t", with_quantisation, {MODE, LINEARS}),
    "head": Fault("gqa untied", nudge("lm_head.weight"), {"unquantised tensors", LINEARS}),
    "activation": Fault("2b4t", config_fault("hidden_act", value="silu"), {"FFN gating fed our inputs"}),
    "missing weight": Fault("2b4t", tensor_fault(lambda t: t.pop(UP)), {"loads"}),
}  # fmt: skip
CASES = [
    pytest.param(name, options, fault, id=f"{name} {label}")
    for name, options, faults in (
        ("hf-packed", {"linear_class": LinearClass.bitlinear}, BITLINEAR),
        ("hf-master", {}, MASTER),
        ("hf-dense", {}, DENSE),
    )
    for label, fault in faults.items()
]


@pytest.mark.parametrize(("format_name", "options", "fault"), CASES)
def test_a_planted_fault_is_rejected(
    format_name: str, options: dict[str, LinearClass], fault: Fault, exported: MakeExport, tmp_path: Path
) -> None:
    export = exported(fault.kind, format_name, **options).copy(tmp_path / format_name)
    fault.plant(export.folder)
    assert {row.name for row in export.verify().failed} >= fault.checks


@pytest.mark.parametrize("format_name", ["hf-packed", "hf-master", "hf-dense"])
def test_one_weight_is_seen_in_bfloat16_as_well(format_name: str, exported: MakeExport, tmp_path: Path) -> None:
    export = exported("2b4t", format_name, dtype=ExportDtype.bfloat16).copy(tmp_path / format_name)
    if format_name == "hf-packed":
        tensor_fault(flip_one_code)(export.folder)
    else:
        tensor_fault(lambda t: t[UP][5, 7].mul_(1.02))(export.folder)
    weights = {"hf-packed": "codes", "hf-master": "master weights", "hf-dense": "codes times scales"}
    assert weights[format_name] in {row.name for row in export.verify().failed}


def test_a_folder_of_another_format_is_rejected(exported: MakeExport, tmp_path: Path) -> None:
    formats = ("hf-packed", "hf-master", "hf-dense")
    for there in formats:
        for claimed in set(formats) - {there}:
            export = exported("2b4t", there).copy(tmp_path / f"{there} as {claimed}")
            assert export.run.verify(export.folder, claimed).failed


@pytest.mark.parametrize("format_name", ["hf-packed", "hf-master", "hf-dense"])
@pytest.mark.parametrize(("there", "run"), [("2b4t", "some float"), ("some float", "llama"), ("llama", "2b4t")])
def test_the_export_of_another_run_is_rejected(
    there: str, run: str, format_name: str, exported: MakeExport, tmp_path: Path
) -> None:
    export = exported(there, format_name).copy(tmp_path / "copy")
    assert exported(run, format_name).run.verify(export.folder, format_name).failed
