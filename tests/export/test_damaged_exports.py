"""Reading an export that is damaged: one sentence each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.export import huggingface_reader
from bitnet_train.export.huggingface_reader import load_export
from tests.export.conftest import SmallRun, edit_json, edit_tensors

GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture
def export(small_run: Callable[[str], SmallRun], tmp_path: Path) -> Path:
    return small_run("2b4t").write(tmp_path / "export")


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        load_export(folder)
    assert "\n" not in str(caught.value)


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


def test_oversized_config(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_reader, "CONFIG_BYTES", 100)
    refused(export, "bytes, which no such file has")


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
        ("num_hidden_layers", 10**9, "too few for the 1,000,000,000 blocks"),
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
        ("quantization_config", None, "quantization_config is None"),
    ],
)
def test_fields_that_cannot_be(key: str, value: Any, pattern: str, export: Path) -> None:
    edit_json(export / "config.json", lambda config: config.update({key: value}))
    refused(export, pattern)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("linear_class", "bitlinear"),
        ("quantization_mode", "online"),
        ("use_rms_norm", True),
        ("modules_to_not_convert", "lm_head"),
    ],
)
def test_other_kinds_of_quantisation(key: str, value: Any, export: Path) -> None:
    edit_json(export / "config.json", lambda config: config["quantization_config"].update({key: value}))
    refused(export, f"quantization_config.{key}")


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
