"""Tables of results as plain rows, for the terminal and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bitnet_train.benchmarking.results import ContenderResult, StepResults
from bitnet_train.benchmarking.run_layers import LayerResults, ShapeResult
from bitnet_train.benchmarking.timing import spread
from bitnet_train.planning.roofline import ceiling

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


def layer_grids(results: LayerResults) -> list[Grid]:
    """A table per shape and number of tokens, one row per layer; the bare matmuls and the ceiling in its title."""
    return [_layer_grid(result) for result in results.shapes if result.reference is not None]


def _layer_grid(result: ShapeResult) -> Grid:
    matmuls = ", ".join(f"{name} {spread(s).median * 1e3:,.2f} ms" for name, s in result.matmuls.items() if s)
    limit = "" if result.r is None else f"; r = {result.r:.2f}, ceiling {ceiling(result.r):.2f}x"
    grid = Grid(
        f"{result.shape.label()}, {result.tokens:,} tokens ({matmuls}{limit})",
        (
            "layer", "forward ms", "predicted", "with backward ms", "predicted", "TFLOP/s", "speed", "of ceiling",
            "kept MB", "dX dB", "dW dB",
        ),
    )  # fmt: skip
    for name, layer in result.layers.items():
        if not layer.both:
            continue
        forward, both = result.times(name)
        speed, share = result.speed(name), result.share_of_ceiling(name)
        noise = layer.noise
        grid.rows.append(
            (
                name,
                f"{forward.median * 1e3:,.2f}",
                "-" if layer.predicted_forward is None else f"{layer.predicted_forward * 1e3:,.2f}",
                f"{both.median * 1e3:,.2f}",
                "-" if layer.predicted_both is None else f"{layer.predicted_both * 1e3:,.2f}",
                f"{result.tflops(name):.3g}",
                "-" if speed is None else f"{speed:.2f}x",
                "-" if share is None or not name.startswith("ternary") else f"{share:.0%}",
                "-" if layer.kept_bytes is None else f"{layer.kept_bytes / 1e6:,.1f}",
                f"{noise['dx_gaussian']:.0f} / {noise['dx_heavy']:.0f}" if noise else "-",
                f"{noise['dw_gaussian']:.0f} / {noise['dw_heavy']:.0f}" if noise else "-",
            )
        )
    return grid


def layer_notes(results: LayerResults) -> list[str]:
    """What the tables do not say."""
    notes = [
        "medians; speed: forward with backward, relative to nn.Linear (compiled where that was measured)",
        "r: speed of the int8 matmul over the bf16 one; ceiling: 3/(2/r+1), a layer with forward and dX in int8 and dW "
        "in bf16 and nothing else to do (dw=int8 may pass it)",
        "kept: bytes saved for the backward, each storage once, parameters not counted",
        "dB: signal to noise of a gradient against the exact straight-through one (Gaussian / heavy-tailed dY)",
    ]
    for result in results.shapes:
        where = f"{result.shape.label()}, {result.tokens:,} tokens"
        notes += [f"{where}: {name} not measured: {why}" for name, why in result.not_measured.items()]
    if not results.complete:
        notes.append("interrupted: this is what was measured until then")
    return notes


def profile_grid(results: StepResults) -> Grid | None:
    """Milliseconds per step by kind of operation, a column per profiled contender; None when none was."""
    profiles = {name: r.profile for name, r in results.timed.items() if r.profile}
    if not profiles:
        return None
    kinds = list(dict.fromkeys(kind for profile in profiles.values() for kind in profile))
    grid = Grid("Where the time of a step goes (ms, and share)", ("kind of operation", *profiles))
    for kind in kinds:
        cells = []
        for profile in profiles.values():
            seconds = profile.get(kind, 0.0)
            cells.append(f"{seconds * 1e3:,.1f} ({seconds / sum(profile.values()):.0%})")
        grid.rows.append((kind, *cells))
    grid.rows.append(("all", *(f"{sum(profile.values()) * 1e3:,.1f}" for profile in profiles.values())))
    return grid


def step_notes(results: StepResults) -> list[str]:
    """What the table does not say: who is who, who is missing and why, how memory was measured."""
    notes = [f"{name}: {result.contender.about}" for name, result in results.timed.items()]
    notes += [f"{name} not measured: {reason}" for name, reason in results.not_measured.items()]
    notes += [f"profile of {name} not measured: {r.no_profile}" for name, r in results.timed.items() if r.no_profile]
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
