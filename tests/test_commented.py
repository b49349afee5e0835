"""``--cfg job`` prints every setting with what the code says of it."""

from dataclasses import dataclass, field

import pytest
import yaml
from omegaconf import OmegaConf

from bitnet_train.__main__ import answer
from bitnet_train.commented import WIDTH, comment_of, commented
from bitnet_train.data.config import DataStage
from bitnet_train.export.config import ConvertConfig
from bitnet_train.nn.config import DepthScaledInit
from tests.composing import fresh_recipes


@dataclass
class Item:
    # Where it begins,
    # and why.
    begin: int = 0
    end: int = 1
    note: str = ""


@dataclass
class Inner:
    """Of the inside.

    Not this.
    """

    name: str = "inner"
    # The size.
    size: int = 3


@dataclass
class Outer:
    first: Inner = field(default_factory=Inner)
    # Some of them.
    items: list[Item] = field(default_factory=list)
    # A reference.
    other: int = "${first.size}"  # type: ignore[assignment]
    # Several lines.
    text: str = "one\ntwo: 3\n\u2028four: 4"
    # Nothing.
    nothing: Inner | None = None


def show(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with fresh_recipes():
        assert answer([*arguments, "--cfg", "job"]) == 0
    return capsys.readouterr().out.splitlines()


def above(lines: list[str], setting: str) -> str:
    """The comment above the only line that begins with ``setting``."""
    (number,) = (i for i, line in enumerate(lines) if line.startswith(setting))
    found: list[str] = []
    while lines[number - 1].lstrip().startswith("#"):
        number -= 1
        found.insert(0, lines[number].strip().removeprefix("# "))
    return " ".join(found)


def test_comments_stand_above_their_settings_and_change_none() -> None:
    node = OmegaConf.structured(Outer)
    for resolve in (False, True):
        text = commented(node, resolve)
        assert yaml.safe_load(text) == OmegaConf.to_container(node, resolve=resolve)
    lines = commented(node).splitlines()
    assert lines[:5] == ["# Of the inside.", "first:", "  # Of the inside.", "  name: inner", "  # The size."]
    assert above(lines, "items:") == (
        "Some of them. Each item of items has:   begin, end, note: Where it begins, and why."
    )
    assert above(lines, "other: ${first.size}") == "A reference."
    assert above(lines, "nothing: null") == "Nothing."
    assert above(lines, "text:") == "Several lines."


def test_a_list_with_items_is_explained_too() -> None:
    node = OmegaConf.structured(Outer(items=[Item(4, 5)]))
    text = commented(node)
    assert yaml.safe_load(text)["items"] == [{"begin": 4, "end": 5, "note": ""}]
    assert "begin, end, note: Where it begins" in text


def test_settings_called_from_have_comments_behind_their_class() -> None:
    assert comment_of(DepthScaledInit, "from").startswith("Folder to start from instead")
    assert comment_of(DepthScaledInit, "std") == "Standard deviation of every weight matrix."  # a base class's
    assert comment_of(ConvertConfig, "from").startswith("Folder to read")
    assert comment_of(DataStage, "from").startswith("Where the stage begins")
    assert "keyword" not in comment_of(DepthScaledInit, "from") + comment_of(ConvertConfig, "from")


@pytest.mark.parametrize("more", [(), ("quant=mixed", "schedule=two_stage", "clip=by_pattern"), ("--resolve",)])
def test_every_setting_of_a_recipe_is_explained(more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    lines = show("+recipe=tiny", *more, capsys=capsys)
    content = yaml.safe_load("\n".join(lines))
    assert content["optimizer"]["lr"] == 0.02
    assert max(map(len, lines)) <= WIDTH + 10
    bare, item = set(), None
    for before, line in zip(["", *lines], lines, strict=False):
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("- "):
            item = indent
        elif item is not None and indent <= item:
            item = None
        if item is None and not line.lstrip().startswith("#") and not before.lstrip().startswith("#"):
            bare.add(line.strip())
    # There is nothing to say of some kinds but their names, and resume.from is explained above resume.
    assert all(line.startswith("name: ") or line == "from: null" for line in bare), bare


def test_images_too(capsys: pytest.CaptureFixture[str]) -> None:
    lines = show("+recipe=digits_vit", capsys=capsys)
    assert above(lines, "  patch:")
    assert above(lines, "  batch_size:")
