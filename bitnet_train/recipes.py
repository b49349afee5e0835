"""Finds conf/ and recipes/ (checkout or wheel) and registers schema, variants and recipes with Hydra."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from bitnet_train.config import KINDS, VARIANTS, Config
from bitnet_train.errors import ConfigError, did_you_mean
from bitnet_train.ladders import read_ladder
from bitnet_train.trust import check_folder

PACKAGE = Path(__file__).resolve().parent


@dataclass
class Catalogue:
    """What can be chosen, for messages and for ``--help``."""

    # Config group ("model", "data/corpus", "recipe", ...) -> the options it has.
    options: dict[str, list[str]] = field(default_factory=dict)
    # "group/option" -> the YAML file it was read from (variants that are dataclasses have none).
    files: dict[str, Path] = field(default_factory=dict)
    # Recipe -> what its file holds.
    recipe_nodes: dict[str, DictConfig] = field(default_factory=dict)
    # Ladder -> its sizes; recipe LADDER_SIZE is one of the recipes.
    ladders: dict[str, list[str]] = field(default_factory=dict)
    # Recipe -> why its file cannot be read. Said only to someone who chooses it.
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def recipes(self) -> list[str]:
        """Names of all recipes, the user's included."""
        return self.options["recipe"]

    def add(self, group: str, name: str, file: Path | None = None) -> None:
        """Note an option; one that is added later stands before an earlier one of the same name."""
        self.options[group] = sorted({*self.options.get(group, []), name})
        if file is not None:
            self.files[f"{group}/{name}"] = file
            self.broken.pop(name, None)


def config_folder(name: str) -> Path:
    """``conf`` or ``recipes``: the checkout's at its top, or the copy that the wheel carries."""
    for folder in (PACKAGE.parent / name, PACKAGE / "_configs" / name):
        if folder.is_dir() and (PACKAGE.parent / "pyproject.toml").is_file() | ("_configs" in folder.parts):
            return folder
    raise ConfigError(f"The installation lacks its '{name}' folder: install bitnet-train again.")


def schema(kinds: dict[str, str] | None = None) -> DictConfig:
    """The typed configuration with its variants still open: the config groups choose their dataclasses.

    ``kinds`` are those of ``model`` and ``data``, whose options are files and bring no dataclass; the first by default.
    """
    node = OmegaConf.structured(Config)
    for key, name in (kinds or {}).items():
        OmegaConf.update(node, key, OmegaConf.structured(KINDS[key][name]), merge=False)
    for key in VARIANTS:
        if "." not in key or OmegaConf.select(node, key) is not None:
            OmegaConf.update(node, key, "???")
    return node


def register(user_folder: Path | None) -> Catalogue:
    """Register everything with Hydra's ConfigStore; what can be chosen.

    Recipes are flat YAML files. A user's own lie in ``--config-dir DIR``, as ``DIR/NAME.yaml`` or
    ``DIR/recipes/NAME.yaml``, and stand before built-in ones of the same name; Hydra's own ``DIR/recipe/NAME.yaml``
    works as well, and so do further options of the other groups, ``DIR/model/NAME.yaml``. Raises ConfigError for a
    folder that cannot be one.
    """
    catalogue = Catalogue()
    store = ConfigStore.instance()
    store.store(name="schema", node=schema())
    for key, options in VARIANTS.items():
        for name, node in options.items():
            store.store(group=key.replace(".", "/"), name=name, node=node)
            catalogue.add(key.replace(".", "/"), name)
    _note_files(catalogue, config_folder("conf"))
    _store_recipes(catalogue, store, config_folder("recipes"))
    for path in sorted((config_folder("recipes") / "ladders").glob("*.yaml")):
        ladder = read_ladder(path)
        catalogue.ladders[path.stem] = [name.removeprefix(f"{path.stem}_") for name in ladder]
        for name, node in ladder.items():
            catalogue.add("recipe", name, path)
            catalogue.recipe_nodes[name] = node
            store.store(group="recipe", name=name, node=node, package="_global_")
    if user_folder is not None:
        if not user_folder.is_dir():
            raise ConfigError(f"--config-dir {user_folder} is not a folder.")
        if (user_folder / "config.yaml").is_file():
            # Hydra would read it in place of conf/config.yaml.
            primary = user_folder / "config.yaml"
            raise ConfigError(f"{primary} would replace the whole configuration: give it another name.")
        check_folder(user_folder)
        _note_files(catalogue, user_folder)
        for folder in (user_folder, user_folder / "recipes"):
            _store_recipes(catalogue, store, folder)
        for path in sorted((user_folder / "recipe").glob("*.yaml")):
            _read_recipe(catalogue, path)
            # Hydra reads these by itself, and takes a stored one of the same name for a schema.
            store.repo["recipe"].pop(path.name, None)
    return catalogue


def _note_files(catalogue: Catalogue, folder: Path) -> None:
    """The options in ``folder``'s group folders, which Hydra reads by itself."""
    known = {"quant", "sweep", *KINDS, *(key.replace(".", "/") for key in VARIANTS)}
    for group in sorted(known):
        for path in sorted((folder / group).glob("*.yaml")):
            catalogue.add(group, path.stem, path)


def _store_recipes(catalogue: Catalogue, store: ConfigStore, folder: Path) -> None:
    for path in sorted(folder.glob("*.yaml")):
        if _read_recipe(catalogue, path):
            store.store(group="recipe", name=path.stem, node=catalogue.recipe_nodes[path.stem], package="_global_")


def _read_recipe(catalogue: Catalogue, path: Path) -> bool:
    """Note the recipe in ``path``; False, with the reason in the catalogue, when there are no settings in it."""
    catalogue.add("recipe", path.stem, path)
    catalogue.recipe_nodes.pop(path.stem, None)
    try:
        node = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        catalogue.broken[path.stem] = f"The recipe {path} is not readable YAML: {yaml_reason(error)}."
        return False
    if not isinstance(node, DictConfig) or not node:
        catalogue.broken[path.stem] = f"The recipe {path} holds no settings: it must be a mapping, such as 'seed: 2'."
        return False
    catalogue.recipe_nodes[path.stem] = node
    return True


def read_sweep(path: Path) -> list[str]:
    """The overrides of a sweep file, a list of ``key=value,value`` lines. Raises ConfigError when it is none."""
    try:
        lines = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The sweep {path} is not readable YAML: {yaml_reason(error)}.") from None
    if not isinstance(lines, list) or not all(isinstance(line, str) and "=" in line for line in lines):
        raise ConfigError(f"The sweep {path} must be a list of key=value,value lines.")
    return lines


def settle(catalogue: Catalogue, given: dict[str, str], kinds: dict[str, str] | None = None) -> None:
    """Let the choices in ``given`` (the command line's: group -> option) and of outer recipes win over inner ones.

    ``+recipe=2b4t schedule=linear`` would otherwise meet the recipe's ``schedule.stages``, which linear does not have.
    What a recipe sets for its own variant and the chosen one does not know is left out; everything else stays, so that
    a rate that both know is kept and a typo is an error. (Recipes in Hydra's own style are merged as they are.)
    ``kinds`` are those of the jobs of a sweep whose choices are not in ``given``.
    """
    store = ConfigStore.instance()
    recipe = given.get("recipe", "")
    kinds = kinds or chosen_kinds(catalogue, given)
    store.store(name="schema", node=schema(kinds))
    for name in _lineage(catalogue, recipe):
        if f"{name}.yaml" not in store.repo["recipe"]:
            continue  # one that Hydra reads by itself
        node = copy.deepcopy(catalogue.recipe_nodes[name])
        for key, options in (KINDS | VARIANTS).items():
            if key in KINDS:
                own = options[_kind(catalogue, key, _choice(catalogue, name, key, {}))]
                final = options[kinds[key]]
            else:
                own = options.get(_choice(catalogue, name, key, {}))
                final = options.get(_choice(catalogue, recipe, key, given))
            block = OmegaConf.select(node, key)
            if own is None or final is None or own is final or not isinstance(block, DictConfig):
                continue
            known, lost = ({f.name for f in fields(kind)} for kind in (final, own))
            for name_of_field in [str(k) for k in block if k in lost - known]:
                del block[name_of_field]
        store.store(group="recipe", name=name, node=node, package="_global_")


def chosen_kinds(catalogue: Catalogue, given: dict[str, str]) -> dict[str, str]:
    """The kinds of ``model`` and ``data`` that the choices in ``given`` come to. Raises ConfigError for an unknown one.

    They decide what the keys below may be, so they are needed before anything is composed.
    """
    recipe = given.get("recipe", "")
    return {key: _kind(catalogue, key, _choice(catalogue, recipe, key, given)) for key in KINDS}


def check_one_kind(catalogue: Catalogue, jobs: list[dict[str, str]]) -> dict[str, str]:
    """The kinds of all jobs of a sweep that Hydra composes. Raises ConfigError when they are not the same."""
    kinds = [chosen_kinds(catalogue, given) for given in jobs]
    if any(other != kinds[0] for other in kinds):
        found = " and ".join(dict.fromkeys(kind["model"] for kind in kinds))
        raise ConfigError(
            f"hydra/launcher= and hydra/sweeper= take jobs of one kind of model at a time, not {found}: make a command "
            "for each, or leave them out."
        )
    return kinds[0]


def option_of(catalogue: Catalogue, group: str, kind: str, inner: dict[str, str]) -> str | None:
    """Any option of ``group`` that is of ``kind`` and chooses ``inner`` (such as {"source": "digits"}), or None."""
    for name in catalogue.options.get(group, []):
        if _kind(catalogue, group, name) == kind:
            node = OmegaConf.load(catalogue.files[f"{group}/{name}"])
            chosen = [entry for entry in defaults_of(node) if isinstance(entry, dict)]  # type: ignore[arg-type]
            if all({key: option} in chosen for key, option in inner.items()):
                return name
    return None


def _kind(catalogue: Catalogue, group: str, option: str) -> str:
    """The ``name`` in the file of an option, or in one that it inherits; by default the first kind."""
    options = KINDS[group]
    file = catalogue.files.get(f"{group}/{option}")
    try:
        node = OmegaConf.load(file) if file is not None else None
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        node = None  # said when the file is composed
    if not isinstance(node, DictConfig):
        return option if option in options else next(iter(options))
    if "name" not in node:
        parents = [entry for entry in defaults_of(node) if isinstance(entry, str) and entry not in ("_self_", option)]
        return _kind(catalogue, group, parents[-1]) if parents else next(iter(options))
    name = str(node["name"])
    if name not in options:
        near = did_you_mean(name, options)
        raise ConfigError(f"{file}: name is '{name}'; it must be one of {', '.join(options)}.{near}")
    return name


def _lineage(catalogue: Catalogue, recipe: str) -> list[str]:
    """The recipe and everything that it inherits, itself first."""
    found: dict[str, None] = {}
    waiting = [recipe]
    while waiting:
        name = waiting.pop()
        if name in catalogue.recipe_nodes and name not in found:
            found[name] = None
            waiting += [entry for entry in defaults_of(catalogue.recipe_nodes[name]) if isinstance(entry, str)]
    return list(found)


def defaults_of(node: DictConfig) -> list[Any]:
    """The entries under ``defaults``: names of parents, and mappings such as {"override /schedule": "cosine"}."""
    entries = OmegaConf.to_container(node).get("defaults")  # type: ignore[union-attr]
    return [entry for entry in entries if isinstance(entry, str | dict)] if isinstance(entries, list) else []


def overridden(catalogue: Catalogue, recipe: str) -> Iterator[tuple[str, str, str]]:
    """(recipe, group, option) of every choice that a recipe and its parents make; the first of a group is in force."""
    for name in _lineage(catalogue, recipe):
        for entry in defaults_of(catalogue.recipe_nodes[name]):
            for group, option in entry.items() if isinstance(entry, dict) else ():
                yield name, str(group).removeprefix("override ").strip("/ "), str(option)


def _choice(catalogue: Catalogue, recipe: str, key: str, given: dict[str, str]) -> str:
    """The option that is in force for a variant: given, chosen by the recipe, or the default."""
    chosen: dict[str, str] = {}
    for _, group, option in overridden(catalogue, recipe):
        chosen.setdefault(group, option)
    chosen |= given
    group = key.replace(".", "/")
    if group in chosen:
        return chosen[group]
    parent, _, child = group.rpartition("/")
    file = catalogue.files.get(f"{parent}/{chosen.get(parent, '')}")
    node = OmegaConf.load(file) if file is not None else None
    for entry in defaults_of(node) if isinstance(node, DictConfig) else []:
        if isinstance(entry, dict) and child in entry:
            return str(entry[child])
    return _default_choice(key)


@cache
def _default_choice(key: str) -> str:
    return str(OmegaConf.select(OmegaConf.structured(Config), f"{key}.name"))


def yaml_reason(error: Exception) -> str:
    """What is wrong with a YAML file and in which line, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem or error.context} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split()).rstrip(".")
