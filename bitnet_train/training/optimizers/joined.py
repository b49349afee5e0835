"""Several optimizers, each for some of the parameters, that look like one to Lightning, hooks and checkpoints."""

from collections.abc import Callable
from typing import Any

import torch


class JoinedOptimizer(torch.optim.Optimizer):
    """Steps its parts one after the other.

    The groups are those of the parts, and the state is one dictionary that the parts write into, so that a state dict
    is that of a single optimizer. Step hooks run once around all parts.

    Args:
        parts: ready optimizers by name; each group says in ``algorithm`` which part it belongs to. They are used
            through this object alone from now on.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self._parts = parts
        self._joining = True
        super().__init__([group for part in parts.values() for group in part.param_groups], {})
        self._joining = False
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part; ``closure`` computes the gradients before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the part that its ``algorithm`` names. Raises ValueError when there is none."""
        if not self._joining:
            name = param_group.get("algorithm")
            if name not in self._parts:
                raise ValueError(f"a group's algorithm must be one of {', '.join(self._parts)}, not {name}")
            self._parts[name].add_param_group(param_group)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts, "_joining": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Give the parts their groups and the one state: loading replaces both."""
        for name, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["algorithm"] == name]
            part.state = self.state
