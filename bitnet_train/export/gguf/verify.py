"""Verification of the ``gguf-*`` exports: llama.cpp runs the ternary types of its main line; I2_S is read back.

bitnet.cpp, the consumer of I2_S, is no Python package; its byte layout is tested against bytes that its own quantiser
wrote, and here the file is read by our own reader and held against the run.
"""

import time
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short_repr

import numpy as np
import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import windows_loss
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import EmbeddingType, ExportConfig, ExportDtype
from bitnet_train.export.folder import shown
from bitnet_train.export.gguf.blocks import as_float32
from bitnet_train.export.gguf.file import GgufFile
from bitnet_train.export.gguf.llama_cpp_child import ask_llama_cpp
from bitnet_train.export.gguf.plan import Container, GgmlType, planned_tensors
from bitnet_train.export.gguf.reader import GgufModel, read_gguf
from bitnet_train.export.gguf.tokenizer_metadata import tokenizer_from_metadata
from bitnet_train.export.gguf.writer import file_metadata, float_data, permuted
from bitnet_train.export.held_out import HeldOut, documents
from bitnet_train.export.own_reader import check_codes, check_text
from bitnet_train.export.report import VerificationReport
from bitnet_train.nn.config import DecoderConfig

# llama.cpp quantises activations in blocks of 256 of its own, so its numbers are near ours and not equal.
LLAMA_CPP_PERPLEXITY = 0.02
# What rounding the embedding may cost (it moves activation codes in every block), and linear layers in bfloat16.
EMBEDDING_PERPLEXITY = {
    EmbeddingType.f32: 1e-4,
    EmbeddingType.f16: 0.01,
    EmbeddingType.q8_0: 0.02,
    EmbeddingType.q6_k: 0.05,
}
BFLOAT16_PERPLEXITY = 0.01
SAMPLE_TOKENS = 48


def verify_gguf(
    folder: Path,
    canonical: CanonicalCheckpoint,
    tokenizer: TextTokenizer,
    held_out: HeldOut,
    container: Container,
    cfg: ExportConfig,
    name: str,
) -> VerificationReport:
    """Read the file and run it with its consumer; the report is also saved as verification.json.

    Raises ConfigError when the folder or its file does not exist.
    """
    path = folder / container.file_name
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: export first with command=export.")
    started = time.monotonic()
    main_line = container is not Container.i2_s
    consumer = "llama.cpp" if main_line else "bitnet_train's reader"
    report = VerificationReport(container.value, str(folder), consumer, canonical.step)
    checks = _Checks(report, path, canonical, tokenizer, held_out, container, cfg, name)
    checks.run()
    if main_line:
        report.guarded("runs in llama.cpp", checks.llama_cpp)
    report.seconds = time.monotonic() - started
    report.save(folder)
    return report


class _Checks:
    """The rows of one file."""

    def __init__(
        self,
        report: VerificationReport,
        path: Path,
        canonical: CanonicalCheckpoint,
        tokenizer: TextTokenizer,
        held_out: HeldOut,
        container: Container,
        cfg: ExportConfig,
        name: str,
    ) -> None:
        self.report, self.path, self.canonical, self.tokenizer = report, path, canonical, tokenizer
        self.held_out, self.container, self.cfg, self.name = held_out, container, cfg, name
        self.scale_type = torch.float32 if container is Container.i2_s else torch.float16
        self.model: GgufModel | None = None
        self._own_perplexity: float | None = None

    def run(self) -> None:
        """What the file holds, by readers."""
        self.report.guarded("metadata", self.metadata)
        self.report.guarded("loads", self.load)
        if self.model is not None:
            self.report.guarded("codes and scales", self.codes)
            self.report.guarded("tokenizer", self.read_tokenizer)
            self.report.guarded("perplexity", self.perplexity)
        self.report.guarded("unquantised tensors", self.tensors)

    def metadata(self) -> None:
        """Every key of the file, and no other."""
        wanted = file_metadata(self.canonical, self.tokenizer, self.container, self.name, self.cfg)
        found = GgufFile(self.path).metadata
        for key, value in wanted.items():
            there = found.get(key)
            if isinstance(value, list):
                measured = f"{len(there)} values" if isinstance(there, list) else short_repr(there)
                self.report.add(f"config: {key}", measured, f"{len(value)} values", there == value)
                continue
            stored = as_float32(value) if isinstance(value, float) else value
            read = as_float32(there) if isinstance(there, float) else there
            same = type(read) is type(stored) and read == stored
            self.report.add(f"config: {key}", "missing" if there is None else str(read), f"= {stored}", same)
        for key in sorted(set(found) - set(wanted)):
            self.report.add(f"config: {shown(key)}", short_repr(found[key]), "absent", False)

    def load(self) -> None:
        """The model by our own reader."""
        self.model = read_gguf(self.path)
        same = self.model.cfg == self._shape()
        self.report.add("config: model", "as in the run" if same else str(self.model.cfg), "as in the run", same)

    def codes(self) -> None:
        """Codes one by one; scales exact to the type of the file."""
        assert self.model is not None
        check_codes(self.report, self.canonical, self.model.codes, self.scale_type)

    def read_tokenizer(self) -> None:
        """The tokenizer that the keys describe."""
        assert self.model is not None
        if self.container is Container.i2_s:
            check_text(self.report, tokenizer_from_metadata(self.model.metadata), self.tokenizer, self.held_out)

    def perplexity(self) -> None:
        """Held-out perplexity of what was read against the run's."""
        assert self.model is not None
        other = windows_loss(self.model.decoder(), self.held_out.batches(), self.tokenizer.byte_lengths()).perplexity
        allowed = EMBEDDING_PERPLEXITY[self.cfg.embedding]
        if self.cfg.dtype is ExportDtype.bfloat16:
            allowed = max(allowed, BFLOAT16_PERPLEXITY)
        self._compare("perplexity of what was read", other, allowed)

    def tensors(self) -> None:
        """Types of all tensors, and the bytes of those that are no codes."""
        file = GgufFile(self.path)
        plan = planned_tensors(self.canonical.cfg, self.canonical.spec, self.container, self.cfg)
        wrong_types, wrong, floats = [], [], 0
        for tensor in plan:
            stored = file.tensors.get(tensor.name)
            if stored is None or stored.type != tensor.type.value:
                wrong_types.append(tensor.name)
                continue
            if tensor.type in (GgmlType.tq1_0, GgmlType.tq2_0, GgmlType.i2_s):
                continue
            floats += 1
            values = self.canonical.tensor(tensor.parameter.name)
            if tensor.permuted_heads:
                values = permuted(values, tensor.permuted_heads)
            written = float_data(values, tensor.type).view(np.uint8).reshape(-1)
            if not np.array_equal(file.data(tensor.name, tensor.bytes), written):
                wrong.append(tensor.name)
        for row, found, count in (("types of tensors", wrong_types, len(plan)), ("unquantised tensors", wrong, floats)):
            measured = f"{len(found)} of {count} differ" + (f", {found[0]}" if found else "")
            self.report.add(row, measured, "0 differ", not found)

    def llama_cpp(self) -> None:
        """Token ids, perplexity and a completion by llama.cpp itself."""
        windows = [row.tolist() for batch in self.held_out.batches() for row in batch]
        texts = documents(self.held_out.ids, self.tokenizer)
        answer = ask_llama_cpp(self.path, windows, texts, self.held_out.prompt, SAMPLE_TOKENS)
        self.report.consumer = f"llama-cpp-python {answer['version']}"
        ids = self.tokenizer.encode_batch(texts)
        self.report.add_token_ids(ids, answer["token_ids"])
        self.report.add_started_ids(self.tokenizer.bos_id, ids, answer["started_ids"])
        self.report.add_decoded(texts, answer["back"])
        tokens = sum(len(window) - 1 for window in windows)
        self._compare("held-out perplexity", float(np.exp(min(answer["nats"] / tokens, 700.0))), LLAMA_CPP_PERPLEXITY)
        self.report.sample = answer["completion"]
        new = answer["new_tokens"]
        self.report.add("text generated", f"{new} tokens", "at least 1", new > 0)

    def _compare(self, name: str, other: float, allowed: float) -> None:
        if self._own_perplexity is None:
            # With the scales that the file can hold, which were compared one by one.
            decoder = self.canonical.decoder(scale_of=lambda scale: scale.to(self.scale_type).float())
            lengths = self.tokenizer.byte_lengths()
            self._own_perplexity = windows_loss(decoder, self.held_out.batches(), lengths).perplexity
        self.report.add_perplexity(name, self._own_perplexity, other, len(self.held_out.ids) - 1, allowed, 2)

    def _shape(self) -> DecoderConfig:
        assert self.model is not None
        cfg = self.canonical.cfg
        # How a consumer adds residuals is its own affair.
        return replace(
            cfg,
            residual_dtype=self.model.cfg.residual_dtype,
            rope_theta=as_float32(cfg.rope_theta),
            norm_eps=as_float32(cfg.norm_eps),
        )
