"""What each option does to the loss: one run per option, against a baseline, at equal steps, seeds and data order.

    python benchmarks/effects.py screen            # all options at 1M parameters, one seed
    python benchmarks/effects.py confirm           # the ones in CONFIRM at the size of tiny, three seeds
    python benchmarks/effects.py table screen      # the table of the runs that are there, as Markdown

Runs that are finished are not done again; a run that was interrupted goes on. Folders: --runs (default runs/effects).
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path

# Option -> overrides on +recipe=micro. Groups only order the table.
SCREEN: dict[str, dict[str, list[str]]] = {
    "baseline": {"ternary (micro)": []},
    "learning rate": {
        "lr 3e-3": ["optimizer.lr=3e-3"],
        "lr 12e-3": ["optimizer.lr=12e-3"],
    },
    "dense twin": {
        "dense lr 3e-3": ["quant=none", "optimizer.lr=3e-3"],
        "dense lr 6e-3": ["quant=none"],
        "dense lr 12e-3": ["quant=none", "optimizer.lr=12e-3"],
    },
    "schedule": {
        "cosine": ["schedule=cosine", "schedule.final=0"],
        "wsd": ["schedule=wsd"],
        "inverse_sqrt": ["schedule=inverse_sqrt"],
        "two_stage (BitNet: half LR peak and no decay from 1/2)": [
            "schedule=two_stage",
            "schedule.stages=[{share: 0.5, lr: 1, shape: linear, final: 0.5},"
            "{share: 0.5, lr: 0.333, shape: linear, final: 0, weight_decay: 0}]",
        ],
        "weight decay off from 2/3 (TriLM)": [
            "weight_decay_schedule=two_stage",
            "weight_decay_schedule.stages=[{share: 0.667, shape: constant},{share: 0.333, lr: 0, shape: constant}]",
        ],
        "no weight decay": ["optimizer.weight_decay=0"],
        "weight decay 0.3": ["optimizer.weight_decay=0.3"],
        "warm-up 20 %": ["schedule.warmup=0.2"],
        "batch warm-up (1/4, 1/2)": [
            "trainer.batch_warmup=[{until: 0.1, tokens: 1024},{until: 0.2, tokens: 2048}]"
        ],
    },
    "optimizer": {
        "muon lr 2e-2": ["optimizer=muon", "optimizer.lr=2e-2"],
        "muon lr 5e-2": ["optimizer=muon", "optimizer.lr=5e-2"],
        "beta2 0.98": ["optimizer.betas=[0.9,0.98]"],
        "blocks at half the rate": ["optimizer.groups=[{pattern: 'layers.*', lr: 0.5}]"],
        "blocks at twice the rate": ["optimizer.groups=[{pattern: 'layers.*', lr: 2}]"],
    },
    "clipping": {
        "none": ["clip=none"],
        "norm 0.3": ["clip.max_norm=0.3"],
        "percentile": ["clip=percentile"],
        "zscore": ["clip=zscore"],
        "adaptive": ["clip=adaptive"],
        "scheduled 0.3 to 1": ["clip=scheduled", "clip.start=0.3", "clip.max_norm=1.0"],
    },
    "initialisation": {
        "normal 0.02": ["init=normal"],
        "fan_in": ["init=fan_in"],
        "small": ["init=small"],
        "mitchell": ["init=mitchell"],
        "sub-norm gain 1": ["init.sub_norm_gain=1"],
        "embedding std 0.02": ["init.embedding_std=0.02"],
    },
    "progressive quantisation": {
        "lambda linear 20 %": ["quant/progressive=lambda"],
        "lambda cosine 20 %": ["quant/progressive=lambda", "quant.progressive.shape=cosine"],
        "lambda exponential 20 %": ["quant/progressive=lambda", "quant.progressive.shape=exponential"],
        "lambda linear 50 %": ["quant/progressive=lambda", "quant.progressive.until=0.5"],
        "switch at 20 %": ["quant/progressive=switch"],
        "layerwise, first to last": ["quant/progressive=layerwise"],
        "layerwise, last to first": ["quant/progressive=layerwise", "quant.progressive.order=last_to_first"],
        "8, 4 bits, ternary": ["quant/progressive=bits"],
        "Quant-Noise 0.5": ["quant/progressive=noise"],
    },
    "quantiser": {
        "absmedian": ["quant.weight.statistic=absmedian"],
        "threshold 0.35": ["quant.weight.threshold=0.35"],
        "threshold 0.7": ["quant.weight.threshold=0.7"],
        "a scale per row": ["quant.weight.groups=row"],
        "groups of 8 rows": ["quant.weight.group_rows=8"],
        "learned scales": ["quant.weight.trainable_scale=true"],
        "learned scales per row": ["quant.weight.trainable_scale=true", "quant.weight.groups=row"],
        "o_proj at 4 bits (mixed)": ["quant=mixed"],
        "all at 4 bits": ["quant.weight.scheme=symmetric", "quant.weight.bits=4"],
        "all at 2 bits, absmean": [
            "quant.weight.scheme=symmetric", "quant.weight.bits=2", "quant.weight.statistic=absmean"
        ],
        "binary": ["quant=binary"],
        "float activations (TriLM)": ["quant=trilm"],
        "4-bit activations, absmean": ["quant.activation.bits=4", "quant.activation.statistic=absmean"],
        "4-bit activations at the end (v2)": ["quant=bitnet_v2"],
        "4-bit activations at the end (a4.8)": ["quant=bitnet_a4_8"],
        "activations per group of 32": ["quant.activation.granularity=group", "quant.activation.group_size=32"],
        "activations per tensor": ["quant.activation.granularity=tensor"],
        "Hadamard everywhere": ["quant.activation.hadamard=true"],
    },
    "norms": {
        "pre (no sub-norms)": ["model.norms=pre", "init.sub_norm_gain=1"],
        "inside every projection (Tips)": ["model.norms=inside"],
    },
    "loss": {
        "z-loss 1e-4": ["loss.z_loss=1e-4"],
        "pull to the codes": ["regulariser=codes"],
        "code entropy": ["regulariser=entropy"],
    },
}  # fmt: skip


def finished(folder: Path, steps: int) -> float | None:
    """The last validation of a run of ``steps`` steps in bits per byte, or None when it has not come that far."""
    try:
        rows = list(csv.DictReader((folder / "metrics.csv").open(newline="")))
    except OSError:
        return None
    if not rows or int(rows[-1]["step"]) != steps or not rows[-1]["val/bits_per_byte"]:
        return None
    return float(rows[-1]["val/bits_per_byte"])


def folder_name(option: str) -> str:
    """A folder's name for an option."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in option).strip("_")


def run(option: str, overrides: list[str], recipe: str, seed: int, runs: Path, data: Path) -> None:
    """Train one option, unless it is done."""
    name = f"{recipe}/{folder_name(option)}/seed{seed}"
    command = [
        sys.executable, "-m", "bitnet_train", f"+recipe={recipe}", *overrides, f"seed={seed}", f"run_name={name}",
        f"paths.runs={runs}", f"paths.data={data}",
    ]  # fmt: skip
    log = runs / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ).returncode
    if code:
        print(f"{option}, seed {seed}: exit code {code}, see {log}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["screen", "table"])
    parser.add_argument("--runs", type=Path, default=Path("runs/effects"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="options whose name contains this")
    arguments = parser.parse_args()
    steps, seed = arguments.steps, arguments.seed
    rows: list[tuple[str, str, float | None]] = []
    for group, options in SCREEN.items():
        for option, overrides in options.items():
            if arguments.only not in option:
                continue
            folder = arguments.runs / "micro" / folder_name(option) / f"seed{seed}"
            if arguments.job == "screen" and finished(folder, steps) is None:
                steps_too = [
                    *overrides,
                    f"trainer.max_steps={steps}",
                    f"trainer.validate_every={steps}",
                    "trainer.compile=false",
                ]
                run(option, steps_too, "micro", seed, arguments.runs, arguments.data)
            rows.append((group, option, finished(folder, steps)))
            if arguments.job == "screen":
                print(f"{group:26} {option:50} {rows[-1][2]}", flush=True)
    base = next(value for _, option, value in rows if option == "ternary (micro)")
    print("\n| group | option | bits per byte | against the baseline |\n| --- | --- | --- | --- |")
    for group, option, value in rows:
        if value is None or base is None:
            print(f"| {group} | {option} | not run | |")
        else:
            print(f"| {group} | {option} | {value:.4f} | {value / base - 1:+.2%} |")
    known = [value for _, _, value in rows if value is not None]
    print(f"\n{len(known)} runs, median {statistics.median(known):.4f}" if known else "")


if __name__ == "__main__":
    main()
