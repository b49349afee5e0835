"""Folders as other people's software writes them: several files, other types, fields left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitnet_train.errors import ConfigError
from bitnet_train.export.huggingface.reader import load_export, read_model, read_tokenizer
from bitnet_train.nn.layout import quantised_layers
from tests.export.conftest import Export, MakeExport, edit_json, edit_tensors


def split_into_two_files(folder: Path) -> None:
    """As transformers saves what is larger than a shard."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, placed = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def assert_reads_as_before(export: Export) -> None:
    expected = export.run.logits(export.run.canonical.decoder())
    assert torch.equal(export.run.logits(load_export(export.folder)[0]), expected)


@pytest.mark.parametrize("format_name", ["hf-packed", "hf-master"])
def test_weights_in_several_files(format_name: str, exported: MakeExport, tmp_path: Path) -> None:
    export = exported("gqa untied", format_name).copy(tmp_path / "copy")
    split_into_two_files(export.folder)
    assert_reads_as_before(export)


@pytest.mark.parametrize(
    "placed", [None, {}, [], ["model.safetensors"], {"a": 3}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}]
)
def test_an_index_that_names_no_files_of_the_folder(placed: Any, exported: MakeExport, tmp_path: Path) -> None:
    export = exported("2b4t").copy(tmp_path / "copy")
    split_into_two_files(export.folder)
    edit_json(export.folder / "model.safetensors.index.json", lambda index: index.update(weight_map=placed))
    with pytest.raises(ConfigError, match=r"index.json is damaged"):
        load_export(export.folder)


def test_a_file_of_the_index_that_is_missing(exported: MakeExport, tmp_path: Path) -> None:
    export = exported("2b4t").copy(tmp_path / "copy")
    split_into_two_files(export.folder)
    (export.folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002.safetensors is missing"):
        load_export(export.folder)


def test_a_tied_head_that_is_stored_all_the_same(exported: MakeExport, tmp_path: Path) -> None:
    export = exported("2b4t").copy(tmp_path / "copy")
    edit_tensors(export.folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_reads_as_before(export)


def test_half_precision_tensors_are_read(exported: MakeExport, tmp_path: Path) -> None:
    export = exported("2b4t").copy(tmp_path / "copy")
    edit_tensors(export.folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}))
    found = read_model(export.folder).tensors["norm.weight"]
    assert torch.equal(found, export.run.canonical.tensor("norm.weight").half().float())


def test_what_transformers_assumes_when_fields_are_missing(exported: MakeExport, tmp_path: Path) -> None:
    export = exported("llama").copy(tmp_path / "copy")

    def shorten(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": None}
        config["head_dim"] = None
        del config["rope_parameters"]
        config["eos_token_id"] = [config["eos_token_id"], 5]

    edit_json(export.folder / "config.json", shorten)
    # bitlinear, offline, nothing left out: as the llama export is anyway.
    found, before = read_model(export.folder), read_model(exported("llama").folder)
    assert (found.cfg, found.storage) == (before.cfg, before.storage)
    assert all(torch.equal(found.codes[name].scale, codes.scale) for name, codes in before.codes.items())
    assert read_tokenizer(export.folder).eos_id == export.run.tokenizer.eos_id


@pytest.mark.parametrize(
    ("entry", "skipped"),
    [
        ("model.layers.1.mlp", {f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}),
        ("model.layers.1.mlp.up_proj", {"layers.1.mlp.up_proj"}),
        ("k_proj", {"layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj"}),
        ("layers.1.mlp.up_proj", {"layers.1.mlp.up_proj"}),
        ("mlp", set()),
        ("model.layers.1.mlp.up", set()),
        ("lm_head", set()),
    ],
)
def test_layers_that_transformers_leaves_dense_are_left_dense(
    entry: str, skipped: set[str], exported: MakeExport, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    export = exported("2b4t", "hf-master").copy(tmp_path / "copy")
    edit_json(
        export.folder / "config.json",
        lambda config: config["quantization_config"].update(modules_to_not_convert=["lm_head", entry]),
    )
    found = read_model(export.folder)
    every = set(export.run.canonical.quantised)
    assert every - set(quantised_layers(found.cfg, found.spec)) == skipped
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export.folder)
    dense = {name for name in every if type(theirs.get_submodule(f"model.{name}")) is torch.nn.Linear}
    assert dense == skipped


@pytest.mark.parametrize("entry", ["model", "model.layers.*.mlp", "(a+)+$", "", "a\nb"])
def test_patterns_of_layers_are_refused(entry: str, exported: MakeExport, tmp_path: Path) -> None:
    export = exported("2b4t", "hf-master").copy(tmp_path / "copy")
    edit_json(
        export.folder / "config.json",
        lambda config: config["quantization_config"].update(modules_to_not_convert=[entry]),
    )
    with pytest.raises(ConfigError, match="which is no module's name") as caught:
        read_model(export.folder)
    assert "\n" not in str(caught.value)
