"""What a training run does, as plain values that can be compared; other observers are in ``observe_parts``."""

import csv
import json
import re
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from bitnet_train.commands import train
from bitnet_train.config import Config
from bitnet_train.errors import BitnetTrainError
from bitnet_train.nn.decoder import Block
from bitnet_train.training.device import choose
from bitnet_train.training.distributed import launch, watchdog
from bitnet_train.training.distributed.strategy import several_processes
from bitnet_train.training.module import PretrainingModule
from bitnet_train.validation import to_config
from tests.composing import CATALOGUE, compose_node
from tests.options.place import SHORT, TEXT, Place

# Columns of metrics.csv that tell how fast it went.
TIMES = ("tokens_per_second", "images_per_second", "model_flops_share", "elapsed_seconds")


def settings(place: Place, changes: tuple[str, ...]) -> list[str]:
    """All settings of a configuration on text, or on images where ``changes`` begin with a recipe."""
    if changes and changes[0].startswith("+recipe="):
        return [place.fill(line) for line in (changes[0], *SHORT, *changes[1:])]
    if any(line.startswith("data=") for line in changes):  # another corpus: what only files have is left out
        base = [line for line in TEXT if not line.startswith(("data=", "data.corpus.", "data.tokenizer."))]
        return [place.fill(line) for line in (*base, "data.tokenizer.vocab_size=320", *SHORT, *changes)]
    return [place.fill(line) for line in (*TEXT, *SHORT, *changes)]


def configure(place: Place, changes: tuple[str, ...]) -> Config:
    """The validated configuration. Raises ConfigError.

    What chooses variants is composed by Hydra, once; single values are set in a copy of that.
    """
    lines = settings(place, changes)
    last = {line.lstrip("+").partition("=")[0]: line for line in lines}
    groups = tuple(line for key, line in last.items() if key in CATALOGUE.options)
    node = OmegaConf.merge(_composed(groups))
    assert isinstance(node, DictConfig)
    OmegaConf.set_struct(node, True)
    for key, line in last.items():
        if key not in CATALOGUE.options:
            node.merge_with_dotlist([line.lstrip("+")])
    node.run_name = node.run_name or "run"
    return to_config(node)


@cache
def _composed(groups: tuple[str, ...]) -> DictConfig:
    return compose_node(*groups)


def run_quietly(command: Callable[[Config], int], cfg: Config) -> tuple[str, str]:
    """How a command ended, exit code or error, and what it printed."""
    output, threads = StringIO(), torch.get_num_threads()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            ended = str(command(cfg))
    except BitnetTrainError as error:
        ended = f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return re.sub(r"\S*/results/\d+/", "", ended), output.getvalue()


def _folder(cfg: Config) -> Path:
    assert cfg.run_name is not None
    return Path(cfg.paths.runs) / cfg.run_name


def trained(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """How the run ended, its losses, norms and rates, what it sampled, and which checkpoints it left."""
    cfg = configure(place, changes)
    ended, _ = run_quietly(train.run, cfg)
    assert not ended.startswith("ConfigError"), ended
    folder = _folder(cfg)
    rows: list[dict[str, str]] = []
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open(newline="") as stream:
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(stream)]
    texts = {name: _text(folder / name) for name in ("samples.md", "layers.csv", "divergence.jsonl")}
    return {"ended": ended, "rows": rows, "files": sorted(p.name for p in folder.glob("checkpoints/step-*")), **texts}


def trained_eagerly(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same without torch.compile, which takes long for an optimizer of another library."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return trained(place, changes, monkeypatch)


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def warned(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The warnings that a run printed."""
    _, output = run_quietly(train.run, configure(place, changes))
    return [line for line in output.splitlines() if line.startswith("warning")]


def checked(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """How the token shards were compared with their manifest."""
    _, output = run_quietly(train.run, configure(place, changes))
    return re.findall(r"; checked (.*)", output)


def provenance(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Which kernels a run says it used."""
    cfg = configure(place, changes)
    run_quietly(train.run, cfg)
    return json.loads((_folder(cfg) / "provenance.json").read_text())["sessions"][-1]["chosen"]["kernels"]


def _calls(target: Any, name: str, keep: Callable[..., Any], replace: Any, place: Place, changes: tuple[str, ...],
           monkeypatch: pytest.MonkeyPatch) -> list[Any]:  # fmt: skip
    """What ``keep`` makes of the arguments of every call of ``target.name`` during training."""
    plain, calls = getattr(target, name), []

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(keep(*arguments, **named))
        return (replace or plain)(*arguments, **named)

    monkeypatch.setattr(target, name, call)
    run_quietly(train.run, configure(place, changes))
    monkeypatch.undo()
    return calls


def micro_batches(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The shapes that forward passes of training see."""
    return _calls(PretrainingModule, "training_step", lambda _, batch, __: tuple(batch.shape), None,
                  place, changes, monkeypatch)  # fmt: skip


def recomputed(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """How often a block is computed in training, which the same losses come of."""
    return _calls(Block, "_compute", lambda *_: torch.is_grad_enabled(), None, place, changes, monkeypatch)


def compiled(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is handed to torch.compile (which is not run: it takes half a minute)."""
    return _calls(torch, "compile", lambda function, **_: function.__name__, lambda function, **_: function,
                  place, changes, monkeypatch)  # fmt: skip


def loaders(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The processes of every loader."""
    return _calls(DataLoader, "__init__", lambda *_, **named: named.get("num_workers"), None,
                  place, changes, monkeypatch)  # fmt: skip


def wandb(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings of the Weights & Biases logger, with a key configured; nothing is sent."""
    import lightning.pytorch.loggers as loggers_module

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    made: list[dict[str, Any]] = []

    class Recorder(CSVLogger):
        def __init__(self, **named: Any) -> None:
            made.append({key: named[key] for key in ("project", "entity", "tags", "offline", "mode")})
            super().__init__(named["save_dir"])
            self.experiment.finish = lambda: None  # type: ignore[attr-defined]

    monkeypatch.setattr(loggers_module, "WandbLogger", Recorder)
    ended, _ = run_quietly(train.run, configure(place, changes))
    return ended, made


def processes(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """How many processes a run starts and how they share the work, or why it cannot."""
    started: list[int] = []
    monkeypatch.setattr(launch, "launch", lambda _, count: started.append(count) or 0)
    cfg = configure(place, changes)
    ended, _ = run_quietly(train.run, cfg)
    return ended, started, type(several_processes(cfg).get("strategy")).__name__


def hangs(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whether a run that does nothing for two seconds is taken for one that hangs."""
    ended: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "LOOK_EVERY", 0.05)
        folder = place.folder / "hang"
        folder.mkdir(exist_ok=True)
        dog = watchdog.Watchdog(folder, configure(place, changes).trainer.hang_timeout, ended.append)
        dog.start(3)
        time.sleep(2)
        dog.stop()
    return ended


def device(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where a run would compute, or that it cannot."""
    del monkeypatch
    try:
        return choose(configure(place, changes)).device
    except BitnetTrainError as error:
        return str(error)
