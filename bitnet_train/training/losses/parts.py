"""What a loss is made of and what it is given."""

from typing import NamedTuple, Protocol

from torch import Tensor

from bitnet_train.nn.collector import Collector, Projections


class LossParts(NamedTuple):
    """A loss as scalars: what is minimised, and what it consists of, for the metrics.

    ``cross_entropy`` is the mean per token in nats whatever else is minimised, so that runs can be compared by it; with
    a ``mean`` reduction ``total`` is the sum of the parts, which carry their weights.
    """

    total: Tensor
    cross_entropy: Tensor
    z: Tensor | None = None
    distillation: Tensor | None = None

    def detached(self) -> "LossParts":
        """The same numbers without their history."""
        return LossParts(*(None if part is None else part.detach() for part in self))  # type: ignore[arg-type]

    def times(self, weight: Tensor) -> "LossParts":
        """All of it times a 0-d ``weight``."""
        return LossParts(*(None if part is None else part * weight for part in self))  # type: ignore[arg-type]


class Taught(NamedTuple):
    """What a teacher says about a batch: its final states (batch, tokens, its hidden) and head (vocab, its hidden),
    and by the student's block numbers its streams and projections."""

    states: Tensor
    head_weight: Tensor
    streams: dict[int, Tensor]
    projections: dict[int, Projections]


class Loss(Protocol):
    """(final states (batch, tokens, hidden), head weight (vocab, hidden), targets (batch, tokens), ...) -> parts.

    ``collector`` is what :meth:`collector` returned, filled by the decoder's pass; ``taught`` comes from the teacher of
    a loss that has one.
    """

    def collector(self) -> Collector | None:
        """What the loss needs to see of the decoder's inside, or None."""

    def __call__(
        self,
        states: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        collector: Collector | None = None,
        taught: Taught | None = None,
    ) -> LossParts: ...
