"""What a loss asks to see of a decoder's inside: the residual stream behind a block, its queries, keys and values."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Projections(NamedTuple):
    """Outputs of q_proj, k_proj and v_proj, before rotary positions: (batch, tokens, heads or kv_heads * head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass
class Collector:
    """Given to ``Decoder.hidden_states``, which fills it during the pass; block numbers count from 0.

    ``streams_of`` and ``projections_of`` say which blocks; ``streams`` (batch, tokens, hidden), the residual stream
    with the block's own results added, and ``projections`` are what was found.
    """

    streams_of: frozenset[int] = frozenset()
    projections_of: frozenset[int] = frozenset()
    streams: dict[int, Tensor] = field(default_factory=dict)
    projections: dict[int, Projections] = field(default_factory=dict)
