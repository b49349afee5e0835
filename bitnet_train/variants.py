"""A variant of the configuration from a plain mapping with its ``name``, for variants that stand inside lists.

Where a variant is a key of its own, Hydra's config groups choose its dataclass. In a list of settings it is a mapping
such as ``{name: norm, max_norm: 0.5}``; here it becomes the dataclass of that name, as strictly as a config group.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from bitnet_train.errors import ConfigError, did_you_mean

Variant = TypeVar("Variant")

# OmegaConf's names of types, in words.
TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "Boolean": "true or false"}


def variant_from(plain: Any, registry: Mapping[str, type[Variant]], where: str, choice: str = "name") -> Variant:
    """The dataclass of ``registry`` that ``plain[choice]`` names, with the other keys of ``plain`` as its fields.

    Args:
        plain: a mapping, as YAML or the command line gives it.
        registry: name -> dataclass, such as ``CLIP_CONFIGS``.
        where: the key of the mapping in the configuration, for messages, such as ``clip.rules[0].clip``.
        choice: the key that names the variant.

    Raises ConfigError when it is no mapping, has no or an unknown name, a key that its dataclass lacks, a value of the
    wrong type, or lacks a value that is needed.
    """
    names = ", ".join(registry)
    if not isinstance(plain, Mapping) or plain.get(choice) is None:
        given = f", not '{plain}'" if not isinstance(plain, Mapping) else f"; its {choice} is missing"
        raise ConfigError(f"{where} must be a mapping with a {choice}, one of {names}{given}.")
    name = str(plain[choice])
    if name not in registry:
        raise ConfigError(
            f"{where}.{choice}={name} does not exist; choose one of {names}.{did_you_mean(name, registry)}"
        )
    kind = registry[name]
    own = [f.name for f in fields(kind) if f.name != "name"]  # type: ignore[arg-type]
    for key in map(str, plain):
        if key != choice and key not in own:
            raise ConfigError(f"{where}.{key} is not a configuration key: {_has(name, own)}{_hint(key, own, registry)}")
    try:
        made = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(kind), {k: v for k, v in plain.items() if k != choice})
        )
    except OmegaConfBaseException as error:
        raise ConfigError(_sentence(error, where)) from None
    assert isinstance(made, kind)
    return made


def _has(name: str, own: list[str]) -> str:
    return f"{name} has {', '.join(own)}." if own else f"{name} has no settings."


def _hint(key: str, own: list[str], registry: Mapping[str, Any]) -> str:
    others = [name for name, kind in registry.items() if key in {f.name for f in fields(kind)}]
    return f" {key} belongs to {' and '.join(others)}." if others else did_you_mean(key, own)


def _sentence(error: OmegaConfBaseException, where: str) -> str:
    key = f"{where}.{error.full_key}" if error.full_key else where
    message = str(error).splitlines()[0].rstrip(".")
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        # Inside a list or a nested dataclass, of which OmegaConf gives the last part of the key.
        kind = error.object_type
        known = [f.name for f in fields(kind)] if isinstance(kind, type) and is_dataclass(kind) else []
        return f"{key} is not a configuration key.{did_you_mean(str(error.full_key).rpartition('.')[2], known)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value and needs one."
    options = re.search(r"expected one of \[([^\]]*)\]", message)
    value = re.search(r"[Vv]alue '([^']*)'", message)
    given = value[1] if value else ""
    if options:
        known = options[1].split(", ")
        return f"{key}={given} does not exist; choose one of {', '.join(known)}.{did_you_mean(given, known)}"
    wanted = re.search(r"could not be converted to (\w+)", message) or re.search(r"is not a valid (\w+)", message)
    if wanted:
        return f"{key} must be {TYPES.get(wanted[1], wanted[1])}, not '{given}'."
    if "Incompatible value 'None'" in message:
        return f"{key} cannot be null."
    if "is not a ListConfig" in message:
        return f"{key} must be a list, such as [a, b]."
    return f"{key}: {message}."
