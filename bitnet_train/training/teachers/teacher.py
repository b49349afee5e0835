"""Frozen models that a student learns from: a run's decoder, or a causal language model of ``transformers``.

A teacher is no part of the Lightning module: its weights are in no checkpoint and no optimizer, and it stays in eval
mode. It hands over final states and its head, so that its logits are made chunk by chunk where the student's are.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.data.windows import document_numbers
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import open_checkpoint
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.collector import Collector, Projections
from bitnet_train.nn.decoder import Decoder
from bitnet_train.training.config import RunConfig
from bitnet_train.training.losses.parts import Taught
from bitnet_train.training.teachers.source import (
    RunSource,
    TeacherBlocks,
    TransformersSource,
    check_tokenizer,
    find_teacher,
    import_transformers,
    teacher_blocks,
)

KEY = "loss.teacher"


class Teacher(ABC):
    """A frozen model that is asked about every batch.

    ``identity`` tells it from another teacher, for provenance.json and the checkpoints; ``description`` is for the
    start-up line. ``compilable`` says whether ``torch.compile`` gains anything.
    """

    compilable = False

    def __init__(self, identity: dict[str, Any], description: str, blocks: TeacherBlocks) -> None:
        self.identity, self.description, self.blocks = identity, description, blocks

    @torch.no_grad()
    def __call__(self, inputs: Tensor, bos_id: int | None) -> Taught:
        """What it says about ids (batch, tokens); with ``bos_id``, which begins documents, each is read on its own."""
        return self.teach(inputs, None if bos_id is None else document_numbers(inputs, bos_id))

    @abstractmethod
    def teach(self, inputs: Tensor, documents: Tensor | None) -> Taught:
        """As above, with the documents' numbers (batch, tokens)."""


class RunTeacher(Teacher):
    """A decoder that this package trained."""

    compilable = True

    def __init__(self, decoder: Decoder, blocks: TeacherBlocks, identity: dict[str, Any], description: str) -> None:
        super().__init__(identity, description, blocks)
        self.decoder = decoder.eval().requires_grad_(False)

    def teach(self, inputs: Tensor, documents: Tensor | None) -> Taught:
        collector = Collector(frozenset(self.blocks.hidden.values()), frozenset(self.blocks.relations.values()))
        states = self.decoder.hidden_states(inputs, documents, collector=collector)
        return Taught(
            states,
            self.decoder.head_weight,
            {ours: collector.streams[theirs] for ours, theirs in self.blocks.hidden.items()},
            {ours: collector.projections[theirs] for ours, theirs in self.blocks.relations.items()},
        )


class TransformersTeacher(Teacher):
    """A model of ``transformers``: what is between its blocks is caught with forward hooks."""

    def __init__(self, model: Any, blocks: TeacherBlocks, identity: dict[str, Any], description: str) -> None:
        super().__init__(identity, description, blocks)
        self.model = model.eval().requires_grad_(False)
        self.body = model.get_decoder()
        self.head: nn.Module = model.get_output_embeddings()
        self._caught: dict[tuple[int, str], Tensor] = {}
        modules: Any = self._blocks() if blocks.hidden or blocks.relations else []
        for number in set(blocks.hidden.values()):
            self._catch(modules[number], number, "stream")
        for number in set(blocks.relations.values()):
            for part in "qkv":
                projection = getattr(getattr(modules[number], "self_attn", None), f"{part}_proj", None)
                if projection is None:
                    raise ConfigError(
                        f"{KEY}: blocks of {type(model).__name__} have no self_attn.{part}_proj, which loss.relations "
                        "compares: set loss.relations=0."
                    )
                self._catch(projection, number, part)

    def teach(self, inputs: Tensor, documents: Tensor | None) -> Taught:
        mask = None
        if documents is not None:
            tokens = inputs.shape[1]
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=inputs.device).tril()
            mask = (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]
        states = self.body(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        found, self._caught = self._caught, {}
        return Taught(
            states,
            self.head.weight,  # type: ignore[arg-type]
            {ours: found[theirs, "stream"] for ours, theirs in self.blocks.hidden.items()},
            {
                ours: Projections(found[theirs, "q"], found[theirs, "k"], found[theirs, "v"])
                for ours, theirs in self.blocks.relations.items()
            },
        )

    @torch.no_grad()
    def check_logits(self, vocab: int) -> None:
        """Raises ConfigError when the model's logits are not its head times its final states: they could not be made
        chunk by chunk."""
        ids = torch.arange(8, device=self.head.weight.device)[None] % vocab  # type: ignore[arg-type]
        whole = self.model(input_ids=ids, use_cache=False).logits
        taught = self.teach(ids, None)
        ours = F.linear(taught.states, taught.head_weight)
        if ours.shape != whole.shape or not torch.allclose(ours.float(), whole.float(), rtol=1e-5, atol=1e-5):
            raise ConfigError(
                f"{KEY}: the logits of {type(self.model).__name__} are not its output embedding times its final states "
                "(a bias, a scale or a soft cap comes after), which is not supported: choose another teacher."
            )

    def _blocks(self) -> nn.ModuleList:
        wanted = self.model.config.get_text_config().num_hidden_layers
        for module in self.body.children():
            if isinstance(module, nn.ModuleList) and len(module) == wanted:
                return module
        raise ConfigError(
            f"{KEY}: the blocks of {type(self.model).__name__} are not found: set loss.hidden=0 loss.relations=0."
        )

    def _catch(self, module: nn.Module, number: int, name: str) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._caught[number, name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)


def load_teacher(
    cfg: RunConfig, device: str, precision: str, backend: Backend | None, tokenizer: TextTokenizer
) -> Teacher | None:
    """The teacher of a configuration on ``device``, in the run's ``precision``, or None when its loss has none.

    ``tokenizer`` is the student's, ``backend`` computes the teacher's quantised layers. Raises ConfigError when it is
    missing, does not fit the student, or means other words by the same ids.
    """
    source = find_teacher(cfg)
    if source is None:
        return None
    check_tokenizer(source, tokenizer)
    blocks = teacher_blocks(cfg, source.shape)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    if isinstance(source, RunSource):
        return _run_teacher(source, blocks, device, dtype, backend)
    return _transformers_teacher(source, blocks, device, dtype)


def _run_teacher(
    source: RunSource, blocks: TeacherBlocks, device: str, dtype: torch.dtype, backend: Backend | None
) -> Teacher:
    canonical = open_checkpoint(source.checkpoint, source.cfg, source.spec, source.spec_after)
    decoder = canonical.decoder(device, backend)
    for layer in decoder.layers.modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer, BitLinear):
            # Autocast would convert them in every pass, to the same numbers.
            layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    identity = {"source": source.name, "kind": "run", "step": canonical.step, "config_sha256": source.digest}
    return RunTeacher(decoder, blocks, identity, f"step {canonical.step} of {source.folder}")


def _transformers_teacher(
    source: TransformersSource, blocks: TeacherBlocks, device: str, dtype: torch.dtype
) -> Teacher:
    transformers = import_transformers(source.name)
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.name, config=source.config, dtype=dtype, trust_remote_code=False
        )
    except Exception as error:  # whatever a damaged or foreign checkpoint makes transformers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{KEY}={source.name} cannot be loaded with transformers ({reason}).") from None
    finally:
        if bars:
            transformers.logging.enable_progress_bar()
    identity = {"source": source.name, "kind": "transformers", "step": None, "config_sha256": source.digest}
    teacher = TransformersTeacher(model.to(device), blocks, identity, f"{type(model).__name__} {source.name}")
    teacher.check_logits(source.shape.vocab)
    return teacher
