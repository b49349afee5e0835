"""One file per command; each function takes the validated configuration and returns an exit code."""

from importlib import import_module

from bitnet_train.config import Config


def run(cfg: Config) -> int:
    """Run ``cfg.command``; only that command's module is imported."""
    module = import_module(f"bitnet_train.commands.{cfg.command.value}")
    code: int = module.run(cfg)
    return code
