"""divergence.jsonl: one line for every time that a run went back to a checkpoint, and one for every bad step.

Where a run goes on is a function of its checkpoint and this file, so that a run that is killed after it went back
does the same when it is started again.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bitnet_train.durable import reason
from bitnet_train.errors import ConfigError, DivergedError
from bitnet_train.training.callbacks.checkpoint import forget_later, step_path
from bitnet_train.training.run_folder import RunFolder, write_atomically


@dataclass(frozen=True)
class Rollback:
    """A return to an earlier state.

    ``step``: the last step that was made and is taken back. ``back_to``: the step of the checkpoint (0: the initial
    weights). ``consumed``: samples that the run had consumed by then, behind which it goes on. ``left_out``: samples
    between the checkpoint and there, which are not trained on. ``reason``: in words.
    """

    step: int
    back_to: int
    consumed: int
    left_out: int
    reason: str


def read_rollbacks(path: Path) -> list[Rollback]:
    """The returns in the file, oldest first; from a damaged line on they do not count."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Rollback], list[dict[str, Any]]]:
    """The returns, and the bad steps (``training.poison.note``), which decide nothing."""
    found: list[Rollback] = []
    steps: list[dict[str, Any]] = []
    if not path.is_file():
        return found, steps
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
            if "event" in content:
                steps.append({**content, "step": int(content["step"]), "first_sample": int(content["first_sample"])})
            else:
                found.append(Rollback(**content))
        except (ValueError, TypeError, KeyError):
            break
    return found, steps


def write_rollbacks(path: Path, rollbacks: list[Rollback], steps: list[dict[str, Any]] | None = None) -> None:
    """Replace the file, as a whole; ``steps`` in the place of the bad steps that it holds."""
    kept = _read(path)[1] if steps is None else steps
    lines = [*kept, *(asdict(rollback) for rollback in rollbacks)]
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def cut_rollbacks(path: Path, first: int) -> list[Rollback]:
    """The rollbacks that count for a run that starts from step ``first``; those of later checkpoints are dropped.

    So are bad steps past ``first``, which will be made again, unless their samples were left out.
    """
    found, steps = _read(path)
    kept = [rollback for rollback in found if rollback.back_to <= first]
    left = [s for s in steps if s["step"] <= first or any(s["first_sample"] < r.consumed for r in kept)]
    if len(kept) < len(found) or len(left) < len(steps):
        write_rollbacks(path, kept, left)
    return kept


def resume_point(rollbacks: list[Rollback], first: int) -> int | None:
    """Samples behind which a run goes on that starts from step ``first``, or None for those its checkpoint says."""
    return next((rollback.consumed for rollback in reversed(rollbacks) if rollback.back_to == first), None)


def go_back(rollback: Rollback, before: list[Rollback], allowed: int, folder: RunFolder, console: Console) -> None:
    """Write ``rollback`` behind those ``before`` it and say so. Raises DivergedError when that is one too many."""
    good = step_path(folder.checkpoints, rollback.back_to)
    place = f"step {rollback.back_to} ({good})" if good.exists() else f"step {rollback.back_to}"
    if len(before) >= allowed:
        past = ", ".join(f"step {r.step} to {r.back_to}" for r in before) or "never"
        raise DivergedError(
            f"Stopped at step {rollback.step}: the guard {rollback.reason}, and the run has gone back "
            f"guard.max_rollbacks={allowed} times ({past}; see {folder.divergence_file}). The last good state is "
            f"{place}. Fork from it or an earlier one (resume.from=) with a lower optimizer.lr, a longer "
            "schedule.warmup or harder clipping, look at the samples that were left out, or allow more with "
            "guard.max_rollbacks."
        )
    try:
        # A kill between the two has the run make these steps again, and go back again.
        forget_later(folder.checkpoints, rollback.back_to)
        write_rollbacks(folder.divergence_file, [*before, rollback])
    except OSError as error:
        raise ConfigError(
            f"The return to {place} cannot be written to {folder.divergence_file} ({reason(error)}): repair that; the "
            "same command goes on from there."
        ) from None
    console.print(
        f"guard: {rollback.reason}: back from step {rollback.step} to {place}, and on behind sample "
        f"{rollback.consumed:,} ({rollback.left_out:,} left out); return {len(before) + 1} of {allowed}",
        markup=False,
    )
