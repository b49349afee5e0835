"""Checks that verifications by readers of our own have in common."""

import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.held_out import HeldOut, documents
from bitnet_train.export.report import VerificationReport
from bitnet_train.quant.weights import Codes


def check_codes(
    report: VerificationReport,
    canonical: CanonicalCheckpoint,
    found: dict[str, Codes],
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Rows for codes one by one, and for scales (one per output row), exact to ``scale_dtype``."""
    differing, total, wrong, rounding = 0, 0, [], 0.0
    for layer in canonical.quantised:
        wanted = canonical.codes(layer)
        total += wanted.codes.numel()
        there = found.get(layer)
        if there is None or there.codes.shape != wanted.codes.shape:
            differing += wanted.codes.numel()
            wrong.append(layer)
            continue
        differing += int((there.codes != wanted.codes).sum())
        exact = wanted.row_scale().to(scale_dtype).float()
        rounding = max(rounding, float((exact / wanted.row_scale() - 1).abs().max()))
        if not torch.equal(there.row_scale(), exact):
            wrong.append(layer)
    report.add("codes", f"{differing:,} of {total:,} differ", "0 differ", differing == 0)
    name = str(scale_dtype).removeprefix("torch.")
    measured = f"{len(wrong)} of {len(canonical.quantised)} differ" + (f", {wrong[0]}" if wrong else "")
    measured += f"; rounded to {name} by up to {rounding:.1e}" if rounding else ""
    report.add("scales", measured, f"exact to {name}", not wrong)


def check_text(report: VerificationReport, theirs: TextTokenizer, ours: TextTokenizer, held_out: HeldOut) -> None:
    """Rows for the special ids, the ids of held-out text and the way back."""
    for key in ("bos_id", "eos_id"):
        found, wanted = getattr(theirs, key), getattr(ours, key)
        report.add(f"config: tokenizer.{key}", str(found), f"= {wanted}", found == wanted)
    report.add_chat_template(ours.chat_template, theirs.chat_template)
    texts = documents(held_out.ids, ours)
    ids = ours.encode_batch(texts)
    report.add_token_ids(ids, theirs.encode_batch(texts))
    report.add_decoded(texts, [theirs.decode(i) for i in ids])
