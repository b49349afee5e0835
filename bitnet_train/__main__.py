"""``python -m bitnet_train``: compose the configuration, run one command, answer with an exit code."""

import argparse
import os
import re
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_train.config import ON_A_RUN, VARIANTS, Command, Config, flatten, from_plain, to_config, to_plain
from bitnet_train.errors import BitnetTrainError, ConfigError, did_you_mean
from bitnet_train.recipes import config_folder, register

# Overrides that do not name a sweep's job.
NAMELESS = ("recipe", "command", "run_name", "paths.runs", "paths.data", "logger")


def main() -> None:
    """The console entry: runs and exits."""
    # Without this Hydra prints errors itself and exits with 1; here every error gets one sentence and code 2.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    codes: list[int] = []
    try:
        recipes = register(_user_folder())
        _run_hydra(recipes, codes)
    except BitnetTrainError as error:
        _say(str(error))
        codes.append(error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        _say(explain(error))
        codes.append(2)
    except KeyboardInterrupt:
        _say("Interrupted; nothing was changed since the last save.")
        codes.append(130)
    sys.exit(max(codes, default=0))


def _say(sentence: str) -> None:
    print(f"bitnet_train: {sentence}", file=sys.stderr, flush=True)


def _user_folder() -> Path | None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd")
    folder = parser.parse_known_args()[0].config_dir
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder} is not a folder.")
    return Path(folder)


def _run_hydra(recipes: list[str], codes: list[int]) -> None:
    import hydra

    def job(node: DictConfig) -> None:
        many = HydraConfig.get().mode is RunMode.MULTIRUN
        try:
            code = run_command(node, recipes)
        except BitnetTrainError as error:
            _say(str(error))
            code = error.exit_code
        except OmegaConfBaseException as error:
            _say(explain(error))
            code = 2
        codes.append(code)
        if many and code in (130, 143):
            sys.exit(code)

    hydra.main(config_path=str(config_folder("conf")), config_name="config", version_base="1.3")(job)()


def run_command(node: DictConfig, recipes: list[str]) -> int:
    """Run the command of a composed configuration; its exit code."""
    hydra_config = HydraConfig.get()
    choices = OmegaConf.to_container(hydra_config.runtime.choices)
    assert isinstance(choices, dict)
    recipe = choices.get("recipe")
    command = Command(node.command) if isinstance(node.command, str) else node.command
    overrides = list(hydra_config.overrides.task)
    if command in ON_A_RUN:
        cfg = to_config(_on_a_run(node, command, recipe, overrides))
    else:
        if recipe is None:
            raise ConfigError(f"No recipe is chosen: add +recipe=NAME, one of {', '.join(recipes)}.")
        if node.run is not None:
            raise ConfigError(f"run= is for {', '.join(c.value for c in ON_A_RUN)}; command={command.value} starts from a recipe.")
        node.run_name = run_name(node.run_name, str(recipe), overrides, hydra_config.mode is RunMode.MULTIRUN)
        cfg = to_config(node)

    from bitnet_train.commands import run

    return run(cfg)


def run_name(given: str | None, recipe: str, overrides: list[str], many: bool) -> str:
    """The run's folder under paths.runs: the given name or the recipe's, and under -m a part for the job's overrides."""
    name = given or recipe
    if not many:
        return name
    parsed = [line for line in overrides if line.lstrip("+~").partition("=")[0] not in NAMELESS]
    return f"{name}/{re.sub(r'[^A-Za-z0-9_=.,+-]+', '_', ','.join(parsed)) or 'default'}"


def _on_a_run(node: DictConfig, command: Command, recipe: object, overrides: list[str]) -> DictConfig:
    """The saved configuration of ``run=``, with the values of this command line on top."""
    if recipe is not None and node.run is None:
        node.run = str(Path(node.paths.runs) / (node.run_name or str(recipe)))
    if node.run is None:
        raise ConfigError(f"command={command.value} needs run=FOLDER, the folder of a finished run such as runs/tiny.")
    folder = Path(node.run)
    if not folder.is_dir():
        raise ConfigError(f"run={node.run} does not exist: give the folder of a run, such as runs/tiny.")
    saved_file = next((p for p in (folder / "config.yaml", folder.parent.parent / "config.yaml") if p.is_file()), None)
    if saved_file is None:
        # An export on its own: its config.json describes the model, this configuration the rest.
        return node
    plain = OmegaConf.to_container(OmegaConf.load(saved_file))
    assert isinstance(plain, dict)
    saved = from_plain({str(k): v for k, v in plain.items()}, saved_file)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key == "recipe":
            continue
        if key in VARIANTS or key.replace("/", ".") in VARIANTS or key in ("quant", "model", "data"):
            raise ConfigError(f"{key}= cannot be changed with command={command.value}: {folder} was trained with its own.")
        OmegaConf.update(saved, key, OmegaConf.select(node, key))
    saved.command, saved.run = node.command, node.run
    return saved


def explain(error: Exception) -> str:
    """One sentence for an error of Hydra or OmegaConf: what is wrong, where, and what was probably meant."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    text = "\n".join(str(e) for e in chain)
    where = re.search(r"In '([^']+)'", text)
    place = f" (in {where[1]}.yaml)" if where and where[1] != "config" else ""
    missing = re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s*((?:\s*\S+\n?)+)", text)
    if missing:
        group, options = missing[2], missing[3].split()
        name = missing[1].removeprefix(f"{group}/")
        return f"{group}={name} does not exist{place}; choose one of {', '.join(options)}.{did_you_mean(name, options)}"
    key = re.search(r"full_key: (\S+)", text)
    if re.search(r"Key '[^']+' (?:is )?not in|Could not override|Key '[^']+' not found", text):
        named = re.search(r"Could not override '([^']+)'", text)
        name = (named[1] if named else key[1] if key else "?").strip()
        known = [k for k, _ in flatten(to_plain(Config()))] + list(VARIANTS) + ["model", "quant", "data", "trainer", "paths"]
        return f"{name} is not a configuration key{place}.{did_you_mean(name, _prefixes(known))}"
    value = next((str(e).splitlines()[0] for e in chain if isinstance(e, OmegaConfBaseException) and str(e)), None)
    if value and key:
        return f"{key[1]}{place}: {value.rstrip('.')}."
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip() and "object_type" not in line)


def _prefixes(keys: list[str]) -> list[str]:
    """All keys and all their parents."""
    found: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            found[".".join(parts[:end])] = None
    return list(found)


if __name__ == "__main__":
    main()
