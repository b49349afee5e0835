"""The learning rate, weight decay and batch of a run at its characteristic steps, and as a picture."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitnet_train.steps import as_steps
from bitnet_train.training.batch_warmup import BatchPlan
from bitnet_train.training.config import RunConfig, consumed_by, step_plan, step_size
from bitnet_train.training.rates import rates
from bitnet_train.training.schedules.config import InverseSqrtSchedule, ScheduleConfig, TwoStageSchedule, WsdSchedule
from bitnet_train.training.schedules.factors import stage_borders

POINTS = 1000


@dataclass(frozen=True)
class CurvePoint:
    """The rates and the batch of one update."""

    step: int
    what: str
    lr: float
    weight_decay: float
    # Tokens of the step, or images of a classifier's.
    tokens: int


def characteristic_points(cfg: RunConfig) -> list[CurvePoint]:
    """First and last step, end of warm-up, both sides of every stage border, and the quarters between."""
    total = cfg.trainer.max_steps
    what = {0: "first step"}
    for schedule, name in ((cfg.schedule, ""), (cfg.weight_decay_schedule, "weight decay's ")):
        for step, event in _events(schedule, total):
            what.setdefault(step, f"{name}{event}")
    whole, plan = _whole_steps(cfg), step_plan(_whole_steps(cfg))
    for step, event in _batch_events(whole, plan):
        what.setdefault(step, f"batch of {event}")
    for quarter in (1, 2, 3):
        what.setdefault(quarter * total // 4, f"{quarter}/4 of the run" if quarter != 2 else "half of the run")
    what[total - 1] = "last step"
    kept = [(step, rates(cfg, step)) for step in sorted(what) if 0 <= step < total]
    return [CurvePoint(s, what[s], at.lr, at.weight_decay, _batch(whole, s)) for s, at in kept]


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
    """Draw the curves over the steps, one panel each, into a PNG file; the batch only if it changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total, whole = cfg.trainer.max_steps, _whole_steps(cfg)
    plan = step_plan(whole)
    marked = {point.step for point in characteristic_points(cfg)}
    steps = sorted(marked | {i * (total - 1) // POINTS for i in range(POINTS + 1)})
    points = [rates(cfg, step) for step in steps]
    events, own = _events(cfg.schedule, total), _events(cfg.weight_decay_schedule, total)
    panels = [
        ("learning rate", "tab:blue", [at.lr for at in points], [e for e in events if "end of stage" not in e[1]]),
        (
            "weight decay",
            "tab:orange",
            [at.weight_decay for at in points],
            [e for e in events if e[1][:5] == "stage"] + own,
        ),
    ]
    if plan.warmup:
        tokens = [float(_batch(whole, step)) for step in steps]
        panels.append(("tokens per step", "tab:green", tokens, []))
    figure = Figure(figsize=(7.5, 1 + 2 * len(panels)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True)
    for panel, (label, colour, values, marks) in zip(axes, panels, strict=True):
        panel.plot(steps, values, color=colour, linewidth=1.8)
        panel.fill_between(steps, values, color=colour, alpha=0.12, linewidth=0)
        panel.set_ylabel(label)
        panel.set_ylim(0, 1.08 * max(values) if max(values) > 0 else 1.0)
        panel.grid(alpha=0.3)
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        for step, event in marks:
            if "end of stage" not in event:
                _mark(panel, step, event)
    axes[-1].set_xlim(0, total)
    size = step_size(cfg)
    axes[-1].set_xlabel(f"optimizer step{'' if plan.warmup else f' (of {size.count:,} {size.unit})'}")
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _whole_steps(cfg: RunConfig) -> RunConfig:
    """``cfg`` with every step in one forward; how steps are cut does not change what they read."""
    return replace(cfg, trainer=replace(cfg.trainer, micro_batch=None))


def _batch(whole: RunConfig, step: int) -> int:
    return consumed_by(whole, step + 1) - consumed_by(whole, step)


def _batch_events(whole: RunConfig, plan: BatchPlan) -> list[tuple[int, str]]:
    return [(stage.until, f"{_batch(whole, stage.until):,} tokens") for stage in plan.warmup]


def _mark(panel: Any, step: int, event: str) -> None:
    panel.axvline(step, color="grey", linewidth=0.8, linestyle="--")
    panel.annotate(
        event, (step, 0.04), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, color="dimgrey",
        textcoords="offset points", xytext=(4, 0), verticalalignment="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
    )  # fmt: skip
