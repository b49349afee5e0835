"""Random command lines near the recipes: wrong types, unknown keys, values out of range, broken files, sweeps."""

import random
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bitnet_train.config import KINDS, VARIANTS, Command, flatten, to_plain
from bitnet_train.recipes import config_folder
from tests.composing import CATALOGUE, RECIPES, choosing, compose_config

HERE = Path(__file__).parent
# Values that hardly any key takes, and some that many take.
VALUES = (*(HERE / "values.txt").read_text().splitlines(), "9" * 400, "x" * 5000)
# Whole settings that are wrong in themselves, as words of a command line.
LINES = (HERE / "lines.txt").read_text().splitlines()
# Several values of a key.
SWEEPS = (HERE / "sweeps.txt").read_text().splitlines()


@cache
def settings_of(recipe: str) -> list[tuple[str, str]]:
    """(key, value) of every setting of a recipe."""
    found = []
    for key, value in flatten(to_plain(compose_config(*choosing(recipe)))):
        text = OmegaConf.to_yaml(OmegaConf.create({"x": value}))[2:].strip() if isinstance(value, dict) else str(value)
        found.append((key, text))
    return found


class Mutator:
    """Draws command lines; ``folder`` is where it writes recipe files. The same seed draws the same."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.files = 0
        groups = {group: options for group, options in CATALOGUE.options.items() if group != "recipe"}
        self.groups = [(group, option) for group, options in sorted(groups.items()) for option in sorted(options)]
        self.variants = sorted({option for options in (KINDS | VARIANTS).values() for option in options})

    def line(self) -> list[str]:
        """One command line."""
        draw = self.random
        words = self._file() if draw.random() < 0.12 else self._recipe()
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            words += self.mutation(words)
        if draw.random() < 0.15:
            words.append(f"command={draw.choice(list(Command)).value}")
        if draw.random() < 0.04:
            draw.shuffle(words)
        if draw.random() < 0.04:
            words.pop(draw.randrange(len(words)))
        return words

    def _recipe(self) -> list[str]:
        words = list(choosing(self.random.choice(sorted(RECIPES))))
        if any(key == "data.corpus.path" for key, _ in settings_of(words[0].partition("=")[2])):
            text = self.folder.parent / "recipes" / "text.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("a text\n")
            words.append(f"data.corpus.path={text}")
        return words

    def mutation(self, words: list[str]) -> list[str]:
        """Words to add to a command line."""
        draw = self.random
        kind = draw.random()
        recipe = next((w.partition("=")[2] for w in words if w.startswith("+recipe=")), "tiny")
        key, value = draw.choice(settings_of(recipe if recipe in RECIPES else "tiny"))
        if kind < 0.15:  # much the same, which mostly composes
            return [f"{key}={value}"]
        if kind < 0.45:
            return [f"{key}={draw.choice(VALUES)}"]
        if kind < 0.55:
            return [f"{key}={self._near(value)}"]
        if kind < 0.63:
            return [f"{draw.choice(('', '+', '++', '~'))}{self._misspelt(key)}={value}"]
        if kind < 0.75:
            return [draw.choice(LINES)]
        if kind < 0.88:
            group, option = draw.choice(self.groups)
            return [f"{group}={option if draw.random() < 0.7 else draw.choice(self.variants)}"]
        sweep = draw.choice(SWEEPS).format(key=key, a=value, b=draw.choice(VALUES))
        return ["-m", sweep] if draw.random() < 0.8 else [sweep]

    def _near(self, value: str) -> str:
        """A value like the one that is there: other digits, a sign, more zeros."""
        draw = self.random
        near = (f"-{value}", f"{value}0", f"{value}.5", f"{value}e9", f"[{value}]", f"{value}x", value[:-1])
        return draw.choice((*near, f"'{value}'", value.upper(), f"{value}e-9", f"{value},{value}", f"{{a:{value}}}"))

    def _misspelt(self, key: str) -> str:
        draw = self.random
        place = draw.randrange(len(key))
        more, less = key[:place] + draw.choice("xé. /") + key[place:], key[:place] + key[place + 1 :]
        parent = key.rpartition(".")[0] or "x"
        return draw.choice((less, more, f"{key}.more", parent, key.replace(".", "/"), key.upper()))

    def _file(self) -> list[str]:
        """A recipe file with a few of its lines broken."""
        draw = self.random
        source = draw.choice([name for name in ("tiny", "small", "2b4t", "digits_mlp", "125m") if name in RECIPES])
        lines = (config_folder("recipes") / f"{source}.yaml").read_text().splitlines()
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(lines))
            lines[at : at + 1] = self._broken(lines[at])
        self.files += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"fuzzed_{self.files}.yaml").write_text("\n".join(lines) + "\n")
        return ["--config-dir", str(self.folder), f"+recipe=fuzzed_{self.files}"]

    def _broken(self, line: str) -> list[str]:
        draw = self.random
        head = line.partition(":")[0]
        return draw.choice((
            [], [line, line], [f"  {line}"], [line.lstrip()], [f"{head}: {draw.choice(VALUES)}"], [f"{head}x: 1"],
            ["\t" + line], [line + ":"], [line, "- a"], [line + " &a", "b: *a"], [f"? {line}"], [head],
            ["!!python/object:os.system {}"],
            [line, "defaults: 3"], [line, "defaults: [nope]"], ["<<: 3"], [line.replace(":", "")], ["%YAML 9.9", line],
            [line, "---", "a: 1"], [line, "_target_: os.system"], ["{" + line], [line + "]"],
        ))  # fmt: skip


def words(line: Any) -> str:
    """A command line as it would be typed, shortened."""
    return " ".join(word if len(word) < 200 else f"{word[:80]}...({len(word)})" for word in line)
