"""A folder of ``transformers`` read into our own decoder computes what was trained."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportDtype, LinearClass
from bitnet_train.export.huggingface.reader import load_export, read_model
from bitnet_train.export.huggingface.variant import Storage, Variant
from bitnet_train.export.huggingface.writer import direct_scale, stored_scale
from tests.conftest import make_text
from tests.export.conftest import Export, MakeExport, held_by

BF16 = torch.bfloat16


def read_logits(export: Export) -> Tensor:
    """Of the decoder that the folder is read into."""
    return export.run.logits(load_export(export.folder)[0])


def through_the_file(linear_class: str, dtype: ExportDtype) -> Callable[[Tensor], Tensor]:
    """A scale written and read again."""
    variant = Variant(Storage.packed, dtype, linear_class)
    return lambda scale: direct_scale(stored_scale(scale, variant), variant)


def with_rounded_masters(canonical: CanonicalCheckpoint) -> CanonicalCheckpoint:
    """The run as if its weights had been trained in bfloat16."""
    masters = {name: tensor.to(BF16).float() for name, tensor in canonical._masters.items()}
    return CanonicalCheckpoint(canonical.cfg, canonical.spec, masters, canonical.step, canonical.origin)


@pytest.mark.parametrize("kind", held_by("hf-packed"))
def test_packed_codes_give_the_runs_logits_bit_for_bit(kind: str, exported: MakeExport) -> None:
    export = exported(kind, linear_class=LinearClass.autobitlinear)
    assert torch.equal(read_logits(export), export.run.logits(export.run.canonical.decoder()))


@pytest.mark.parametrize("kind", held_by("hf-packed"))
def test_inverse_scales_come_back_to_within_one_rounding(kind: str, exported: MakeExport) -> None:
    export = exported(kind, linear_class=LinearClass.bitlinear)
    found = read_model(export.folder)
    for layer in export.run.canonical.quantised:
        wanted = export.run.canonical.codes(layer)
        assert torch.equal(found.codes[layer].codes, wanted.codes)
        assert torch.allclose(found.codes[layer].scale, wanted.scale, rtol=torch.finfo(torch.float32).eps, atol=0)
    same_scales = export.run.canonical.decoder(scale_of=through_the_file("bitlinear", ExportDtype.float32))
    assert torch.equal(read_logits(export), export.run.logits(same_scales))


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_a_bfloat16_export_reads_back_as_float32_of_rounded_tensors(linear_class: str, exported: MakeExport) -> None:
    export = exported("2b4t", dtype=ExportDtype.bfloat16, linear_class=LinearClass(linear_class))
    logits = read_logits(export)
    scale_of = through_the_file(linear_class, ExportDtype.bfloat16)
    rounded = export.run.canonical.decoder(number_type=BF16, scale_of=scale_of)
    assert logits.dtype is torch.float32
    assert torch.equal(logits, export.run.logits(rounded))


@pytest.mark.parametrize("kind", held_by("hf-master"))
def test_master_weights_are_ternarised_as_in_training(kind: str, exported: MakeExport) -> None:
    export = exported(kind, "hf-master")
    assert read_model(export.folder).storage is Storage.master
    assert torch.equal(read_logits(export), export.run.logits(export.run.canonical.decoder()))


def test_master_weights_in_bfloat16_are_ternarised_as_they_are_stored(exported: MakeExport) -> None:
    export = exported("2b4t", "hf-master", dtype=ExportDtype.bfloat16)
    rounded = with_rounded_masters(export.run.canonical).decoder()
    assert torch.equal(read_logits(export), export.run.logits(rounded))


@pytest.mark.parametrize("kind", held_by("hf-dense"))
def test_dense_weights_compute_what_the_codes_compute_on_float_inputs(kind: str, exported: MakeExport) -> None:
    export = exported(kind, "hf-dense")
    imported, canonical = read_model(export.folder), export.run.canonical
    assert imported.storage is Storage.dense
    assert not imported.codes
    for layer in canonical.quantised:
        assert torch.equal(imported.tensors[f"{layer}.weight"], canonical.codes(layer).dequantise())
    expected = export.run.logits(canonical.with_float_activations().decoder())
    # Scaling weights instead of sums rounds elsewhere.
    assert float((read_logits(export) - expected).norm() / expected.norm()) < 1e-5


def test_dense_weights_in_bfloat16_are_read_as_they_are_stored(exported: MakeExport) -> None:
    export = exported("2b4t", "hf-dense", dtype=ExportDtype.bfloat16)
    imported, canonical = read_model(export.folder), export.run.canonical
    for layer in canonical.quantised:
        wanted = canonical.codes(layer).dequantise().to(BF16).float()
        assert torch.equal(imported.tensors[f"{layer}.weight"], wanted)


@pytest.mark.parametrize("format_name", ["hf-packed", "hf-master", "hf-dense"])
def test_the_tokenizer_comes_back(format_name: str, exported: MakeExport) -> None:
    export = exported("2b4t", format_name)
    ours, theirs = export.run.tokenizer, load_export(export.folder)[1]
    assert (theirs.bos_id, theirs.eos_id) == (ours.bos_id, ours.eos_id)
    text = make_text(200) + "<|endoftext|>"
    assert theirs.encode(text) == ours.encode(text)
