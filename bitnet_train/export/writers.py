"""The export formats: name -> how it is written, verified and measured. Their rules are in ``export.rules``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.gguf.plan import Container, gguf_size
from bitnet_train.export.gguf.reader import gguf_path, load_gguf
from bitnet_train.export.gguf.verify import verify_gguf
from bitnet_train.export.gguf.writer import write_gguf
from bitnet_train.export.held_out import HeldOut
from bitnet_train.export.huggingface.reader import is_transformers_folder, load_export
from bitnet_train.export.huggingface.variant import Storage, choose_variant
from bitnet_train.export.huggingface.verify import verify_huggingface
from bitnet_train.export.huggingface.writer import export_size, write_huggingface
from bitnet_train.export.packed.reader import is_packed, load_packed
from bitnet_train.export.packed.verify import verify_packed
from bitnet_train.export.packed.writer import packed_size, write_packed
from bitnet_train.export.report import VerificationReport
from bitnet_train.export.sizes import ExportSize
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.decoder import Decoder
from bitnet_train.quant.spec import QuantSpec


@dataclass(frozen=True)
class Job:
    """What is exported: the run's weights, its tokenizer and name, and how the user wants exports."""

    canonical: CanonicalCheckpoint
    tokenizer: TextTokenizer
    name: str
    cfg: ExportConfig


@dataclass(frozen=True)
class Format:
    """What belongs to one format.

    ``write(job, folder)`` replaces the folder; ``verify(job, folder, held_out)`` reloads it with its real consumer;
    ``size(model, spec, cfg)`` is what the tensors take.
    """

    write: Callable[[Job, Path], None]
    verify: Callable[[Job, Path, HeldOut], VerificationReport]
    size: Callable[[DecoderConfig, QuantSpec, ExportConfig], ExportSize]


def _huggingface(storage: Storage) -> Format:
    def write(job: Job, folder: Path) -> None:
        variant = choose_variant(storage, job.canonical.cfg, job.cfg)
        write_huggingface(job.canonical, job.tokenizer, folder, variant)

    def verify(job: Job, folder: Path, held_out: HeldOut) -> VerificationReport:
        return verify_huggingface(folder, job.canonical, job.tokenizer, held_out, storage)

    return Format(write, verify, lambda cfg, spec, export: export_size(cfg, spec, choose_variant(storage, cfg, export)))


def _gguf(container: Container) -> Format:
    def write(job: Job, folder: Path) -> None:
        write_gguf(job.canonical, job.tokenizer, folder, container, job.cfg, job.name)

    def verify(job: Job, folder: Path, held_out: HeldOut) -> VerificationReport:
        return verify_gguf(folder, job.canonical, job.tokenizer, held_out, container, job.cfg, job.name)

    return Format(write, verify, lambda cfg, spec, export: gguf_size(cfg, spec, container, export))


def _packed() -> Format:
    return Format(
        lambda job, folder: write_packed(job.canonical, job.tokenizer, folder, job.cfg),
        lambda job, folder, held_out: verify_packed(folder, job.canonical, job.tokenizer, held_out),
        packed_size,
    )


# Add a format: its rule in bitnet_train.export.rules.FORMAT_RULES, and an entry of the same name here.
FORMATS: dict[str, Format] = {
    **{storage.value: _huggingface(storage) for storage in Storage},
    "packed": _packed(),
    **{container.value: _gguf(container) for container in Container},
}


def is_export(folder: Path) -> bool:
    """Whether the folder looks like an export of any format."""
    return is_transformers_folder(folder) or gguf_path(folder) is not None


def load_any_export(
    folder: Path, device: torch.device | str = "cpu", backend: Backend | None = None
) -> tuple[Decoder, TextTokenizer]:
    """The model (float32, eval mode, without master weights) and the tokenizer of an export of any format.

    Raises ConfigError for a folder that is incomplete, damaged, or of a kind that is not read here.
    """
    if gguf_path(folder) is not None:
        return load_gguf(folder, device, backend)
    if is_packed(folder):
        return load_packed(folder, device, backend)
    return load_export(folder, device, backend)
