"""The export formats: name -> how it is written, verified and measured. Their rules are in ``export.rules``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.huggingface import ExportSize, export_size, write_huggingface
from bitnet_train.export.report import VerificationReport
from bitnet_train.export.verify import HeldOut, verify_huggingface
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.quant.spec import QuantSpec


@dataclass(frozen=True)
class Format:
    """What belongs to one format.

    ``write(canonical, tokenizer, folder, dtype)`` replaces the folder; ``verify(folder, canonical, tokenizer,
    held_out)`` reloads it with its real consumer; ``size(cfg, spec, dtype)`` is what the tensors take.
    """

    write: Callable[[CanonicalCheckpoint, TextTokenizer, Path, ExportDtype], None]
    verify: Callable[[Path, CanonicalCheckpoint, TextTokenizer, HeldOut], VerificationReport]
    size: Callable[[DecoderConfig, QuantSpec, ExportDtype], ExportSize]


# Add a format: its rule in bitnet_train.export.rules.FORMAT_RULES, and an entry of the same name here.
FORMATS: dict[str, Format] = {"hf-packed": Format(write_huggingface, verify_huggingface, export_size)}
