"""Nothing from a checkpoint, an export, a data set or a configuration runs code."""

import ast
import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet_train.__main__ import answer
from bitnet_train.data import chat, corpus, document
from bitnet_train.data.chat_template import ChatEncoder
from bitnet_train.data.config import FilesCorpus
from bitnet_train.data.corpus import FilesSource
from bitnet_train.data.shard_files import ShardFiles
from bitnet_train.data.tokenizer import TextTokenizer, load_tokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.training.run_folder import check_checkpoint
from bitnet_train.trust import check_content
from tests.composing import fresh_recipes

PACKAGE = Path(__file__).parents[2] / "bitnet_train"
# Every way of calling Python by name that this package could take.
UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def calls() -> list[tuple[Path, str, ast.Call]]:
    """(file, dotted name, call) of every call in the package."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((path, ast.unparse(node.func), node))
    return found


def given(call: ast.Call, name: str) -> Any:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_the_package_has_no_unsafe_call() -> None:
    loads = seen = 0
    for path, name, call in calls():
        where = f"{path}:{call.lineno}"
        if name == "torch.load":
            assert given(call, "weights_only") == "True", where
            loads += 1
        if name.endswith("trainer.fit"):
            assert given(call, "weights_only") == "True", where
        if name.rpartition(".")[2] == "from_pretrained" and ".Auto" in f".{name}":
            assert given(call, "trust_remote_code") == "False", where
            seen += 1
        assert name not in ("eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "os.system"), where
        assert not name.endswith(("hydra.utils.instantiate", "hydra.utils.get_class")), where
        assert given(call, "allow_pickle") in (None, "False"), where
        assert given(call, "shell") in (None, "False"), where
        assert given(call, "trust_remote_code") in (None, "False"), where
    assert loads >= 4
    assert seen >= 5
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            unsafe = {name.partition(".")[0] for name in names} & UNSAFE
            assert unsafe <= ({"pickle"} if path.name == "checkpoint_files.py" else set()), path
    # That one reads the metadata of shards, by an unpickler that knows the classes that belong there.
    pickled = {(path.name, name) for path, name, _ in calls() if name.partition(".")[0] == "pickle"}
    assert pickled == {("checkpoint_files.py", "pickle.UnpicklingError")}


class Evil:
    """Unpickled, it leaves a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Any:
    """Where the trace of executed code would be."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists(), "code was executed"


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"global_step": 1, "state_dict": {"w": torch.ones(2)}, "x": Evil(mark)}, path)
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        check_checkpoint(path)
    path.write_bytes(pickle.dumps({"global_step": 1, "state_dict": {}, "x": Evil(mark)}))
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        check_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"global_step": 1, "state_dict": {}, "x": Evil(mark)}))
        archive.writestr("archive/version", "3")
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        check_checkpoint(path)


def test_a_pickle_in_a_shard_or_a_tokenizer_is_not_executed(tmp_path: Path, mark: Path) -> None:
    shard = tmp_path / "train-00000.npy"
    np.save(shard, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="it holds object of shape"):
        ShardFiles([shard], [1], [""]).read(0, 0, 1)
    (tmp_path / "tokenizer.json").write_bytes(pickle.dumps(Evil(mark)))
    (tmp_path / "special_tokens.json").write_text('{"bos_id": 0, "eos_id": 0}')
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


def test_an_oversized_header_of_a_shard_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / "x.npy"
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (" + b"(" * 3000 + b"1,), }"
    shard.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ConfigError, match="cannot be read"):
        ShardFiles([shard], [1], [""]).read(0, 0, 1)
    header = b" " * 60000
    shard.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ConfigError, match="cannot be read"):
        ShardFiles([shard], [1], [""]).read(0, 0, 1)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence of a command line that is refused."""
    with fresh_recipes():
        assert answer(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1, error
    return error


def test_python_in_yaml_is_not_executed(
    tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = f"!!python/object/apply:os.mkdir ['{mark}']"
    recipes = tmp_path / "mine"
    recipes.mkdir()
    (recipes / "bad.yaml").write_text(f"seed: {evil}\n")
    assert "not readable YAML" in said(capsys, "--config-dir", str(recipes), "+recipe=bad", "command=estimate")
    run = tmp_path / "runs/x"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"seed: {evil}\n")
    assert "cannot be read" in said(capsys, "command=export", f"run={run}")


@pytest.mark.parametrize(
    "setting",
    [
        "+optimizer._target_=os.system",
        "+model.x._target_=os.system",
        "hydra.launcher._target_=os.system",
        "+hydra.launcher.executor._target_=os.system",
        "+hydra.sweeper.x={_target_: os.system}",
        "+hydra.callbacks.x._target_=os.system",
        "+hydra.callbacks={x: {_target_: os.system}}",
        "+hydra.job_logging.handlers.x.class=os.system",
        "hydra.searchpath=[file:///tmp/evil]",
    ],
)
def test_settings_that_name_code_are_refused(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = said(capsys, "+recipe=tiny", "command=estimate", setting)
    assert "names code" in sentence or "is no setting of this program" in sentence


@pytest.mark.parametrize("flag", ["--config-path", "--config-name", "--experimental-rerun"])
def test_flags_that_read_unchecked_files_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag} is not for this program" in said(capsys, "+recipe=tiny", flag, "x", "command=estimate")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bad.yaml", "optimizer: {_target_: os.system}\n"),
        ("recipes/bad.yaml", "model: {x: [{_target_: os.system}]}\n"),
        ("recipe/bad.yaml", "# @package _global_\nhydra: {callbacks: {x: {_target_: os.system}}}\n"),
        ("bad.yaml", "hydra: {job_logging: {handlers: {x: {'()': os.system}}}}\n"),
        ("optimizer/bad.yaml", "_target_: os.system\n"),
        ("hydra/callbacks/bad.yaml", "x: {_target_: os.system}\n"),
        ("hydra/launcher/bad.yaml", "_target_: os.system\n"),
        ("hydra/launcher/bad.yaml", "_target_: hydra_plugins.x.Y\nparams: {_target_: os.system}\n"),
    ],
)
def test_recipes_that_name_code_are_refused(
    tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    sentence = said(capsys, "--config-dir", str(tmp_path), "+recipe=tiny", "command=estimate")
    assert str(path) in sentence
    assert "names code" in sentence or "is no setting of this program" in sentence


def test_hydras_own_launchers_and_sweepers_stay() -> None:
    own = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    check_content({"hydra": {"launcher": {"_target_": own}}, "defaults": [{"override /schedule": "wsd"}]}, "x")
    slurm = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    check_content({"hydra": {"launcher": {"_target_": slurm, "timeout_min": 60}, "sweep": {"dir": "x"}}}, "x")
    with pytest.raises(ConfigError, match="names code"):
        check_content({"a": [{"b": {"_target_": own}}]}, "x")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.mkdir('executed') }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(999999999) %}x{% endfor %}",
    ],
)
def test_chat_templates_run_in_a_sandbox(template: str, bpe: TextTokenizer) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    conversation = chat.Conversation("a b", False, tuple(talk), "line 1")
    with pytest.raises(ConfigError, match="line 1: the chat template"):
        ChatEncoder(bpe, template).encode(conversation)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (document, corpus):
        monkeypatch.setattr(module, "LONGEST_DOCUMENT", 1 << 20)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz", "bomb.jsonl"])
def test_files_that_unpack_to_any_size_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else io.open
    with opener(path, "wb") as stream:  # type: ignore[operator]
        for _ in range(64):
            stream.write(b"a" * (1 << 18))
    source = FilesSource(FilesCorpus(path=str(path), patterns=["*"]))
    with pytest.raises(ConfigError, match="longer than 1 MiB, which no document is"):
        list(source.documents())
    with pytest.raises(ConfigError, match="longer than 1 MiB"):
        list(chat.ChatSource(chat.ChatCorpus(path=str(path), patterns=["*"])).documents()) if "jsonl" in name else list(
            source.documents()
        )


def test_a_picture_that_unpacks_to_any_size_is_refused(tmp_path: Path) -> None:
    import struct
    import zlib

    from bitnet_train.data.images.config import HubSource
    from bitnet_train.data.images.sources import _unpacked

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [{"bytes": png, "path": None}]}, features=features)
    with pytest.raises(ConfigError, match=r"Image 0 of here cannot be decoded \(Image size"):
        list(_unpacked(table, HubSource(path="here")))


def test_tasks_of_ones_own_are_data(tmp_path: Path, mark: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import utils
    from lm_eval.tasks import TaskManager

    from bitnet_train.evaluation.harness_trust import distrust

    distrust()
    distrust()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\ndef f(x): return x\n")
    (tmp_path / "tasks/mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: !function code.f\n"
    )
    with pytest.raises(Exception, match="names the Python function"):
        TaskManager(include_path=str(tmp_path / "tasks")).load(["mine"])
    with pytest.raises(Exception, match="unsafe"):
        utils.apply_template("{{ ''.__class__.__mro__ }}", {})
    assert utils.apply_template("{{ a | regex_replace('b', 'c') }}!\n", {"a": "abc"}) == "acc!\n"


def test_a_repository_with_code_of_its_own_is_not_loaded(tmp_path: Path, mark: Path) -> None:
    from bitnet_train.training.teachers.source import _transformers_source

    (tmp_path / "model").mkdir()
    (tmp_path / "model/code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass C: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"loss\.teacher="):
        _transformers_source(str(tmp_path / "model"), tmp_path / "model")
