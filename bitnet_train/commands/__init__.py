"""One file per command; each function takes the validated configuration and returns an exit code."""

import os
from importlib import import_module

from bitnet_train.config import Config
from bitnet_train.ranks import this_process


def run(cfg: Config) -> int:
    """Run ``cfg.command``; only that command's module is imported."""
    if this_process().world > 1:
        # Before torch is loaded: of a lost connection it would print a page of C++ frames whenever somebody asks.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    module = import_module(f"bitnet_train.commands.{cfg.command.value}")
    code: int = module.run(cfg)
    return code
