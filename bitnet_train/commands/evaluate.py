"""``command=evaluate``: loss, perplexity and bits per byte of a run or an export, beside gzip and xz."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bitnet_train.commands.console import make_console, print_table
from bitnet_train.commands.evaluate_images import evaluate_images
from bitnet_train.commands.sources import LoadedModel, load_model, open_run, read_text
from bitnet_train.config import Config
from bitnet_train.data.mixture import chats
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import cut_windows, windows_loss
from bitnet_train.evaluation.compression import compressed_bits_per_byte
from bitnet_train.export.held_out import documents
from bitnet_train.reporting.run_facts import read_json_object
from bitnet_train.training.loggers.config import WandbLogger
from bitnet_train.training.run_folder import write_atomically

# Tokens per forward.
BATCH_TOKENS = 8192


RESULT_FILE = "evaluation.json"


def run(cfg: Config) -> int:
    """Measure in float32 and print the figures; they are also left in evaluation.json in the folder of ``run=``.

    A language model is measured on the tasks of ``evaluate.tasks``; on ``evaluate.text``; without either on the
    validation text as training did. An image classifier is measured on its test images.
    """
    console = make_console()
    if cfg.on_images:
        return evaluate_images(cfg, console)
    if cfg.evaluate.tasks:
        from bitnet_train.evaluation.lm_eval_model import check_harness

        check_harness(cfg.evaluate)
    folder = Path(str(cfg.run))
    model = load_model(cfg)
    results: dict[str, Any] = {"model": model.description}
    if cfg.evaluate.text is not None or not cfg.evaluate.tasks:
        results["text"] = _measure_text(cfg, model, console)
    if cfg.evaluate.tasks:
        results["tasks"] = _run_tasks(cfg, model, console)
    try:
        # What was measured before stays, unless it was measured again.
        before = read_json_object(folder / RESULT_FILE) or {}
        kept = before if before.get("model") == model.description else {}
        write_atomically(folder / RESULT_FILE, json.dumps(kept | results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        console.print(f"{folder / RESULT_FILE} is not written: {error.strerror}")
    _log(cfg, model, results, console)
    return 0


def _log(cfg: Config, model: LoadedModel, results: dict[str, Any], console: Console) -> None:
    """To the run's Weights & Biases curve, when it has one."""
    if not isinstance(cfg.logger, WandbLogger) or model.run is None:
        return
    from bitnet_train.training.loggers.wandb import build_wandb

    scores = {
        f"tasks/{task}/{name}": v for task, found in results.get("tasks", {}).items() for name, v in found.items()
    }
    text = {f"evaluate/{key}": results["text"][key] for key in ("loss", "bits_per_byte")} if "text" in results else {}
    folder = model.run.folder.path
    logger, where = build_wandb(cfg.logger, cfg.run_name or folder.name, folder, {})
    logger.log_metrics({**scores, **text}, model.run.canonical.step)
    logger.finalize("success")
    console.print(where, markup=False)


def _run_tasks(cfg: Config, model: LoadedModel, console: Console) -> dict[str, Any]:
    from bitnet_train.evaluation.lm_eval_model import run_harness

    scores = run_harness(model.decoder, model.tokenizer, cfg.evaluate)
    table = Table(title=f"{model.description}, float32, lm-evaluation-harness", title_justify="left")
    for heading in ("task", "metric", "value", "standard error"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, found in scores.items():
        for name, value in found.items():
            metric, _, part = name.partition(",")
            if not metric.endswith("_stderr") and metric != "sample_len":
                error = found.get(f"{metric}_stderr,{part}")
                table.add_row(task, metric, f"{value:.4f}", "-" if error is None else f"{error:.4f}")
    print_table(console, table)
    return scores


def _measure_text(cfg: Config, model: LoadedModel, console: Console) -> dict[str, Any]:
    context = model.decoder.cfg.context
    # An export that was copied elsewhere says nothing of how it was trained.
    known = model.run is not None or (Path(str(cfg.run)).parent.parent / "config.yaml").is_file()
    window = cfg.evaluate.window or (min(cfg.text.sequence_length, context) if known else context)
    if window > context:
        raise ConfigError(f"evaluate.window={window} is longer than the model's context of {context}.")
    texts, name, within_documents = _texts(cfg, model)
    tokenizer = model.tokenizer
    parts = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(texts)]
    ids = torch.tensor([index for part in parts for index in part])
    if len(ids) < 2:
        raise ConfigError(f"{name} has no tokens to predict.")
    batch = max(1, BATCH_TOKENS // window)
    batches = track(
        cut_windows(ids, window, batch),
        "evaluating",
        total=-(-(len(ids) - 1) // (batch * window)),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    boundary = tokenizer.bos_id if within_documents else None
    loss = windows_loss(model.decoder, batches, tokenizer.byte_lengths(), bos_id=boundary)

    console.print(f"{model.description}, float32, on {name}", markup=False)
    table = Table(show_header=False)
    table.add_row("loss", f"{loss.loss:.4f} nats per token")
    table.add_row("perplexity", f"{loss.perplexity:.3f}")
    table.add_row("[bold]bits per byte[/bold]", f"[bold]{loss.bits_per_byte:.4f}[/bold]")
    for compressor, bits in compressed_bits_per_byte("".join(texts).encode()).items():
        table.add_row(compressor, f"{bits:.4f} bits per byte")
    table.add_row("text", f"{loss.bytes:,} bytes, {loss.tokens:,} tokens, windows of {window}")
    print_table(console, table)
    figures = {"name": name, "loss": loss.loss, "perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
    return figures | {"bytes": loss.bytes, "tokens": loss.tokens, "window": window}


def _texts(cfg: Config, model: LoadedModel) -> tuple[list[str], str, bool]:
    """The documents to measure, what they are, and whether attention stays inside each of them."""
    if cfg.evaluate.text is not None:
        return [read_text(Path(cfg.evaluate.text), "evaluate.text")], cfg.evaluate.text, False
    run = model.run
    if run is None:
        # An export inside its run's folder has that run's validation text; one that was copied elsewhere has none.
        assert cfg.run is not None
        parent = Path(cfg.run).parent.parent
        if not (parent / "config.yaml").is_file():
            raise ConfigError(f"{cfg.run} lies in no run's folder and has no validation text: give evaluate.text=FILE.")
        cfg.run = str(parent)
        run = open_run(cfg)
    if chats(cfg.text.corpus):
        raise ConfigError(
            "The validation text of chat data is measured while training, on the assistant's tokens alone: give "
            "evaluate.text=FILE or evaluate.tasks=[...] here."
        )
    ids = run.validation_ids(cfg, cfg.text.validation_tokens)
    return documents(ids, run.tokenizer), "the validation text", cfg.text.attend_within_documents
