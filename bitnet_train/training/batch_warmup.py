"""Smaller batches at the beginning of a run (``trainer.batch_warmup``), as a pure function of the step.

A step keeps its number of micro-batches (Lightning's accumulation is one number), so the micro-batches shrink.
"""

import math
from dataclasses import dataclass

from omegaconf import MISSING

from bitnet_train.errors import ConfigError
from bitnet_train.steps import as_steps

# torch.compile keeps eight graphs of one function, and every stage and the full batch take one each.
MOST_STAGES = 7


@dataclass
class BatchStageConfig:
    """A span at the beginning of the run with a smaller batch; it starts where the one before ends."""

    # The step that the stage ends before: a number of steps, or below 1 a share of trainer.max_steps.
    until: float = MISSING
    # Tokens per optimizer step.
    tokens: int = MISSING


@dataclass(frozen=True)
class BatchStage:
    """Sequences per step before step ``until`` (and from the end of the stage before)."""

    until: int
    sequences: int


def batch_stages(
    stages: list[BatchStageConfig], max_steps: int, batch_tokens: int, sequence_length: int
) -> tuple[BatchStage, ...]:
    """The stages in steps and sequences; none for a run without steps.

    Raises ConfigError unless the borders and the batches rise, the last border is inside the run, every batch is whole
    sequences and smaller than ``batch_tokens``.
    """
    if len(stages) > MOST_STAGES:
        raise ConfigError(f"trainer.batch_warmup has {len(stages)} stages; it can have {MOST_STAGES} at most.")
    found: list[BatchStage] = []
    for number, stage in enumerate(stages if max_steps else []):
        key = f"trainer.batch_warmup[{number}]"
        after = found[-1] if found else BatchStage(0, 0)
        end = as_steps(stage.until, max_steps, f"{key}.until") if math.isfinite(stage.until) else 0
        if not after.until < end < max_steps:
            raise ConfigError(
                f"{key}.until={stage.until:g} is step {end}, which must be after step {after.until} and before the "
                f"end of the run, trainer.max_steps={max_steps}."
            )
        sequences, rest = divmod(stage.tokens, sequence_length)
        if rest or sequences < 1:
            raise ConfigError(
                f"{key}.tokens={stage.tokens} is no multiple of data.sequence_length={sequence_length}: use "
                f"{max(1, round(stage.tokens / sequence_length)) * sequence_length}."
            )
        if sequences <= after.sequences or stage.tokens >= batch_tokens:
            raise ConfigError(
                f"{key}.tokens={stage.tokens} must be more than in the stage before and less than "
                f"trainer.batch_tokens={batch_tokens}, which comes after the warm-up."
            )
        found.append(BatchStage(end, sequences))
    return tuple(found)


@dataclass(frozen=True)
class BatchPlan:
    """How the tokens of a step are cut: sequences per step, sequences per forward, forwards per step and process.

    Before the full batch come the stages of ``warmup``, with as many forwards of fewer sequences each.
    """

    batch_sequences: int
    micro_batch: int
    accumulation: int
    warmup: tuple[BatchStage, ...] = ()
    processes: int = 1

    @property
    def pieces(self) -> int:
        """Forwards per step of all processes together."""
        return self.accumulation * self.processes

    @property
    def words(self) -> str:
        """How a step is cut: "2 x 8", or of several processes "2 processes x 2 x 8"."""
        several = f"{self.processes} processes x " if self.processes > 1 else ""
        return f"{several}{self.accumulation} x {self.micro_batch}"

    def sequences_at(self, step: int) -> int:
        """Sequences of optimizer step ``step``, counted from 0."""
        return next((stage.sequences for stage in self.warmup if step < stage.until), self.batch_sequences)

    def consumed(self, steps: int) -> int:
        """Sequences of the first ``steps`` steps."""
        total = first = 0
        for stage in self.warmup:
            end = min(stage.until, steps)
            total += (end - first) * stage.sequences
            first = end
        return total + (steps - first) * self.batch_sequences

    def early_batches(self, step: int) -> list[tuple[int, int]]:
        """What is left of the warm-up at ``step``: pairs (number of micro-batches of all processes,
        sequences in each)."""
        left = []
        for stage in self.warmup:
            if step < stage.until:
                left.append(((stage.until - step) * self.pieces, stage.sequences // self.pieces))
                step = stage.until
        return left

    def micro_batches(self) -> list[int]:
        """Every micro-batch that cuts a step of this plan, ascending."""
        return even_cuts(self.batch_sequences, self.warmup, self.processes)

    def warmup_text(self, sequence_length: int) -> str:
        """The warm-up in words: "1,024 tokens until step 50, 2,048 until step 100"; empty when there is none."""
        parts = [f"{stage.sequences * sequence_length:,} until step {stage.until:,}" for stage in self.warmup]
        return ", ".join(parts).replace(" until", " tokens until", 1)


def even_cuts(sequences: int, warmup: tuple[BatchStage, ...], world: int = 1) -> list[int]:
    """Every micro-batch, ascending, whose number of pieces divides a full step and every stage of the warm-up and is
    shared evenly by ``world`` processes."""
    common = math.gcd(sequences, *(stage.sequences for stage in warmup))
    return [sequences // pieces for pieces in range(common, 0, -1) if common % pieces == 0 and pieces % world == 0]
