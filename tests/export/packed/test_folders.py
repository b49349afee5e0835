"""The format ``packed`` holds whatever a run can train, and gives it back bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import ConfigError
from bitnet_train.export.config import ExportConfig, ExportDtype, Packing
from bitnet_train.export.packed import writer
from bitnet_train.export.packed.layout import packed_bytes
from bitnet_train.export.packed.reader import is_packed, load_packed, read_packed
from bitnet_train.export.packed.writer import packed_size
from bitnet_train.nn.layout import parameter_table
from tests.conftest import make_text
from tests.export.conftest import KINDS, MakeExport, MakeRun, held_by

every_packing = pytest.mark.parametrize("packing", list(Packing))
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_it_holds_every_kind() -> None:
    assert held_by("packed") == list(KINDS)


@every_packing
@every_kind
def test_reading_back_gives_the_runs_logits_bit_for_bit(kind: str, packing: Packing, exported: MakeExport) -> None:
    export = exported(kind, "packed", packing=packing)
    expected = export.run.logits(export.run.canonical.decoder())
    assert torch.equal(export.run.logits(load_packed(export.folder)[0]), expected)


@every_kind
def test_codes_scales_and_layers_are_the_runs(kind: str, exported: MakeExport) -> None:
    export = exported(kind, "packed")
    found, canonical = read_packed(export.folder), export.run.canonical
    assert found.cfg == canonical.cfg
    assert set(found.codes) == set(canonical.quantised)
    for layer, codes in found.codes.items():
        assert torch.equal(codes.codes, canonical.codes(layer).codes)
        assert torch.equal(codes.scale, canonical.codes(layer).scale)
        quant, wanted = found.spec.for_layer(layer), canonical.quantised[layer]
        assert (quant.scheme, quant.activation_bits) == (wanted.scheme, wanted.activation_bits)


@every_kind
def test_a_right_export_passes(kind: str, exported: MakeExport, tmp_path: Path) -> None:
    for dtype in ExportDtype:
        export = exported(kind, "packed", dtype=dtype).copy(tmp_path / dtype.value)
        report = export.verify()
        assert not report.failed
        names = {check.name for check in report.checks}
        assert names >= {
            "codes", "scales", "unquantised tensors", "token ids of held-out text", "text decoded from ids",
            "held-out perplexity", "config: model", "config: quantised layers",
        }  # fmt: skip
        assert json.loads((export.folder / "verification.json").read_text())["passed"] is True


@every_packing
def test_a_right_export_of_either_packing_passes(packing: Packing, exported: MakeExport, tmp_path: Path) -> None:
    assert exported("mixed", "packed", packing=packing).copy(tmp_path / "copy").verify().passed


@every_packing
@pytest.mark.parametrize("dtype", list(ExportDtype))
@pytest.mark.parametrize("kind", ["2b4t", "mixed", "groups", "gqa untied", "unquantised"])
def test_sizes_are_those_of_the_file(kind: str, dtype: ExportDtype, packing: Packing, exported: MakeExport) -> None:
    export = exported(kind, "packed", dtype=dtype, packing=packing)
    canonical, tensors = export.run.canonical, load_file(export.folder / "model.safetensors")
    size = packed_size(canonical.cfg, canonical.spec, ExportConfig(dtype=dtype, packing=packing))
    parts = {name: tensor.nbytes for name, tensor in tensors.items()}
    assert size.total_bytes == sum(parts.values())
    assert size.code_bytes == sum(n for name, n in parts.items() if name.endswith((".codes", ".scale")))
    assert size.embedding_bytes == parts["embed_tokens.weight"] + parts.get("lm_head.weight", 0)
    assert size.code_weights == sum(canonical.codes(layer).codes.numel() for layer in canonical.quantised)
    for layer in canonical.quantised:
        rows = {p.layer_name: p.size for p in parameter_table(canonical.cfg)}
        assert parts[f"{layer}.codes"] == packed_bytes(rows[layer], packing)


def test_base_3_takes_the_bits_that_it_promises(exported: MakeExport) -> None:
    sizes = {
        packing: packed_size(
            *(lambda c: (c.cfg, c.spec))(exported("2b4t", "packed").run.canonical), ExportConfig(packing=packing)
        )
        for packing in Packing
    }
    assert sizes[Packing.base3].bits_per_code == pytest.approx(1.6, abs=0.02)
    assert sizes[Packing.two_bit].bits_per_code == pytest.approx(2.0, abs=0.02)
    assert 1.0 < sizes[Packing.base3].over_ideal < 1.03


def test_unquantised_tensors_are_rounded_to_the_exports_type_and_no_further(exported: MakeExport) -> None:
    export = exported("mixed", "packed", dtype=ExportDtype.bfloat16)
    found, canonical = read_packed(export.folder).tensors, export.run.canonical
    assert set(found) == set(canonical.tensor_names)
    for name in canonical.tensor_names:
        assert torch.equal(found[name], canonical.tensor(name).bfloat16().float())
    # Scales are never rounded.
    assert all(
        torch.equal(read_packed(export.folder).codes[n].scale, canonical.codes(n).scale) for n in canonical.quantised
    )


def test_the_tokenizer_comes_back(exported: MakeExport) -> None:
    export = exported("2b4t", "packed")
    ours, theirs = export.run.tokenizer, load_packed(export.folder)[1]
    text = make_text(200) + "<|endoftext|>"
    assert theirs.encode(text) == ours.encode(text)
    assert (theirs.bos_id, theirs.eos_id) == (ours.bos_id, ours.eos_id)


def test_the_folder_says_what_it_is(exported: MakeExport, tmp_path: Path) -> None:
    folder = exported("2b4t", "packed").folder
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert config["format"] == "bitnet_train-packed"
    assert config["version"] == 1
    assert json.loads((folder / "bitnet_train.json").read_text()) == {"format": "packed", "step": 7}
    assert is_packed(folder)
    assert not is_packed(exported("2b4t").folder)
    assert not is_packed(tmp_path)


def test_an_interrupted_export_leaves_the_old_one(
    small_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run("2b4t")
    folder = run.write(tmp_path / "export", "packed")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "packed_config", stop)
    with pytest.raises(KeyboardInterrupt):
        run.write(folder, "packed")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_does_not_exist(small_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export first"):
        small_run("2b4t").verify(tmp_path / "none", "packed")
