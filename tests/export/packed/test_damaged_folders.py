"""Reading a damaged folder of the format ``packed``: one sentence each."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.conftest import MakeExport, edit_json, edit_tensors
from tests.export.hostile import refused

UP = "layers.0.mlp.up_proj"


@pytest.fixture
def export(exported: MakeExport, tmp_path: Path) -> Path:
    return exported("2b4t", "packed").copy(tmp_path / "export").folder


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors is missing"),
        ("tokenizer.json", "holds no readable tokenizer"),
        ("special_tokens.json", "holds no readable tokenizer"),
    ],
)
def test_missing_file(name: str, pattern: str, export: Path) -> None:
    (export / name).unlink()
    refused(export, pattern)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "special_tokens.json"])
def test_bad_json(name: str, content: str, export: Path) -> None:
    (export / name).write_text(content)
    refused(export, "config.json is damaged" if name == "config.json" else "holds no readable tokenizer")


def test_a_configuration_that_is_longer_than_any(export: Path) -> None:
    with (export / "config.json").open("r+b") as file:  # sparse: no such bytes on the disk
        file.truncate(1 << 30)
    refused(export, "bytes, which no such file has")


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("format", "another", "model_type is None"),
        ("version", 2, "only the format bitnet_train-packed, version 1, is read here"),
        ("version", None, "only the format bitnet_train-packed, version 1"),
        ("packing", "three_bit", "packing='three_bit' is not known here"),
        ("packing", ["base3"], "is not known here"),
        ("dtype", "float64", "dtype='float64'"),
        pytest.param("dtype", "x" * 10**6, "is not known here", id="endless"),
        ("dtype", "bfloat16", r"config.json asks for .* torch.bfloat16"),
        ("packing", "two_bit", "config.json asks for"),
        ("model", None, "model must have exactly the fields activation, attention_bias, context"),
        ("model", [], "model must have exactly the fields"),
        ("quantised_layers", None, "quantised_layers is missing"),
        ("quantised_layers", ["x"], "quantised_layers is missing"),
        ("quantised_layers", {}, "is not part of the model|is missing"),
        ("quantised_layers", {"layers.*": {}}, "quantised_layers has layers.*, which is no linear layer"),
        ("quantised_layers", {"a\nb": {}}, "which is no linear layer"),
        ("quantised_layers", {UP: 3}, f"quantised_layers.{UP} is damaged"),
        ("bos_token_id", 5, "disagree about the ids of bos and eos"),
    ],
)
def test_fields_that_cannot_be(key: str, value: Any, pattern: str, export: Path) -> None:
    edit_json(export / "config.json", lambda config: config.update({key: value}))
    refused(export, pattern)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("hidden", "wide", "model: Value 'wide'"),
        ("hidden", None, "model: "),
        ("hidden", -64, "model.hidden is -64; it must be at least 1"),
        ("hidden", 128, r"config.json asks for \(416, 128\)"),
        ("hidden", 10**12, "config.json asks for"),
        ("heads", 7, "does not divide"),
        ("layers", 9_999, "too few for 9,999 blocks"),
        ("layers", 1, "not part of the model|no linear layer"),
        ("layers", 3, "is missing"),
        ("context", 10**12, "is the most that is read here"),
        ("vocab", 10**12, "config.json asks for"),
        ("norm_eps", float("nan"), "must be finite"),
        ("norm_eps", float("inf"), "must be finite"),
        ("norm_eps", 0, "must both be positive"),
        ("rope_theta", float("inf"), "must be finite"),
        ("norms", "post", "model: "),
        ("tie_embeddings", False, "lm_head.weight is missing"),
        ("activation", {"a": 1}, "model: "),
        ("hidden", "${oc.env:HOME}", "a field is a reference"),
        ("hidden", "a\nb", "model: "),
    ],
)
def test_shapes_that_cannot_be(key: str, value: Any, pattern: str, export: Path) -> None:
    edit_json(export / "config.json", lambda config: config["model"].update({key: value}))
    refused(export, pattern)


def test_other_fields_than_a_model_has(export: Path) -> None:
    edit_json(export / "config.json", lambda config: config["model"].update(depth=3))
    refused(export, "model must have exactly the fields")


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("scheme", "float", "scheme='float'"),
        ("scheme", ["ternary"], "which is not known here"),
        ("activation_bits", 4, "activation_bits=4"),
        ("activation_bits", "8", "activation_bits='8'"),
        ("threshold", 0.5, "is damaged"),
    ],
)
def test_layers_that_cannot_be(key: str, value: Any, pattern: str, export: Path) -> None:
    edit_json(export / "config.json", lambda config: config["quantised_layers"][UP].update({key: value}))
    refused(export, pattern)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_scales_that_cannot_be(scale: float, export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors[f"{UP}.scale"].fill_(scale))
    refused(export, f"{UP}.scale is not positive and finite")


@pytest.mark.parametrize("count", [0, 5])
def test_groups_that_do_not_divide_the_rows(count: int, export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({f"{UP}.scale": torch.ones(count)}))
    refused(export, "does not divide the 96 output rows" if count else f"{UP} has scheme='ternary', 0 scales")


def test_a_scale_that_is_a_table(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({f"{UP}.scale": torch.ones(2, 2)}))
    refused(export, f"quantised_layers.{UP} is damaged")


def test_bytes_that_hold_no_codes(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors[f"{UP}.codes"][3:4].fill_(250))
    refused(export, r"outside \{-1, 0, 1\}")


def test_too_few_codes(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({f"{UP}.codes": tensors[f"{UP}.codes"][:-1].clone()}))
    refused(export, f"{UP}.codes is .* config.json asks for")


def test_wrong_type(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].double()}))
    refused(export, "norm.weight is .*F64.*config.json asks for")


def test_tensor_that_is_not_finite(export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors["norm.weight"][:1].fill_(float("nan")))
    refused(export, "norm.weight holds numbers that are not finite")


@pytest.mark.parametrize("name", ["extra", "a\nb"])
def test_superfluous_tensor(name: str, export: Path) -> None:
    edit_tensors(export, lambda tensors: tensors.update({name: torch.ones(1)}))
    refused(export, "is not part of the model")


def test_a_tokenizer_of_a_larger_model(export: Path) -> None:
    def more(content: dict[str, Any]) -> None:
        extra = {"id": 416, "content": "<more>", "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append({**extra, "normalized": False, "special": True})
        content["model"]["vocab"]["<more>"] = 416

    edit_json(export / "tokenizer.json", more)
    refused(export, "the tokenizer has ids above the model's vocabulary of 416")


def test_special_ids_that_are_none(export: Path) -> None:
    edit_json(export / "special_tokens.json", lambda content: content.update(bos_id=-1))
    refused(export, "the tokenizer has ids above the model's vocabulary")


def test_a_tokenizer_without_any_token(export: Path) -> None:
    def empty(content: dict[str, Any]) -> None:
        content["added_tokens"] = []
        content["model"].update(vocab={}, merges=[])

    edit_json(export / "tokenizer.json", empty)
    refused(export, "without any token")
