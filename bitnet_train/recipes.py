"""Finds conf/ and recipes/ (checkout or wheel) and registers schema, variants and recipes with Hydra."""

from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from bitnet_train.config import VARIANTS, Config
from bitnet_train.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def config_folder(name: str) -> Path:
    """``conf`` or ``recipes``: the checkout's at its top, or the copy that the wheel carries."""
    for folder in (PACKAGE.parent / name, PACKAGE / "_configs" / name):
        if folder.is_dir() and (PACKAGE.parent / "pyproject.toml").is_file() | ("_configs" in folder.parts):
            return folder
    raise ConfigError(f"The installation lacks its '{name}' folder: install bitnet-train again.")


def register(user_folder: Path | None) -> list[str]:
    """Register everything with Hydra's ConfigStore; the names of all recipes, the user's included.

    Recipes are flat YAML files. A user's own lie in ``--config-dir DIR``: ``DIR/NAME.yaml`` or ``DIR/recipes/NAME.yaml``,
    and stand before built-in ones of the same name. (Hydra's own ``DIR/recipe/NAME.yaml`` works as well.)
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for key, options in VARIANTS.items():
        for name, node in options.items():
            store.store(group=key.replace(".", "/"), name=name, node=node)
    names = _store_recipes(store, config_folder("recipes"))
    if user_folder is not None:
        for folder in (user_folder, user_folder / "recipes"):
            names += _store_recipes(store, folder)
        names += [path.stem for path in sorted((user_folder / "recipe").glob("*.yaml"))]
    return sorted(set(names))


def _store_recipes(store: ConfigStore, folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            node = OmegaConf.load(path)
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"The recipe {path} is not readable YAML: {reason}") from None
        if not OmegaConf.is_dict(node):
            raise ConfigError(f"The recipe {path} holds no settings: it must be a YAML mapping.")
        store.store(group="recipe", name=path.stem, node=node, package="_global_")
        names.append(path.stem)
    return names
