"""What the other commands do, and what is read, as plain values that can be compared."""

import hashlib
import json
import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer

from bitnet_train.commands import benchmark, prepare, train
from bitnet_train.data.corpus import open_corpus
from bitnet_train.data.hub import HubSource
from bitnet_train.data.images.sources import load_images
from bitnet_train.data.prepare import shard_folder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import build_spec
from tests.options.observe import configure, run_quietly, settings
from tests.options.place import Place


def _digests(folder: Path) -> dict[str, str]:
    """File -> digest of its content, of what is not a record of times and places."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.name not in ("manifest.json", "verification.json", "bitnet_train.json")
    }


def prepared(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The token shards, byte by byte, their splits, and whether an existing folder was written again."""
    del monkeypatch
    cfg = configure(place, changes)
    folder = shard_folder(cfg.text, Path(cfg.paths.data))
    before = folder.stat().st_ino if folder.is_dir() else None
    ended, _ = run_quietly(prepare.run, cfg)
    assert ended == "0", ended
    again = before is not None and folder.stat().st_ino != before
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = {name: (entry["documents"], entry["tokens"]) for name, entry in manifest["splits"].items()}
    return _digests(folder), splits, again


def shared_out(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """How the work of preparing was shared out: what is said, and the pieces that are there when it ends."""
    del monkeypatch
    cfg = configure(place, changes)
    ended, output = run_quietly(prepare.run, cfg)
    pieces = sorted(path.name for path in Path(cfg.paths.data).glob("*.parts/*.json"))
    return ended, re.sub(r"\S*/results/\d+/", "", output), pieces


def mirrored(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The checkpoints that a run leaves on another file system."""
    import fsspec

    run_quietly(train.run, configure(place, changes))
    return sorted(fsspec.filesystem("memory").find("flip"))


def buffers(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The shapes of what the model keeps beside its weights."""
    del monkeypatch
    cfg = configure(place, changes)
    decoder = build_decoder(cfg.decoder, build_spec(cfg.quant), cfg.init, cfg.seed)
    return {name: tuple(tensor.shape) for name, tensor in decoder.named_buffers()}


def first_documents(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whether the first documents are for training or for validation."""
    del monkeypatch
    corpus = open_corpus(configure(place, changes).text.corpus)
    return [document.validation for document in islice(corpus.documents(), 200)]


def hub_rows(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """How a data set of the hub is held: in the cache, or read as it comes."""
    del monkeypatch
    corpus = open_corpus(configure(place, changes).text.corpus)
    assert isinstance(corpus, HubSource)
    return type(corpus._split("train"))


def hub_call(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``datasets`` is asked for, and the sentence that it cannot be had."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **named: Any) -> Any:
        asked.append((arguments, named))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    ended, _ = run_quietly(prepare.run, configure(place, changes))
    return ended, asked


def tokenizer_call(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is asked of the hub for a tokenizer."""
    asked: list[Any] = []

    class Refusing:
        from_file = Tokenizer.from_file

        @staticmethod
        def from_pretrained(*arguments: Any, **named: Any) -> Any:
            asked.append((arguments, named))
            raise ConnectionError("no network")

    monkeypatch.setattr("bitnet_train.data.tokenizer.Tokenizer", Refusing)
    ended, _ = run_quietly(prepare.run, configure(place, changes))
    return ended, asked


def images(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pixels and classes of every split."""
    del monkeypatch
    splits = load_images(configure(place, changes).images)
    return [
        (part.pixels.shape, hashlib.sha256(part.pixels.tobytes()).hexdigest(), part.labels.tolist())
        for part in (splits.train, splits.validation, splits.test)
    ]


def command(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command line prints, without speeds and times."""
    del monkeypatch
    lines = changes if any(line.startswith("run=") for line in changes) else settings(place, changes)
    code, output = place.answer(*lines)
    assert code == 0, output
    return re.sub(r"\S*/results/\d+/|[\d,]+ tokens/s|\d+:\d\d:\d\d|[\d.]+ s\b", "", output)


def folders(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where a run and its shards are put."""
    del monkeypatch
    code, output = place.answer(*settings(place, changes), "trainer.max_steps=1")
    assert code == 0, output
    return re.findall(r"run folder: (.*?);|tokens in (\S+);", re.sub(r"/results/\d+/runs", "/runs", output))


def exported(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The files of an export, byte by byte, and what its verification measured."""
    del monkeypatch
    run = Path(place.fill(next(line for line in changes if line.startswith("run="))).partition("=")[2])
    folder = run / "export"
    shutil.rmtree(folder, ignore_errors=True)
    code, output = place.answer(*changes)
    assert code == 0, output
    return _digests(folder), re.findall(r"perplexity.*", output)


def harness(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What lm-evaluation-harness is asked for."""
    from bitnet_train.evaluation import lm_eval_model

    asked: list[Any] = []

    def evaluate(tasks: list[str], num_fewshot: int | None, limit: int | None, **rest: Any) -> Any:
        asked.append((tasks, num_fewshot, limit, rest["task_manager"]))
        return {"results": {}}

    monkeypatch.setattr(lm_eval_model, "simple_evaluate", evaluate)
    monkeypatch.setattr(lm_eval_model, "check_harness", lambda *_, **__: None)
    monkeypatch.setattr(lm_eval_model, "_task_manager", lambda cfg: cfg.task_folder)
    lines = changes if any(line.startswith("run=") for line in changes) else settings(place, changes)
    code, output = place.answer(*lines)
    assert code == 0, output
    return asked


def benchmarked(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What was measured how often; not how fast it was."""
    del monkeypatch
    cfg = configure(place, changes)
    ended, output = run_quietly(benchmark.run, cfg)
    assert ended == "0", output
    found: dict[str, Any] = {}
    for path in sorted((Path(cfg.paths.runs) / "measured" / "benchmark").glob("*.json")):
        content = json.loads(path.read_text())
        found[path.name] = [
            (name, len(c["seconds"]), c["warmup_losses"], c.get("memory") is None, c["profile_seconds"] is None)
            for name, c in content.get("contenders", {}).items()
        ] or [re.sub(r"\d+\.\d+(e-\d+)?", "", json.dumps(content["shapes"], sort_keys=True))]
    return found


def converted(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The converted checkpoint, byte by byte, where it lies and what was said about it."""
    del monkeypatch
    lines = [place.fill(line) for line in changes]
    code, output = place.answer(*lines)
    assert code == 0, output
    to = Path(next(line for line in reversed(lines) if line.startswith("convert.to=")).partition("=")[2])
    return to.name, _digests(to), re.sub(r"\S*/results/\d+/|[\d.]+ s\b", "", output)
