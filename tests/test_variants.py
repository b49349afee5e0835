"""Variants from plain mappings: fields checked by name and type."""

from dataclasses import dataclass, field

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.variants import build_variant


@dataclass
class Base:
    name: str = "???"


@dataclass
class Apple(Base):
    name: str = "apple"
    size: int = 3
    colours: list[str] = field(default_factory=lambda: ["red"])


@dataclass
class Pear(Base):
    name: str = "pear"
    ripe: bool | None = None


FRUIT: dict[str, type[Base]] = {"apple": Apple, "pear": Pear}


def test_given_fields_are_converted_and_the_others_keep_their_defaults() -> None:
    assert build_variant(FRUIT, "fruit", {"fruit": "apple", "size": "5"}, "a.b") == Apple(size=5)
    assert build_variant(FRUIT, "fruit", {"fruit": "apple", "colours": ["x"]}, "a.b") == Apple(colours=["x"])
    assert build_variant(FRUIT, "fruit", {"fruit": "pear", "ripe": None}, "a.b") == Pear()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "a.b must be a mapping such as {fruit: apple, ...}, not '3'"),
        ({}, "a.b lacks 'fruit'; choose one of apple, pear"),
        ({"fruit": "aple"}, "a.b.fruit=aple does not exist; choose one of apple, pear. Did you mean 'apple'"),
        ({"fruit": ["apple"]}, "does not exist"),
        ({"fruit": "apple", "sise": 3}, "a.b.sise is not a setting of fruit: apple, which has size, colours. Did you"),
        ({"fruit": "pear", "size": 3}, "a.b.size is not a setting of fruit: pear, which has ripe"),
        ({"fruit": "apple", "name": "pear"}, "a.b.name is not a setting"),
        ({"fruit": "apple", "size": "many"}, "a.b.size: Value 'many'"),
        ({"fruit": "apple", "colours": 3}, "a.b.colours: "),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(given: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_variant(FRUIT, "fruit", given, "a.b")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
