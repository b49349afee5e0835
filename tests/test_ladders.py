"""Ladders: families of recipes that differ in size, one table each."""

from functools import cache
from pathlib import Path

import pytest

from bitnet_train.__main__ import answer
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.ladders import read_ladder
from bitnet_train.nn.config import Norms
from bitnet_train.planning.parameters import count_parameters
from bitnet_train.quant.config import Granularity
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.rates import rates
from bitnet_train.training.schedules.config import PolynomialSchedule, TwoStageSchedule
from tests.composing import CATALOGUE, compose_config

# Parameters in millions by name, how near the model must be, and its learning rates (of both halves).
SIZES = {
    "trilm_99m": (99, 0.01, 2.4e-3, 1.5e-3),
    "trilm_190m": (190, 0.01, 2.4e-3, 1.5e-3),
    "trilm_390m": (390, 0.01, 1.8e-3, 1.2e-3),
    "trilm_560m": (560, 0.02, 1.6e-3, 1.1e-3),
    "trilm_830m": (830, 0.01, 1.5e-3, 1.0e-3),
    "trilm_1_1b": (1100, 0.05, 1.3e-3, 9.0e-4),
    "trilm_1_5b": (1500, 0.01, 1.2e-3, 8.0e-4),
    "trilm_2_4b": (2400, 0.03, 1.2e-3, 8.0e-4),
    "trilm_3_9b": (3900, 0.025, 1.2e-3, 8.0e-4),
    "b1_125m": (125, 0.13, 2.4e-3, None),
    "b1_350m": (350, 0.06, 1.2e-3, None),
    "b1_760m": (760, 0.05, 1.0e-3, None),
    "b1_1_3b": (1300, 0.02, 8.0e-4, None),
    "b1_2_7b": (2700, 0.05, 6.4e-4, None),
    "b1_6_7b": (6700, 0.03, 4.8e-4, None),
    "b1_13b": (13000, 0.02, 4.0e-4, None),
    "b1_30b": (30000, 0.01, 4.0e-4, None),
    "tips_700m": (700, 0.05, 1.5e-3, 1.0e-3),
    "tips_1_3b": (1300, 0.025, 1.2e-3, 8.0e-4),
    "tips_3b": (3300, 0.01, 1.2e-3, 8.0e-4),
    # Of the table as it is published; its name leaves out more than the embedding.
    "tips_3_9b": (4363, 0.001, 1.2e-3, 8.0e-4),
    "bitnet_v2_400m": (400, 0.1, 1.8e-3, 1.2e-3),
    "bitnet_v2_1_3b": (1300, 0.025, 1.2e-3, 8.0e-4),
    # As the table of the paper has it, 20 blocks of 4096.
    "bitnet_v2_3b": (3487, 0.001, 1.2e-3, 6.4e-4),
    "bitnet_v2_7b": (6574, 0.001, 1.0e-3, 6.0e-4),
}


@cache
def composed(name: str) -> Config:
    return compose_config(f"+recipe={name}")


def test_every_size_is_tried_below() -> None:
    assert {f"{ladder}_{size}" for ladder, sizes in CATALOGUE.ladders.items() for size in sizes} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_model_is_as_large_as_its_name(name: str) -> None:
    cfg, (millions, tolerance, _, _) = composed(name), SIZES[name]
    counts = count_parameters(cfg.model, build_spec(cfg.quant))
    assert counts.total == pytest.approx(millions * 1e6, rel=tolerance)
    assert cfg.decoder.kv_heads == cfg.decoder.heads


@pytest.mark.parametrize("name", SIZES)
def test_the_rates_are_those_of_the_table(name: str) -> None:
    cfg, (_, _, first, second) = composed(name), SIZES[name]
    assert cfg.optimizer.lr == pytest.approx(first)
    total, warm = cfg.trainer.max_steps, int(cfg.schedule.warmup)
    assert rates(cfg, warm).lr == pytest.approx(first, rel=0.02)
    assert rates(cfg, total - 1).lr < 1e-3 * first
    if second is None:
        assert isinstance(cfg.schedule, PolynomialSchedule)
        return
    assert isinstance(cfg.schedule, TwoStageSchedule)
    # Half of each peak where one linear decay hands over to the other.
    half = total // 2
    assert rates(cfg, half - 1).lr == pytest.approx(first / 2, rel=1e-3)
    assert rates(cfg, half + 1).lr == pytest.approx(second / 2, rel=1e-3)
    assert rates(cfg, 3 * total // 4).lr == pytest.approx(second / 4, rel=1e-3)
    # Weight decay ends at half, TriLM's at two thirds.
    end = 2 / 3 if name.startswith("trilm") else 1 / 2
    assert rates(cfg, int(end * total) - 2).weight_decay == pytest.approx(0.1)
    assert rates(cfg, int(end * total) + 2).weight_decay == 0


def test_weight_decay_is_larger_for_the_largest_binary_models() -> None:
    assert [composed(f"b1_{size}").optimizer.weight_decay for size in ("6_7b", "13b", "30b")] == [0.01, 0.05, 0.05]


def test_each_family_has_its_quantisation_and_norms() -> None:
    trilm, b1 = composed("trilm_99m"), composed("b1_125m")
    assert (trilm.quant.activation.bits, trilm.decoder.norms, trilm.decoder.tie_embeddings) == (None, Norms.pre, False)
    assert build_spec(b1.quant).default.scheme == "binary"
    assert composed("tips_700m").decoder.norms is Norms.inside
    v2 = composed("bitnet_v2_400m")
    spec = build_spec(v2.quant)
    total = v2.trainer.max_steps
    for step, bits in ((0, 8), (int(0.94 * total), 8), (int(0.96 * total), 4)):
        down = spec.at(step, total).for_layer("layers.3.mlp.down_proj")
        assert (down.activation_bits, down.hadamard) == (bits, True)
        assert down.activation_granularity == Granularity.token.value
    assert not spec.for_layer("layers.3.mlp.up_proj").hadamard


BROKEN = {
    "no list of sizes": "defaults: []\nsettings: {}\ncolumns: [hidden]\nsizes: [1]\n",
    "a row that is too short": "defaults: []\nsettings: {}\ncolumns: [hidden, heads]\nsizes: {1m: [64]}\n",
    "an unknown column": "defaults: []\nsettings: {}\ncolumns: [hidden, wings]\nsizes: {1m: [64, 2]}\n",
    "an unknown part": "defaults: []\nsettings: {}\ncolumns: [hidden]\nsizes: {1m: [64]}\nrungs: 3\n",
    "no settings": "defaults: []\ncolumns: [hidden]\nsizes: {1m: [64]}\n",
    "no yaml": "defaults: [\n",
    "a list": "- 1\n",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_ladder_is_refused_with_its_path(tmp_path: Path, what: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(BROKEN[what])
    with pytest.raises(ConfigError, match=r"mine\.yaml.* no (ladder|part of a ladder) of recipes") as caught:
        read_ladder(path)
    if "unknown" in what:
        assert "'wings'" in str(caught.value) or "'rungs'" in str(caught.value)


def test_a_ladder_makes_a_recipe_of_each_row(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "defaults: [{override /schedule: two_stage}, _self_]\nsettings: {trainer: {max_steps: 10}}\n"
        "columns: [hidden, heads, first_lr, second_lr]\nsizes: {s: [64, 2, 1e-3, 5e-4], m: [128, 4, 2.0e-3, 1.0e-3]}\n"
    )
    found = read_ladder(path)
    assert list(found) == ["mine_s", "mine_m"]
    small = found["mine_s"]
    assert (small.model.hidden, small.model.heads, small.model.kv_heads) == (64, 2, 2)
    assert small.optimizer.lr == 1e-3
    assert [stage.lr for stage in small.schedule.stages] == [1.0, 0.25]
    assert found["mine_m"].trainer.max_steps == 10


def test_the_command_line_takes_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert answer(["+recipe=trilm_99m", "command=estimate", "trainer.max_steps=100000"]) == 0
    assert (tmp_path / "runs" / "trilm_99m" / "estimate" / "estimate.json").is_file()
