"""What the step benchmark found, filled while it runs, so that an interruption leaves what was measured."""

from dataclasses import asdict, dataclass, field
from typing import Any

from bitnet_train.benchmarking.contenders import REFERENCE, Contender
from bitnet_train.benchmarking.memory import StepMemory
from bitnet_train.benchmarking.timing import Ratio, Spread, ratio, spread


@dataclass
class ContenderResult:
    """Figures of one contender; seconds of whole steps, one per round, and the losses of the warm-up steps."""

    contender: Contender
    tokens: int = 0
    warmup_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: StepMemory | None = None
    no_memory: str = ""
    predicted_seconds: float | None = None
    predicted_parts: dict[str, float] = field(default_factory=dict)
    profile: dict[str, float] | None = None
    no_profile: str = ""

    @property
    def time(self) -> Spread:
        """Median and quartiles of a step's seconds."""
        return spread(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """From the median step."""
        return self.tokens / self.time.median


@dataclass
class StepResults:
    """The whole step benchmark. ``complete`` is false when it was interrupted."""

    measured: dict[str, ContenderResult] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    complete: bool = False

    @property
    def timed(self) -> dict[str, ContenderResult]:
        """The contenders that have at least one timed round."""
        return {name: result for name, result in self.measured.items() if result.seconds}

    @property
    def reference(self) -> str | None:
        """What the ratios refer to: the dense twin, or without it the first contender that was timed."""
        timed = self.timed
        return REFERENCE if REFERENCE in timed else next(iter(timed), None)

    def ratio(self, name: str) -> Ratio | None:
        """Speed of a contender relative to the reference; None when there is nothing to compare."""
        reference = self.reference
        if reference is None or name not in self.timed:
            return None
        return ratio(self.timed[reference].seconds, self.timed[name].seconds)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for step.json."""
        return {
            "complete": self.complete,
            "reference": self.reference,
            "device_rates": self.rates,
            "contenders": {name: self._plain(name, result) for name, result in self.measured.items()},
            "not_measured": self.not_measured,
        }

    def _plain(self, name: str, result: ContenderResult) -> dict[str, Any]:
        contender, compared = result.contender, self.ratio(name)
        timed = bool(result.seconds)
        return {
            "about": contender.about,
            "layers": contender.layers,
            "device": contender.device,
            "precision": contender.precision,
            "compiled": contender.compiled,
            "tokens_per_step": result.tokens,
            "warmup_seconds": result.warmup_seconds,
            "warmup_losses": result.losses,
            "seconds": result.seconds,
            "seconds_spread": asdict(result.time) if timed else None,
            "tokens_per_second": result.tokens_per_second if timed else None,
            "speed_over_reference": None if compared is None else asdict(compared),
            "memory": None if result.memory is None else asdict(result.memory) | {"model": result.memory.model},
            "no_memory": result.no_memory,
            "predicted_seconds": result.predicted_seconds,
            "predicted_parts": result.predicted_parts,
            "profile_seconds": result.profile,
            "no_profile": result.no_profile,
        }
