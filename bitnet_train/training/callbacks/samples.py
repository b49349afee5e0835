"""Texts on the way, in samples.md."""

import re
from pathlib import Path

import lightning as L

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.evaluation.generate import generate_text
from bitnet_train.evaluation.sampling import Sampling
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due
from bitnet_train.training.log_files import LogFile
from bitnet_train.training.module import PretrainingModule, TrainingModule

HEADING = "## Step "


class Samples(StepCallback):
    """Appends a section per sampled step, one text per prompt."""

    def __init__(self, clock: TrainingClock, tokenizer: TextTokenizer, path: Path) -> None:
        self.clock, self.tokenizer, self.log_file = clock, tokenizer, LogFile(path)

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        assert isinstance(module, PretrainingModule)
        cfg = module.cfg.samples
        if cfg.prompts and due(step, cfg.every_steps, module.cfg.trainer.max_steps):
            with self.clock.paused():
                self._write(module, step)

    def _write(self, module: PretrainingModule, step: int) -> None:
        cfg = module.cfg.samples
        module.decoder.eval()
        parts = [f"{HEADING}{step}\n"]
        for number, prompt in enumerate(cfg.prompts):
            pieces = generate_text(
                module.decoder,
                self.tokenizer,
                prompt,
                cfg.max_new_tokens,
                sampling=Sampling(cfg.temperature),
                seed=number,
            )
            # Four backticks, because sampled text may hold three.
            parts.append(f"````text\n{prompt}{''.join(pieces)}\n````\n")
        module.decoder.train()
        self.log_file.append("\n".join(parts) + "\n")


def cut_samples(path: Path, after_step: int) -> None:
    """Drop the sections of steps past ``after_step``, which a continued run writes again."""
    if not path.exists():
        return
    text = path.read_text()
    # A heading is followed by a fence; sampled text that looks like one is inside.
    for heading in re.finditer(rf"^{HEADING}(\d+)\n\n````text$", text, flags=re.MULTILINE):
        if int(heading[1]) > after_step:
            path.write_text(text[: heading.start()])
            return
