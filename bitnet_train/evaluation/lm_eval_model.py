"""Our decoder as a model of lm-evaluation-harness, through its own model API (``pip install "bitnet-train[eval]"``).

Text is encoded as the harness does with a Hugging Face export of the same model: the bos id in front of every context,
as every training document starts, so that scores are the same either way.
"""

import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager, get_task_dict
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.config import EvaluateConfig
from bitnet_train.evaluation.generate import generate_texts
from bitnet_train.evaluation.harness_trust import distrust
from bitnet_train.evaluation.sampling import Sampling
from bitnet_train.nn.decoder import Decoder

# Tokens of one forward, padding included.
BATCH_TOKENS = 8192
# What the harness generates at most when a task does not say.
DEFAULT_NEW_TOKENS = 256


class DecoderLM(TemplateLM):
    """Answers the harness's three kinds of requests with a :class:`Decoder` in eval mode."""

    def __init__(self, decoder: Decoder, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self.decoder, self.text = decoder, tokenizer
        self.max_length = decoder.cfg.context

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = str(self.text.tokenizer.id_to_token(self.text.bos_id))
        if add_special_tokens is None and string.startswith(bos):
            return [self.text.bos_id, *self.text.encode(string.removeprefix(bos))]
        return [*([] if add_special_tokens is False else [self.text.bos_id]), *self.text.encode(string)]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest_answer = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest_answer > self.max_length:
            raise ValueError(f"an answer has {longest_answer} tokens, and the model's context is {self.max_length}")
        device = self.decoder.embed_tokens.weight.device
        # Like lengths together; the longest first, so that running out of memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        while order:
            longest = min(self.max_length, len(requests[order[0]][1]) + len(requests[order[0]][2]) - 1)
            count = max(1, BATCH_TOKENS // longest)
            batch, order = order[:count], order[count:]
            inputs = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :][:-1] for i in batch]
            ids = torch.zeros(len(batch), max(map(len, inputs)), dtype=torch.int64)
            for row, tokens in enumerate(inputs):
                ids[row, : len(tokens)] = torch.tensor(tokens)  # what is behind cannot be seen by what is before
            logits = self.decoder(ids.to(device))
            for row, i in enumerate(batch):
                targets = torch.tensor(requests[i][2], device=device)
                end = len(inputs[row])
                seen = F.log_softmax(logits[row, end - len(targets) : end].float(), dim=-1)
                score = float(seen.gather(-1, targets[:, None]).sum())
                answers[i] = (score, bool((seen.argmax(-1) == targets).all()))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows, counts = [], []
        for request in requests:
            cut = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
            parts = [(None, *make_disjoint_window(pair)) for pair in cut]
            windows.extend(parts)
            counts.append(len(parts))
        scores = iter(score for score, _ in self._loglikelihood_tokens(windows))
        return [sum(next(scores) for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
            count = int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            room = self.max_length - count
            if room < 2:
                raise ValueError(f"it asks for {count} new tokens, and the model's context is {self.max_length}")
            ids = self.text.encode(context)
            if len(ids) + 1 > room:  # the end of the context is what the answer continues
                context = self.text.decode(ids[-(room - 1) :])
            texts += generate_texts(
                self.decoder, self.text, [context], count, sampling=Sampling(temperature), stop=stop
            )
        return texts


def check_harness(cfg: EvaluateConfig, load: bool = False) -> None:
    """Raises ConfigError when the harness does not know a task of ``cfg``, or (``load``) cannot load its data."""
    manager = _task_manager(cfg)
    for task in cfg.tasks:
        if not manager.match_tasks([task]):
            where = f", nor in {cfg.task_folder}" if cfg.task_folder else "; give evaluate.task_folder= for your own"
            raise ConfigError(f"evaluate.tasks: lm-evaluation-harness has no task '{task}'{where}.")
    if load:
        try:
            get_task_dict(list(cfg.tasks), manager)
        except Exception as error:
            raise _cannot_run(cfg, error) from None


def run_harness(decoder: Decoder, tokenizer: TextTokenizer, cfg: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value of the tasks in ``cfg``, as the harness reports them, numbers only.

    Raises ConfigError when a task or its data cannot be loaded.
    """
    # Hub downloads print and retry for minutes; the harness's own progress bars are for its command line.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        outcome = simple_evaluate(
            model=DecoderLM(decoder, tokenizer),
            tasks=list(cfg.tasks),
            num_fewshot=cfg.shots,
            limit=cfg.limit,
            task_manager=_task_manager(cfg),
            log_samples=False,
            bootstrap_iters=1000,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a task is other people's YAML, templates and code
        raise _cannot_run(cfg, error) from None
    assert outcome is not None
    return {
        task: {name: value for name, value in found.items() if isinstance(value, int | float)}
        for task, found in outcome["results"].items()
    }


def _cannot_run(cfg: EvaluateConfig, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ConfigError(f"evaluate.tasks={','.join(cfg.tasks)} cannot be run: {reason}")


def _task_manager(cfg: EvaluateConfig) -> TaskManager:
    distrust()
    if cfg.task_folder is None:
        return _index_tasks(None, ())
    folder = Path(cfg.task_folder).expanduser()
    # A link that leads nowhere is no task: the harness passes it over as well.
    files = tuple((str(f), f.stat().st_mtime_ns) for f in sorted(folder.rglob("*.yaml")) if f.is_file())
    return _index_tasks(str(folder), files)


@lru_cache(maxsize=1)
def _index_tasks(folder: str | None, files: tuple[tuple[str, int], ...]) -> TaskManager:
    """The harness's tasks and those of ``folder``, read again when its ``files`` have changed.

    The harness reads its 14,000 files of tasks for that, which takes from ten seconds to a minute: once in a process,
    not at every evaluation on the way.
    """
    del files
    return TaskManager(include_path=folder)
