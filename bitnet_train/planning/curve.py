"""The learning rate and weight decay of a run at its characteristic steps, and as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_train.training.config import RunConfig
from bitnet_train.training.rates import rates
from bitnet_train.training.schedules.config import InverseSqrtSchedule, ScheduleConfig, TwoStageSchedule, WsdSchedule
from bitnet_train.training.schedules.factors import as_steps, stage_borders

POINTS = 1000


@dataclass(frozen=True)
class CurvePoint:
    """The rates of one update."""

    step: int
    what: str
    lr: float
    weight_decay: float


def characteristic_points(cfg: RunConfig) -> list[CurvePoint]:
    """First and last step, end of warm-up, both sides of every stage border, and the quarters between."""
    total = cfg.trainer.max_steps
    what = {0: "first step"}
    for schedule, name in ((cfg.schedule, ""), (cfg.weight_decay_schedule, "weight decay's ")):
        for step, event in _events(schedule, total):
            what.setdefault(step, f"{name}{event}")
    for quarter in (1, 2, 3):
        what.setdefault(quarter * total // 4, f"{quarter}/4 of the run" if quarter != 2 else "half of the run")
    what[total - 1] = "last step"
    kept = [(step, rates(cfg, step)) for step in sorted(what) if 0 <= step < total]
    return [CurvePoint(step, what[step], at.lr, at.weight_decay) for step, at in kept]


def _events(schedule: ScheduleConfig, total: int) -> list[tuple[int, str]]:
    warm = as_steps(schedule.warmup, total)
    events = [(warm - 1, "end of warm-up")] if warm else []
    if isinstance(schedule, WsdSchedule | InverseSqrtSchedule) and schedule.decay:
        events.append((total - as_steps(schedule.decay, total), "decay begins"))
    if isinstance(schedule, TwoStageSchedule):
        for number, border in enumerate(stage_borders(schedule, total)[:-1], start=1):
            events += [(border - 1, f"end of stage {number}"), (border, f"stage {number + 1} begins")]
    return events


def draw(cfg: RunConfig, title: str, file: Path) -> None:
    """Draw both curves over the steps, one panel each, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = cfg.trainer.max_steps
    marked = {point.step for point in characteristic_points(cfg)}
    steps = sorted(marked | {i * (total - 1) // POINTS for i in range(POINTS + 1)})
    points = [rates(cfg, step) for step in steps]
    curves = ([at.lr for at in points], [at.weight_decay for at in points])
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for panel, values, label, colour in (
        (upper, curves[0], "learning rate", "tab:blue"),
        (lower, curves[1], "weight decay", "tab:orange"),
    ):
        panel.plot(steps, values, color=colour, linewidth=1.8)
        panel.fill_between(steps, values, color=colour, alpha=0.12, linewidth=0)
        panel.set_ylabel(label)
        panel.set_ylim(0, 1.08 * max(values) if max(values) > 0 else 1.0)
        panel.grid(alpha=0.3)
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for step, event in _events(cfg.schedule, total):
        if not event.startswith("end of stage"):
            _mark(upper, step, event)
    for step, event in [e for e in _events(cfg.schedule, total) if e[1].startswith("stage")] + _events(
        cfg.weight_decay_schedule, total
    ):
        _mark(lower, step, event)
    lower.set_xlim(0, total)
    lower.set_xlabel(f"optimizer step (of {cfg.trainer.batch_tokens:,} tokens)")
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _mark(panel: Any, step: int, event: str) -> None:
    panel.axvline(step, color="grey", linewidth=0.8, linestyle="--")
    panel.annotate(
        event, (step, 0.04), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, color="dimgrey",
        textcoords="offset points", xytext=(4, 0), verticalalignment="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
    )  # fmt: skip
