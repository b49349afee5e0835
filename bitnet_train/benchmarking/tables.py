"""Tables of results as plain rows, for the terminal and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bitnet_train.benchmarking.results import ContenderResult, StepResults

# trainer.precision as the tables call it.
PRECISIONS = {"bf16-mixed": "bf16", "32-true": "fp32"}


@dataclass(frozen=True)
class Grid:
    """A titled table; the first column holds names, the others figures."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """As a Markdown table under its title."""
        head = f"| {' | '.join(self.columns)} |"
        rule = f"| --- |{' ---: |' * (len(self.columns) - 1)}"
        body = [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([f"### {self.title}", "", head, rule, *body, ""])


def megabytes(value: float) -> str:
    """Whole megabytes (10^6 bytes)."""
    return f"{value / 1e6:,.0f}"


def step_grid(results: StepResults) -> Grid:
    """One row per contender; those that were not measured come last, with a dash in every column."""
    grid = Grid(
        f"One training step (speed relative to {results.reference}; in brackets the range of the paired rounds)",
        (
            "contender", "how", "tokens/s", "ms", "quartiles", "speed", "predicted ms", "predicted speed",
            "peak MB", "model MB",
        ),
    )  # fmt: skip
    for name, result in results.timed.items():
        time, ratio = result.time, results.ratio(name)
        assert ratio is not None
        grid.rows.append(
            (
                name,
                f"{PRECISIONS[result.contender.precision]} {'compiled' if result.contender.compiled else 'eager'}",
                f"{result.tokens_per_second:,.0f}",
                f"{time.median * 1e3:,.1f}",
                f"{time.lower * 1e3:,.1f}-{time.upper * 1e3:,.1f}",
                f"{ratio.of_medians:.2f}x ({ratio.smallest:.2f}-{ratio.largest:.2f})",
                *_predicted(results, result),
                "-" if result.memory is None else megabytes(result.memory.peak),
                "-" if result.memory is None else megabytes(result.memory.model),
            )
        )
    dashes = ("-",) * (len(grid.columns) - 1)
    grid.rows.extend((name, *dashes) for name in results.not_measured if name not in results.timed)
    return grid


def _predicted(results: StepResults, result: ContenderResult) -> tuple[str, str]:
    reference = results.reference
    if result.predicted_seconds is None or reference is None:
        return "-", "-"
    base = results.measured[reference].predicted_seconds
    # A step of the reference may hold another number of tokens (a variant of trainer.batch_tokens).
    scale = result.tokens / results.measured[reference].tokens
    speed = "-" if base is None else f"{base * scale / result.predicted_seconds:.2f}x"
    return f"{result.predicted_seconds * 1e3:,.1f}", speed


def step_notes(results: StepResults) -> list[str]:
    """What the table does not say: who is who, who is missing and why, how memory was measured."""
    notes = [f"{name}: {result.contender.about}" for name, result in results.timed.items()]
    notes += [f"{name} not measured: {reason}" for name, reason in results.not_measured.items()]
    notes += [f"memory of {name} not measured: {r.no_memory}" for name, r in results.timed.items() if r.no_memory]
    ways = {r.memory.how for r in results.timed.values() if r.memory is not None}
    notes += [
        f"memory: {way}, peak over three steps after warm-up, a process per contender; model MB: "
        "without what the process held before the model was built"
        for way in ways
    ]
    if not results.complete:
        notes.append("interrupted: this is what was measured until then")
    return notes
