"""Verification of an ``hf-packed`` export: the real ``transformers`` loads it and is compared with the RUN.

Nothing here reads the export by our own understanding of it: every value is what the consumer ended up with, held
against the run's canonical checkpoint.
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import TextLoss, cut_windows, windows_loss
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.huggingface import generation_config, hf_name, model_config
from bitnet_train.export.probes import Worst, probe
from bitnet_train.export.report import VerificationReport

PIECE_TOLERANCE = 1e-6
# A few codes in ten thousand may differ by one step; a wrong norm would show as tens of percents.
FUSED_TOLERANCE = 1e-2
PERPLEXITY_TOLERANCE = {ExportDtype.float32: 0.002, ExportDtype.bfloat16: 0.01}
PROBE_TOKENS = 512
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class HeldOut:
    """What the comparison is made on: ids (n,) of the run's validation text, windows of ``window`` tokens, a prompt."""

    ids: Tensor
    window: int
    prompt: str


def import_transformers() -> Any:
    """The ``transformers`` module. Raises ConfigError when it or ``accelerate``, which it loads with, is missing."""
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Verification loads the export with transformers, and {' and '.join(missing)} is not installed: "
            'pip install "bitnet-train[export]".'
        )
    import transformers

    return transformers


def verify_huggingface(
    folder: Path,
    canonical: CanonicalCheckpoint,
    tokenizer: TextTokenizer,
    held_out: HeldOut,
) -> VerificationReport:
    """Load ``folder`` with transformers and compare it with the run; the report is also saved as verification.json.

    On the CPU, whatever else there is: both sides then use the same float32 routines, and what is left of a difference
    is the export's. A consumer that refuses the export, or raises on the way, is a failed check. Raises ConfigError
    when transformers is not installed or the folder does not exist.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist: export first with command=export.")
    started = time.monotonic()
    transformers = import_transformers()
    report = VerificationReport("hf-packed", str(folder), f"transformers {transformers.__version__}", canonical.step)
    # Compiling the consumer's few elementwise functions would take longer than all checks.
    with _quiet(transformers), torch.compiler.set_stance("force_eager"), torch.no_grad():
        checks = _Checks(report, folder, canonical, tokenizer, held_out, transformers)
        checks.run()
    report.seconds = time.monotonic() - started
    report.save(folder)
    return report


class _Checks:
    """The groups of checks, in order; a group that raises is a failed row and does not stop the others."""

    def __init__(
        self,
        report: VerificationReport,
        folder: Path,
        canonical: CanonicalCheckpoint,
        tokenizer: TextTokenizer,
        held_out: HeldOut,
        transformers: Any,
    ) -> None:
        self.report, self.folder, self.canonical, self.tokenizer = report, folder, canonical, tokenizer
        self.held_out, self.transformers = held_out, transformers
        self.dtype = ExportDtype.float32
        self.model: Any = None

    def run(self) -> None:
        """All checks; those on the model only when it loads."""
        self._guarded("config", self.config)
        self._guarded("loads", self.load)
        self._guarded("tokenizer", self.check_tokenizer)
        if self.model is None:
            return
        self._guarded("generation config", self.check_generation_config)
        self._guarded("codes and scales", self.codes)
        self._guarded("unquantised tensors", self.tensors)
        self._guarded("generation", self.generate)
        # Only a comparison in float32 can tell a bug from rounding. (transformers leaves the tensors of a packed model
        # in the type of the file whatever type is asked for, so a bfloat16 export is widened here.)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        self._guarded("pieces", self.pieces)
        self._guarded("perplexity", self.perplexity)

    def _guarded(self, name: str, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:  # whatever a consumer raises is its verdict on the export
            self.report.add(name, _one_line(error), "no error", False)

    def config(self) -> None:
        """Every field of config.json, as written and as the consumer understands it."""
        written = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if written.get("dtype") in {d.value for d in ExportDtype}:
            self.dtype = ExportDtype(written["dtype"])
        understood = self.transformers.AutoConfig.from_pretrained(self.folder)
        cfg, spec = self.canonical.cfg, self.canonical.spec
        wanted = model_config(cfg, spec, self.tokenizer.bos_id, self.tokenizer.eos_id, self.dtype)
        seen = _leaves({key: _plain(getattr(understood, key)) for key in wanted if hasattr(understood, key)})
        leaves, found = _leaves(wanted), _leaves(written)
        for key, value in leaves.items():
            # Older fields that this version of the consumer does not read are compared as they are written.
            both = (found.get(key, "missing"), seen.get(key, found.get(key, "missing")))
            wrong = [item for item in both if item != value]
            self.report.add(f"config: {key}", str(wrong[0] if wrong else value), f"= {value}", not wrong)
        for key in sorted(set(found) - set(leaves)):
            self.report.add(f"config: {key}", str(found[key]), "absent", False)

    def load(self) -> None:
        """The model as a user loads it, with no tensor missing, unexpected or of another shape."""
        model, info = self.transformers.AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype="auto",
            attn_implementation="sdpa",
            output_loading_info=True,
            local_files_only=True,
        )
        wrong = {key: names for key, names in info.items() if names}
        self.report.add("loads", _problems(wrong) if wrong else type(model).__name__, "every tensor fits", not wrong)
        if not wrong:
            self.model = model.eval()

    def check_generation_config(self) -> None:
        """The ids that start and end a text."""
        wanted = generation_config(self.canonical.cfg, self.tokenizer.bos_id, self.tokenizer.eos_id)
        for key, value in wanted.items():
            found = getattr(self.model.generation_config, key, None)
            self.report.add(f"config: generation.{key}", str(found), f"= {value}", found == value)

    def codes(self) -> None:
        """Codes one by one; scales exact to the export's number type."""
        number_type = getattr(torch, self.dtype.value)
        differing, total, wrong_scales, rounding = 0, 0, [], 0.0
        for layer in self.canonical.quantised:
            wanted = self.canonical.codes(layer)
            module = self.model.get_submodule(hf_name(layer))
            found = module.weight.detach().cpu()
            total += wanted.codes.numel()
            same_shape = found.shape == wanted.codes.shape
            differing += int((found != wanted.codes.to(found.dtype)).sum()) if same_shape else wanted.codes.numel()
            scale = getattr(module, "weight_scale", torch.tensor([math.nan])).detach().cpu().float()
            exact = wanted.scale.to(number_type).float()
            rounding = max(rounding, float(((exact - wanted.scale) / wanted.scale).abs().max()))
            if not torch.equal(scale, exact):
                wrong_scales.append(f"{layer}: {float(scale.flatten()[0]):.6g} instead of {float(exact[0]):.6g}")
        self.report.add("codes", f"{differing:,} of {total:,} differ", "0 differ", differing == 0)
        count = len(self.canonical.quantised)
        measured = f"{len(wrong_scales)} of {count} differ" + (f", {wrong_scales[0]}" if wrong_scales else "")
        if rounding:
            measured += f"; rounded to {self.dtype.value} by up to {rounding:.1e}"
        self.report.add("scales", measured, f"exact to {self.dtype.value}", not wrong_scales)

    def tensors(self) -> None:
        """Every other tensor, exact to the export's number type, and nothing beside them."""
        number_type = getattr(torch, self.dtype.value)
        parameters = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        names = self.canonical.tensor_names
        wrong = []
        for name in names:
            wanted = self.canonical.tensor(name).to(number_type).float()
            if not torch.equal(parameters[hf_name(name)].detach().cpu().float(), wanted):
                wrong.append(name)
        measured = f"{len(wrong)} of {len(names)} differ" + (f", {wrong[0]}" if wrong else "")
        self.report.add("unquantised tensors", measured, f"exact to {self.dtype.value}", not wrong)

    def pieces(self) -> None:
        """Every linear, norm, attention and gate fed our inputs, and the table of rotary positions."""
        ours = self.canonical.decoder(number_type=getattr(torch, self.dtype.value))
        window = min(self.held_out.window, len(self.held_out.ids))
        ids = self.held_out.ids[: max(1, PROBE_TOKENS // window) * window]
        result = probe(ours, self.model, ids[: len(ids) // window * window].reshape(-1, window))
        self._worst("linears fed our inputs", result.linears)
        self._worst("norm and linear as one", result.fused, FUSED_TOLERANCE)
        self._worst("RMSNorms fed our inputs", result.norms)
        self._worst("RMSNorms fed quiet inputs", result.quiet_norms)
        self._worst("attention fed our q, k, v", result.attention)
        self._worst("FFN gating fed our inputs", result.gating)
        positions = torch.arange(self.canonical.cfg.context)[None]
        table = self.model.model.rotary_emb(ours.cos[None], position_ids=positions)
        rotary = Worst()
        for name, mine, other in (("cos", ours.cos, table[0][0]), ("sin", ours.sin, table[1][0])):
            rotary.take(name, float((mine - other).abs().max()) if mine.shape == other.shape else math.inf)
        self._worst("rotary positions", rotary)

    def _worst(self, name: str, worst: Worst, tolerance: float = PIECE_TOLERANCE) -> None:
        measured = f"{worst.error:.1e} at {worst.name} (worst of {worst.count})"
        self.report.add(name, measured, f"{tolerance:.0e}", worst.error <= tolerance)

    def perplexity(self) -> None:
        """Held-out perplexity of the whole model against that of the run, both in float32."""
        ours = self.canonical.decoder()
        batches = list(cut_windows(self.held_out.ids, self.held_out.window, max(1, 4096 // self.held_out.window)))
        mine = windows_loss(ours, batches, self.tokenizer.byte_lengths()).perplexity
        other = _consumer_loss(self.model, batches).perplexity
        difference = abs(other / mine - 1)
        allowed = PERPLEXITY_TOLERANCE[self.dtype]
        measured = f"{difference:.3%}: {other:.4f} against {mine:.4f} on {len(self.held_out.ids) - 1:,} tokens"
        self.report.add("held-out perplexity", measured, f"{allowed:.1%}", difference <= allowed)

    def check_tokenizer(self) -> None:
        """The tokenizer's definition, its ids of held-out text, and the way back."""
        theirs = self.transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        definition = json.loads(theirs.backend_tokenizer.to_str())
        original = json.loads(self.tokenizer.tokenizer.to_str())
        parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
        changed = [part for part in parts if definition[part] != original[part]]
        self.report.add("tokenizer definition", f"changed: {', '.join(changed) or 'none'}", "none", not changed)
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        for key, value in {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}.items():
            found_id = getattr(theirs, key)
            self.report.add(f"config: tokenizer.{key}", str(found_id), f"= {value}", found_id == value)
        texts = documents(self.held_out.ids, self.tokenizer)
        ids = [self.tokenizer.encode(text) for text in texts]
        # Text is data: the run's tokenizer does not look for special tokens in it, so the consumer must not either.
        found = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        total, equal = sum(map(len, ids)), sum(map(len, (i for i, f in zip(ids, found, strict=True) if i == f)))
        self.report.add("token ids of held-out text", f"{equal:,} of {total:,} equal", "all", equal == total)
        started = theirs(texts, split_special_tokens=True)["input_ids"]
        with_bos = all(f == [bos, *i] for i, f in zip(ids, started, strict=True))
        self.report.add(
            "special tokens added", "bos in front" if with_bos else "others", "bos, as in training", with_bos
        )
        back = [theirs.decode(i, skip_special_tokens=True) for i in ids]
        same = sum(a == b for a, b in zip(texts, back, strict=True))
        self.report.add("text decoded from ids", f"{same} of {len(texts)} documents equal", "all", same == len(texts))

    def generate(self) -> None:
        """``model.generate`` writes something, greedily."""
        context = self.canonical.cfg.context
        prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(self.held_out.prompt)][: max(1, context // 2)]
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=1.0,
            max_new_tokens=min(SAMPLE_TOKENS, context - len(prompt)),
            max_length=None,
        )
        new = output[0, len(prompt) :].tolist()
        self.report.sample = self.tokenizer.decode(output[0].tolist())
        self.report.add("text generated", f"{len(new)} tokens", "at least 1", bool(new))


def documents(ids: Tensor, tokenizer: TextTokenizer) -> list[str]:
    """The texts between the bos ids of ids (n,): real held-out documents, the last one cut where the ids end."""
    texts: list[list[int]] = [[]]
    for index in ids.tolist():
        if index == tokenizer.bos_id:
            texts.append([])
        else:
            texts[-1].append(index)
    return [text for part in texts if part and (text := tokenizer.decode(part))]


def _consumer_loss(model: Any, batches: list[Tensor]) -> TextLoss:
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    for ids in batches:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        nats += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        tokens += ids[:, 1:].numel()
    return TextLoss(float(nats), tokens, 0)


def _plain(value: Any) -> Any:
    """A consumer's configuration value as JSON would hold it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return {key: getattr(item, "value", item) for key, item in value.items()}
    return value


def _leaves(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf of nested dictionaries."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        name = f"{prefix}{key}"
        found |= _leaves(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:240]}{'...' if len(text) > 240 else ''}"


def _problems(info: dict[str, Any]) -> str:
    return "; ".join(f"{key}: {len(names)}, such as {_first(names)}" for key, names in info.items())


def _first(names: Any) -> str:
    if isinstance(names, str):
        return names[:120]
    return str(sorted(map(str, names))[0])[:120]


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Progress bars and notes (no GPU, slow unpacking) stay out of the output; errors are raised, not logged."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
