"""Small runs to export: a random decoder with uneven norms, saved as a training checkpoint is."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.canonical import CanonicalCheckpoint, open_checkpoint
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.huggingface import STEP_KEY, write_huggingface
from bitnet_train.export.report import VerificationReport
from bitnet_train.export.verify import HeldOut, verify_huggingface
from bitnet_train.nn.config import Activation, DecoderConfig, NormalInit, Norms
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from tests.conftest import make_text

# The kinds of model that the format holds: fields of DecoderConfig, and the quantisation.
KINDS: dict[str, tuple[dict[str, Any], QuantSpec]] = {
    "2b4t": ({}, QuantSpec()),
    "silu": ({"activation": Activation.silu}, QuantSpec()),
    "gqa untied": ({"kv_heads": 2, "tie_embeddings": False}, QuantSpec()),
    "llama": ({"norms": Norms.pre, "activation": Activation.silu, "kv_heads": 2}, QuantSpec()),
    "llama relu2 untied": ({"norms": Norms.pre, "tie_embeddings": False}, QuantSpec()),
    "binary": ({}, QuantSpec(LayerQuant("binary"))),
    "mixed": (
        {"kv_heads": 1},
        QuantSpec(
            LayerQuant(threshold=0.7),
            (("layers.1.mlp.*", FLOAT), ("*.k_proj", FLOAT), ("*.v_proj", LayerQuant("binary"))),
        ),
    ),
}  # fmt: skip


def decoder_config(**fields: Any) -> DecoderConfig:
    """A decoder of hidden 64 and 2 blocks; the vocabulary has ids that the tokenizer does not use."""
    shape = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": 96, "context": 128, "vocab": 416}
    return DecoderConfig(**{**shape, **fields})


@dataclass
class SmallRun:
    """A run's checkpoint in canonical form, its file, its tokenizer and held-out tokens."""

    canonical: CanonicalCheckpoint
    checkpoint: Path
    tokenizer: TextTokenizer
    held_out: HeldOut

    def write(self, folder: Path, dtype: ExportDtype = ExportDtype.float32) -> Path:
        """The export, in ``folder``."""
        write_huggingface(self.canonical, self.tokenizer, folder, dtype)
        return folder

    def verify(self, folder: Path) -> VerificationReport:
        """Its verification with the real transformers."""
        return verify_huggingface(folder, self.canonical, self.tokenizer, self.held_out)


def save_checkpoint(path: Path, cfg: DecoderConfig, spec: QuantSpec, step: int = 7, seed: int = 3, **more: Any) -> Path:
    """A training checkpoint as Lightning writes it, of random weights with uneven norms."""
    model = build_decoder(cfg, spec, NormalInit(std=0.1), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    state = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "global_step": step, "epoch": 0, **more}, path)
    return path


@pytest.fixture(autouse=True)
def _always_one_thread(one_thread: None) -> None:
    """All tests of this folder."""


@pytest.fixture(scope="session")
def small_run(bpe: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SmallRun]:
    """Makes the run of a kind in :data:`KINDS`."""

    def make(kind: str) -> SmallRun:
        fields, spec = KINDS[kind]
        cfg = decoder_config(**fields)
        path = save_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt", cfg, spec)
        ids = [index for i in range(100, 104) for index in [bpe.bos_id, *bpe.encode(make_text(i))]]
        held_out = HeldOut(torch.tensor(ids), window=32, prompt="def ")
        return SmallRun(open_checkpoint(path, cfg, spec), path, bpe, held_out)

    return make


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an export in place."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt", STEP_KEY: "7"})
