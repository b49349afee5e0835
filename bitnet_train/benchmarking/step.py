"""One whole training step of a contender, built from the parts that training is built from, without Lightning.

Lightning adds its hooks, loggers and data loading to every step; they are the same for every contender and are left
out. Everything that computes is in: rates of the step, forward and loss (compiled together as in
``training/module.py``, under autocast as Lightning's precision plugin opens it), backward of every micro-batch, clip
rule, guard, optimizer, refresh of the codes (a hook of the optimizer's), and dropping the gradients.
"""

import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from bitnet_train.benchmarking.contenders import Contender
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.clipping.rules import build_clip
from bitnet_train.training.config import batch_plan
from bitnet_train.training.guard.rule import build_guard
from bitnet_train.training.losses.build import build_loss
from bitnet_train.training.optimizers.build import build_optimizer
from bitnet_train.training.regularisers.penalties import build_regulariser
from bitnet_train.training.step import clip_gradients, next_token_loss, set_step_rates

_NUMBERS = itertools.count()


@contextmanager
def training_mode(device: str) -> Iterator[None]:
    """PyTorch's global settings as ``training/run.py`` has them: deterministic on a CPU, without debugging fills."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(device == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class TrainingStep:
    """A contender that is ready to train: :meth:`run` does one optimizer step on random token ids."""

    def __init__(self, contender: Contender) -> None:
        cfg = contender.cfg
        self.contender = contender
        self.device = torch.device(contender.device)
        self.plan = batch_plan(cfg.trainer, cfg.text.sequence_length)
        self.decoder = contender.decoder().to(self.device)
        self.optimizer = build_optimizer(cfg.optimizer, self.decoder)
        self.clip = build_clip(cfg.clip, cfg.trainer.max_steps).to(self.device)
        guard = build_guard(cfg.guard)
        self.guard = None if guard is None else guard.to(self.device)
        self.cache = CodeCache(self.decoder, self.optimizer)
        self.regulariser = build_regulariser(
            cfg.regulariser, self.decoder, build_spec(cfg.quant), cfg.trainer.max_steps
        )
        self._compute = self._batch_loss()

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.plan.batch_sequences * self.contender.cfg.text.sequence_length

    def batches(self, step: int) -> list[Tensor]:
        """The micro-batches of a step, each (micro-batch, sequence length + 1); the same for every contender."""
        cfg = self.contender.cfg
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        shape = (self.plan.micro_batch, cfg.text.sequence_length + 1)
        count = self.plan.accumulation
        return [torch.randint(cfg.decoder.vocab, shape, generator=generator).to(self.device) for _ in range(count)]

    def run(self, step: int, batches: list[Tensor]) -> Tensor:
        """One optimizer step; the mean loss of its micro-batches, left on the device."""
        cfg = self.contender.cfg
        losses = []
        self.optimizer.zero_grad()
        for batch in batches:
            with self._autocast():
                loss = self._compute(batch)
            losses.append(loss.detach())
            (loss / self.plan.accumulation).backward()
        step = min(step, cfg.trainer.max_steps - 1)
        set_step_rates(self.optimizer, cfg, step)
        if self.regulariser is not None:
            self.regulariser.add_gradients(step)
        mean = torch.stack(losses).mean()
        clip_gradients(self.decoder, self.clip, self.guard, self.optimizer, mean, step)
        self.optimizer.step()
        return mean

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.contender.precision == "bf16-mixed":
            # As Lightning's MixedPrecision does.
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def _batch_loss(self) -> Callable[[Tensor], Tensor]:
        cfg, decoder = self.contender.cfg, self.decoder
        loss = build_loss(cfg.loss, cfg.decoder)
        bos = 0 if cfg.text.attend_within_documents else None

        def batch_loss(ids: Tensor) -> Tensor:
            return next_token_loss(decoder, loss, ids, bos).total

        return compiled_alone(batch_loss, self.contender.name) if self.contender.compiled else batch_loss


def compiled_alone(function: types.FunctionType | Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """``torch.compile(function)`` as in a process of its own.

    torch.compile keeps what it compiled, how often it had to and which sizes have changed with the code object. Several
    contenders that share one would run into its limit, test each other's guards in every step and turn sizes that
    differ between them into dynamic ones (which it remembers by file, line and name). So each gets a code object and a
    name of its own.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_of_{name}_{next(_NUMBERS)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    compiled: Callable[..., Tensor] = torch.compile(own)
    return compiled
