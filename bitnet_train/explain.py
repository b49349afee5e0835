"""One sentence for each error of Hydra and OmegaConf: what is wrong, in which file, and what was probably meant.

Hydra answers a typo with a traceback or with its own inner workings. Its exceptions carry what is needed (the key, the
value, the options), so this reads those, and the text only where there is nothing else.
"""

import re
from collections.abc import Iterator

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from bitnet_train.config import KINDS, VARIANTS, Config
from bitnet_train.errors import ConfigError, did_you_mean
from bitnet_train.recipes import Catalogue, overridden, yaml_reason
from bitnet_train.trust import check_setting
from bitnet_train.validation import unknown_key

# OmegaConf's names of types, in words.
TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "Boolean": "true or false"}


def quoted(line: str) -> str:
    """The override with quotes where Hydra's grammar needs them: ``run=runs/tiny/seed=1`` and ``~/texts`` are paths."""
    key, _, value = line.partition("=")
    return f"{key}='{value}'" if set(value) & set("=~") and not set(value) & set("'\"[]{}()$\\") else line


def check_overrides(overrides: list[str], catalogue: Catalogue, sweeping: bool) -> None:
    """Raises ConfigError for arguments that cannot mean anything, or mean something that surprises."""
    parser = OverridesParser.create()
    for line in overrides:
        try:
            override = parser.parse_overrides([line])[0]
        except HydraException as error:
            raise ConfigError(_unparsed(line, error)) from None
        key = override.key_or_group
        if not key:
            raise ConfigError(f"'{line}' is not a setting: write key=value, or see --help.")
        check_setting(key, override.value())
        if key in ("hydra/sweeper", "hydra/launcher") and not sweeping:
            raise ConfigError(f"{key} is for sweeps: add -m.")
        if key.startswith("hydra"):
            continue
        if key == "recipe" and not override.is_add() and not override.is_force_add():
            for name in _values(override):
                _check_option("recipe", name, catalogue)
            raise ConfigError(f"A recipe is added with a plus: +recipe={','.join(_values(override))}.")
        if override.is_delete():
            raise ConfigError(f"{line}: settings cannot be removed; give {key} another value, or null if it may be.")
        if override.is_sweep_override() and not sweeping:
            raise ConfigError(f"{line} is several values: add -m for a job with each, or write [a,b] for a list.")
        if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise ConfigError(f"{line}: glob() is not understood; list the values, as in {key}=a,b.")
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{line} has no end of values to try: list them, as in {key}=1,2,3.")
        if key in catalogue.options:
            for name in _values(override):
                _check_option(key, name, catalogue)


def _values(override: Override) -> list[str]:
    """The values of a sweep, or the one value."""
    if override.is_discrete_sweep():
        return [str(value).strip("'\"") for value in override.sweep_string_iterator()]
    return [override.get_value_element_as_str().strip("'\"")]


def _unparsed(line: str, error: HydraException) -> str:
    if "=" not in line:
        return f"'{line}' is not a setting: write key=value, or see --help."
    if "EQUAL" in str(error):
        return f"'{line}' is not a setting: the part before '=' is not a key."
    return (
        f"'{line}' cannot be read: a bracket, brace or quote is not closed, or the value needs quotes of its own, "
        "as in 'key=\"a value\"'."
    )


def _check_option(group: str, name: str, catalogue: Catalogue) -> None:
    if name in catalogue.broken and group == "recipe":
        raise ConfigError(catalogue.broken[name])
    options = catalogue.options.get(group, [])
    if name not in options:
        raise ConfigError(_no_option(group, name, options))


def _no_option(group: str, name: str, options: list[str], place: str = "") -> str:
    plus = "+" if group == "recipe" else ""
    hint = did_you_mean(name, options)
    return f"{place}{plus}{group}={name} does not exist; choose one of {', '.join(options)}.{hint}"


def explain(error: BaseException, catalogue: Catalogue, overrides: list[str]) -> str:
    """The sentence for ``error``, starting with the file that is to blame if it is not the command line."""
    chain = list(_chain(error))
    text = "\n".join(str(e) for e in chain)
    place = _place(text, catalogue)
    for cause in chain:
        if isinstance(cause, OverrideParseException):
            return _unparsed(cause.override, cause)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            wanted = cause.missing_cfg_file
            return _missing(wanted, place or _chosen_in(wanted, catalogue, overrides), catalogue)
        if isinstance(cause, yaml.YAMLError):
            mark = getattr(cause, "problem_mark", None)
            return f"{mark.name if mark else 'A configuration file'} is not readable YAML: {yaml_reason(cause)}."
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return place + _omegaconf(cause, text, catalogue)
    return place + _composition(text, catalogue)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _place(text: str, catalogue: Catalogue) -> str:
    """``"FILE: "`` when Hydra says which config it was reading and that is not the primary one."""
    where = re.search(r"In '([^']+)'", text)
    if where is None or where[1] == "config":
        return ""
    return f"{catalogue.files.get(where[1], where[1])}: "


def _chosen_in(wanted: str, catalogue: Catalogue, overrides: list[str]) -> str:
    """``"FILE: "`` of the recipe that chooses ``wanted`` ("group/option") under defaults, parents included."""
    group, _, name = wanted.rpartition("/")
    for line in overrides:
        if line.lstrip("+").startswith("recipe="):
            for recipe, where, option in overridden(catalogue, line.partition("=")[2]):
                if (where, option) == (group, name):
                    return f"{catalogue.files[f'recipe/{recipe}']}: "
    return ""


def _missing(wanted: str, place: str, catalogue: Catalogue) -> str:
    group, _, name = wanted.rpartition("/")
    if group == "recipe" and name in catalogue.broken:
        return catalogue.broken[name]
    if not group:
        return f"{place}the configuration '{name}' does not exist."
    return _no_option(group, name, catalogue.options.get(group, []), place)


def _omegaconf(error: OmegaConfBaseException, text: str, catalogue: Catalogue) -> str:
    key = str(error.full_key)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        named = re.search(r"Could not override '([^']+)'", text)
        if named and named[1].split(".")[-1] != key.split(".")[-1]:
            # A typo in the middle of a key, or inside a list or mapping that the command line gives.
            if not named[1].startswith(key):
                return f"{named[1]}: {unknown_key(key, error.object_type)}"
            key = named[1]
        if key == "recipe" or key.startswith("recipe."):
            return "Hydra's own recipe/ folder needs '# @package _global_' as the first line of the file."
        return unknown_key(key, error.object_type)
    merged = re.search(r"Error merging override ([^=\s]+)=", text)
    if merged and not key.startswith(merged[1].lstrip("+")):  # inside a list that the command line gives
        key = f"{merged[1].lstrip('+')}: {key}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value and needs one."
    if isinstance(error, InterpolationResolutionError):
        return f"{key}: {_first_line(error)}."
    if isinstance(error, ValidationError):
        return _wrong_value(key, error, catalogue)
    return f"{key}: {_first_line(error)}."


def _wrong_value(key: str, error: ValidationError, catalogue: Catalogue) -> str:
    value, message = error.value, _first_line(error)
    expected = re.search(r"expected one of \[([^\]]*)\]", message)
    if expected:
        options = expected[1].split(", ")
        return f"{key}={value} does not exist; choose one of {', '.join(options)}.{did_you_mean(str(value), options)}"
    if "is not a valid input for <enum" in message:
        names = getattr(getattr(error.child_node, "enum_type", None), "__members__", {})
        return f"{key} must be {'one of ' + ', '.join(names) if names else 'a name'}, not '{value}'."
    kind = re.search(r"could not be converted to (\w+)", message) or re.search(r"is not a valid (\w+)", message)
    if kind and value == {}:
        return f"{key} is a single value; there are no keys below it."
    if kind:
        given = "nothing" if value in ("", None) else f"'{value}'"
        return f"{key} must be {TYPES.get(kind[1], kind[1])}, not {given}."
    if "is not a ListConfig" in message:
        return f"{key} must be a list, such as [a,b], not '{value}'."
    if re.match("Cannot assign [a-z]+ to Dict", message):
        return f"{key} must be settings in braces, such as {{key: value}}, not '{value}'."
    if "not Optional" in message or "is not optional" in message or "Incompatible value 'None'" in message:
        return f"{key} cannot be null."
    return f"{key}: {message}."


def _composition(text: str, catalogue: Catalogue) -> str:
    """What only Hydra's wording tells."""
    override = re.search(r"Could not override '([^']+)'\.\s*(?:No match in the defaults list|Did you mean)", text)
    if override:
        group = override[1].lstrip("/")
        known = sorted(set(catalogue.options) - {"recipe"})
        return f"'override /{group}' does not exist; the groups are {', '.join(known)}.{did_you_mean(group, known)}"
    twice = re.search(r"Multiple values for (\S+)\. To override a value use 'override [^:]+: ([^']+)'", text)
    if twice:
        group, option = twice[1], twice[2]
        if group == "recipe":
            return "Two recipes are given: choose one, or write a recipe whose defaults name another."
        return f"{group} has a choice already: write {group}={option} without '+' (in a recipe, 'override /{group}')."
    merged = re.search(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", text)
    if merged:
        return _not_settings(merged[1], merged[2].strip(), catalogue)
    item = re.search(r"An item is already at '([^']+)'", text)
    if item:
        return f"{item[1]} exists already: write it without '+'."
    if "RecursionError" in text or "maximum recursion depth" in text:
        return "A recipe that names itself under defaults never ends: give one of the two another name."
    group_like = re.search(r"config group '([^']+)' does not\s+exist", text)
    if group_like:
        return f"{group_like[1]} is not a choice.{did_you_mean(group_like[1], catalogue.options)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = ("In '", "object_type", "reference_type", "full_key", "See http")
    lines = [line for line in lines if not line.startswith(noise)]
    unmerged = re.match(r"Error merging override (.*)", lines[0]) if len(lines) > 1 else None
    if unmerged:
        return f"{unmerged[1]} does not fit: {lines[1].rstrip('.')}."
    return f"{lines[0].rstrip('.')}." if lines else "The configuration cannot be composed."


def _not_settings(kind: str, value: str, catalogue: Catalogue) -> str:
    """A recipe that says ``schedule: cosine`` where only the settings of a schedule can stand."""
    keys = [
        key
        for key, options in (KINDS | VARIANTS).items()
        if any(option.__name__ == kind for option in options.values())
    ]
    keys += [key for key, part in vars(Config()).items() if type(part).__name__ == kind and key not in keys]
    groups = [key.replace(".", "/") for key in keys if key.replace(".", "/") in catalogue.options]
    fitting = [group for group in groups if value in catalogue.options[group]] or groups
    if not fitting:
        return f"{' or '.join(keys) or kind} holds settings and cannot be '{value}'."
    group = fitting[0]
    return (
        f"'{group}: {value}' does not choose anything: write '- override /{group}: {value}' under defaults "
        f"(or {group}={value} on the command line); the options are {', '.join(catalogue.options[group])}."
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
