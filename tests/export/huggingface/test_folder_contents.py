"""What lies in a folder for ``transformers``: the tensors, the configuration, the sizes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import ConfigError
from bitnet_train.export.config import ExportConfig, ExportDtype, LinearClass
from bitnet_train.export.folder import read_step
from bitnet_train.export.huggingface import writer
from bitnet_train.export.huggingface.model_config import hf_name
from bitnet_train.export.writers import FORMATS
from bitnet_train.quant.packing import unpack_2bit
from tests.export.conftest import MakeExport, MakeRun

STORAGES = ("hf-packed", "hf-master", "hf-dense")


@pytest.mark.parametrize("dtype", list(ExportDtype))
def test_tensors_are_the_canonical_ones_in_the_exports_type(dtype: ExportDtype, exported: MakeExport) -> None:
    export = exported("gqa untied", dtype=dtype)
    canonical, tensors = export.run.canonical, load_file(export.folder / "model.safetensors")
    number_type = getattr(torch, dtype.value)
    for layer in canonical.quantised:
        codes = canonical.codes(layer)
        assert torch.equal(unpack_2bit(tensors.pop(f"{hf_name(layer)}.weight")), codes.codes)
        assert torch.equal(tensors.pop(f"{hf_name(layer)}.weight_scale"), codes.scale.to(number_type))
    assert set(tensors) == {hf_name(name) for name in canonical.tensor_names}
    for name in canonical.tensor_names:
        assert torch.equal(tensors[hf_name(name)], canonical.tensor(name).to(number_type))


@pytest.mark.parametrize("dtype", list(ExportDtype))
def test_bitlinear_gets_the_inverse_of_the_scale(dtype: ExportDtype, exported: MakeExport) -> None:
    export = exported("2b4t", linear_class=LinearClass.bitlinear, dtype=dtype)
    tensors = load_file(export.folder / "model.safetensors")
    for layer in export.run.canonical.quantised:
        inverse = 1 / export.run.canonical.codes(layer).scale
        assert torch.equal(tensors[f"{hf_name(layer)}.weight_scale"], inverse.to(getattr(torch, dtype.value)))


@pytest.mark.parametrize("dtype", list(ExportDtype))
def test_master_and_dense_folders_hold_weights_under_the_runs_names(dtype: ExportDtype, exported: MakeExport) -> None:
    for format_name in ("hf-master", "hf-dense"):
        export = exported("llama", format_name, dtype=dtype)
        canonical, tensors = export.run.canonical, load_file(export.folder / "model.safetensors")
        for layer in canonical.quantised:
            master = canonical.tensor(f"{layer}.weight")
            wanted = master if format_name == "hf-master" else canonical.codes(layer).dequantise()
            assert torch.equal(tensors.pop(f"{hf_name(layer)}.weight"), wanted.to(getattr(torch, dtype.value)))
        assert set(tensors) == {hf_name(name) for name in canonical.tensor_names}


def test_every_field_of_the_configuration_is_written(exported: MakeExport) -> None:
    config = json.loads((exported("mixed").folder / "config.json").read_text())
    assert config["architectures"] == ["BitNetForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["max_position_embeddings"] == 128
    assert config["dtype"] == config["torch_dtype"] == "float32"
    quantisation = config["quantization_config"]
    assert quantisation["linear_class"] == "autobitlinear"
    assert quantisation["quantization_mode"] == "offline"
    skipped = {"lm_head", *(f"model.layers.{i}.self_attn.k_proj" for i in range(2))}
    skipped |= {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(quantisation["modules_to_not_convert"]) == skipped


@pytest.mark.parametrize(
    ("kind", "format_name", "linear_class", "expected"),
    [
        ("2b4t", "hf-packed", LinearClass.auto, ("autobitlinear", "offline")),
        ("llama", "hf-packed", LinearClass.auto, ("bitlinear", "offline")),
        ("llama", "hf-packed", LinearClass.autobitlinear, ("autobitlinear", "offline")),
        ("2b4t", "hf-packed", LinearClass.bitlinear, ("bitlinear", "offline")),
        # Only AutoBitLinear quantises in the forward pass, whatever the packed format was asked to be.
        ("llama", "hf-master", LinearClass.bitlinear, ("autobitlinear", "online")),
        ("llama", "hf-dense", LinearClass.bitlinear, None),
    ],
)
def test_the_consumers_class_follows_format_norms_and_wish(
    kind: str, format_name: str, linear_class: LinearClass, expected: tuple[str, str] | None, exported: MakeExport
) -> None:
    folder = exported(kind, format_name, linear_class=linear_class).folder
    quantisation = json.loads((folder / "config.json").read_text()).get("quantization_config")
    found = quantisation and (quantisation["linear_class"], quantisation["quantization_mode"])
    assert found == expected


@pytest.mark.parametrize("format_name", STORAGES)
@pytest.mark.parametrize("dtype", list(ExportDtype))
def test_sizes_are_those_of_the_file(format_name: str, dtype: ExportDtype, exported: MakeExport) -> None:
    export = exported("gqa untied", format_name, dtype=dtype)
    canonical, tensors = export.run.canonical, load_file(export.folder / "model.safetensors")
    size = FORMATS[format_name].size(canonical.cfg, canonical.spec, ExportConfig(dtype=dtype))
    assert size.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert size.embedding_bytes == tensors["lm_head.weight"].nbytes + tensors["model.embed_tokens.weight"].nbytes
    assert size.code_weights == sum(canonical.codes(layer).codes.numel() for layer in canonical.quantised)
    bits = 8 * tensors["lm_head.weight"].element_size()
    assert (2 if format_name == "hf-packed" else bits) <= size.bits_per_code < bits + 0.01
    assert size.bits_per_code < 2.01 or format_name != "hf-packed"


@pytest.mark.parametrize("format_name", STORAGES)
def test_the_folder_says_what_it_was_made_from(format_name: str, exported: MakeExport) -> None:
    folder = exported("2b4t", format_name).folder
    assert json.loads((folder / "bitnet_train.json").read_text()) == {"format": format_name, "step": 7}
    assert read_step(folder) == 7


def test_an_interrupted_export_leaves_the_old_one(
    small_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run("2b4t")
    folder = run.write(tmp_path / "export")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_tokenizer", stop)
    with pytest.raises(KeyboardInterrupt):
        run.write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_cannot_be_written_is_one_sentence(small_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        small_run("2b4t").write(tmp_path / "file" / "export")
