"""AdamW with moments of 8 bits, torchao's, as one of our optimizers."""

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.training.optimizers.config import AdamW8bitConfig


def build_adamw_8bit(groups: list[dict[str, Any]], cfg: AdamW8bitConfig) -> torch.optim.Optimizer:
    """torchao's ``AdamW8bit``: block-wise 8-bit moments (Dettmers et al., arXiv 2110.02861), arithmetic in float32.

    Its update is compiled by ``torch.compile`` for each shape of parameter in the first step, with the weight decay as
    a constant. Here the decay is a step of its own before it, ``p * (1 - lr * weight_decay)``, which is the same
    (arXiv 1711.05101) and lets a schedule change it without compiling anew. A state dict holds plain tensors, so that
    checkpoints are read without torchao.

    Raises ConfigError when there is no C++ compiler for it on a CPU.
    """
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

    on_cpu = any(p.device.type == "cpu" for group in groups for _, p in group["params"])
    if on_cpu and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ConfigError("optimizer=adamw_8bit compiles its update, and there is no C++ compiler here: install g++.")

    class EightBitAdamW(AdamW8bit):
        """Takes its rates as numbers, and a weight decay that may change."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:  # which may set the rates of this step
                with torch.enable_grad():
                    loss = closure()
            given = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
            try:
                for group, (lr, decay) in zip(self.param_groups, given, strict=True):
                    kept = [p for p in group["params"] if p.grad is not None]
                    if decay and kept:
                        with torch.no_grad():
                            torch._foreach_mul_(kept, 1.0 - float(lr) * decay)
                    group["lr"], group["weight_decay"] = torch.tensor(float(lr)), 0.0
                super().step()
            finally:
                for group, (lr, decay) in zip(self.param_groups, given, strict=True):
                    group["lr"], group["weight_decay"] = lr, decay
            return loss

    def to_plain(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {n: _each(state, plain) for n, state in state_dict["state"].items()}}

    def from_plain(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {n: _each(state, quantised) for n, state in state_dict["state"].items()}}

    def plain(value: Any) -> Any:
        if not isinstance(value, OptimState8bit):
            return value
        return {"codes": value.codes, "scale": value.scale, "signed": value.signed}

    def quantised(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        table = torch.tensor(get_qmap_signed() if value["signed"] else get_qmap_unsigned())
        codes: Tensor = value["codes"]
        state = OptimState8bit(codes, value["scale"], table.to(codes.device), value["signed"], dtype=torch.float32)
        if state.block_size == cfg.block_size:
            return state
        # A fork with other blocks.
        moment = state.dequantize()
        if codes.numel() % cfg.block_size:
            return moment
        other = OptimState8bit.zeros(codes.shape, value["signed"], cfg.block_size, codes.device, torch.float32)
        return other.copy_(moment)

    optimizer = EightBitAdamW(
        groups,
        lr=cfg.lr,
        betas=(cfg.betas[0], cfg.betas[1]),
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        block_size=cfg.block_size,
    )
    optimizer.register_state_dict_post_hook(to_plain)
    optimizer.register_load_state_dict_pre_hook(from_plain)
    return optimizer


def _each(state: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: change(value) for key, value in state.items()}
