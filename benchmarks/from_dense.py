"""What a dense model is worth to a ternary one: as a start (at once or by degrees), and as a teacher.

    python benchmarks/from_dense.py --size tiny --seed 1      # trains what is missing, prints the tables
    python benchmarks/from_dense.py --size small --only "at once"

Expected before it was measured: by degrees is better than at once, by more the shorter the run; a teacher of the same
size helps by 1 to 2 % at equal steps, and costs a third more time per step.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from effects import finished, folder_name, own_steps
from trainings import rows
from trainings import train as start

DENSE = "dense (the teacher)"


@dataclass(frozen=True)
class Size:
    """What is trained at a size: steps of the teacher, from it, and from scratch; settings of the two latter; and how
    many steps lie between validations."""

    teacher: int
    from_dense: int
    scratch: int
    finetune: list[str]
    optimizer: list[str]
    marks: int


SIZES = {
    "tiny": Size(
        2100,
        300,
        600,
        ["model=tiny", "data.tokenizer.vocab_size=4096", "data.sequence_length=256"],
        ["optimizer=muon", "optimizer.lr=2e-2"],
        100,
    ),
    # As much as an afternoon on two CPU cores has room for: less than an epoch.
    "small": Size(500, 150, 250, [], ["optimizer=muon", "optimizer.lr=1e-2"], 50),
}


def runs(name: str) -> dict[str, list[str]]:
    """Run -> overrides; DENSE in them stands for the teacher's folder."""
    size = SIZES[name]
    fine = [
        "+recipe=finetune", "data=stdlib", *size.finetune, "init.from=DENSE", "optimizer.weight_decay=0.1",
        "quant.gradient.dw=int8", "trainer.batch_tokens=4096", "trainer.micro_batch=null",
        f"trainer.max_steps={size.from_dense}",
    ]  # fmt: skip
    degrees = ["quant/progressive=lambda", "quant.progressive.until=0.3"]
    own = [f"+recipe={name}", *size.optimizer]
    scratch = [*own, f"trainer.max_steps={size.scratch}"]
    taught = ["loss=distillation", "loss.teacher=DENSE", "loss.temperature=2"]
    return {
        DENSE: [*own, f"trainer.max_steps={size.teacher}", "quant=none"],
        "start: at once, lr 1e-3": [*fine, "optimizer.lr=1e-3"],
        "start: by degrees, lr 1e-3": [*fine, "optimizer.lr=1e-3", *degrees],
        "start: at once, lr 3e-4": [*fine, "optimizer.lr=3e-4"],
        "start: by degrees, lr 3e-4": [*fine, "optimizer.lr=3e-4", *degrees],
        "scratch: plain": scratch,
        "scratch: taught, logits": [*scratch, *taught, "loss.logits=1"],
        "scratch: taught, logits and relations": [*scratch, *taught, "loss.logits=1", "loss.relations=10"],
    }


def train(name: str, overrides: list[str], places: argparse.Namespace) -> float | None:
    """Bits per byte of a run at its end, which is trained unless it is there; None when it fails (see its log)."""
    folder, dense = places.runs / folder_name(name), places.runs / folder_name(DENSE)
    log = places.runs / f"{folder_name(name)}.log"
    steps = own_steps(overrides)
    if finished(folder, steps) is None:
        settings = [
            *(o.replace("DENSE", str(dense)) for o in overrides), f"seed={places.seed}",
            f"run_name={folder_name(name)}", f"paths.runs={places.runs}", f"paths.data={places.data}",
            f"trainer.validate_every={SIZES[places.size].marks}", "samples.every_steps=null", "trainer.compile=true",
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
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/from_dense"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/from_dense.json"))
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs / arguments.size / f"seed{arguments.seed}"
    size, everything = SIZES[arguments.size], runs(arguments.size)
    for name, overrides in everything.items():
        if name == DENSE or arguments.only in name:
            value = train(name, overrides, arguments)
            print(f"{name:40} {'failed' if value is None else f'{value:.4f}'}", flush=True)
    curves = {name: curve(arguments.runs / folder_name(name)) for name in everything}
    known = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    known[f"{arguments.size}, seed {arguments.seed}"] = {name: c for name, c in curves.items() if c}
    arguments.results.write_text(json.dumps(known, indent=1) + "\n")
    for kind, steps in (("start", size.from_dense), ("scratch", size.scratch)):
        marks = range(size.marks, steps + 1, size.marks)
        print(f"\n| {kind} | {' | '.join(f'step {mark}' for mark in marks)} |\n| --- |{' ---: |' * len(marks)}")
        for name in (name for name in everything if name.startswith(kind)):
            cells = [f"{curves[name][mark]:.4f}" if mark in curves[name] else "" for mark in marks]
            print(f"| {name.partition(': ')[2]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
