"""No option is read and ignored: every field of the configuration, changed, changes what it is for.

For each field there is a pair of configurations that differ in it alone (``flips_of_*``). What the two do, above all
their first losses, must differ; for fields that are not about losses, what is built, written or asked for.
"""

from typing import Any

import pytest

from bitnet_train.errors import ConfigError
from tests.options import (
    flips_of_cluster,
    flips_of_commands,
    flips_of_data,
    flips_of_model,
    flips_of_training,
    observe,
    observe_cluster,
    observe_parts,
)
from tests.options.flip import Flip
from tests.options.place import Place
from tests.options.schema import every_field

TABLES = (
    flips_of_model.FLIPS, flips_of_training.FLIPS, flips_of_data.FLIPS, flips_of_commands.FLIPS, flips_of_cluster.FLIPS
)  # fmt: skip
OBSERVERS = (observe, observe_parts, observe_cluster)
FLIPS: dict[str, Flip] = {name: flip for table in TABLES for name, flip in table.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Place(tmp_path_factory.mktemp("place"))
    torch.set_num_threads(before)
    return made


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    """What was observed before: many flips share the configuration that they start from."""
    return {}


def test_there_is_a_flip_for_every_field() -> None:
    fields = every_field()
    assert len(fields) == len(set(fields)) > 380
    assert {"missing": set(fields) - set(FLIPS), "no fields": set(FLIPS) - set(fields)} == {
        "missing": set(), "no fields": set()
    }  # fmt: skip
    assert sum(map(len, TABLES)) == len(FLIPS)


@pytest.mark.parametrize("name", FLIPS)
@pytest.mark.usefixtures("one_thread")
def test_a_changed_option_changes_something(
    name: str, place: Place, known: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip = FLIPS[name]
    before, after = flip.on, (*flip.on, flip.to)
    see = next(getattr(module, flip.see) for module in OBSERVERS if hasattr(module, flip.see))
    if flip.refused:
        with pytest.raises(ConfigError, match=flip.to.partition("=")[0].replace("[", r"\[")):
            see(place, after, monkeypatch)
        return
    seen = []
    for changes in (before, after):
        if (flip.see, changes) not in known:
            place.count += 1
            with monkeypatch.context() as patched:
                known[flip.see, changes] = see(place, changes, patched)
        seen.append(known[flip.see, changes])
    assert seen[0] != seen[1]
