"""lm-evaluation-harness: our model API gives the scores that the harness gets from exports through its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation import lm_eval_model
from bitnet_train.evaluation.config import EvaluateConfig
from bitnet_train.evaluation.lm_eval_model import DecoderLM, _index_tasks, check_harness, run_harness
from bitnet_train.export.canonical import CanonicalCheckpoint, open_checkpoint
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.huggingface.variant import Storage, choose_variant
from bitnet_train.export.huggingface.writer import write_huggingface
from bitnet_train.quant.spec import QuantSpec
from tests.conftest import make_text
from tests.export.conftest import decoder_config, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "own_tasks_alone")


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the harness's own tasks, whose thousands of files take it ten seconds to read."""
    monkeypatch.setattr(lm_eval_model, "TaskManager", partial(TaskManager, include_defaults=False))
    _index_tasks.cache_clear()
    yield
    _index_tasks.cache_clear()


TASKS = {
    "mini_choice": """
task: mini_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "mini_text": """
task: mini_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "mini_answer": """
task: mini_answer
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local tasks with their data: whole documents cut into questions, and choices of one and several tokens."""
    folder = tmp_path_factory.mktemp("tasks")
    questions, texts = [], []
    for i in range(40):
        words = make_text(i).split(" ")
        choices = [" " + " ".join(make_text(i + j).split(" ")[3 : 4 + (i + j) % 3]) for j in range(4)]
        questions.append({"question": " ".join(words[: 3 + i % 30]), "choices": choices, "answer": i % 4})
        texts.append({"text": make_text(i) * (1 + i % 3)})
    for name, rows in (("choice", questions), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> CanonicalCheckpoint:
    cfg, spec = decoder_config(), QuantSpec()
    return open_checkpoint(save_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt", cfg, spec), cfg, spec)


def harness_on_export(
    canonical: CanonicalCheckpoint, bpe: TextTokenizer, storage: Storage, folder: Path, out: Path
) -> dict[str, Any]:
    """Scores of an export through the harness's own ``hf`` model, as its command line runs it."""
    write_huggingface(canonical, bpe, out, choose_variant(storage, canonical.cfg, ExportConfig()))
    code = (
        "import json, sys, torch; torch.set_num_threads(1); torch.compiler.set_stance('force_eager')\n"
        "from lm_eval.evaluator import simple_evaluate\nfrom lm_eval.tasks import TaskManager\n"
        f"out = simple_evaluate(model='hf', model_args='pretrained={out},dtype=float32', device='cpu', batch_size=4, "
        f"task_manager=TaskManager(include_path={str(folder)!r}, include_defaults=False), "
        f"tasks={list(TASKS)!r}, bootstrap_iters=10)\n"
        "print('\\n' + json.dumps(out['results'], default=str))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("storage", [Storage.packed, Storage.dense])
def test_scores_of_run_and_exports_are_equal(
    storage: Storage, canonical: CanonicalCheckpoint, bpe: TextTokenizer, folder: Path, tmp_path: Path
) -> None:
    # Dense weights take their inputs as they are: the run is asked in the same way.
    run = canonical.with_float_activations() if storage is Storage.dense else canonical
    ours = run_harness(run.decoder(), bpe, EvaluateConfig(tasks=list(TASKS), task_folder=str(folder)))
    theirs = harness_on_export(canonical, bpe, storage, folder, tmp_path / "export")
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["mini_choice"][metric] == theirs["mini_choice"][metric]
    assert 0 < ours["mini_choice"]["acc,none"] < 1
    assert ours["mini_text"]["bits_per_byte,none"] == pytest.approx(theirs["mini_text"]["bits_per_byte,none"], rel=1e-4)
    assert ours["mini_answer"]["exact_match,none"] == theirs["mini_answer"]["exact_match,none"]


def test_log_likelihoods_do_not_depend_on_the_batch(canonical: CanonicalCheckpoint, bpe: TextTokenizer) -> None:
    lm = DecoderLM(canonical.decoder(), bpe)
    ids = [[bpe.bos_id, *bpe.encode(make_text(i))][: 20 + 30 * i] for i in range(6)]
    requests = [(None, row[:-3], row[-3:]) for row in ids]
    together = lm._loglikelihood_tokens(requests)
    for request, (score, greedy) in zip(requests, together, strict=True):
        ((alone, same),) = lm._loglikelihood_tokens([request])
        assert score == pytest.approx(alone, rel=1e-4)
        assert greedy == same
        whole = torch.tensor([request[1] + request[2]])[:, -129:]
        with torch.no_grad():
            logits = torch.log_softmax(lm.decoder(whole[:, :-1])[0], -1)
        wanted = float(logits[-3:].gather(-1, whole[0, -3:, None]).sum())
        assert score == pytest.approx(wanted, rel=1e-4)


def test_a_context_longer_than_the_model_keeps_its_end(canonical: CanonicalCheckpoint, bpe: TextTokenizer) -> None:
    lm = DecoderLM(canonical.decoder(), bpe)
    long = list(range(300))
    assert lm._loglikelihood_tokens([(None, long, [7])]) == lm._loglikelihood_tokens([(None, long[-128:], [7])])


def test_special_tokens_in_front(canonical: CanonicalCheckpoint, bpe: TextTokenizer) -> None:
    lm = DecoderLM(canonical.decoder(), bpe)
    assert lm.tok_encode("abc") == [bpe.bos_id, *bpe.encode("abc")]
    assert lm.tok_encode("abc", add_special_tokens=False) == bpe.encode("abc")
    assert lm.tok_encode("<|endoftext|>abc") == [bpe.bos_id, *bpe.encode("abc")]


def test_unknown_tasks_and_missing_data_are_one_sentence(
    canonical: CanonicalCheckpoint, bpe: TextTokenizer, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no task 'mini_chioce'"):
        check_harness(EvaluateConfig(tasks=["mini_chioce"], task_folder=str(folder)))
    check_harness(EvaluateConfig(tasks=["mini_choice"], task_folder=str(folder)))
    gone = TASKS["mini_choice"].replace("FOLDER", str(tmp_path / "none")).replace("mini_choice", "gone")
    (tmp_path / "gone.yaml").write_text(gone)
    with pytest.raises(ConfigError, match=r"evaluate\.tasks=gone cannot be run"):
        run_harness(canonical.decoder(), bpe, EvaluateConfig(tasks=["gone"], task_folder=str(tmp_path)))


def test_the_tasks_are_read_once_and_again_when_a_file_changes(folder: Path, tmp_path: Path) -> None:
    mine = EvaluateConfig(tasks=["mini_choice"], task_folder=str(tmp_path))
    (tmp_path / "mini.yaml").write_text(TASKS["mini_choice"].replace("FOLDER", str(folder)))
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nowhere")
    check_harness(mine)
    began = _index_tasks.cache_info()
    check_harness(mine)
    assert _index_tasks.cache_info().misses == began.misses
    (tmp_path / "second.yaml").write_text(TASKS["mini_choice"].replace("mini_choice", "second"))
    check_harness(replace(mine, tasks=["second"]))
    assert _index_tasks.cache_info().misses == began.misses + 1
