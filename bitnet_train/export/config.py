"""What a finished run is written as: the ``export`` part of the configuration."""

from dataclasses import dataclass
from enum import Enum


class ExportDtype(Enum):
    """Type of the tensors that are not codes: embedding, head, norms, scales."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class ExportConfig:
    # Names of formats (see --help); null for every format that can hold the model.
    formats: list[str] | None = None
    # float32 keeps what was trained exactly; bfloat16 halves the embedding, as Microsoft published 2B4T.
    dtype: ExportDtype = ExportDtype.float32
    # Held-out tokens that verification measures perplexity on.
    verify_tokens: int = 16384
