"""Mixtures: exact shares, every corpus in epochs of its own, stages, and shards of several corpora."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from bitnet_train.data.config import BpeTokenizer, DataConfig, FilesCorpus, MixtureCorpus, StdlibCorpus
from bitnet_train.data.describe import describe
from bitnet_train.data.mixture import BLOCK, block_counts, check_mixture, expected_samples, parts, stages
from bitnet_train.data.order import Drawn, MixtureOrder, Segment
from bitnet_train.data.prepare import prepare, prepared, shard_folder, source_settings, split_text
from bitnet_train.data.shards import TokenArray, load_manifest, verify_shards
from bitnet_train.errors import ConfigError

SIZES = {"a": 137, "b": 40, "c": 700}
SEGMENTS = [Segment(0, (700, 300, 0)), Segment(1234, (100, 100, 800)), Segment(2000, (0, 500, 500))]


def drawn_windows(order: MixtureOrder, samples: range) -> dict[str, list[int]]:
    """The windows of each corpus, in the order in which they are drawn."""
    found: dict[str, list[int]] = {name: [] for name in SIZES}
    starts = dict(zip(SIZES, np.cumsum([0, *SIZES.values()]).tolist(), strict=False))
    for n in samples:
        index = order(n)
        name = next(name for name in reversed(SIZES) if index >= starts[name])
        found[name].append(index - starts[name])
        assert found[name][-1] < SIZES[name]
    return found


def check_epochs(windows: list[int], size: int) -> None:
    """Every epoch visits every window once."""
    for start in range(0, len(windows), size):
        epoch = windows[start : start + size]
        assert len(set(epoch)) == len(epoch)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9))
def test_counts_add_up_and_are_within_one_of_the_share(weights: list[float]) -> None:
    counts = block_counts({str(i): weight for i, weight in enumerate(weights)}, "k")
    assert sum(counts) == BLOCK
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - BLOCK * weight / sum(weights)) < 1 + 1e-6


def test_largest_remainders_by_hand() -> None:
    assert block_counts({"a": 1, "b": 1, "c": 1}, "k") == (334, 333, 333)
    assert block_counts({"a": 2, "b": 1}, "k") == (667, 333)
    assert block_counts({"a": 0.7, "b": 0.3, "c": 0.0}, "k") == (700, 300, 0)
    assert block_counts({"a": 999, "b": 1}, "k") == (999, 1)


def test_a_block_holds_its_shares_and_is_shuffled() -> None:
    order = MixtureOrder(SIZES, [Segment(0, (500, 300, 200))], seed=3)
    for block in range(3):
        windows = drawn_windows(order, range(block * BLOCK, (block + 1) * BLOCK))
        assert [len(found) for found in windows.values()] == [500, 300, 200]
    first = [order(n) < 137 for n in range(BLOCK)]
    # No corpus comes in runs: of 20 neighbouring tenths of a block, each holds about half of corpus a.
    assert all(10 <= sum(first[i : i + 50]) <= 40 for i in range(0, BLOCK, 50))
    assert [order(n) < 137 for n in range(BLOCK, 2 * BLOCK)] != first


def test_every_corpus_walks_its_own_epochs_through_all_stages() -> None:
    order = MixtureOrder(SIZES, SEGMENTS, seed=3)
    windows = drawn_windows(order, range(5000))
    for name, size in SIZES.items():
        check_epochs(windows[name], size)
        assert sorted(windows[name][:size]) == list(range(size))
    for start, stop, counts in ((0, 1000, (700, 300, 0)), (1234, 2000, None), (2000, 5000, (0, 1500, 1500))):
        found = tuple(len(w) for w in drawn_windows(order, range(start, stop)).values())
        assert counts is None or found == counts
        after, before = order.drawn(stop).counts, order.drawn(start).counts
        assert tuple(b - a for a, b in zip(before, after, strict=True)) == found


def test_the_order_is_a_pure_function_of_seed_and_number() -> None:
    order, again = (MixtureOrder(SIZES, SEGMENTS, seed=3) for _ in range(2))
    numbers = [0, 999, 1000, 1233, 1234, 1999, 2000, 4999, 10**9, 5]
    assert [order(n) for n in numbers] == [again(n) for n in reversed(numbers)][::-1]
    # A run that is continued after an upgrade must see the same order.
    assert [order(n) for n in range(8)] == GOLDEN
    assert [MixtureOrder(SIZES, SEGMENTS, seed=4)(n) for n in range(8)] != GOLDEN


GOLDEN = [170, 167, 41, 42, 53, 158, 115, 31]


def test_corpora_of_one_size_have_orders_of_their_own() -> None:
    order = MixtureOrder({"a": 50, "b": 50}, [Segment(0, (500, 500))], seed=1)
    found = [order(n) for n in range(BLOCK)]
    assert [i for i in found if i < 50][:50] != [i - 50 for i in found if i >= 50][:50]


def test_another_mixture_goes_on_where_each_corpus_was() -> None:
    before = MixtureOrder(SIZES, SEGMENTS, seed=3)
    at = 1500
    after = MixtureOrder(SIZES, [Segment(0, (100, 400, 500)), Segment(1800, (300, 300, 400))], 3, before.drawn(at))
    assert before.drawn(at).samples == at
    first, then = drawn_windows(before, range(at)), drawn_windows(after, range(at, 4000))
    for name, size in SIZES.items():
        check_epochs(first[name] + then[name], size)
    assert after.drawn(4000).counts == tuple(len(first[name] + then[name]) for name in SIZES)
    with pytest.raises(ValueError, match="before the origin"):
        after(at - 1)
    # The same mixture, taken up in the middle of its block, draws the rest of its epochs in another order.
    same = MixtureOrder(SIZES, SEGMENTS, 3, Drawn(0, (0, 0, 0)))
    assert [same(n) for n in range(100)] == [before(n) for n in range(100)]


# ----------------------------------------------------------------------------------------------------- settings


def make(corpora: object, stage_list: list[dict[str, Any]] | None = None, **settings: object) -> DataConfig:
    node = OmegaConf.merge(OmegaConf.structured(DataConfig(corpus=MixtureCorpus())), {"stages": stage_list, **settings})
    node.corpus.corpora = corpora
    cfg = OmegaConf.to_object(node)
    assert isinstance(cfg, DataConfig)
    return cfg


TWO = {"web": {"corpus": "files", "path": "x", "weight": 3}, "code": {"corpus": "stdlib"}}


def test_parts_are_whole_corpora_by_name() -> None:
    found = parts(MixtureCorpus(corpora={**TWO, "b": {"corpus": "files", "path": "y", "validation_every": 9}}))
    assert list(found) == ["b", "code", "web"]
    assert found["web"].corpus == FilesCorpus(path="x")
    assert found["code"].corpus == StdlibCorpus()
    assert found["b"].corpus == FilesCorpus(path="y", validation_every=9)
    assert [part.weight for part in found.values()] == [1.0, 1.0, 3.0]


def test_stages_by_step_and_by_share() -> None:
    cfg = make(TWO, [{"from": 10, "weights": {"web": 1}}, {"from": 0.5, "weights": {"web": 1, "code": 1}}])
    found = stages(cfg, 100)
    assert [stage.step for stage in found] == [0, 10, 50]
    assert [stage.counts for stage in found] == [(250, 750), (0, 1000), (500, 500)]
    assert expected_samples(cfg, 100, lambda step: 8 * step) == {
        "code": pytest.approx(8 * (10 * 0.25 + 50 * 0.5)),
        "web": pytest.approx(8 * (10 * 0.75 + 40 + 50 * 0.5)),
    }
    assert describe(cfg, 100) == (
        "mixture of 2 corpora (code 25.0%, web 75.0%; from step 10 web 100.0%; from step 50 code 50.0%, web 50.0%; "
        "code: stdlib, web: files)"
    )


def test_a_weight_of_0_waits_for_its_stage() -> None:
    late = {**TWO, "math": {"corpus": "files", "path": "m", "weight": 0}}
    check_mixture(make(late, [{"from": 0.5, "weights": {"math": 1}}]), 100)
    with pytest.raises(ConfigError, match=r"corpora\.math\.weight must be positive, it is 0: leave"):
        check_mixture(make(late), 100)
    with pytest.raises(
        ConfigError, match=r"corpora\.math\.weight must be positive, it is 0, nor in any of data.stages"
    ):
        check_mixture(make(late, [{"from": 0.5, "weights": {"web": 1}}]), 100)


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        (None, "corpora names no corpora"),
        ({}, "corpora names no corpora"),
        ([1], "corpora names no corpora"),
        ({"a b": {"corpus": "stdlib"}}, "corpora.a b: a name is letters"),
        ({"a": "stdlib"}, "corpora.a must be a mapping"),
        ({"a": {"weight": 1}}, "corpora.a must be a mapping with a corpus, one of"),
        ({"a": {"corpus": "mixture"}}, "corpora.a.corpus=mixture does not exist"),
        ({"a": {"corpus": "files", "pth": "x"}}, "corpora.a.pth is not a configuration key: files has"),
        (
            {"a": {"corpus": "files", "path": "x", "validation_every": 3}},
            "corpora.a.validation_every must be at least 8",
        ),
        ({"a": {"corpus": "stdlib", "weight": -1}}, "corpora.a.weight must be a positive number"),
        ({"a": {"corpus": "stdlib", "weight": "much"}}, "corpora.a.weight must be a positive number"),
        ({"a": {"corpus": "stdlib", "weight": True}}, "corpora.a.weight must be a positive number"),
        ({"a": {"corpus": "stdlib", "weight": float("nan")}}, "corpora.a.weight must be a positive number"),
        ({"a": {"corpus": "stdlib", "weight": 0}}, "corpora: every weight is 0"),
        ({**TWO, "a": {"corpus": "stdlib", "weight": 0.001}}, "corpora: a gets 0.02% of the samples, and the smallest"),
    ],
)
def test_mixtures_that_are_refused(corpora: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_mixture(make(corpora), 100)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("stage_list", "message"),
    [
        ([{"weights": {"web": 1}}], "data.stages[0] lacks 'from'"),
        ([{"from": 5, "weights": {"wbe": 1}}], "data.stages[0].weights.wbe is not in data.corpus.corpora. Did you"),
        ([{"from": 5}], "data.stages[0]: every weight is 0"),
        ([{"from": 5, "weights": {"web": -1}}], "data.stages[0].weights.web must be a positive number"),
        ([{"from": 1.0, "weights": {"web": 1}}], "from=1.0 must be a share between 0 and 1"),
        ([{"from": 0, "weights": {"web": 1}}], "from=0 is step 0, outside of the run (1 to 99)"),
        ([{"from": 100, "weights": {"web": 1}}], "from=100 is step 100, outside of the run"),
        (
            [{"from": 50, "weights": {"web": 1}}, {"from": 0.5, "weights": {"code": 1}}],
            "data.stages[1] begins at step 50, not after the one before it (step 50)",
        ),
    ],
)
def test_stages_that_are_refused(stage_list: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_mixture(make(TWO, stage_list), 100)
    assert message in str(caught.value)


def test_stages_need_a_mixture() -> None:
    cfg = make(TWO, [{"from": 5, "weights": {"web": 1}}])
    cfg.corpus = StdlibCorpus()
    with pytest.raises(ConfigError, match=r"data\.stages needs data/corpus=mixture"):
        check_mixture(cfg, 100)


# ------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def mixture(tmp_path: Path, texts: list[str]) -> Callable[..., DataConfig]:
    """Makes a DataConfig over two jsonl files of 40 and 20 documents; keyword arguments are its fields."""
    for name, part in (("a", texts[:40]), ("b", texts[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    own = {"corpus": "files", "validation_every": 10}

    def build(weight: float = 3.0, **settings: object) -> DataConfig:
        corpora = {
            "one": {**own, "path": str(tmp_path / "a.jsonl"), "weight": weight},
            "two": {**own, "path": str(tmp_path / "b.jsonl")},
        }
        return DataConfig(
            **{  # type: ignore[arg-type]
                "corpus": MixtureCorpus(corpora=corpora),
                "tokenizer": BpeTokenizer(vocab_size=300),
                "sequence_length": 16,
                **settings,
            }
        )

    return build


def test_every_corpus_has_shards_of_its_own_and_validation_is_all_of_them(
    mixture: Callable[..., DataConfig], tmp_path: Path, texts: list[str]
) -> None:
    cfg, root = mixture(shard_tokens=500), tmp_path / "shards"
    manifest = prepare(cfg, root)
    folder = shard_folder(cfg, root)
    assert manifest.corpora == ["one", "two"]
    held = {"one": texts[7:40:10], "two": texts[47:60:10]}
    for split in ("train", "val"):
        apart = [TokenArray(folder, manifest, f"{split}/{name}") for name in manifest.corpora]
        together = TokenArray(folder, manifest, split)
        assert together.slice(0, len(together)).tolist() == [i for t in apart for i in t.slice(0, len(t)).tolist()]
        for key in ("tokens", "documents", "bytes"):
            assert manifest.splits[split][key] == sum(manifest.splits[f"{split}/{n}"][key] for n in held)
    assert manifest.splits["val/one"]["bytes"] == sum(len(t.encode()) for t in held["one"])
    assert split_text(cfg, "val") == "".join([*held["one"], *held["two"]])
    on_disk = sorted(path.name for path in folder.glob("*.npy"))
    listed = Counter(shard.file for split in manifest.splits for shard in manifest.shards(split))
    assert on_disk == sorted(listed)
    assert {name.rpartition("-")[0] for name in on_disk} == {"train-one", "train-two", "val-one", "val-two"}
    assert verify_shards(folder, manifest, cfg.verify) == "every byte"
    assert load_manifest(folder) == manifest == prepared(cfg, root)
    (folder / on_disk[0]).unlink()
    with pytest.raises(ConfigError, match="is missing"):
        verify_shards(folder, manifest, cfg.verify)


def test_other_weights_need_no_other_shards_and_an_edited_corpus_does(
    mixture: Callable[..., DataConfig], tmp_path: Path
) -> None:
    root = tmp_path / "shards"
    manifest = prepare(mixture(), root)
    assert prepared(mixture(weight=1.0), root) == manifest
    stage = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), {"stages": [{"from": 3}]}))
    assert shard_folder(mixture(stages=stage.stages), root) == shard_folder(mixture(), root)  # type: ignore[union-attr]
    with (tmp_path / "b.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match="has changed since"):
        prepared(mixture(), root)


def test_what_is_wrong_with_one_corpus_names_it(mixture: Callable[..., DataConfig], tmp_path: Path) -> None:
    cfg = mixture()
    (tmp_path / "b.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(ConfigError, match=r"b.jsonl line 1 .*\(data\.corpus\.corpora\.two\.text_field\)"):
        prepare(cfg, tmp_path / "shards")
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"data\.corpus\.corpora\.two\.path=.* does not exist"):
        prepare(cfg, tmp_path / "shards")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"data\.corpus\.corpora\.two gives no training documents"):
        prepare(cfg, tmp_path / "shards")


def test_settings_of_single_corpora_are_what_they_were() -> None:
    # Existing shard folders are found by a digest of exactly these.
    assert source_settings(DataConfig(corpus=FilesCorpus(path="x"))) == {
        "format": 1,
        "corpus": {
            "name": "files",
            "path": "x",
            "patterns": ["*.txt", "*.md", "*.jsonl", "*.txt.gz", "*.jsonl.gz"],
            "text_field": "text",
            "validation_path": None,
            "validation_every": 50,
        },
        "tokenizer": {"name": "bpe", "vocab_size": 4096, "end_of_text": "<|endoftext|>"},
        "shard_tokens": 100_000_000,
    }
    assert source_settings(DataConfig())["corpus"] == {"name": "stdlib", "validation_every": 50}
