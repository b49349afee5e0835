"""Preparing and estimating a mixture through the command line, and what is said about its keys."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_train.__main__ import answer
from bitnet_train.config import to_plain
from bitnet_train.data.config import DataConfig, HubCorpus
from bitnet_train.data.describe import describe
from bitnet_train.errors import ConfigError
from bitnet_train.validation import check_continuation
from tests.composing import compose_config

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    for name, count in (("web", 30), ("code", 10)):
        Path(name).mkdir()
        for i in range(count):
            Path(f"{name}/{i:02d}.txt").write_text(f"{name} text {i} of several words\n" * 20)
    own = "corpus: files, validation_every: 8"
    corpora = f"{{web: {{{own}, path: web, weight: 3}}, code: {{{own}, path: code}}}}"

    def command(*settings: str) -> tuple[int, str]:
        mixture = ("+recipe=tiny", "data=mixture", f"data.corpus.corpora={corpora}", "data.tokenizer.vocab_size=300")
        code = answer([*mixture, "data.stages=[{from: 0.5, weights: {code: 1}}]", *settings])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return command


def test_prepare_and_estimate_say_what_the_data_are(run: Run) -> None:
    settings = ("data.sequence_length=32", "trainer.batch_tokens=256", "trainer.max_steps=100")
    said = "mixture of 2 corpora (code 25.0%, web 75.0%; from step 50 code 100.0%; code: files, web: files)"
    code, output = run("command=estimate", *settings)
    assert code == 0, output
    assert said in " ".join(output.split())
    assert "known once the data are prepared" in output
    code, output = run("command=prepare")
    assert code == 0, output
    for line in ("train: 36 documents", "val: 4 documents", "train/code: 9 documents", "val/web: 3 documents"):
        assert line in output
    code, output = run("command=estimate", *settings)
    assert code == 0, output
    figures = json.loads(Path("runs/tiny/estimate/estimate.json").read_text())
    manifest = json.loads(next(Path("data").glob("*/manifest.json")).read_text())
    assert figures["data"] == said
    wanted = {"code": 50 * 256 * 1.25, "web": 50 * 256 * 0.75}
    assert figures["corpus_epochs"] == {
        name: pytest.approx(tokens / manifest["splits"][f"train/{name}"]["tokens"]) for name, tokens in wanted.items()
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.corpus.corpora.web.weight=-1", "data.corpus.corpora.web.weight must be a positive number"),
        (
            "data.corpus.corpora.web.text_field=x",
            "is not given yet: write it with a plus, +data.corpus.corpora.web.text",
        ),
        ("+data.corpus.corpora.web.text_feild=x", "web.text_feild is not a configuration key: files has path"),
        ("data.corpus.corpora.web.path=nowhere", "data.corpus.corpora.web.path=nowhere does not exist"),
        ("data.stages=[{from: 3, wieghts: {code: 1}}]", "wieghts is not a configuration key. Did you mean 'weights'"),
        ("data.stages=[{from: soon, weights: {code: 1}}]", "from: Value 'soon' of type"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(run: Run, setting: str, message: str) -> None:
    code, output = run("command=prepare", setting)
    assert code == 2
    assert message in output
    assert len(output.strip().splitlines()) == 1


def test_a_run_from_before_there_were_stages_can_be_continued() -> None:
    cfg = compose_config("+recipe=tiny")
    saved = to_plain(cfg)
    del saved["data"]["stages"]
    check_continuation(saved, cfg, Path("config.yaml"))
    staged = compose_config(
        "+recipe=tiny",
        "data=mixture",
        "data.corpus.corpora={a: {corpus: stdlib}, b: {corpus: stdlib}}",
        "data.stages=[{from: 3, weights: {a: 1}}]",
    )
    saved = to_plain(staged)
    staged.data.stages = None
    with pytest.raises(ConfigError, match=r"was started with data\.stages="):
        check_continuation(saved, staged, Path("config.yaml"))


def test_cards_name_hub_data_sets_and_no_local_paths(tmp_path: Path) -> None:
    hub = HubCorpus(path="someone/text", subset="big", revision="v2", max_documents=5000)
    assert describe(DataConfig(corpus=hub), 10) == (
        "hub (someone/text, big, split train, revision v2, the first 5,000 rows)"
    )
    assert describe(DataConfig(corpus=HubCorpus(path=str(tmp_path))), 10) == "hub (a local data set, split train)"
    assert describe(DataConfig(), 10) == "stdlib"
