"""A variant's dataclass from plain keys and values, for options that stand in a mapping or list of their own."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_train.errors import ConfigError, did_you_mean

Variant = TypeVar("Variant")


def build_variant(options: Mapping[str, type[Variant]], choice: str, given: object, key: str) -> Variant:
    """The variant of ``options`` that ``given[choice]`` names, with the rest of ``given`` as its fields.

    ``key`` is where the mapping stands in the configuration. Raises ConfigError for something else than a mapping, an
    unknown variant, a field that the variant lacks, and a value of the wrong type.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} must be a mapping such as {{{choice}: {next(iter(options))}, ...}}, not '{given}'.")
    name = str(given.get(choice))
    if name not in options:
        chosen = f"{key}.{choice}={name} does not exist" if choice in given else f"{key} lacks '{choice}'"
        raise ConfigError(f"{chosen}; choose one of {', '.join(options)}.{did_you_mean(name, options)}")
    kind = options[name]
    known = [f.name for f in fields(kind) if f.name != "name"]  # type: ignore[arg-type]
    values = {str(field): value for field, value in given.items() if field != choice}
    for field in values:
        if field not in known:
            hint = did_you_mean(field, known)
            raise ConfigError(
                f"{key}.{field} is not a setting of {choice}: {name}, which has {', '.join(known)}.{hint}"
            )
    try:
        built: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        where = f"{key}.{error.full_key}" if error.full_key else key
        raise ConfigError(f"{where}: {str(error).splitlines()[0].rstrip('.')}.") from None
    assert isinstance(built, kind)
    return built
