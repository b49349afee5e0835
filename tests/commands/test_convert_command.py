"""``command=convert`` on small checkpoints of transformers, as the command line runs it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers.integrations.bitnet import AutoBitLinear

from bitnet_train.__main__ import answer
from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.huggingface import foreign
from bitnet_train.export.huggingface.tokenizer_files import write_tokenizer
from bitnet_train.nn import convert as nn_convert
from bitnet_train.quant.spec import LayerQuant, build_spec
from tests.composing import compose_node
from tests.export.conftest import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS: dict[str, Any] = {"vocab_size": 416, "num_key_value_heads": 2, "max_position_embeddings": 64}
Run = Callable[..., tuple[int, str]]


def save(model: Any, folder: Path, tokenizer: TextTokenizer | None = None) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, 64)
    return folder


def make(name: str) -> Any:
    """A random model; the biases of qwen2 are not zero."""
    torch.manual_seed(0)
    t = transformers
    if name == "qwen2":
        model: Any = t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, **TOKENS, tie_word_embeddings=True, bos_token_id=0))
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model
    if name == "vit":
        return t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=5))
    if name == "gpt2":
        sizes: dict[str, Any] = {"vocab_size": 416, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 0}
        return t.GPT2LMHeadModel(t.GPT2Config(**sizes, eos_token_id=1))
    if name == "t5":
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=416, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
        )
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **TOKENS, tie_word_embeddings=name == "tied"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def execute(source: Path, to: Path, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        code = answer(["command=convert", f"convert.from={source}", f"convert.to={to}", *more])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out + captured.err

    return execute


@pytest.fixture
def llama(tmp_path: Path, bpe: TextTokenizer) -> Path:
    return save(make("llama"), tmp_path / "llama", bpe)


def test_a_converted_llama_is_quantised_by_transformers_itself(llama: Path, run: Run, tmp_path: Path) -> None:
    to = tmp_path / "converted"
    code, output = run(llama, to)
    assert code == 0, output
    for row in ("model.layers.*.mlp.gate_proj", "left alone: an embedding", "left alone: excluded by 'lm_head'"):
        assert row in output
    assert "14 of 14 parameters have the same bytes" in output
    assert "14 converted" in output
    assert "largest difference 0" in output
    assert "with quantisation off" in output
    before, after = load_file(llama / "model.safetensors"), load_file(to / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    config = json.loads((to / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "use_rms_norm": False,
        "modules_to_not_convert": ["lm_head"],
    }
    assert (to / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    record = json.loads((to / "bitnet_train.json").read_text())
    assert record["quantised_by_transformers"]
    assert len(record["layers"]) == 14
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(to)
        assert sum(isinstance(m, AutoBitLinear) for m in theirs.modules()) == 14
        ours = transformers.LlamaForCausalLM.from_pretrained(llama)
        nn_convert.convert(ours)
        ids = torch.arange(20)[None]
        difference = (theirs(ids).logits - ours(ids).logits).norm() / ours(ids).logits.norm()
        assert difference < 0.05
    code, output = run(llama, to, "convert.exclude=[lm_head,'*.down_proj']")  # again, over what it wrote
    assert code == 0, output
    assert len(json.loads((to / "bitnet_train.json").read_text())["layers"]) == 12


def test_a_folder_without_tokenizer_is_measured_on_random_tokens(run: Run, tmp_path: Path) -> None:
    code, output = run(save(make("tied"), tmp_path / "tied"), tmp_path / "to")
    assert code == 0, output
    assert "not measured (no tokenizer: the folder has none)" in output
    state = load_file(tmp_path / "to" / "model.safetensors")
    assert "lm_head.weight" not in state  # tied, as it was


@pytest.mark.parametrize("name", ["qwen2", "vit", "t5"])
def test_other_architectures(name: str, run: Run, tmp_path: Path, bpe: TextTokenizer) -> None:
    source = save(make(name), tmp_path / name, bpe if name != "vit" else None)
    # transformers keeps T5's wo in float32, and so never quantises it.
    more = ("convert.exclude=[lm_head,'*.wo']",) if name == "t5" else ()
    if more:
        code, output = run(source, tmp_path / "to")
        assert code == 0, output
        assert "it would quantise 14 layers, not these 16" in output
    code, output = run(source, tmp_path / "to", *more)
    assert code == 0, output
    assert "which transformers quantises in every forward pass" in output
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "to"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    if name == "qwen2":
        assert "same bytes, with bias" in output
        assert "perplexity" in output
    if name == "vit":
        assert "predicts no next token" in output or "no tokenizer" in output


@pytest.mark.parametrize(
    ("settings", "reason", "described"),
    [
        (("quant=binary",), "these weights are binary at 0.5", "binary, groups=1, inputs 8"),
        (("quant.weight.groups=4",), "these have quant.weight.groups=4", "ternary, groups=4, inputs 8"),
        (("quant.weight.groups=row",), "these have quant.weight.groups=row", "ternary, scales one per row, inputs 8"),
        (("quant.weight.group_rows=4",), "no setting for the group rows", "ternary, scales of 4 rows, inputs 8"),
        (("quant.weight.threshold=0.7",), "ternary at 0.7", "ternary, groups=1, inputs 8, threshold=0.7"),
        (
            ("quant.weight.scheme=symmetric", "quant.weight.bits=3"),
            "these weights are symmetric",
            "symmetric 3 bits, groups=1, inputs 8",
        ),
        (
            ("quant.weight.scheme=symmetric", "quant.weight.bits=8", "quant.weight.statistic=absmean"),
            "these weights are symmetric",
            "symmetric 8 bits, groups=1, inputs 8, statistic=absmean",
        ),
        (("quant.activation.bits=null",), "these stay floats", "ternary, groups=1, inputs float"),
        (
            ("quant.activation.granularity=tensor",),
            "no setting for the activation granularity",
            "inputs 8, activation_granularity=tensor",
        ),
    ],
)
def test_what_transformers_cannot_quantise_is_written_plain(
    settings: tuple[str, ...], reason: str, described: str, llama: Path, run: Run, tmp_path: Path
) -> None:
    code, output = run(llama, tmp_path / "to", *settings)
    assert code == 0, output
    output = " ".join(output.replace("│", " ").split())
    assert "transformers will not quantise them: " in output
    assert reason in output
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert "quantization_config" not in config
    record = json.loads((tmp_path / "to" / "bitnet_train.json").read_text())
    assert not record["quantised_by_transformers"]
    quant = LayerQuant(**record["layers"]["model.layers.0.self_attn.q_proj"]["quant"])
    wanted: Any = OmegaConf.to_object(compose_node(*settings).quant)
    assert quant == build_spec(wanted).default != LayerQuant()
    assert described in output
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_overrides_are_matched_against_the_models_own_names(llama: Path, run: Run, tmp_path: Path) -> None:
    code, output = run(llama, tmp_path / "to", "quant.overrides=[{pattern: 'model.layers.0.*', scheme: float}]")
    assert code == 0, output
    assert "left alone: quant leaves it float" in output
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert "model.layers.0.mlp.up_proj" in config["quantization_config"]["modules_to_not_convert"]
    code, output = run(llama, tmp_path / "to2", "quant.overrides=[{pattern: 'layers.0.*', scheme: float}]")
    assert code == 2
    assert "the pattern 'layers.0.*' matches no linear layer of this model" in output


def test_bad_input_is_one_sentence_and_code_2(llama: Path, run: Run, tmp_path: Path, bpe: TextTokenizer) -> None:
    def damaged(name: str, edit: Callable[[Path], object]) -> Path:
        folder = tmp_path / name
        shutil.copytree(llama, folder)
        edit(folder)
        return folder

    def reshape(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    def pickled(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "mine.txt").write_text("mine")
    to, norm = tmp_path / "to", "model.norm.weight"
    quantised = {"quantization_config": {"quant_method": "bitnet"}}
    for source, target, more, sentence in (
        (tmp_path / "none", to, (), "has no config.json: give the folder of a checkpoint"),
        (llama, llama, (), "lies in the folder that is read"),
        (llama, llama / "inside", (), "lies in the folder that is read"),
        (llama, busy, (), "exists and was not written by bitnet_train"),
        (llama, to, ("quant=none",), "would convert nothing"),
        (llama, to, ("convert.tokens=1",), "convert.tokens is 1; it must be at least 2"),
        (llama, to, ("convert.text=nowhere.txt",), "convert.text=nowhere.txt is no file"),
        (llama, to, ("convert.exclude=[lm_heads]",), "convert.exclude: the pattern 'lm_heads' matches no linear layer"),
        (llama, to, ("kernels.backend=triton",), "kernels.backend=triton cannot run here"),
        (llama, to, ("convert.include=['*.wq']",), "convert.include: the pattern '*.wq' matches no linear layer"),
        (llama, to, ("quant.weight.groups=5",), "self_attn.q_proj: quant.weight.groups=5 does not divide"),
        (save(make("gpt2"), tmp_path / "gpt2"), to, (), "(Conv1D is no nn.Linear)"),
        (
            damaged("quantised", lambda f: edit_json(f / "config.json", lambda c: c.update(quantised))),
            to, (), "is quantised already",
        ),
        (damaged("lacking", lambda f: reshape(f, lambda s: s.pop(norm))), to, (), f"lacks {norm}"),
        (
            damaged("spare", lambda f: reshape(f, lambda s: s.update(extra=torch.ones(2)))),
            to, (), "has, beside its model, extra",
        ),
        (damaged("torn", lambda f: (f / "model.safetensors").write_bytes(b"torn")), to, (), "transformers cannot load"),
        (damaged("pickled", pickled), to, (), "transformers cannot load"),
        (damaged("json", lambda f: (f / "config.json").write_text("{")), to, (), "config.json is damaged"),
    ):  # fmt: skip
        code, output = run(source, target, *more)
        assert (code, sentence in output) == (2, True), output
        assert not to.exists()
    assert [path.name for path in busy.iterdir()] == ["mine.txt"]
    for arguments, sentence in (
        (["command=convert"], "command=convert needs convert.from=FOLDER"),
        (["command=convert", f"convert.from={llama}"], "command=convert needs convert.to=FOLDER"),
        (["command=convert", "run=runs/x", f"convert.from={llama}", "convert.to=y"], "run= is for"),
    ):
        assert answer(arguments) == 2, sentence


def test_a_failed_check_is_code_4_and_writes_nothing(
    llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"
    with monkeypatch.context() as patched:
        patched.setattr(nn_convert, "copy_parameter", lambda p: torch.nn.Parameter(p.detach() + 1e-3))
        code, output = run(llama, to)
        assert code == 4
        assert "model.layers.0.self_attn.q_proj: checksum: the bytes of weight are not those before" in output
    # A weight that is no number; and one that is written wrongly.
    broken = tmp_path / "nan"
    shutil.copytree(llama, broken)
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    code, output = run(broken, to)
    assert code == 4
    assert "model.layers.1.mlp.up_proj: finite: weight holds NaN" in output
    real = foreign.write_json

    def spoil(path: Path, content: dict[str, Any]) -> None:
        real(path, content)
        weights = path.parent / "model.safetensors"
        state = load_file(weights)
        state["model.norm.weight"] += 1
        save_file(state, weights, {"format": "pt"})

    monkeypatch.setattr(foreign, "write_json", spoil)
    code, output = run(llama, to)
    assert code == 4
    assert "model.norm.weight is not the same when it is loaded back" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "nan"]


def test_an_architecture_that_transformers_loads_otherwise_is_written_plain(
    llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = foreign._quantisation

    def fewer(model: Any, report: Any) -> dict[str, Any]:
        return real(model, report) | {"modules_to_not_convert": ["lm_head", "down_proj"]}

    monkeypatch.setattr(foreign, "_quantisation", fewer)
    code, output = run(llama, tmp_path / "to")
    assert code == 0, output
    assert "it would quantise 12 layers, not these 14" in output
    assert "quantization_config" not in json.loads((tmp_path / "to" / "config.json").read_text())


def test_layers_left_alone_whose_names_catch_others_are_named_exactly() -> None:
    assert foreign._entry("lm_head", {"model.layers.0.up"}) == "lm_head"
    assert foreign._entry("decoder", {"decoder.up"}) == "decoder$"
    assert foreign._entry("a.up", {"block.a.up"}) == r"a\.up$"
