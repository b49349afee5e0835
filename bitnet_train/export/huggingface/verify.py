"""Verification of the ``hf-*`` exports: the real ``transformers`` loads it and is compared with the RUN.

Nothing here reads the export by our own understanding of it: every value is what the consumer ended up with, held
against the run's canonical checkpoint.
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import windows_loss
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.held_out import HeldOut, consumer_loss, documents
from bitnet_train.export.huggingface.model_config import generation_config, model_config
from bitnet_train.export.huggingface.probes import Worst, probe
from bitnet_train.export.huggingface.variant import Storage, Variant
from bitnet_train.export.huggingface.weight_checks import check_tensors, check_weights, reference_decoder
from bitnet_train.export.report import VerificationReport

PIECE_TOLERANCE = 1e-6
# A few codes in ten thousand may differ by one step; a wrong norm would show as tens of percents.
FUSED_TOLERANCE = 1e-2
PERPLEXITY_TOLERANCE = {ExportDtype.float32: 0.002, ExportDtype.bfloat16: 0.01}
PROBE_TOKENS = 512
SAMPLE_TOKENS = 48


def import_transformers() -> Any:
    """The ``transformers`` module. Raises ConfigError when it or ``accelerate``, which it loads with, is missing."""
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Verification loads the export with transformers, and {' and '.join(missing)} is not installed: "
            'pip install "bitnet-train[export]".'
        )
    # What transformers imports along registers enums in a way that PyTorch remarks on, once per enum.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    import transformers

    return transformers


def verify_huggingface(
    folder: Path,
    canonical: CanonicalCheckpoint,
    tokenizer: TextTokenizer,
    held_out: HeldOut,
    storage: Storage,
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
    report = VerificationReport(storage.value, str(folder), f"transformers {transformers.__version__}", canonical.step)
    # Compiling the consumer's few elementwise functions would take longer than all checks.
    with quiet(transformers), torch.compiler.set_stance("force_eager"), torch.no_grad():
        _Checks(report, folder, canonical, tokenizer, held_out, transformers, storage).run()
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
        storage: Storage,
    ) -> None:
        self.report, self.folder, self.canonical, self.tokenizer = report, folder, canonical, tokenizer
        self.held_out, self.transformers = held_out, transformers
        self.variant = Variant(storage, linear_class=None if storage is Storage.dense else "autobitlinear")
        self.model: Any = None

    def run(self) -> None:
        """All checks; those on the model only when it loads."""
        self.report.guarded("config", self.config)
        self.report.guarded("loads", self.load)
        self.report.guarded("tokenizer", self.check_tokenizer)
        if self.model is None:
            return
        self.report.guarded("generation config", self.check_generation_config)
        weights = (self.report, self.model, self.canonical, self.variant)
        self.report.guarded("codes and scales", lambda: check_weights(*weights))
        self.report.guarded("unquantised tensors", lambda: check_tensors(*weights))
        self.report.guarded("generation", self.generate)
        # Only a comparison in float32 can tell a bug from rounding. (transformers leaves the tensors of a packed model
        # in the type of the file whatever type is asked for, so a bfloat16 export is widened here.)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        for module in self.model.modules():
            if isinstance(getattr(module, "dtype", None), torch.dtype) and hasattr(module, "weight_scale"):
                module.dtype = torch.float32  # BitLinear unpacks its codes into this type
        self.report.guarded("pieces", self.pieces)
        self.report.guarded("perplexity", self.perplexity)

    def config(self) -> None:
        """Every field of config.json, as written and as the consumer understands it."""
        written = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if written.get("dtype") in {d.value for d in ExportDtype}:
            self.variant = replace(self.variant, dtype=ExportDtype(written["dtype"]))
        if self.variant.storage is Storage.packed:
            linear_class = written.get("quantization_config", {}).get("linear_class")
            if linear_class in ("autobitlinear", "bitlinear"):
                self.variant = replace(self.variant, linear_class=linear_class)
        understood = self.transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        cfg, spec = self.canonical.cfg, self.canonical.spec
        wanted = model_config(cfg, spec, self.tokenizer.bos_id, self.tokenizer.eos_id, self.variant)
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
            trust_remote_code=False,
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

    def pieces(self) -> None:
        """Every linear, norm, attention and gate fed our inputs, and the table of rotary positions."""
        ours = reference_decoder(self.model, self.canonical, self.variant)
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
        """Held-out perplexity of the whole model against that of the run, both in float32.

        Dense weights know nothing of quantised activations: they are compared with the run's weights without them.
        """
        batches = self.held_out.batches()
        other = consumer_loss(lambda ids: self.model(input_ids=ids, use_cache=False).logits, batches).perplexity
        mine = self._own_perplexity(self.canonical, batches)
        beside = ""
        if self.variant.storage is Storage.dense:
            beside = f" (the run itself, with its 8-bit activations: {mine:.4f})"
            mine = self._own_perplexity(self.canonical.with_float_activations(), batches)
        allowed, tokens = PERPLEXITY_TOLERANCE[self.variant.dtype], len(self.held_out.ids) - 1
        self.report.add_perplexity("held-out perplexity", mine, other, tokens, allowed, 1, beside)

    def _own_perplexity(self, canonical: CanonicalCheckpoint, batches: list[torch.Tensor]) -> float:
        return windows_loss(canonical.decoder(), batches, self.tokenizer.byte_lengths()).perplexity

    def check_tokenizer(self) -> None:
        """The tokenizer's definition, its ids of held-out text, and the way back."""
        theirs = self.transformers.AutoTokenizer.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False
        )
        definition = json.loads(theirs.backend_tokenizer.to_str())
        original = json.loads(self.tokenizer.tokenizer.to_str())
        parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
        changed = [part for part in parts if definition[part] != original[part]]
        self.report.add("tokenizer definition", f"changed: {', '.join(changed) or 'none'}", "none", not changed)
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        for key, value in {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}.items():
            found_id = getattr(theirs, key)
            self.report.add(f"config: tokenizer.{key}", str(found_id), f"= {value}", found_id == value)
        self.report.add_chat_template(self.tokenizer.chat_template, getattr(theirs, "chat_template", None))
        texts = documents(self.held_out.ids, self.tokenizer)
        ids = [self.tokenizer.encode(text) for text in texts]
        # Text is data: the run's tokenizer does not look for special tokens in it, so the consumer must not either.
        found = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self.report.add_token_ids(ids, found)
        self.report.add_started_ids(bos, ids, theirs(texts, split_special_tokens=True)["input_ids"])
        self.report.add_decoded(texts, [theirs.decode(i, skip_special_tokens=True) for i in ids])

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


def _problems(info: dict[str, Any]) -> str:
    return "; ".join(f"{key}: {len(names)}, such as {_first(names)}" for key, names in info.items())


def _first(names: Any) -> str:
    if isinstance(names, str):
        return names[:120]
    return str(sorted(map(str, names))[0])[:120]


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
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
