"""Composes configurations as the command line does, without running anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from bitnet_train.config import Config
from bitnet_train.recipes import config_folder, register, settle
from bitnet_train.validation import to_config

CATALOGUE = register(None)
RECIPES = CATALOGUE.recipes
# What recipes ask for that start from a model.
NEEDED = {
    "finetune": ("init.from=x",),
    "distill_continue": ("init.from=x",),
    "sft": ("init.from=x",),
    "distill": ("init.from=x", "loss.teacher=x"),
}


def choosing(recipe: str) -> tuple[str, ...]:
    """The overrides that choose ``recipe``, with what it needs."""
    return (f"+recipe={recipe}", *NEEDED.get(recipe, ()))


def compose_node(*overrides: str) -> DictConfig:
    """What Hydra composes from these overrides, before it is validated."""
    settle(CATALOGUE, {key.lstrip("+"): value for key, _, value in (line.partition("=") for line in overrides)})
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder("conf"))):
        return compose("config", overrides=list(overrides))


def compose_config(*overrides: str) -> Config:
    """The validated configuration of these overrides."""
    return to_config(compose_node(*overrides))


@contextmanager
def fresh_recipes() -> Iterator[None]:
    """Whatever recipes are registered inside are forgotten afterwards (Hydra's store is one per process)."""
    store = ConfigStore.instance()
    before = dict(store.repo["recipe"])
    try:
        yield
    finally:
        store.repo["recipe"] = before


def write(folder: Path, **files: str) -> Path:
    """Write ``name="text"`` as ``folder/name.yaml``; ``a__b`` is ``folder/a/b.yaml``."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
