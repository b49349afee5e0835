"""Putting the state of a checkpoint into an optimizer that may be of another kind or have other groups."""

import warnings
from typing import Any

import torch

from bitnet_train.errors import ConfigError


def fit_saved_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """What ``optimizer`` loads in place of ``saved``: its own groups with their settings, and the saved states by name.

    The same run continued has the same groups, and this changes nothing. A fork may have others: its own settings hold
    (PyTorch alone would take betas, momentum and factors from the checkpoint), and a parameter that had another
    algorithm starts without a past, which is said in a warning. For ``register_load_state_dict_pre_hook``. Raises
    ConfigError when the checkpoint does not tell the parameters' names and its groups are not these.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    if not all("param_names" in group for group in groups):
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
            raise ConfigError(
                "The checkpoint does not tell which optimizer states belong to which parameters, and optimizer= groups "
                "them in another way: restore the optimizer's settings."
            )
        groups = [{**group, "param_names": mine["param_names"]} for group, mine in zip(groups, own, strict=True)]
    past = {
        (name, group.get("algorithm", "adamw")): saved["state"][number]
        for group in groups
        for name, number in zip(group["param_names"], group["params"], strict=True)
        if number in saved["state"]
    }
    state, fresh = {}, []
    for group in own:
        for name, number in zip(group["param_names"], group["params"], strict=True):
            if (name, group["algorithm"]) in past:
                state[number] = past[name, group["algorithm"]]
            else:
                fresh.append(name)
    if past and fresh:
        # Not from this line, which says nothing to a user.
        warnings.warn_explicit(
            f"{len(fresh)} parameters, {fresh[0]} the first of them, had another algorithm in the checkpoint: the "
            "optimizer starts without a past there.",
            UserWarning,
            "bitnet_train",
            0,
        )
    return {**saved, "state": state, "param_groups": own}
