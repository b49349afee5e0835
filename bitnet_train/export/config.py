"""What a finished run is written as: the ``export`` part of the configuration."""

from dataclasses import dataclass
from enum import Enum


class ExportDtype(Enum):
    """Type of the tensors that are not codes: embedding, head, norms, scales."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LinearClass(Enum):
    """How transformers reads packed codes: which class, and so whether it multiplies or divides by the scale."""

    auto = "auto"
    autobitlinear = "autobitlinear"
    bitlinear = "bitlinear"


class EmbeddingType(Enum):
    """Type of the embedding, and of an untied head, in a GGUF file."""

    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"
    q6_k = "q6_k"


class Packing(Enum):
    """How the format ``packed`` stores codes: four to a byte, or five as digits of base three."""

    two_bit = "two_bit"
    base3 = "base3"


@dataclass
class ExportConfig:
    # Names of formats (see --help); null for every format that can hold the model and be verified on this machine.
    formats: list[str] | None = None
    # hf-*, packed: float32 keeps what was trained exactly; bfloat16 halves the embedding, as Microsoft published 2B4T.
    dtype: ExportDtype = ExportDtype.float32
    # hf-packed: autobitlinear multiplies by the scale (2B4T), bitlinear divides by its inverse (Falcon3-1.58,
    # Llama3-8B-1.58); auto is autobitlinear with model.norms=pre_sub and bitlinear with pre.
    linear_class: LinearClass = LinearClass.auto
    # gguf-*: f32, f16, q8_0 (8.5 bits a weight) or q6_k (6.56 bits).
    embedding: EmbeddingType = EmbeddingType.f16
    # packed: two_bit or base3 (1.6 bits a weight).
    packing: Packing = Packing.base3
    # Licence in the model card, as the Hugging Face hub names it (apache-2.0, mit, ...); null leaves it out.
    license: str | None = None
    # Held-out tokens that verification measures perplexity on.
    verify_tokens: int = 16384
