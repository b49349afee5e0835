"""A run that starts from a Qwen2 checkpoint trains its biases, and is continued bit for bit."""

import torch
import transformers

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.huggingface.tokenizer_files import write_tokenizer
from tests.training.conftest import Workspace


def test_a_ternary_run_starts_from_qwen2_and_is_continued_bit_for_bit(workspace: Workspace, bpe: TextTokenizer) -> None:
    torch.manual_seed(0)
    bos, eos = (bpe.tokenizer.id_to_token(index) for index in (bpe.bos_id, bpe.eos_id))
    config = transformers.Qwen2Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=bpe.bos_id,
        eos_token_id=bpe.eos_id,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(workspace.folder / "qwen2")
    write_tokenizer(bpe, workspace.folder / "qwen2", 64)
    settings = (
        "data/tokenizer=pretrained", "data.tokenizer.source=qwen2", f"data.tokenizer.bos='{bos}'",
        f"data.tokenizer.eos='{eos}'", "data.tokenizer.vocab_size=400", "model.activation=silu", "model.norms=pre",
        "model.attention_bias=true", "model.rope_theta=10000", "model.norm_eps=1e-6", "init.sub_norm_gain=1",
        "init.from=qwen2", "schedule=constant", "trainer.validate_every=3",
    )  # fmt: skip
    for name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        code, output = workspace.run(f"run_name={name}", f"trainer.max_steps={steps}", *settings)
        assert code == 0, output
    assert "steps 3 to 6" in output
    assert workspace.losses("whole") == workspace.losses("parts")
    states = [
        torch.load(workspace.folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    biases = {name: tensor for name, tensor in states[0].items() if name.endswith("bias")}
    assert len(biases) == 6
    assert all(bool(tensor.any()) for name, tensor in biases.items() if "k_proj" not in name)
