"""What a dense model is worth to a ternary one: as a start (at once or by degrees), and as a teacher. At the
size of small.

    python benchmarks/from_dense.py            # trains what is missing, prints the tables
    python benchmarks/from_dense.py --only "at once"

Expected before it was measured: by degrees is better than at once, by more the shorter the run; a teacher of the same
size helps by 1 to 2 % at equal steps, and costs a third more time per step.
"""

import argparse
import json
from pathlib import Path

from effects import finished, folder_name
from trainings import rows
from trainings import train as start

DENSE = "dense (the teacher)"
TEACHER, FROM_DENSE, SCRATCH = 600, 300, 400  # steps
START = [
    "+recipe=finetune", "data=stdlib", "init.from=DENSE", "optimizer.weight_decay=0.1", "quant.gradient.dw=int8",
    "trainer.batch_tokens=4096", "trainer.micro_batch=null", f"trainer.max_steps={FROM_DENSE}",
]  # fmt: skip
BY_DEGREES = ["quant/progressive=lambda", "quant.progressive.until=0.3"]
SMALL = ["+recipe=small", f"trainer.max_steps={SCRATCH}"]
MUON = ["optimizer=muon", "optimizer.lr=2e-2"]
ADAMW = ["optimizer=adamw", "optimizer.lr=3e-3"]
TAUGHT = ["loss=distillation", "loss.teacher=DENSE", "loss.temperature=2"]
RUNS: dict[str, list[str]] = {
    DENSE: ["+recipe=small", f"trainer.max_steps={TEACHER}", "quant=none", *MUON],
    "scratch: plain": [*SMALL, *MUON],
    "scratch: taught, logits": [*SMALL, *MUON, *TAUGHT, "loss.logits=1"],
    "start: at once, lr 1e-3": [*START, "optimizer.lr=1e-3"],
    "start: by degrees, lr 1e-3": [*START, "optimizer.lr=1e-3", *BY_DEGREES],
    "scratch: plain, AdamW": [*SMALL, *ADAMW],
    "start: at once, lr 3e-4": [*START, "optimizer.lr=3e-4"],
    "start: by degrees, lr 3e-4": [*START, "optimizer.lr=3e-4", *BY_DEGREES],
    "scratch: taught, logits and relations": [*SMALL, *MUON, *TAUGHT, "loss.logits=1", "loss.relations=10"],
}


def train(name: str, overrides: list[str], places: argparse.Namespace) -> float | None:
    """Bits per byte of a run at its end, which is trained unless it is there; None when it fails (see its log)."""
    folder, dense = places.runs / folder_name(name), places.runs / folder_name(DENSE)
    log = places.runs / f"{folder_name(name)}.log"
    steps = next(int(o.partition("=")[2]) for o in overrides if o.startswith("trainer.max_steps="))
    if finished(folder, steps) is None:
        settings = [
            *(o.replace("DENSE", str(dense)) for o in overrides),
            f"run_name={folder_name(name)}", f"paths.runs={places.runs}", f"paths.data={places.data}",
            "trainer.validate_every=100", "samples.every_steps=null",
        ]  # fmt: skip
        if code := start(settings, log):
            print(f"{name}: exit code {code}, see {log}", flush=True)
    return finished(folder, steps)


def curve(folder: Path) -> dict[int, float]:
    """Step -> bits per byte of every validation."""
    return {int(row["step"]): float(row["val/bits_per_byte"]) for row in rows(folder) if row["val/bits_per_byte"]}


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/from_dense"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/from_dense.json"))
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    for name, overrides in RUNS.items():
        if name == DENSE or arguments.only in name:
            value = train(name, overrides, arguments)
            print(f"{name:40} {'failed' if value is None else f'{value:.4f}'}", flush=True)
    curves = {name: curve(arguments.runs / folder_name(name)) for name in RUNS}
    arguments.results.write_text(json.dumps({n: c for n, c in curves.items() if c}, indent=1) + "\n")
    for kind, steps in (("start", FROM_DENSE), ("scratch", SCRATCH)):
        marks = range(100, steps + 1, 100)
        print(f"\n| {kind} | {' | '.join(f'step {mark}' for mark in marks)} |\n| --- |{' ---: |' * len(marks)}")
        for name in (name for name in RUNS if name.startswith(kind)):
            cells = [f"{curves[name][mark]:.4f}" if mark in curves[name] else "" for mark in marks]
            print(f"| {name.partition(': ')[2]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
