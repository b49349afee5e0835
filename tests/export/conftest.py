"""Small runs to export: a random decoder with uneven norms, saved as a training checkpoint is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.canonical import CanonicalCheckpoint, open_checkpoint
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.held_out import HeldOut
from bitnet_train.export.report import VerificationReport
from bitnet_train.export.rules import FORMAT_RULES
from bitnet_train.export.writers import FORMATS, Job
from bitnet_train.nn.config import Activation, DecoderConfig, NormalInit, Norms
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from tests.conftest import make_text

# Helpers whose assertions should say what they compared.
pytest.register_assert_rewrite("tests.export.hostile", "tests.export.gguf.passing", "tests.export.gguf.planting")

LLAMA = {"norms": Norms.pre, "activation": Activation.silu, "kv_heads": 2}
SILU = {"activation": Activation.silu, "kv_heads": 2}
# What llama.cpp's ternary blocks of 256 weights and I2_S's of 128 need.
WIDE = {"hidden": 256, "ffn": 256}
HALF_WIDE = {"hidden": 128, "ffn": 128}

# Kinds of model: fields of DecoderConfig, and the quantisation.
KINDS: dict[str, tuple[dict[str, Any], QuantSpec]] = {
    "2b4t": ({}, QuantSpec()),
    "silu": ({"activation": Activation.silu}, QuantSpec()),
    "gqa untied": ({"kv_heads": 2, "tie_embeddings": False}, QuantSpec()),
    "llama": (LLAMA, QuantSpec()),
    "llama relu2 untied": ({"norms": Norms.pre, "tie_embeddings": False}, QuantSpec()),
    "qwen2": ({**LLAMA, "attention_bias": True}, QuantSpec()),
    "qwen3": ({**LLAMA, "qk_norm": True, "head_width": 32}, QuantSpec()),
    "qwen2 floats": ({**LLAMA, "attention_bias": True}, QuantSpec(FLOAT)),
    "long heads": ({**LLAMA, "head_width": 24}, QuantSpec()),
    "all parts": ({"attention_bias": True, "qk_norm": True, "head_width": 32}, QuantSpec(LayerQuant(groups=4))),
    "binary": ({}, QuantSpec(LayerQuant("binary"))),
    "mixed": (
        {"kv_heads": 1},
        QuantSpec(
            LayerQuant(threshold=0.7),
            (("layers.1.mlp.*", FLOAT), ("*.k_proj", FLOAT), ("*.v_proj", LayerQuant("binary"))),
        ),
    ),
    "some float": (LLAMA, QuantSpec(LayerQuant(), (("layers.1.mlp.*", FLOAT), ("*.k_proj", FLOAT)))),
    "groups": ({}, QuantSpec(LayerQuant(groups=4))),
    "rows": ({"kv_heads": 2}, QuantSpec(LayerQuant(groups="row"))),
    "float inputs": ({}, QuantSpec(LayerQuant(activation_bits=None))),
    "unquantised": ({}, QuantSpec(FLOAT)),
    "wide silu": ({**SILU, **WIDE}, QuantSpec()),
    "wide llama": ({**LLAMA, **WIDE}, QuantSpec()),
    "wide llama untied": ({**LLAMA, **WIDE, "tie_embeddings": False}, QuantSpec()),
    "wide groups": ({**LLAMA, **WIDE}, QuantSpec(LayerQuant(groups=2))),
    # Their scales move with the rows that rotary positions move.
    "wide llama rows": ({**LLAMA, **WIDE}, QuantSpec(LayerQuant(groups="row"))),
    "wide rows": ({**SILU, **WIDE}, QuantSpec(LayerQuant(groups="row"))),
    "wide binary": ({**SILU, **WIDE}, QuantSpec(LayerQuant("binary"))),
    "wide mixed": (
        {**LLAMA, **WIDE},
        QuantSpec(LayerQuant(threshold=0.7), (("layers.1.mlp.*", FLOAT), ("*.k_proj", FLOAT))),
    ),
    "half wide 2b4t": (HALF_WIDE, QuantSpec()),
    "half wide silu": ({**SILU, **HALF_WIDE}, QuantSpec()),
    "half wide llama": ({**LLAMA, **HALF_WIDE, "tie_embeddings": False}, QuantSpec()),
    "half wide odd numbers": (
        {**SILU, **HALF_WIDE, "norm_eps": 1.2345678e-6, "rope_theta": 1234567.0, "context": 77},
        QuantSpec(),
    ),
    "half wide mixed": (HALF_WIDE, QuantSpec(LayerQuant("binary"), (("layers.0.*", FLOAT),))),
}  # fmt: skip


def decoder_config(**fields: Any) -> DecoderConfig:
    """A decoder of hidden 64 and 2 blocks; the vocabulary has ids that the tokenizer does not use."""
    shape = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": 96, "context": 128, "vocab": 416}
    return DecoderConfig(**{**shape, **fields})


def held_by(format_name: str, **options: Any) -> list[str]:
    """The kinds that a format can hold, by its rule."""
    rule = FORMAT_RULES[format_name]
    return [
        k
        for k, (fields, spec) in KINDS.items()
        if rule(decoder_config(**fields), spec, ExportConfig(**options)) is None
    ]


@dataclass
class SmallRun:
    """A run's checkpoint in canonical form, its file, its tokenizer and held-out tokens."""

    canonical: CanonicalCheckpoint
    checkpoint: Path
    tokenizer: TextTokenizer
    held_out: HeldOut

    def job(self, **options: Any) -> Job:
        """What is exported; ``options`` are fields of ExportConfig."""
        return Job(self.canonical, self.tokenizer, "small", ExportConfig(**options))

    def write(self, folder: Path, format_name: str = "hf-packed", **options: Any) -> Path:
        """The export, in ``folder``."""
        FORMATS[format_name].write(self.job(**options), folder)
        return folder

    def verify(self, folder: Path, format_name: str = "hf-packed", **options: Any) -> VerificationReport:
        """Its verification with the consumer of its format."""
        return FORMATS[format_name].verify(self.job(**options), folder, self.held_out)

    @torch.no_grad()
    def logits(self, decoder: Decoder) -> Tensor:
        """Of two windows of held-out tokens."""
        return decoder(self.held_out.ids[:64].reshape(2, 32))


@dataclass(frozen=True)
class Export:
    """An export on disk, with the run and the options that it was made from."""

    run: SmallRun
    folder: Path
    format_name: str
    options: dict[str, Any]

    def copy(self, folder: Path) -> "Export":
        """The same in another folder, to be damaged there."""
        shutil.copytree(self.folder, folder)
        return replace(self, folder=folder)

    def verify(self) -> VerificationReport:
        """Its verification with the consumer of its format."""
        return self.run.verify(self.folder, self.format_name, **self.options)


MakeRun = Callable[[str], SmallRun]
MakeExport = Callable[..., Export]


def save_checkpoint(path: Path, cfg: DecoderConfig, spec: QuantSpec, step: int = 7, seed: int = 3, **more: Any) -> Path:
    """A training checkpoint as Lightning writes it, of random weights with uneven norms."""
    model = build_decoder(cfg, spec, NormalInit(std=0.1), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        elif name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    state = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "global_step": step, "epoch": 0, **more}, path)
    return path


@pytest.fixture(autouse=True)
def _always_one_thread(one_thread: None) -> None:
    """All tests of this folder."""


@pytest.fixture(scope="session")
def small_run(bpe: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Makes the run of a kind in :data:`KINDS`."""

    def make(kind: str) -> SmallRun:
        fields, spec = KINDS[kind]
        cfg = decoder_config(**fields)
        path = save_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt", cfg, spec)
        ids = [index for i in range(100, 104) for index in [bpe.bos_id, *bpe.encode(make_text(i))]]
        held_out = HeldOut(torch.tensor(ids), window=32, prompt="def ")
        return SmallRun(open_checkpoint(path, cfg, spec), path, bpe, held_out)

    return make


@pytest.fixture(scope="session")
def exported(small_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> MakeExport:
    """Gives the export of a kind in a format, written once and never changed: damage a copy."""
    made: dict[str, Export] = {}

    def get(kind: str, format_name: str = "hf-packed", **options: Any) -> Export:
        key = repr((kind, format_name, options))
        if key not in made:
            run = small_run(kind)
            folder = run.write(tmp_path_factory.mktemp("exports") / format_name, format_name, **options)
            made[key] = Export(run, folder, format_name, options)
        return made[key]

    return get


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
    save_file(tensors, path, metadata={"format": "pt"})
