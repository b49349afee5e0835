"""``command=estimate``: what a recipe will cost, as tables, ``estimate.json`` and a picture of its schedule."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bitnet_train.commands.console import make_console
from bitnet_train.commands.scaling import plans_of, scaling_tables
from bitnet_train.config import Config
from bitnet_train.data.config import MixtureCorpus
from bitnet_train.data.describe import describe
from bitnet_train.data.mixture import expected_samples
from bitnet_train.data.prepare import prepared, shard_folder
from bitnet_train.data.shards import MANIFEST, load_manifest
from bitnet_train.errors import ConfigError
from bitnet_train.export.rules import no_export
from bitnet_train.planning.curve import draw
from bitnet_train.planning.estimate import Estimate, estimate
from bitnet_train.planning.vision import ImageEstimate, estimate_images
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.losses.config import DistillationLoss
from bitnet_train.training.optimizers.config import AdamW8bitConfig, MuonConfig
from bitnet_train.training.run_folder import write_atomically

Figures = Estimate | ImageEstimate

BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
COUNT_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))


def run(cfg: Config) -> int:
    """Print the estimate and leave it in ``<paths.runs>/<run_name>/estimate/``."""
    console = make_console()
    assert cfg.run_name is not None
    figures: Figures
    data = describe(cfg.data, cfg.trainer.max_steps)
    if cfg.on_images:
        figures = estimate_images(cfg, cfg.export.dtype)
        more: dict[str, Any] = {"data": data}
        work = _image_work(figures, cfg)
    else:
        figures = estimate(cfg, cfg.export.dtype)
        tokens, remark = training_tokens(cfg)
        corpora = corpus_epochs(cfg, figures)
        more = {"training_tokens_prepared": tokens, "epochs": figures.tokens / tokens if tokens else None}
        more |= {"data": data, "corpus_epochs": corpora or None}
        more |= {"scaling": [plan.as_dict() for plan in plans_of(cfg)]} if cfg.estimate.gpus else {}
        work = _work(figures, cfg, tokens, remark, corpora)
    folder = Path(cfg.paths.runs) / cfg.run_name / "estimate"
    try:
        batch = ", batch" if cfg.trainer.batch_warmup else ""
        draw(cfg, f"{cfg.run_name}: learning rate, weight decay{batch}", folder / "schedule.png")
        write_atomically(folder / "estimate.json", json.dumps(figures.as_dict() | more, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another with paths.runs=.") from None
    console.print(f"Estimate of {cfg.run_name}, from the configuration alone")
    console.print(f"data: {data}", markup=False)
    for table in (_parameters(figures), work, _memory(figures, cfg), _disk(figures, cfg), _curve(figures)):
        console.print()
        console.print(table)
    if isinstance(figures, Estimate) and (plans := plans_of(cfg)):
        for part in scaling_tables(cfg, plans, figures.tokens):
            console.print()
            console.print(part, markup=False)
    if not cfg.on_images and (obstacle := no_export(cfg.export, cfg.decoder, build_spec(cfg.quant))) is not None:
        console.print(f"\nwarning: {obstacle}", markup=False)
    if isinstance(cfg.loss, DistillationLoss):
        console.print(f"Not counted: the teacher {cfg.loss.teacher}, its weights and its forward passes.", markup=False)
    console.print(f"{folder / 'schedule.png'} and {folder / 'estimate.json'}")
    return 0


def training_tokens(cfg: Config) -> tuple[int | None, str]:
    """Training tokens of shards that are prepared already, or None and the reason; nothing is prepared here."""
    try:
        manifest = prepared(cfg.text, Path(cfg.paths.data))
    except ConfigError as error:
        unset = "data.corpus.path is not set" in str(error)
        return None, "data.corpus.path is not set" if unset else "the text is missing or has changed"
    if manifest is None:
        return None, "known once the data are prepared"
    return int(manifest.splits["train"]["tokens"]), ""


def corpus_epochs(cfg: Config, figures: Estimate) -> dict[str, float]:
    """How often each corpus of a mixture is seen; empty for a single corpus and before the data are prepared."""
    folder = shard_folder(cfg.text, Path(cfg.paths.data))
    if not isinstance(cfg.text.corpus, MixtureCorpus) or not (folder / MANIFEST).is_file():
        return {}
    manifest = load_manifest(folder)
    seen = expected_samples(cfg.text, cfg.trainer.max_steps, figures.batch.consumed)
    length = cfg.text.sequence_length
    return {name: samples * length / manifest.splits[f"train/{name}"]["tokens"] for name, samples in seen.items()}


def human(value: float, units: tuple[tuple[float, str], ...] = BYTE_UNITS) -> str:
    """Two or three significant digits with a decimal unit: 2412820480 -> "2.41 GB", 522000000 -> "0.52 GB"."""
    size, unit = next((entry for entry in units if value >= 0.1 * entry[0]), units[-1])
    scaled = value / size
    digits = 0 if scaled >= 100 or size == 1 else 1 if scaled >= 10 else 2
    return f"{scaled:,.{digits}f} {unit}".strip()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _parameters(figures: Figures) -> Table:
    counts = figures.parameters
    table = _table("Parameters", "kind", "count", "share")
    rows = {"embedding": counts.embedding, "head": counts.head, "norms": counts.norms}
    rows |= {f"{scheme} linear": count for scheme, count in counts.linear.items()}
    for name, count in rows.items():
        if name == "embedding" and isinstance(figures, ImageEstimate):
            name = "first layer and positions"
        if name == "head" and not count and isinstance(figures, Estimate):
            table.add_row("head (tied: the embedding)", "0", "")
        else:
            table.add_row(name, f"{count:,}", f"{count / counts.total:.1%}")
    table.add_row("all", f"{counts.total:,}", "100.0%")
    table.add_row("of these quantised", f"{counts.quantised:,}", f"{counts.quantised_share:.1%}")
    return table


def _work(figures: Estimate, cfg: Config, tokens: int | None, remark: str, corpora: dict[str, float]) -> Table:
    table = _table("Work (2 operations per weight and token; backward twice forward)", "what", "figure")
    plan = figures.batch
    for name, value in figures.forward_flops.items():
        table.add_row(f"forward per token, {name}", human(value, COUNT_UNITS))
    table.add_row("forward per token", human(figures.forward_flops_per_token, COUNT_UNITS))
    table.add_row("training per token", human(figures.training_flops_per_token, COUNT_UNITS))
    table.add_row("training, whole run", f"{figures.training_flops:.3g}")
    table.add_row("steps", f"{figures.steps:,}")
    table.add_row("tokens per step", f"{cfg.trainer.batch_tokens:,}")
    if plan.warmup:
        table.add_row("  before", plan.warmup_text(cfg.text.sequence_length))
    cut = f"{plan.accumulation} x {plan.micro_batch} sequences of {cfg.text.sequence_length:,}"
    table.add_row("  as micro-batches", cut)
    if figures.batch_assumption is not None:
        table.add_row("  trainer.micro_batch", figures.batch_assumption)
    table.add_row("tokens, whole run", f"{figures.tokens:,}")
    table.add_row("epochs", f"{figures.tokens / tokens:.2f} of {tokens:,} tokens" if tokens else remark)
    for name, epochs in corpora.items():
        table.add_row(f"  of {name}", f"{epochs:.2f}")
    return table


def _image_work(figures: ImageEstimate, cfg: Config) -> Table:
    table = _table("Work (2 operations per weight and image or patch; backward twice forward)", "what", "figure")
    plan = figures.batch
    for name, value in figures.forward_flops.items():
        table.add_row(f"forward per image, {name}", human(value, COUNT_UNITS))
    table.add_row("forward per image", human(figures.forward_flops_per_image, COUNT_UNITS))
    table.add_row("training per image", human(figures.training_flops_per_image, COUNT_UNITS))
    table.add_row("training, whole run", f"{figures.training_flops:.3g}")
    table.add_row("steps", f"{figures.steps:,}")
    table.add_row("images per step", f"{cfg.images.batch_size:,}")
    table.add_row("  as micro-batches", f"{plan.accumulation} x {plan.micro_batch} images")
    table.add_row("images, whole run", f"{figures.images:,}")
    return table


def _memory(figures: Figures, cfg: Config) -> Table:
    memory = figures.memory
    precision = "auto, counted as bf16-mixed" if figures.precision == "auto" else figures.precision
    title = f"Training memory (an estimate; eager, micro-batch {figures.batch.micro_batch}, {precision})"
    table = _table(title, "component", "size")
    for name, value in (
        ("master weights (float32)", memory.master_weights),
        ("gradients (float32)", memory.gradients),
        (f"optimizer state ({_moments(cfg)})", memory.optimizer_state),
        ("code buffers (int8 codes, row scales)", memory.code_buffers),
        ("float weights in the compute type", memory.compute_copies),
        *((f"activations: {name}", value) for name, value in memory.activations.items()),
    ):
        if value:
            table.add_row(name, human(value))
    table.add_row("all", human(memory.total))
    return table


def _moments(cfg: Config) -> str:
    if isinstance(cfg.optimizer, MuonConfig):
        return "1 moment of the blocks' matrices, 2 of the rest, float32"
    if isinstance(cfg.optimizer, AdamW8bitConfig):
        return "2 moments, 8-bit where a parameter is large enough"
    return "2 moments, float32"


def _disk(figures: Figures, cfg: Config) -> Table:
    what = "weights" if isinstance(figures, ImageEstimate) else "export"
    title = f"On disk (tensors that are no codes in {figures.export_dtype})"
    table = _table(title, "file", "without embeddings", "whole")
    for size in figures.exports:
        table.add_row(f"{what}, {size.packing}", human(size.without_embeddings), human(size.total))
    table.add_row(f"checkpoint (weights, {_moments(cfg)})", "", human(figures.checkpoint_bytes))
    return table


def _curve(figures: Figures) -> Table:
    warmup = figures.batch.warmup
    table = _table("Schedule", "step", "", "learning rate", "weight decay", *(["tokens"] if warmup else []))
    table.columns[0].justify, table.columns[1].justify = "right", "left"
    for point in figures.curve:
        tokens = [f"{point.tokens:,}"] if warmup else []
        table.add_row(f"{point.step:,}", point.what, f"{point.lr:.3g}", f"{point.weight_decay:.3g}", *tokens)
    return table
