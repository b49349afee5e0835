"""Tasks of lm-evaluation-harness on the way, in evaluations.jsonl and W&B."""

import json
import random
from pathlib import Path

import lightning as L
import numpy as np
import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due
from bitnet_train.training.log_files import LogFile
from bitnet_train.training.loggers.metrics_csv import MetricsCsv
from bitnet_train.training.module import PretrainingModule, TrainingModule


class Tasks(StepCallback):
    """Appends a line with the scores of ``evaluate.tasks`` every ``evaluate.every_steps``."""

    def __init__(self, clock: TrainingClock, tokenizer: TextTokenizer, path: Path) -> None:
        self.clock, self.tokenizer, self.log_file = clock, tokenizer, LogFile(path)

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        assert isinstance(module, PretrainingModule)
        cfg = module.cfg.evaluate
        if not due(step, cfg.every_steps, module.cfg.trainer.max_steps):
            return
        from bitnet_train.evaluation.lm_eval_model import run_harness

        # The harness seeds every generator; training must not notice.
        states = random.getstate(), np.random.get_state()
        with self.clock.paused(), torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            module.decoder.eval()
            results = run_harness(module.decoder, self.tokenizer, cfg)
            module.decoder.train()
        random.setstate(states[0])
        np.random.set_state(states[1])
        self.log_file.append(json.dumps({"step": step, "results": results}) + "\n")
        flat = {f"tasks/{task}/{name}": float(v) for task, found in results.items() for name, v in found.items()}
        for logger in trainer.loggers:
            if not isinstance(logger, MetricsCsv):  # its columns are fixed
                logger.log_metrics(flat, step)


def cut_evaluations(path: Path, after_step: int) -> None:
    """Drop the lines of steps past ``after_step``, which a continued run writes again, and a line cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= after_step:
                kept.append(line + "\n")
        except ValueError:
            break
    path.write_text("".join(kept))
