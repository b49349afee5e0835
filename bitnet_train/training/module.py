"""The Lightning modules: a model, its loss, its optimizer, and what happens once per optimizer step."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bitnet_train.data.mixture import chats
from bitnet_train.data.windows import document_numbers, inputs_and_targets
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.sharded_codes import ShardedCodeCache
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.clipping.rules import ClipResult, build_clip
from bitnet_train.training.config import RunConfig, step_plan
from bitnet_train.training.distributed import group
from bitnet_train.training.distributed.sharding import finish_gradients, is_sharded, shard_network
from bitnet_train.training.guard.rule import build_guard
from bitnet_train.training.losses.build import build_loss
from bitnet_train.training.losses.config import CrossEntropyLoss, Reduction
from bitnet_train.training.losses.parts import LossParts, Taught
from bitnet_train.training.losses.shares import share_of_targets
from bitnet_train.training.optimizers.build import build_optimizer
from bitnet_train.training.regularisers.penalties import build_regulariser
from bitnet_train.training.step import clip_gradients, next_token_loss, set_step_rates
from bitnet_train.training.teachers.resume import TEACHER
from bitnet_train.training.teachers.teacher import Teacher


class TrainingModule(L.LightningModule):
    """Base of the training of a model: all but the model and the loss of a batch.

    Learning rate and weight decay are set from the step before each update; the codes are refreshed by the optimizer's
    step hook. ``step_loss`` (the cross-entropy), ``step_parts`` (what else is minimised, by the names of its columns;
    empty without) and ``clip_result`` hold the last step's figures as tensors, for the callbacks.
    """

    # The attribute that holds the model; its weights begin with it in checkpoints.
    NETWORK = ""

    def __init__(self, cfg: RunConfig, network: nn.Module, compiled: bool) -> None:
        super().__init__()
        self.cfg = cfg
        setattr(self, self.NETWORK, network)
        self.guard = build_guard(cfg.guard)
        self.clip_rule = build_clip(cfg.clip, cfg.trainer.max_steps)
        self.regulariser = build_regulariser(cfg.regulariser, network, build_spec(cfg.quant), cfg.trainer.max_steps)
        # A sum over the samples of a step: Lightning divides the loss of each micro-batch by their number, and the
        # gradients are averaged over the processes.
        self._micro_batches: int | None = None
        if isinstance(cfg.loss, CrossEntropyLoss) and cfg.loss.reduction is Reduction.sum:
            rehearsed = isinstance(cfg.trainer.micro_batch, str)
            self._micro_batches = 1 if rehearsed else step_plan(cfg).pieces
        self.step_loss: Tensor | None = None
        self.step_parts: dict[str, Tensor] = {}
        self.clip_result: ClipResult | None = None
        # The first step (from 1) of this process that was applied though its loss or norm was not finite; -1: none.
        self.first_bad: Tensor | None = None
        self.code_cache: CodeCache | None = None
        self._parts: list[LossParts] = []
        # What a micro-batch counts for among those of its step, here and in other processes; None: all the same.
        self._weigh: Callable[[Any], Tensor] | None = None
        self._weights: list[Tensor] = []
        # A graph for each size of a batch warm-up: one for changing sizes would compute otherwise in a continued run.
        dynamic = False if cfg.trainer.batch_warmup else None
        self._compute: Callable[..., LossParts] = (
            torch.compile(self.batch_loss, dynamic=dynamic) if compiled else self.batch_loss
        )

    @property
    def network(self) -> nn.Module:
        """The model that is trained."""
        network = getattr(self, self.NETWORK)
        assert isinstance(network, nn.Module)
        return network

    def batch_loss(self, *batch: Any) -> LossParts:
        """The loss of what :meth:`prepared` gives, and its parts, not compiled."""
        raise NotImplementedError

    def prepared(self, batch: Any) -> tuple[Any, ...]:
        """The arguments of :meth:`batch_loss` for a micro-batch."""
        return (batch,)

    def probe(self, batch: Any) -> None:
        """A forward pass of the first sample of a micro-batch, for those who watch the layers."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = self._compute(*self.prepared(batch))
        if self._weigh is not None:
            self._weights.append(self._weigh(batch))
            total = None if self._micro_batches is None else parts.total
            parts = parts.times(self._weights[-1])
            # A sum counts every token the same as it is.
            parts = parts if total is None else parts._replace(total=total)
        self._parts.append(parts.detached())
        return parts.total if self._micro_batches is None else parts.total * self._micro_batches

    def configure_model(self) -> None:
        """Shard the weights where the strategy has a mesh of devices to shard them over."""
        if self._device_mesh is not None and not is_sharded(self.network):
            shard_network(self.network, self._device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.cfg.optimizer, self.network)

    def on_fit_start(self) -> None:
        # Here the weights are on their device and the optimizer exists.
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.code_cache = (ShardedCodeCache if is_sharded(self.network) else CodeCache)(self.network, optimizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit what Lightning is about to restore to this run's accumulation, clip rule and guard.

        Lightning closes a step when its count of micro-batches divides by the accumulation, so the count of a run that
        is continued with another ``trainer.micro_batch`` must be put into the new unit. A fork may have another clip
        rule or guard, which starts without a past.
        """
        plan = step_plan(self.cfg)
        batches = checkpoint["global_step"] * plan.accumulation
        for progress in ("total", "current"):
            counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"][progress]
            # Saved at the end of a batch, before Lightning counts it as completed.
            counts |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
        state = checkpoint["state_dict"]
        for part, module in (("clip_rule", self.clip_rule), ("guard", self.guard)):
            own = {f"{part}.{name}": value for name, value in module.state_dict().items()} if module is not None else {}
            saved = {name: value.shape for name, value in state.items() if name.startswith(f"{part}.")}
            if saved != {name: value.shape for name, value in own.items()}:
                for name in saved:
                    del state[name]
                state |= own

    def on_after_backward(self) -> None:
        finish_gradients(self.network)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Called once per optimizer step, after accumulation: rates for this step, regulariser, clip rule, guard."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        set_step_rates(optimizer, self.cfg, self.global_step)
        self._divide_by_weights()
        penalty = None if self.regulariser is None else self.regulariser.add_gradients(self.global_step)
        loss = self.step_loss = group.mean(torch.stack([parts.cross_entropy for parts in self._parts]).mean())
        self.clip_result = clip_gradients(self.network, self.clip_rule, self.guard, optimizer, loss, self.global_step)
        self._note_bad(loss, self.clip_result.norm)
        self.step_parts = self._other_parts(penalty)
        self._parts = []

    @torch.no_grad()
    def _divide_by_weights(self) -> None:
        """Make the weighted sums of the step, gradients and losses, weighted means; nothing to learn leaves zeros."""
        if not self._weights:
            return
        whole = group.mean(torch.stack(self._weights).mean())
        factor = torch.where(whole > 0, 1 / whole, torch.zeros_like(whole))
        parts = [parts.times(factor) for parts in self._parts]
        if self._micro_batches is None:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
        else:  # a sum
            parts = [new._replace(total=old.total) for new, old in zip(parts, self._parts, strict=True)]
        self._parts, self._weights = parts, []

    @torch.no_grad()
    def _note_bad(self, loss: Tensor, norm: Tensor) -> None:
        """Remember the first bad step, on the device, which nobody waits for: steps between log lines count too."""
        if self.first_bad is None:
            self.first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) & (self.first_bad < 0)
        if self.guard is not None:
            bad = bad & (self.guard.in_a_row == 0)  # else it was skipped
        self.first_bad = torch.where(bad, self.global_step + 1, self.first_bad)

    def _other_parts(self, penalty: Tensor | None) -> dict[str, Tensor]:
        """The step's total and its parts beside the cross-entropy, with their weights; nothing when there are none."""
        found = {
            "loss/z": [parts.z for parts in self._parts if parts.z is not None],
            "loss/distillation": [parts.distillation for parts in self._parts if parts.distillation is not None],
        }
        means = {name: group.mean(torch.stack(values).mean()) for name, values in found.items() if values}
        if penalty is not None:
            means["loss/regulariser"] = penalty
        if not means and self._micro_batches is None:
            return {}
        totals = torch.stack([parts.total for parts in self._parts])
        total = group.mean(totals.mean() if self._micro_batches is None else totals.sum() * group.world())
        return {"loss/total": total if penalty is None else total + penalty, **means}


class PretrainingModule(TrainingModule):
    """Next-token training of a decoder. A ``teacher`` is used and not owned."""

    NETWORK = "decoder"
    decoder: Decoder

    def __init__(
        self, cfg: RunConfig, decoder: Decoder, bos_id: int, compiled: bool, teacher: Teacher | None = None
    ) -> None:
        super().__init__(cfg, decoder, compiled)
        self.bos_id = bos_id if cfg.text.attend_within_documents else None
        self.loss = build_loss(cfg.loss, cfg.decoder)
        self.teacher = teacher
        whole = group.world() == 1 and cfg.trainer.micro_batch is None
        if chats(cfg.text.corpus) and not whole:
            self._weigh = share_of_targets
        self._teach = (
            torch.compile(teacher.__call__) if compiled and teacher is not None and teacher.compilable else teacher
        )

    def prepared(self, batch: Tensor) -> tuple[Tensor, Taught | None]:
        return batch, None if self._teach is None else self._teach(inputs_and_targets(batch)[0], self.bos_id)

    def batch_loss(self, ids: Tensor, taught: Taught | None = None) -> LossParts:
        """The loss of a micro-batch ids (batch, tokens + 1) and its parts, not compiled."""
        return next_token_loss(self.decoder, self.loss, ids, self.bos_id, taught)

    def forward(self, ids: Tensor) -> Tensor:
        """Final states (batch, tokens, hidden) of a micro-batch, as :func:`next_token_loss` takes it."""
        inputs, _ = inputs_and_targets(ids)
        documents = None if self.bos_id is None else document_numbers(inputs, self.bos_id)
        return self.decoder.hidden_states(inputs, documents)

    def probe(self, batch: Tensor) -> None:
        self(batch[:1])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The teacher's weights are not saved; which one it is tells a continued run that it has the same."""
        if self.teacher is not None:
            checkpoint[TEACHER] = self.teacher.identity
