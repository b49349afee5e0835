"""``command=evaluate``: loss, perplexity and bits per byte of a run or an export, beside gzip and xz."""

from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table

from bitnet_train.commands.console import make_console, print_table
from bitnet_train.commands.sources import LoadedModel, load_model, open_run, read_text
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import cut_windows, windows_loss
from bitnet_train.evaluation.compression import compressed_bits_per_byte
from bitnet_train.export.held_out import documents

# Tokens per forward.
BATCH_TOKENS = 8192


def run(cfg: Config) -> int:
    """Measure in float32 on ``evaluate.text``, or on the validation text as training did, and print the figures."""
    console = make_console()
    model = load_model(cfg)
    context = model.decoder.cfg.context
    window = cfg.evaluate.window or min(cfg.data.sequence_length, context)
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
    return 0


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
    ids = run.validation_ids(cfg, cfg.data.validation_tokens)
    return documents(ids, run.tokenizer), "the validation text", cfg.data.attend_within_documents
