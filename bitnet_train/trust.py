"""Configurations are data: what would make Hydra import, call or read something of their choosing is refused.

Hydra itself instantiates ``_target_`` of its launcher and sweeper (and whatever is nested in them) and of callbacks,
hands its logging settings to ``logging.config.dictConfig``, which calls what stands under ``()``, and reads pickles
with ``--experimental-rerun``. Nothing else in this package instantiates anything by name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bitnet_train.errors import ConfigError

TARGET = "_target_"
# Where Hydra's own plugins say what they are, and how those names begin.
PLUGINS = {
    ("hydra", "launcher"): ("hydra_plugins.", "hydra._internal.core_plugins."),
    ("hydra", "sweeper"): ("hydra_plugins.", "hydra._internal.core_plugins."),
    ("hydra", "sweeper", "sampler"): ("optuna.samplers.",),
}
# The parts of Hydra's own configuration that a user may set.
HYDRA_PARTS = frozenset({"launcher", "sweeper", "run", "sweep", "job", "verbose", "output_subdir", "mode", "env"})
# Flags of Hydra that take the configuration, or a pickle, from elsewhere.
FLAGS = {
    "config_path": "--config-path", "config_name": "--config-name", "experimental_rerun": "--experimental-rerun"
}  # fmt: skip


def check_flags(flags: Any) -> None:
    """Raises ConfigError for a flag of Hydra's (an argparse namespace) that reads what nobody has checked."""
    for name, flag in FLAGS.items():
        if getattr(flags, name, None):
            raise ConfigError(f"{flag} is not for this program: your own recipes lie in --config-dir FOLDER.")


def check_setting(key: str, value: Any) -> None:
    """Raises ConfigError when ``key=value`` of the command line names code."""
    path = tuple(part for part in key.replace("/", ".").split(".") if part)
    # hydra/launcher=slurm chooses among the options that there are.
    chosen = value if "/" not in key else {}
    for where, leaf in _leaves(path, chosen):
        _check(where, leaf, key)


def check_content(content: Any, origin: Path | str) -> None:
    """Raises ConfigError when the content of a recipe or another configuration file names code."""
    for where, leaf in _leaves((), content):
        _check(where, leaf, str(origin))


def check_folder(folder: Path) -> None:
    """Check every YAML file of a ``--config-dir``. Raises ConfigError, which names the file."""
    for path in (*folder.glob("*.y*ml"), *folder.glob("*/*.y*ml"), *folder.glob("*/*/*.y*ml")):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
            continue  # said when it is chosen
        parts = path.relative_to(folder).parts
        inside = parts[:-1] if parts[0] == "hydra" else ()
        for where, leaf in _leaves(inside, content):
            _check(where, leaf, str(path))


def _check(where: tuple[str, ...], leaf: Any, origin: str) -> None:
    name = ".".join(where)
    if TARGET in where:
        allowed = PLUGINS.get(where[:-1], ()) if where[-1] == TARGET else ()
        if not str(leaf).startswith(allowed or ("\0",)):
            raise ConfigError(
                f"{origin}: {name} names code, and configurations do not run any: only Hydra's own launchers and "
                "sweepers have a _target_."
            )
    if where[:1] == ("hydra",) and len(where) > 1 and where[1] not in HYDRA_PARTS:
        raise ConfigError(
            f"{origin}: {name} is no setting of this program: of Hydra's own, {', '.join(sorted(HYDRA_PARTS))} can be "
            "set."
        )


def _leaves(path: tuple[str, ...], content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in plain or OmegaConf content; an empty part is a leaf."""
    items: list[tuple[str, Any]] = []
    if hasattr(content, "items"):
        items = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        items = [("", value) for value in content]
    if not items:
        yield path, content
    for key, value in items:
        # In a defaults list "override /hydra/callbacks" chooses a group, which a file must have.
        inner = tuple(part for part in key.replace("override ", "").replace("/", ".").split(".") if part)
        yield from _leaves((*path, *inner) if "defaults" not in path else inner, value)
