"""Which clipping survives four times the tuned learning rate, or one batch in a hundred of random tokens.

    python benchmarks/stability.py            # +recipe=micro, 300 steps: the table, and the curves as pictures
    python benchmarks/stability.py --only both    # one column of it; what is done already is not trained again

Expected before it was measured: without clipping both hurt; a fixed norm holds the learning rate but lets a corrupted
batch in at full length, which the rules that look at past norms (percentile, zscore) and the guard keep out.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from trainings import PACKAGE, rows, train

from bitnet_train.reporting.charts import Chart, Line, png, smoothed

STEPS = 300
TUNED = 12e-3
CLIPS: dict[str, list[str]] = {
    "none": ["clip=none"],
    "norm 1": ["clip=norm"],
    "norm 0.3": ["clip=norm", "clip.max_norm=0.3"],
    "scheduled 0.3 to 1": ["clip=scheduled", "clip.start=0.3"],
    "percentile 90": ["clip=percentile"],
    "zscore": ["clip=zscore"],
    "adaptive": ["clip=adaptive"],
    "norm 1 + guard, 6 sigma": ["clip=norm", "guard.outlier_sigma=6", "guard.skip_non_finite=true"],
}
TROUBLES: dict[str, list[str]] = {
    "tuned": [],
    "4 x learning rate": [f"optimizer.lr={4 * TUNED}"],
    "1 percent corrupted": ["corrupt"],
    "both": [f"optimizer.lr={4 * TUNED}", "corrupt"],
}


def train_with_corrupted_batches(arguments: list[str]) -> None:
    """The command line, with the batches of one step in a hundred replaced by random tokens, the same in every run."""
    import torch

    from bitnet_train.__main__ import answer
    from bitnet_train.training.module import PretrainingModule

    plain = PretrainingModule.training_step

    def step(self: PretrainingModule, batch: torch.Tensor, number: int) -> torch.Tensor:
        if self.global_step % 100 == 57:
            generator = torch.Generator().manual_seed(self.global_step)
            batch = torch.randint(self.decoder.cfg.vocab, batch.shape, generator=generator).to(batch.device)
        return plain(self, batch, number)

    PretrainingModule.training_step = step  # type: ignore[method-assign]
    sys.exit(answer(arguments))


def run(name: str, overrides: list[str], runs: Path, data: Path) -> None:
    """Train one combination, unless it is done."""
    corrupt = "corrupt" in overrides
    arguments = [
        "+recipe=micro", f"run_name={name}", f"optimizer.lr={TUNED}", *(o for o in overrides if o != "corrupt"),
        f"trainer.max_steps={STEPS}", f"trainer.validate_every={STEPS}", "trainer.log_every=1",
        "trainer.compile=false", f"paths.runs={runs}", f"paths.data={data}",
    ]  # fmt: skip
    train(arguments, runs / f"{name}.log", (__file__, "--corrupt") if corrupt else PACKAGE)


def main() -> None:
    if sys.argv[1:2] == ["--corrupt"]:
        train_with_corrupted_batches(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", choices=TROUBLES, help="one column, without the table and its file")
    places = parser.parse_args()
    chosen = {places.only: TROUBLES[places.only]} if places.only else TROUBLES
    table: dict[str, dict[str, str]] = {}
    for trouble, settings in chosen.items():
        lines = []
        for clip, rule in CLIPS.items():
            name = "".join(c if c.isalnum() else "_" for c in f"{trouble}-{clip}")
            found = rows(places.runs / name)
            if not found or int(found[-1]["step"]) != STEPS:
                run(name, [*rule, *settings], places.runs, places.data)
                found = rows(places.runs / name)
            last = found[-1] if found else {}
            value = float(last.get("val/bits_per_byte") or math.nan)
            ended = "" if last.get("step") == str(STEPS) else f" (ended at step {last.get('step', 0)})"
            table.setdefault(clip, {})[trouble] = f"{value:.4f}{ended}"
            losses = smoothed([float(row["train/loss"]) for row in found], 5)
            lines.append(Line(clip, [int(row["step"]) for row in found], losses))
            print(f"{trouble:20} {clip:26} {table[clip][trouble]}", flush=True)
        png(Chart(f"training loss, {trouble}", lines), places.results / f"stability-{trouble.replace(' ', '-')}.png")
    if places.only:
        return
    print("\n| clip | " + " | ".join(TROUBLES) + " |\n| --- |" + " --- |" * len(TROUBLES))
    for clip, values in table.items():
        print(f"| {clip} | " + " | ".join(values[trouble] for trouble in TROUBLES) + " |")
    (places.results / "stability.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
