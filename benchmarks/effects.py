"""What each option does to the loss: one run per option, against a baseline, at equal steps, seeds and data order.

    python benchmarks/effects.py screen     # all options at 1M parameters, 300 steps, one seed
    python benchmarks/effects.py confirm    # those in CONFIRM at the size of tiny, three epochs, three seeds
    python benchmarks/effects.py same_time  # both twins, each optimizer, for as long as 500 dense steps with Muon take
    python benchmarks/effects.py table      # what is known so far, as Markdown

What was measured is kept in a results file (benchmarks/results/effects.json) and not measured again; a run that was
interrupted goes on. Compare options of one file only if the code between them computes the same.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from trainings import rows, train

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
    "combinations of what helped": {
        "muon lr 1e-2": ["optimizer=muon", "optimizer.lr=1e-2"],
        "muon 2e-2, wsd": ["optimizer=muon", "optimizer.lr=2e-2", "schedule=wsd"],
        "muon 2e-2, lambda": ["optimizer=muon", "optimizer.lr=2e-2", "quant/progressive=lambda"],
        "muon 2e-2, wsd, lambda": [
            "optimizer=muon", "optimizer.lr=2e-2", "schedule=wsd", "quant/progressive=lambda"
        ],
        "wsd, lambda": ["schedule=wsd", "quant/progressive=lambda"],
        "wsd, lr 12e-3": ["schedule=wsd", "optimizer.lr=12e-3"],
        "dense, wsd": ["quant=none", "schedule=wsd"],
        "dense, muon 2e-2": ["quant=none", "optimizer=muon", "optimizer.lr=2e-2"],
        "dense, muon 1e-2": ["quant=none", "optimizer=muon", "optimizer.lr=1e-2"],
    },
}  # fmt: skip


ADAMW = ["optimizer=adamw", "optimizer.lr=4e-3"]
DENSE_ADAMW = ["quant=none", "optimizer=adamw", "optimizer.lr=3e-3"]
MUON = ["optimizer=muon", "optimizer.lr=2e-2"]
LAMBDA = ["quant/progressive=lambda"]
# Option -> overrides on +recipe=tiny, over several epochs. The first is the baseline.
CONFIRM: dict[str, list[str]] = {
    "ternary (tiny)": ADAMW,
    "dense": DENSE_ADAMW,
    "muon lr 2e-2": MUON,
    "muon, lambda": [*MUON, *LAMBDA],
    # As many steps as fit into the time of the dense twin's 2,100: a ternary step was 1.19 times as fast.
    "muon, lambda, 2,500 steps": [*MUON, *LAMBDA, "trainer.max_steps=2500"],
    "muon, 2,500 steps": [*MUON, "trainer.max_steps=2500"],
    "dense, muon": ["quant=none", *MUON],
    # The rates beside the winner's, for both: is each at its best?
    "muon lr 1e-2": ["optimizer=muon", "optimizer.lr=1e-2"],
    "dense, muon lr 1e-2": ["quant=none", "optimizer=muon", "optimizer.lr=1e-2"],
    "dense, muon lr 5e-3": ["quant=none", "optimizer=muon", "optimizer.lr=5e-3"],
    # Ternary gains most at the end, when the rate is low: is a rate that falls faster better?
    "muon, power 2": [*MUON, "schedule=polynomial", "schedule.power=2"],
    "lambda linear 20 %": [*ADAMW, *LAMBDA],
    "wsd": [*ADAMW, "schedule=wsd"],
    "dense, wsd": [*DENSE_ADAMW, "schedule=wsd"],
    "muon, wsd": [*MUON, "schedule=wsd"],
    "dense, muon, wsd": ["quant=none", *MUON, "schedule=wsd"],
    "lr 8e-3": ["optimizer=adamw", "optimizer.lr=8e-3"],
    "dense, lr 6e-3": ["quant=none", "optimizer=adamw", "optimizer.lr=6e-3"],
    "warm-up 20 %": [*ADAMW, "schedule.warmup=0.2"],
    "blocks at half the rate": [*ADAMW, "optimizer.groups=[{pattern: 'layers.*', lr: 0.5}]"],
}
# The dense twin of each ternary option: with AdamW the same schedule, with Muon and a linear or a squared decay the
# one at the best of the rates above.
TUNED = "dense, muon lr 1e-2"
TWINS = {
    "ternary (tiny)": "dense",
    "lambda linear 20 %": "dense",
    "wsd": "dense, wsd",
    "muon lr 2e-2": TUNED,
    "muon, lambda": TUNED,
    "muon, lambda, 2,500 steps": TUNED,
    "muon, 2,500 steps": TUNED,
    "muon lr 1e-2": TUNED,
    "muon, power 2": TUNED,
    "muon, wsd": "dense, muon, wsd",
    "lr 8e-3": "dense, lr 6e-3",
}
CONFIRM_STEPS = 2100
CONFIRM_SEEDS = (1, 2, 3)

# Option -> overrides on +recipe=small, with the steps that fit into the time of 500 dense steps with Muon, which is the
# slowest: benchmarks/results/2026-11-23-cpu-small-optimizers.md.
SAME_TIME: dict[str, list[str]] = {
    "dense, muon lr 1e-2": ["quant=none", "optimizer=muon", "optimizer.lr=1e-2", "trainer.max_steps=500"],
    "dense, muon lr 5e-3": ["quant=none", "optimizer=muon", "optimizer.lr=5e-3", "trainer.max_steps=500"],
    "dense, muon lr 2.5e-3": ["quant=none", "optimizer=muon", "optimizer.lr=2.5e-3", "trainer.max_steps=500"],
    "muon lr 1e-2": ["optimizer=muon", "optimizer.lr=1e-2", "trainer.max_steps=610"],
    "dense, lr 1.5e-3": ["quant=none", "optimizer=adamw", "optimizer.lr=1.5e-3", "trainer.max_steps=660"],
    "lr 3e-3": ["optimizer=adamw", "optimizer.lr=3e-3", "trainer.max_steps=935"],
}
# The rates of AdamW, in fewer steps.
RATES: dict[str, list[str]] = {
    f"{twin}lr {lr}, 150 steps": [*settings, "optimizer=adamw", f"optimizer.lr={lr}", "trainer.max_steps=150"]
    for twin, settings in {"dense, ": ["quant=none"], "": []}.items()
    for lr in ("7.5e-4", "1.5e-3", "3e-3", "6e-3")
}

Results = dict[str, dict[str, float]]  # job -> "option, seed" -> bits per byte


def finished(folder: Path, steps: int) -> float | None:
    """The last validation of a run of ``steps`` steps in bits per byte, or None when it has not come that far."""
    found = rows(folder)
    if not found or int(found[-1]["step"]) != steps or not found[-1]["val/bits_per_byte"]:
        return None
    return float(found[-1]["val/bits_per_byte"])


def own_steps(overrides: list[str]) -> int:
    """The steps of an option of CONFIRM."""
    given = [int(o.partition("=")[2]) for o in overrides if o.startswith("trainer.max_steps=")]
    return given[0] if given else CONFIRM_STEPS


def folder_name(option: str) -> str:
    """A folder's name for an option."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in option).strip("_")


def measure(option: str, overrides: list[str], recipe: str, steps: int, seed: int, places: argparse.Namespace) -> float:
    """Bits per byte of an option after ``steps`` steps; NaN when the run fails, with the reason in its log."""
    name = f"{recipe}/{folder_name(option)}/seed{seed}"
    folder, log = places.runs / name, places.runs / f"{name}.log"
    settings = [
        f"+recipe={recipe}", *overrides, f"seed={seed}", f"run_name={name}",
        f"trainer.max_steps={steps}", f"trainer.validate_every={min(steps, 300)}",
        f"trainer.compile={'true' if steps >= 1000 or recipe == 'small' else 'false'}",
        f"paths.runs={places.runs}", f"paths.data={places.data}",
    ]  # fmt: skip
    if finished(folder, steps) is None and (code := train(settings, log)):
        print(f"{option}, seed {seed}: exit code {code}, see {log}", flush=True)
    value = finished(folder, steps)
    return math.nan if value is None else value


def read(path: Path) -> Results:
    """The results so far."""
    return json.loads(path.read_text()) if path.is_file() else {}


def note(path: Path, job: str, option: str, seed: int, value: float) -> None:
    """Put a result into the file (read again, for another process may write to it too)."""
    results = read(path)
    results.setdefault(job, {})[f"{option}, {seed}"] = value
    path.write_text(json.dumps(results, indent=1) + "\n")


def screen_table(results: dict[str, float]) -> str:
    """The options of SCREEN against the baseline."""
    base = results.get("ternary (micro), 1", math.nan)
    lines = ["| group | option | bits per byte | against the baseline |", "| --- | --- | --- | --- |"]
    for group, options in SCREEN.items():
        for option in options:
            value = results.get(f"{option}, 1")
            figures = "not run | " if value is None else f"{value:.4f} | {value / base - 1:+.2%}"
            lines.append(f"| {group} | {option} | {figures} |")
    seeds = [value for key, value in results.items() if key.startswith("ternary (micro), ")]
    if len(seeds) > 2:
        lines.append(f"\nSeeds of the baseline: {', '.join(f'{value:.4f}' for value in seeds)}.")
    return "\n".join(lines)


def confirm_table(results: dict[str, float]) -> str:
    """The options of CONFIRM: the mean over its seeds, and the mean paired difference (with its standard error where
    there are several) to the baseline and to the dense twin of the same optimizer and schedule."""
    known = {
        option: {seed: results[f"{option}, {seed}"] for seed in CONFIRM_SEEDS if f"{option}, {seed}" in results}
        for option in CONFIRM
    }
    baseline = next(iter(CONFIRM))
    lines = [
        "| option | seeds | bits per byte | against the baseline | against its dense twin |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for option, values in known.items():
        if values:
            against = [paired(values, known[other]) if other else "" for other in (baseline, TWINS.get(option))]
            mean = statistics.fmean(values.values())
            lines.append(f"| {option} | {len(values)} | {mean:.4f} | {against[0]} | {against[1]} |")
    return "\n".join(lines)


def same_time_table(results: dict[str, float]) -> str:
    """The options of SAME_TIME and RATES, a column for each seed."""
    lines = ["| option | steps | " + " | ".join(f"seed {seed}" for seed in CONFIRM_SEEDS) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(CONFIRM_SEEDS))
    for option, overrides in {**SAME_TIME, **RATES}.items():
        values = [results.get(f"{option}, {seed}") for seed in CONFIRM_SEEDS]
        if any(values):
            figures = " | ".join("" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"| {option} | {own_steps(overrides)} | {figures} |")
    return "\n".join(lines)


def paired(values: dict[int, float], others: dict[int, float]) -> str:
    """The mean share by which ``values`` exceed ``others`` on the seeds that both have."""
    shares = [values[seed] / others[seed] - 1 for seed in values if seed in others]
    if not shares or values == others:
        return ""
    error = f" ± {statistics.stdev(shares) / math.sqrt(len(shares)):.2%}" if len(shares) > 1 else ""
    return f"{statistics.fmean(shares):+.2%}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["screen", "confirm", "same_time", "table"])
    parser.add_argument("--runs", type=Path, default=Path("runs/effects"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/effects.json"))
    parser.add_argument("--reverse", action="store_true", help="last option first: for a second process beside one")
    parser.add_argument(
        "--only", default="", help="this option, or those whose name contains it where none is called so"
    )
    parser.add_argument("--seed", type=int, help="runs of this seed alone")
    arguments = parser.parse_args()
    if arguments.job == "screen":
        tries = [(o, settings, "micro", 300, 1) for options in SCREEN.values() for o, settings in options.items()]
        # How far apart seeds lie: what is smaller is noise.
        tries += [("ternary (micro)", [], "micro", 300, seed) for seed in (2, 3)]
    elif arguments.job == "same_time":
        seeded = [(1, RATES), *((seed, SAME_TIME) for seed in CONFIRM_SEEDS)]
        tries = [
            (o, settings, "small", own_steps(settings), seed) for seed, some in seeded for o, settings in some.items()
        ]
    else:
        tries = [
            (option, settings, "tiny", own_steps(settings), seed)
            for seed in CONFIRM_SEEDS
            for option, settings in CONFIRM.items()
        ]
    names = {option for option, *_ in tries}
    wanted = names & {arguments.only} or {name for name in names if arguments.only in name}
    for option, overrides, recipe, steps, seed in tries[::-1] if arguments.reverse else tries:
        known = read(arguments.results).get(arguments.job, {})
        if option not in wanted or arguments.seed not in (None, seed):
            continue
        if arguments.job == "table" or f"{option}, {seed}" in known:
            continue
        value = measure(option, overrides, recipe, steps, seed, arguments)
        if math.isnan(value):  # said, and tried again the next time
            continue
        note(arguments.results, arguments.job, option, seed, value)
        print(f"{option:50} seed {seed}  {value:.4f}", flush=True)
    results = read(arguments.results)
    print(screen_table(results.get("screen", {})))
    print("\n" + confirm_table(results.get("confirm", {})))
    print("\n" + same_time_table(results.get("same_time", {})))


if __name__ == "__main__":
    main()
