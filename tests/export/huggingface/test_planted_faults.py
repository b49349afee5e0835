"""Verification with the real transformers rejects every fault planted in packed codes with direct scales."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bitnet_train.errors import ConfigError, VerificationError
from bitnet_train.export.config import LinearClass
from bitnet_train.export.huggingface import verify
from tests.export.conftest import MakeExport, MakeRun
from tests.export.huggingface.planting import (
    Plant,
    config_fault,
    drop_merges,
    flip_one_code,
    invert_scales,
    no_bos,
    nudge,
    swap,
    swap_merges,
    tensor_fault,
    truncate,
)

pytest.importorskip("transformers")

# name -> (kind of model, fault, a check that must fail)
FAULTS: dict[str, tuple[str, Plant, str]] = {
    "norm eps": ("2b4t", config_fault("rms_norm_eps", value=1e-6), "RMSNorms fed quiet inputs"),
    "norm eps, llama": ("llama", config_fault("rms_norm_eps", value=1e-6), "RMSNorms fed quiet inputs"),
    "all scales inverted": ("2b4t", invert_scales(""), "linears fed our inputs"),
    "one scale inverted": ("2b4t", invert_scales("layers.1.mlp.up_proj"), "linears fed our inputs"),
    "one scale inverted, llama": ("llama", invert_scales("layers.0.self_attn.o_proj"), "scales"),
    "q and k swapped": ("2b4t", swap("q_proj", "k_proj"), "codes"),
    "q and k swapped, other shapes": ("gqa untied", swap("q_proj", "k_proj"), "loads"),
    "k and v swapped": ("gqa untied", swap("k_proj", "v_proj"), "linears fed our inputs"),
    "gate and up swapped": ("silu", swap("gate_proj", "up_proj"), "codes"),
    "norms swapped": ("2b4t", swap("input_layernorm", "post_attention_layernorm"), "RMSNorms fed our inputs"),
    "one code": ("2b4t", tensor_fault(flip_one_code), "codes"),
    "rope theta": ("2b4t", config_fault("rope_parameters", "rope_theta", value=10000.0), "attention fed our q, k, v"),
    "rope theta of version 4": ("2b4t", config_fault("rope_theta", value=10000.0), "config: rope_theta"),
    "rope type": (
        "2b4t",
        config_fault("rope_parameters", value={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
        "rotary positions",
    ),
    "activation": ("2b4t", config_fault("hidden_act", value="silu"), "FFN gating fed our inputs"),
    "activation, llama": ("llama", config_fault("hidden_act", value="gelu"), "FFN gating fed our inputs"),
    "eos id": ("2b4t", config_fault("eos_token_id", value=5), "config: eos_token_id"),
    "eos id of generation": (
        "2b4t",
        config_fault("eos_token_id", value=5, file="generation_config.json"),
        "config: generation.eos_token_id",
    ),
    "bos token": (
        "2b4t",
        config_fault("bos_token", value="a", file="tokenizer_config.json"),
        "config: tokenizer.bos_token_id",
    ),
    "context": ("2b4t", config_fault("max_position_embeddings", value=64), "config: max_position_embeddings"),
    "heads": ("2b4t", config_fault("num_attention_heads", value=2), "config: num_attention_heads"),
    "kv heads": ("2b4t", config_fault("num_key_value_heads", value=2), "loads"),
    "untied": ("2b4t", config_fault("tie_word_embeddings", value=False), "loads"),
    "vocabulary": ("2b4t", config_fault("vocab_size", value=400), "loads"),
    "scale convention": (
        "2b4t",
        config_fault("quantization_config", "linear_class", value="bitlinear"),
        "linears fed our inputs",
    ),
    "online": ("2b4t", config_fault("quantization_config", "quantization_mode", value="online"), "loads"),
    "extra norm": ("2b4t", config_fault("quantization_config", "use_rms_norm", value=True), "loads"),
    "architecture": ("2b4t", config_fault("model_type", value="llama"), "loads"),
    "claims bfloat16": ("2b4t", config_fault("dtype", value="bfloat16"), "generation"),
    "embedding row": ("2b4t", nudge("model.embed_tokens.weight"), "unquantised tensors"),
    "head": ("gqa untied", nudge("lm_head.weight"), "unquantised tensors"),
    "float layer": ("mixed", nudge("model.layers.1.mlp.up_proj.weight"), "linears fed our inputs"),
    "final norm": ("2b4t", nudge("model.norm.weight"), "RMSNorms fed our inputs"),
    "last merges swapped": ("2b4t", swap_merges, "tokenizer definition"),
    "no merges": ("2b4t", drop_merges, "token ids of held-out text"),
    "no bos added": ("2b4t", no_bos, "special tokens added"),
    "missing tensor": ("2b4t", tensor_fault(lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale")), "loads"),
    "unknown tensor": ("2b4t", tensor_fault(lambda t: t.update(extra=torch.ones(1))), "loads"),
    "truncated weights": ("2b4t", truncate, "loads"),
    "no tokenizer": ("2b4t", lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "broken config": ("2b4t", lambda folder: (folder / "config.json").write_text("{"), "config"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_rejected(fault: str, exported: MakeExport, tmp_path: Path) -> None:
    kind, plant, check = FAULTS[fault]
    export = exported(kind, linear_class=LinearClass.autobitlinear).copy(tmp_path / "hf-packed")
    plant(export.folder)
    report = export.verify()
    failed = {row.name for row in report.failed}
    assert check in failed, failed
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert any(name in str(caught.value) for name in failed)
    assert json.loads((export.folder / "verification.json").read_text())["passed"] is False


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("silu", swap("gate_proj", "up_proj")),
        ("2b4t", config_fault("hidden_act", value="silu")),
        ("gqa untied", swap("k_proj", "v_proj")),
    ],
)
def test_the_perplexity_of_a_wrong_model_is_another(
    kind: str, plant: Plant, exported: MakeExport, tmp_path: Path
) -> None:
    export = exported(kind, linear_class=LinearClass.autobitlinear).copy(tmp_path / "hf-packed")
    plant(export.folder)
    assert "held-out perplexity" in {row.name for row in export.verify().failed}


def test_the_table_shows_failures_and_folds_the_fields(exported: MakeExport, tmp_path: Path) -> None:
    export = exported("2b4t").copy(tmp_path / "hf-packed")
    config_fault("rms_norm_eps", value=1e-6)(export.folder)
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(export.verify().table())
    text = console.export_text()
    assert "config: rms_norm_eps" in text
    assert "FAILED" in text
    assert "config: hidden_size" not in text
    assert "fields equal" in text


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_without_transformers_the_installation_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ConfigError, match=rf'{missing} is not installed: pip install "bitnet-train\[export\]"'):
        verify.import_transformers()


@pytest.mark.parametrize("format_name", ["hf-packed", "hf-master", "hf-dense"])
def test_a_folder_that_does_not_exist(format_name: str, small_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export first"):
        small_run("2b4t").verify(tmp_path / "none", format_name)
