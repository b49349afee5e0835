"""The tables of ``command=estimate estimate.gpus=[8,64,1024]``."""

from rich.table import Table

from bitnet_train.config import Config
from bitnet_train.planning.gpus import GPUS
from bitnet_train.planning.scaling import Plan, plan_scaling
from bitnet_train.training.config import step_sequences

DAY = 86400


def scaling_tables(cfg: Config, plans: list[Plan], tokens: int) -> list[Table | str]:
    """What every plan needs, the time that it takes, and what was assumed; ``tokens`` are those of the whole run."""
    gpu, shares = GPUS[cfg.estimate.gpu], cfg.estimate
    memory = _table(
        f"On paper, memory per GPU in GB ({gpu.name}: {gpu.memory / 1e9:.0f} GB)", "GPUs", "way", "masters",
        "gradients", "optimizer", "codes", "gathered, buckets", "activations", "all",
    )  # fmt: skip
    speed = _table(
        "On paper, a step (computing and communicating at once, or one after the other)", "GPUs", "way", "sequences",
        "wire per GPU", "computing", "network", "step", "tokens/s", "whole run",
    )  # fmt: skip
    for plan in plans:
        parts = [f"{value / 1e9:.1f}" for value in plan.memory.values()]
        fits = "" if plan.memory_total <= gpu.memory else " (too much)"
        memory.add_row(f"{plan.gpus:,}", plan.way, *parts, f"{plan.memory_total / 1e9:.1f}{fits}")
        rates = [plan.tokens_per_second(seconds) for seconds in (plan.in_turn, plan.overlapped)]
        speed.add_row(
            f"{plan.gpus:,}", plan.way, f"{plan.micro_batches} x {plan.micro_batch}", f"{plan.wire_bytes / 1e9:.1f} GB",
            f"{plan.computing:.3f} s", f"{plan.communicating:.3f} s", f"{plan.overlapped:.3f} to {plan.in_turn:.3f} s",
            f"{rates[0] / 1e6:.3g}M to {rates[1] / 1e6:.3g}M",
            f"{tokens / rates[1] / DAY:.3g} to {tokens / rates[0] / DAY:.3g} days",
        )  # fmt: skip
    said: list[Table | str] = [
        memory,
        speed,
        f"Assumed: {shares.matmul_share:.0%} of the published matmul rates, {shares.memory_share:.0%} of the memory "
        f"bandwidth, {shares.network_share:.0%} of NVLink ({gpu.nvlink / 1e9:.0f} GB/s one way, up to "
        f"{shares.gpus_per_node} GPUs) and of one network card per GPU ({gpu.network / 1e9:.0f} GB/s, beyond); no "
        "waiting, failures, validation or checkpoints. Formulas: bitnet_train/planning/scaling.py.",
    ]
    sequences = step_sequences(cfg.trainer, cfg.text.sequence_length)
    few = [f"{gpus:,}" for gpus in cfg.estimate.gpus or [] if gpus > sequences]
    if few:
        said.append(
            f"A step of the recipe has {sequences:,} sequences. For {' and '.join(few)} GPUs one sequence each was "
            "taken, a larger batch, which other learning rates may suit."
        )
    uneven = [f"{gpus:,}" for gpus in cfg.estimate.gpus or [] if gpus <= sequences and sequences % gpus]
    if uneven:
        said.append(f"{sequences:,} sequences do not divide evenly among {' and '.join(uneven)} GPUs: some wait.")
    return said


def plans_of(cfg: Config) -> list[Plan]:
    """The plans for ``estimate.gpus``; nothing without."""
    return plan_scaling(cfg, cfg.estimate) if cfg.estimate.gpus else []


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 1 else "right", overflow="fold")
    return table
