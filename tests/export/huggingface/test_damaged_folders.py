"""Reading an export that is damaged: one sentence each."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.export.folder import read_json
from bitnet_train.export.huggingface import reader
from tests.export.conftest import MakeExport, edit_json, edit_tensors
from tests.export.hostile import refused

GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture
def export(exported: MakeExport, tmp_path: Path) -> Path:
    return exported("2b4t").copy(tmp_path / "export").folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(name: str, export: Path) -> None:
    (export / name).unlink()
    refused(export, f"{name} is missing")


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_weights(keep: int, export: Path) -> None:
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(export, "model.safetensors is damaged")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_bad_json(name: str, content: str, export: Path) -> None:
    (export / name).write_text(content)
    refused(export, f"{name} is damaged")


def test_json_of_another_tokenizer_format(export: Path) -> None:
    (export / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    refused(export, "tokenizer.json is damaged")


def test_a_tokenizer_without_any_token(export: Path) -> None:
    def empty(content: dict[str, Any]) -> None:
        content["added_tokens"], content["post_processor"] = [], None
        content["model"].update(vocab={}, merges=[])

    edit_json(export / "tokenizer.json", empty)
    refused(export, "tokenizer.json is damaged .its vocabulary is empty")


def test_a_tokenizer_that_its_library_panics_on(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 calls a panic in Rust, which is no Exception."""

    def panic(_: str) -> None:
        raise PanicException("range end index 14\nout of range")

    monkeypatch.setattr(reader.Tokenizer, "from_file", panic)
    refused(export, "tokenizer.json is damaged")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_is_longer_than_any_such_file(name: str, export: Path) -> None:
    with (export / name).open("r+b") as file:  # sparse: no such bytes on the disk
        file.truncate(300 << 20)
    refused(export, "bytes, which no such file has")


def test_a_long_json_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}" + " " * 200)
    with pytest.raises(ConfigError, match="202 bytes"):
        read_json(tmp_path / "x.json", limit=100)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2'"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("hidden_act", ["silu"], "hidden_act is"),
        ("hidden_size", None, "hidden_size is None"),
        ("hidden_size", "64", "hidden_size is '64'"),
        ("hidden_size", True, "hidden_size is True"),
        ("hidden_size", -64, "must be at least 1"),
        ("hidden_size", 128, "head_dim is 16"),
        ("intermediate_size", 128, "has the shape"),
        ("num_hidden_layers", 9_999, "too few for the 9,999 blocks"),
        ("num_hidden_layers", 1, "not part of the model"),
        ("num_hidden_layers", 3, "is missing"),
        ("num_attention_heads", 7, "does not divide"),
        ("head_dim", 128, "head_dim is 128"),
        ("vocab_size", 10**12, "has the shape"),
        ("max_position_embeddings", 10**12, "is the most that is read"),
        ("rms_norm_eps", float("nan"), "not a finite number"),
        ("rms_norm_eps", 0, "must both be positive"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "only plain rotary positions"),
        ("rope_parameters", 3, "only plain rotary positions"),
        ("attention_bias", True, "has biases"),
        ("tie_word_embeddings", False, "lm_head.weight is missing"),
        ("bos_token_id", 10**6, "must be ids below 416"),
        ("eos_token_id", None, "must be ids below 416"),
        ("eos_token_id", [], "must be ids below 416"),
        pytest.param("rms_norm_eps", 10**400, "not a finite number", id="more than a float holds"),
        pytest.param("model_type", "x" * 10**6, "model_type is 'xxx", id="endless"),
        ("quantization_config", None, "weight_scale is not part of the model"),
        ("quantization_config", 3, "quantization_config is 3"),
    ],
)
def test_fields_that_cannot_be(key: str, value: Any, pattern: str, export: Path) -> None:
    edit_json(export / "config.json", lambda config: config.update({key: value}))
    refused(export, pattern)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("quant_method", "gptq", "quantization_config.quant_method is 'gptq'"),
        ("linear_class", "linear", "quantization_config.linear_class is 'linear'"),
        ("linear_class", ["bitlinear"], "quantization_config.linear_class is"),
        ("quantization_mode", "later", "quantization_config.quantization_mode is 'later'"),
        ("use_rms_norm", True, "quantization_config.use_rms_norm is True"),
        ("modules_to_not_convert", "lm_head", "quantization_config.modules_to_not_convert is no list"),
        ("modules_to_not_convert", [3], "quantization_config.modules_to_not_convert is no list"),
        ("modules_to_not_convert", ["x"] * 20_000, "quantization_config.modules_to_not_convert is no list"),
        # Read, but not what lies in the folder.
        ("quantization_mode", "online", "is not part of the model in config.json"),
    ],
)
def test_other_kinds_of_quantisation(key: str, value: Any, pattern: str, export: Path) -> None:
    edit_json(export / "config.json", lambda config: config["quantization_config"].update({key: value}))
    refused(export, pattern)


def test_master_weights_for_a_class_that_does_not_quantise_them(export: Path) -> None:
    wanted = {"quantization_mode": "online", "linear_class": "bitlinear"}
    edit_json(export / "config.json", lambda config: config["quantization_config"].update(wanted))
    refused(export, "online needs linear_class autobitlinear, not bitlinear")


@pytest.mark.parametrize("format_name", ["hf-master", "hf-dense"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(format_name: str, number: float, exported: MakeExport, tmp_path: Path) -> None:
    folder = exported("2b4t", format_name).copy(tmp_path / "copy").folder
    edit_tensors(folder, lambda tensors: tensors[f"{GATE}.weight"][3, 4:5].fill_(number))
    refused(folder, f"{GATE}.weight holds numbers that are not finite")


@pytest.mark.parametrize("format_name", ["hf-master", "hf-dense"])
def test_weights_that_are_packed_where_they_should_be_numbers(
    format_name: str, exported: MakeExport, tmp_path: Path
) -> None:
    folder = exported("2b4t", format_name).copy(tmp_path / "copy").folder
    edit_tensors(folder, lambda t: t.update({f"{GATE}.weight": t[f"{GATE}.weight"].to(torch.uint8)}))
    refused(folder, "is of type U8, which does not belong there")


def test_names_with_line_ends_stay_on_one_line(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({"a\nb": torch.ones(1)}))
    refused(export, "not part of the model")


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_scales_that_cannot_be(scale: float, export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors[f"{GATE}.weight_scale"].fill_(scale))
    refused(export, "a scale is positive and finite")


def test_codes_outside_the_three(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors[f"{GATE}.weight"][3, 4:5].fill_(0b11))
    refused(export, rf"{GATE}.*outside \{{-1, 0, 1\}}")


def test_shapes_types_and_numbers(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({f"{GATE}.weight_scale": torch.ones(2)}))
    refused(export, r"has the shape \(2,\), config.json asks for \(1,\)")


def test_wrong_type(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({f"{GATE}.weight": tensors[f"{GATE}.weight"].float()}))
    refused(export, "is of type F32")


def test_tensor_that_is_not_finite(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors["model.norm.weight"][:1].fill_(float("nan")))
    refused(export, "model.norm.weight holds numbers that are not finite")


def test_superfluous_tensor(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({"extra": torch.ones(1)}))
    refused(export, "extra is not part of the model")
