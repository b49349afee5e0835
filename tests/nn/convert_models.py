"""Models to convert, and what a conversion must leave as it was."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.convert import tensor_digest

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS: dict[str, Any] = {"vocab_size": 60, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
IDS = {"input_ids": torch.arange(24).reshape(2, 12)}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
CAUSAL = {"attn_implementation": "eager"}


def llama(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, tie_word_embeddings=tied, **CAUSAL))


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **TOKENS, tie_word_embeddings=True, **CAUSAL))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def vit() -> PreTrainedModel:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=5))


class Gpt2Like(nn.Module):
    """GPT-2's blocks, whose projections are Conv1D, and a plain linear layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        cfg = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=1)
        self.body = GPT2Model(cfg)
        self.out = nn.Linear(32, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.body(input_ids).last_hidden_state)


class Twice(nn.Module):
    """One layer in two places, two layers with one weight, a tied head of another name, a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.blocks[1].weight = self.blocks[0].weight
        self.normed = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.decoder = nn.Linear(8, 20, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(torch.relu(self.first(self.embed(ids))))
        for block in self.blocks:
            x = x + block(x)
        return self.decoder(self.normed(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, IDS),
    "llama tied": (lambda: llama(tied=True), IDS),
    "qwen2": (qwen2, IDS),
    "vit": (vit, IMAGES),
    "gpt2-like": (Gpt2Like, IDS),
    "twice": (Twice, {"ids": torch.arange(12).reshape(2, 6)}),
}


class Before:
    """Everything that a rollback must restore."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        self.parameters = [(name, id(p), tensor_digest(p), p.requires_grad) for name, p in model.named_parameters()]
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check(self) -> None:
        assert self.modules == [(name, id(module), module.training) for name, module in self.model.named_modules()]
        now = [(name, id(p), tensor_digest(p), p.requires_grad) for name, p in self.model.named_parameters()]
        assert self.parameters == now
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for name, tensor in self.state.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, equal_nan=True)
        for module in self.model.modules():
            assert not isinstance(module, BitLinear)
            assert "forward" not in module.__dict__
