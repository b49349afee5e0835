"""Verification of the format ``packed``: read back and compared with the run, bit by bit and on held-out text."""

import time
from pathlib import Path

import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import windows_loss
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.held_out import HeldOut
from bitnet_train.export.own_reader import check_codes, check_text
from bitnet_train.export.packed.reader import PackedModel, read_packed, read_packed_tokenizer
from bitnet_train.export.packed.writer import NAME, scheme_of_codes
from bitnet_train.export.report import VerificationReport
from bitnet_train.nn.layout import quantised_layers

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
        _compare(report, folder, model, canonical, tokenizer, held_out)
    report.seconds = time.monotonic() - started
    report.save(folder)
    return report


def _compare(
    report: VerificationReport,
    folder: Path,
    model: PackedModel,
    canonical: CanonicalCheckpoint,
    tokenizer: TextTokenizer,
    held_out: HeldOut,
) -> None:
    report.add("config: model", str(model.cfg == canonical.cfg), "equal", model.cfg == canonical.cfg)
    layers = {name: (scheme_of_codes(q), q.activation_bits) for name, q in canonical.quantised.items()}
    found = {name: (q.scheme, q.activation_bits) for name, q in quantised_layers(model.cfg, model.spec).items()}
    wrong = [name for name in layers.keys() | found.keys() if layers.get(name) != found.get(name)]
    report.add("config: quantised layers", f"{len(wrong)} differ", "0 differ", not wrong)
    report.guarded("codes and scales", lambda: check_codes(report, canonical, model.codes))
    report.guarded("unquantised tensors", lambda: _tensors(report, model, canonical))

    def text() -> None:
        check_text(report, read_packed_tokenizer(folder, model.cfg.vocab), tokenizer, held_out)

    report.guarded("tokenizer", text)
    report.guarded("perplexity", lambda: _perplexity(report, model, canonical, tokenizer, held_out))


def _tensors(report: VerificationReport, model: PackedModel, canonical: CanonicalCheckpoint) -> None:
    number_type, wrong = getattr(torch, model.dtype.value), []
    for name in canonical.tensor_names:
        there = model.tensors.get(name)
        if there is None or not torch.equal(there, canonical.tensor(name).to(number_type).float()):
            wrong.append(name)
    measured = f"{len(wrong)} of {len(canonical.tensor_names)} differ" + (f", {wrong[0]}" if wrong else "")
    report.add("unquantised tensors", measured, f"exact to {model.dtype.value}", not wrong)


def _perplexity(
    report: VerificationReport,
    model: PackedModel,
    canonical: CanonicalCheckpoint,
    tokenizer: TextTokenizer,
    held_out: HeldOut,
) -> None:
    lengths = tokenizer.byte_lengths()
    mine = windows_loss(canonical.decoder(), held_out.batches(), lengths).perplexity
    other = windows_loss(model.decoder(), held_out.batches(), lengths).perplexity
    allowed, tokens = PERPLEXITY_TOLERANCE[model.dtype], len(held_out.ids) - 1
    report.add_perplexity("held-out perplexity", mine, other, tokens, allowed, 4)
