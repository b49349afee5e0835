"""Putting sub-norms into a model that came without: which gains they start at, and what that does to its loss."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bitnet_train.data.shards import Manifest, TokenArray
from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.data.windows import Windows, document_numbers
from bitnet_train.evaluation.bits_per_byte import windows_loss
from bitnet_train.export.initial import InitialWeights
from bitnet_train.nn.config import DecoderConfig, Norms, ResidualDtype, SubNorms
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.sub_norms import fit_gains
from bitnet_train.quant.spec import FLOAT, QuantSpec, build_spec
from bitnet_train.training.config import RunConfig

# Tokens of training text that gains are fitted on, and of validation text that losses are measured on.
TOKENS = 8192


def insert_sub_norms(
    cfg: RunConfig, initial: InitialWeights, shards: Path, manifest: Manifest, tokenizer: TextTokenizer, device: str
) -> tuple[InitialWeights, str]:
    """``initial``, which lacks sub-norms, with their gains as ``init.sub_norms`` says; and a sentence about it.

    The gains are fitted, and the losses measured, with the source's own weights: where it computes with codes, with
    codes, else with floats, whatever the run will train. Everything follows from the files, so that the same command
    gives the same weights.
    """
    held = _windows(shards, manifest, "val", cfg)
    bos_id = tokenizer.bos_id if cfg.text.attend_within_documents else None
    spec = build_spec(cfg.quant)
    own = QuantSpec(FLOAT, tuple((name, spec.for_layer(name)) for name in sorted(initial.coded)))
    masters = {name: tensor.to(device) for name, tensor in initial.masters.items()}

    def loss(model: Decoder) -> float:
        return windows_loss(model, held, tokenizer.byte_lengths(), bos_id=bos_id).loss

    source = _decoder(replace(cfg.decoder, norms=Norms.pre), own, masters)
    before = loss(source)
    choices = {"at one": {name: gain for name, gain in masters.items() if name.endswith("sub_norm.weight")}}
    if cfg.init.sub_norms is not SubNorms.ones:
        read = (batch[:, :-1].to(device) for batch in _windows(shards, manifest, "train", cfg))
        fitted = fit_gains(source, ((ids, None if bos_id is None else document_numbers(ids, bos_id)) for ids in read))
        choices = {"one gain for a norm": fitted.scalar, "a gain for each channel": fitted.channel}
    target = _decoder(cfg.decoder, own, masters)
    after = {}
    for name, gains in choices.items():
        target.load_state_dict(gains, strict=False)
        after[name] = loss(target)
    best = min(after, key=lambda name: abs(after[name] - before))
    others = "".join(f"; {name} {value:.4f}" for name, value in after.items() if name != best)
    sentence = (
        f"sub-norms: {len(choices[best])} put in, {best} (init.sub_norms); validation loss of these weights "
        f"{before:.4f} without, {after[best]:.4f} with them{others} (model.norms=pre keeps the function)"
    )
    kept = {name: gain.to("cpu") for name, gain in choices[best].items()}
    return replace(initial, masters=initial.masters | kept), sentence


def _windows(shards: Path, manifest: Manifest, split: str, cfg: RunConfig) -> list[Tensor]:
    """Single windows (1, tokens + 1) spread evenly over a split, about TOKENS in all."""
    windows = Windows(TokenArray(shards, manifest, split), cfg.text.sequence_length, partial=split == "val")
    count = min(len(windows), max(1, TOKENS // cfg.text.sequence_length))
    return [windows[index * len(windows) // count][None] for index in range(count)]


def _decoder(cfg: DecoderConfig, spec: QuantSpec, masters: dict[str, Tensor]) -> Decoder:
    """A decoder in eval mode that computes in float32 with copies of ``masters``, on their device."""
    model = Decoder(replace(cfg, residual_dtype=ResidualDtype.float32), spec)
    names = {name for name, _ in model.named_parameters()}
    model.to(next(iter(masters.values())).device)
    model.load_state_dict({name: masters[name] for name in names})
    return model.eval().requires_grad_(False)
