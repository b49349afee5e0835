"""Verification with the real transformers accepts what the writers write."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitnet_train.export.config import ExportDtype, LinearClass
from tests.export.conftest import MakeExport, held_by

pytest.importorskip("transformers")

PIECES = {
    "linears fed our inputs", "norm and linear as one", "RMSNorms fed our inputs", "RMSNorms fed quiet inputs",
    "attention fed our q, k, v",
    "FFN gating fed our inputs", "rotary positions",
}  # fmt: skip
WEIGHTS = {
    "hf-packed": {"codes", "scales"},
    "hf-master": {"master weights", "codes made by the consumer", "scales made by the consumer"},
    "hf-dense": {"codes times scales"},
}


def small_kinds(format_name: str) -> list[str]:
    """The kinds of a format, without the wide ones, which only differ to GGUF."""
    return [kind for kind in held_by(format_name) if "wide" not in kind]


def cases() -> list[Any]:
    """(format, kind, options): every format with every kind it holds, packed codes in both conventions."""
    packed = [
        ("hf-packed", kind, {"linear_class": linear_class})
        for kind in small_kinds("hf-packed")
        for linear_class in (LinearClass.autobitlinear, LinearClass.bitlinear)
        if kind in held_by("hf-packed", linear_class=linear_class)
    ]
    others = [(name, kind, {}) for name in ("hf-master", "hf-dense") for kind in small_kinds(name)]
    every = [*packed, *others]
    return [
        pytest.param(name, kind, {**options, "dtype": dtype}, id=" ".join([name, kind, *_words(options), dtype.value]))
        for name, kind, options in every
        for dtype in ExportDtype
    ]


def _words(options: dict[str, Any]) -> list[str]:
    return [value.value for value in options.values()]


@pytest.mark.parametrize(("format_name", "kind", "options"), cases())
def test_a_right_export_passes(
    format_name: str, kind: str, options: dict[str, Any], exported: MakeExport, tmp_path: Path
) -> None:
    export = exported(kind, format_name, **options).copy(tmp_path / format_name)
    report = export.verify()
    assert not report.failed
    report.raise_if_failed()
    checks = {check.name: check for check in report.checks}
    assert checks.keys() >= PIECES | WEIGHTS[format_name]
    assert checks.keys() >= {"unquantised tensors", "held-out perplexity", "text generated"}
    if format_name == "hf-packed":
        rounded = options["dtype"] is ExportDtype.bfloat16
        assert ("rounded to bfloat16" in checks["scales"].measured) == rounded
        assert ("inverse" in checks["scales"].tolerance) == (options["linear_class"] is LinearClass.bitlinear)
    assert report.sample.startswith("def ")
    saved = json.loads((export.folder / "verification.json").read_text())
    assert saved["passed"] is True
    assert saved["format"] == format_name
    assert saved["step"] == 7
    assert len(saved["checks"]) == len(report.checks)


def test_dense_weights_are_compared_without_8_bit_activations_and_the_runs_figure_is_shown(
    exported: MakeExport, tmp_path: Path
) -> None:
    report = exported("2b4t", "hf-dense").copy(tmp_path / "hf-dense").verify()
    row = next(check for check in report.checks if check.name == "held-out perplexity")
    assert "the run itself, with its 8-bit activations" in row.measured
