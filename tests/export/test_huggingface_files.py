"""What lies in an export, and reading it back into our own decoder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export import huggingface
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.huggingface import export_size, hf_name, write_tokenizer
from bitnet_train.export.huggingface_reader import load_export
from bitnet_train.quant.packing import unpack_2bit
from tests.conftest import make_text
from tests.export.conftest import KINDS, SmallRun

Make = Callable[[str], SmallRun]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_back_gives_the_run_bit_for_bit(kind: str, small_run: Make, tmp_path: Path) -> None:
    run = small_run(kind)
    model, tokenizer = load_export(run.write(tmp_path / "export"))
    ids = run.held_out.ids[:64].reshape(2, 32)
    with torch.no_grad():
        assert torch.equal(model(ids), run.canonical.decoder()(ids))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (run.tokenizer.bos_id, run.tokenizer.eos_id)
    text = make_text(200) + "<|endoftext|>"
    assert tokenizer.encode(text) == run.tokenizer.encode(text)


@pytest.mark.parametrize("dtype", list(ExportDtype))
def test_tensors_are_the_canonical_ones_in_the_exports_type(
    dtype: ExportDtype, small_run: Make, tmp_path: Path
) -> None:
    run = small_run("gqa untied")
    tensors = load_file(run.write(tmp_path / "export", dtype) / "model.safetensors")
    number_type = getattr(torch, dtype.value)
    for layer in run.canonical.quantised:
        codes = run.canonical.codes(layer)
        assert torch.equal(unpack_2bit(tensors.pop(f"{hf_name(layer)}.weight")), codes.codes)
        assert torch.equal(tensors.pop(f"{hf_name(layer)}.weight_scale"), codes.scale.to(number_type))
    assert set(tensors) == {hf_name(name) for name in run.canonical.tensor_names}
    for name in run.canonical.tensor_names:
        assert torch.equal(tensors[hf_name(name)], run.canonical.tensor(name).to(number_type))


def test_a_bfloat16_export_reads_back_as_float32_of_rounded_tensors(small_run: Make, tmp_path: Path) -> None:
    run = small_run("2b4t")
    model, _ = load_export(run.write(tmp_path / "export", ExportDtype.bfloat16))
    ids = run.held_out.ids[:32][None]
    with torch.no_grad():
        logits = model(ids)
        assert logits.dtype is torch.float32
        assert torch.equal(logits, run.canonical.decoder(number_type=torch.bfloat16)(ids))


def test_every_field_of_the_configuration_is_written(small_run: Make, tmp_path: Path) -> None:
    run = small_run("mixed")
    config = json.loads((run.write(tmp_path / "export") / "config.json").read_text())
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


def test_sizes_are_those_of_the_file(small_run: Make, tmp_path: Path) -> None:
    run = small_run("gqa untied")
    for dtype in ExportDtype:
        size = export_size(run.canonical.cfg, run.canonical.spec, dtype)
        tensors = load_file(run.write(tmp_path / "export", dtype) / "model.safetensors")
        assert size.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert size.embedding_bytes == tensors["lm_head.weight"].nbytes + tensors["model.embed_tokens.weight"].nbytes
        assert size.code_weights == sum(run.canonical.codes(layer).codes.numel() for layer in run.canonical.quantised)
        assert 2 < size.bits_per_code < 2.01


def test_an_interrupted_export_leaves_the_old_one(
    small_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run("2b4t")
    folder = run.write(tmp_path / "export")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "write_tokenizer", stop)
    with pytest.raises(KeyboardInterrupt):
        run.write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_cannot_be_written_is_one_sentence(small_run: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        small_run("2b4t").write(tmp_path / "file" / "export")


def test_auto_tokenizer_gives_the_runs_ids(bpe: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    bpe.tokenizer.enable_truncation(8)
    try:
        write_tokenizer(bpe, tmp_path, context=64)
    finally:
        bpe.tokenizer.no_truncation()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [
        make_text(300),
        "",
        " ",
        "  leading",
        "trailing \n\n",
        "a\r\nb",
        "né 你好 \U0001f600",
        "x , y . don't",
    ]:
        ids = bpe.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [bpe.bos_id, *ids]
        assert theirs.decode(ids) == bpe.decode(ids) == text
    assert theirs("a", "b")["input_ids"] == [bpe.bos_id, *bpe.encode("a"), bpe.bos_id, *bpe.encode("b")]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (bpe.bos_id, bpe.eos_id, bpe.eos_id)
    assert theirs.model_max_length == 64
    # In a prompt, a special token's name is that token.
    assert theirs("<|endoftext|>", add_special_tokens=False)["input_ids"] == [bpe.eos_id]
