"""The Lightning module: the decoder, its loss, its optimizer, and what happens once per optimizer step."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.decoder import Decoder
from bitnet_train.training.clipping.rules import ClipResult, build_clip
from bitnet_train.training.config import RunConfig, batch_plan
from bitnet_train.training.guard.rule import build_guard
from bitnet_train.training.losses.cross_entropy import build_loss
from bitnet_train.training.optimizers.build import build_optimizer
from bitnet_train.training.step import clip_gradients, next_token_loss, set_step_rates


class PretrainingModule(L.LightningModule):
    """Next-token training of a decoder.

    Learning rate and weight decay are set from the step before each update; the codes are refreshed by the optimizer's
    step hook. ``step_loss`` and ``clip_result`` hold the last step's figures as tensors, for the callbacks.
    """

    def __init__(self, cfg: RunConfig, decoder: Decoder, bos_id: int, compiled: bool) -> None:
        super().__init__()
        self.cfg = cfg
        self.decoder = decoder
        self.guard = build_guard(cfg.guard)
        self.clip_rule = build_clip(cfg.clip, cfg.trainer.max_steps)
        self.bos_id = bos_id if cfg.data.attend_within_documents else None
        self.loss = build_loss(cfg.loss)
        self.step_loss: Tensor | None = None
        self.clip_result: ClipResult | None = None
        self.code_cache: CodeCache | None = None
        self._losses: list[Tensor] = []
        self._compute: Callable[[Tensor], Tensor] = torch.compile(self._batch_loss) if compiled else self._batch_loss

    def _batch_loss(self, ids: Tensor) -> Tensor:
        return next_token_loss(self.decoder, self.loss, ids, self.bos_id)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._compute(batch)
        self._losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.cfg.optimizer, self.decoder)

    def on_fit_start(self) -> None:
        # Here the weights are on their device and the optimizer exists.
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.code_cache = CodeCache(self.decoder, optimizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit what Lightning is about to restore to this run's accumulation, clip rule and guard.

        Lightning closes a step when its count of micro-batches divides by the accumulation, so the count of a run that
        is continued with another ``trainer.micro_batch`` must be put into the new unit. A fork may have another clip
        rule or guard, which starts without a past.
        """
        plan = batch_plan(self.cfg.trainer, self.cfg.data.sequence_length)
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

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Called once per optimizer step, after accumulation: rates for this step, the clip rule, then the guard."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        set_step_rates(optimizer, self.cfg, self.global_step)
        loss = self.step_loss = torch.stack(self._losses).mean()
        self._losses = []
        self.clip_result = clip_gradients(self.decoder, self.clip_rule, self.guard, optimizer, loss, self.global_step)
