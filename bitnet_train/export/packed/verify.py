"""Verification of the format ``packed``: read back and compared with the run, bit by bit and on held-out text."""

import time
from pathlib import Path

import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import windows_loss
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.folder import read_json
from bitnet_train.export.held_out import HeldOut
from bitnet_train.export.own_reader import check_codes, check_text
from bitnet_train.export.packed.reader import PackedModel, read_packed, read_packed_tokenizer
from bitnet_train.export.packed.writer import NAME
from bitnet_train.export.report import VerificationReport

PERPLEXITY_TOLERANCE = {ExportDtype.float32: 1e-6, ExportDtype.bfloat16: 0.01}


def verify_packed(
    folder: Path, canonical: CanonicalCheckpoint, tokenizer: TextTokenizer, held_out: HeldOut
) -> VerificationReport:
    """Read ``folder`` and compare it with the run; the report is also saved as verification.json.

    Raises ConfigError when the folder does not exist.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist: export first with command=export.")
    started = time.monotonic()
    report = VerificationReport(NAME, str(folder), "bitnet_train's reader", canonical.step)
    models: list[PackedModel] = []
    report.guarded("loads", lambda: models.append(read_packed(folder)))
    for model in models:
        dtype = ExportDtype(read_json(folder / "config.json")["dtype"])
        report.add("config: model", str(model.cfg == canonical.cfg), "equal", model.cfg == canonical.cfg)
        wrong = [n for n, q in canonical.quantised.items() if _layer(model, n) != (q.scheme, q.activation_bits)]
        report.add("config: quantised layers", f"{len(wrong)} differ", "0 differ", not wrong)
        report.guarded("codes and scales", lambda m=model: check_codes(report, canonical, m.codes))  # type: ignore[misc]
        number_type = getattr(torch, dtype.value)
        names = canonical.tensor_names
        differing = [n for n in names if not torch.equal(model.tensors[n], canonical.tensor(n).to(number_type).float())]
        report.add(
            "unquantised tensors", f"{len(differing)} of {len(names)} differ", f"exact to {dtype.value}", not differing
        )
        report.guarded("tokenizer", lambda v=model.cfg.vocab: _check_tokenizer(report, folder, v, tokenizer, held_out))  # type: ignore[misc]
        report.guarded(
            "perplexity",
            lambda m=model, d=dtype: _perplexity(report, m, canonical, tokenizer, held_out, d),  # type: ignore[misc]
        )
    report.seconds = time.monotonic() - started
    report.save(folder)
    return report


def _check_tokenizer(
    report: VerificationReport, folder: Path, vocab: int, tokenizer: TextTokenizer, held_out: HeldOut
) -> None:
    check_text(report, read_packed_tokenizer(folder, vocab), tokenizer, held_out)


def _layer(model: PackedModel, name: str) -> tuple[str, int | None]:
    layer = model.spec.for_layer(name)
    return layer.scheme, layer.activation_bits


def _perplexity(
    report: VerificationReport,
    model: PackedModel,
    canonical: CanonicalCheckpoint,
    tokenizer: TextTokenizer,
    held_out: HeldOut,
    dtype: ExportDtype,
) -> None:
    lengths = tokenizer.byte_lengths()
    mine = windows_loss(canonical.decoder(), held_out.batches(), lengths).perplexity
    other = windows_loss(model.decoder(), held_out.batches(), lengths).perplexity
    difference, allowed = abs(other / mine - 1), PERPLEXITY_TOLERANCE[dtype]
    measured = f"{difference:.3%}: {other:.4f} against {mine:.4f} on {len(held_out.ids) - 1:,} tokens"
    report.add("held-out perplexity", measured, f"{allowed:.4%}", difference <= allowed)
