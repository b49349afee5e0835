"""The Lightning data module: shards to batches, and the count of samples consumed."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from bitnet_train.data.config import DataConfig
from bitnet_train.data.mixture import Stage, shares_text
from bitnet_train.data.order import Drawn, MixtureOrder, Segment, corpus_order
from bitnet_train.data.sampler import ConsumedBatchSampler
from bitnet_train.data.shards import Manifest, TokenArray
from bitnet_train.data.tokenizer import load_tokenizer
from bitnet_train.data.windows import Windows
from bitnet_train.errors import ConfigError
from bitnet_train.training.batch_warmup import BatchPlan
from bitnet_train.training.distributed import group

VALIDATION_TOKENS_PER_BATCH = 8192
# Of a bad sample, in divergence.jsonl.
SHOWN_TOKENS = 32


def leave_signals_to_the_run(_: int) -> None:
    """In a loader process: ignore what a terminal's Ctrl-C or a cluster's SIGTERM sends to the whole process group.

    The run itself stops after its step and saves; it needs its loaders until then, and ends them by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class ShardDataModule(L.LightningDataModule):
    """Training and validation windows of prepared shards.

    Args:
        cfg: the data settings.
        folder: the shard folder, with its manifest.
        plan: sequences per optimizer step and per forward.
        seed: chooses the order of the windows.
        stages: of a mixture, from ``data.mixture.stages``.
        resume_at: samples behind which to start, in place of those that a checkpoint says were consumed.
    """

    def __init__(
        self,
        cfg: DataConfig,
        folder: Path,
        manifest: Manifest,
        plan: BatchPlan,
        seed: int,
        stages: list[Stage] | None = None,
        resume_at: int | None = None,
    ) -> None:
        super().__init__()
        self.cfg, self.manifest, self.plan, self.seed, self.stages = cfg, manifest, plan, seed, stages or []
        self.resume_at = resume_at
        self.consumed, self._first_step = resume_at or 0, 0
        self._saved_mixture: dict[str, Any] | None = None
        # Windows of each corpus of a mixture; of a single corpus under "".
        names = {name: f"/{name}" for name in manifest.corpora} or {"": ""}
        self.sources = {
            name: Windows(
                TokenArray(folder, manifest, f"train{split}"),
                cfg.sequence_length,
                mask=_mask(folder, manifest, f"train{split}"),
            )
            for name, split in names.items()
        }
        self.train_windows = _concatenated(list(self.sources.values()))
        val_tokens = {name: manifest.splits[f"val{split}"]["tokens"] for name, split in names.items()}
        self.val_windows = {
            name: Windows(
                TokenArray(folder, manifest, f"val{split}"),
                cfg.sequence_length,
                partial=True,
                limit=_share(cfg.validation_tokens, val_tokens[name], sum(val_tokens.values())),
                mask=_mask(folder, manifest, f"val{split}"),
            )
            for name, split in names.items()
            if val_tokens[name] > 1
        }
        for name, windows in self.sources.items():
            if len(windows) == 0:
                raise ConfigError(
                    f"The training text{' of data.corpus.corpora.' + name if name else ''} is {len(windows.tokens)} "
                    f"tokens, less than one sequence of data.sequence_length={cfg.sequence_length}: add text or "
                    "shorten the sequences."
                )

    def samples_before(self, step: int) -> int:
        """Training samples before optimizer step ``step`` (from 0)."""
        # Counted from where this process started: a fork may have begun with another batch.
        return self.consumed + self.plan.consumed(step) - self.plan.consumed(self._first_step)

    def place_of(self, sample: int) -> dict[str, Any]:
        """The corpus (of a mixture), shard and offset of a training sample, and how its text begins."""
        window = self.window_of_sample()(sample)
        corpus, windows = "", next(iter(self.sources.values()))
        for corpus, windows in self.sources.items():  # noqa: B007
            if window < len(windows):
                break
            window -= len(windows)
        path, offset = windows.tokens.place(window * windows.length)
        try:
            ids = windows.tokens.slice(window * windows.length, window * windows.length + SHOWN_TOKENS)
            text = load_tokenizer(path.parent).decode(ids.tolist())
        except (ConfigError, OverflowError) as error:
            text = f"cannot be read: {error}"
        named = {"corpus": corpus} if corpus else {}
        return {**named, "shard": path.name, "offset": offset, "tokens": windows.length + 1, "text": text}

    def check_unchanged(self) -> list[Path]:
        """The shards that are gone. Raises ConfigError when one is not what it was when the run began."""
        every = [*self.sources.values(), *self.val_windows.values()]
        files = [tokens.files for windows in every for tokens in (windows.tokens, windows.mask) if tokens is not None]
        return [path for one in files for path in one.check()]

    def order(self) -> MixtureOrder | None:
        """The order of a mixture's samples; None for a single corpus.

        Another mixture than that of the checkpoint (a fork's, or stages moved by another trainer.max_steps) takes over
        at the samples consumed so far, and every corpus goes on in its epoch.
        """
        if not self.stages:
            return None
        sizes = {name: len(windows) for name, windows in self.sources.items()}
        segments = [
            Segment(self.samples_before(stage.step) if stage.step else 0, stage.counts) for stage in self.stages
        ]
        origin = None
        if self._saved_mixture is not None:
            saved = [Segment(start, tuple(counts)) for start, counts in self._saved_mixture["segments"]]
            samples, drawn = self._saved_mixture["origin"]
            origin = Drawn(samples, tuple(drawn))
            if saved != segments:
                origin = MixtureOrder(sizes, saved, self.seed, origin).drawn(self.consumed)
        return MixtureOrder(sizes, segments, self.seed, origin, self.cfg.shuffle, self.cfg.shuffle_window)

    def window_of_sample(self) -> Callable[[int], int]:
        """Sample number -> index of its window."""
        size = len(self.train_windows)
        return self.order() or corpus_order(size, self.seed, self.cfg.shuffle, self.cfg.shuffle_window)

    def epochs(self, max_steps: int) -> str:
        """How often the text is seen by step ``max_steps``, in words."""
        samples, order = self.samples_before(max_steps), self.order()
        if order is None:
            return f"{self.plan.consumed(max_steps) / len(self.train_windows):.2f} epochs"
        seen = zip(self.sources.items(), order.drawn(samples).counts, strict=True)
        return f"epochs: {', '.join(f'{name} {count / len(windows):.2f}' for (name, windows), count in seen)}"

    def mixture(self) -> list[str]:
        """The shares of each stage of a mixture, a line each."""
        names = list(self.sources)
        return [f"mixture from step {stage.step}: {shares_text(names, stage.counts)}" for stage in self.stages]

    def train_dataloader(self) -> DataLoader[Tensor]:
        size, early = len(self.train_windows), self.plan.early_batches(self._first_step)
        sampler = ConsumedBatchSampler(
            size,
            self.plan.micro_batch,
            self.seed,
            self.consumed,
            rank=group.rank(),
            world=group.world(),
            early=early,
            order=self.window_of_sample(),
        )
        return DataLoader(
            self.train_windows,
            batch_sampler=sampler,
            num_workers=self.cfg.workers,
            pin_memory=self._on_cuda(),
            worker_init_fn=leave_signals_to_the_run,
        )

    def val_batches(self, windows: Windows) -> list[list[int]]:
        """Window numbers of each validation batch; the short last window is a batch of its own."""
        batch = max(1, VALIDATION_TOKENS_PER_BATCH // self.cfg.sequence_length)
        count = len(windows)
        full = count if (windows.end - 1) % self.cfg.sequence_length == 0 else count - 1
        batches = [list(range(i, min(i + batch, full))) for i in range(0, full, batch)]
        return [*batches, [full]] if full < count else batches

    def validation_loaders(self) -> dict[str, DataLoader[Tensor]]:
        """All validation windows in order, those of each corpus apart (not ``val_dataloader``: a callback validates,
        between optimizer steps). Of several processes each has its share of the batches.
        """
        rank, world = group.rank(), group.world()
        return {
            name: DataLoader(w, batch_sampler=self.val_batches(w)[rank::world]) for name, w in self.val_windows.items()
        }

    def validation_fillers(self) -> list[DataLoader[Tensor]]:
        """A batch that does not count for every corpus of which other processes have one more: where weights are
        gathered all must make as many forward passes."""
        rank, world = group.rank(), group.world()
        found: list[DataLoader[Tensor]] = []
        for windows in self.val_windows.values():
            batches = self.val_batches(windows)
            if len(batches) % world and rank >= len(batches) % world:
                found.append(DataLoader(windows, batch_sampler=batches[:1]))
        return found

    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def state_dict(self) -> dict[str, Any]:
        step = self.trainer.global_step if self.trainer is not None else self._first_step
        state = {"step": step, "consumed": self.samples_before(step), "fingerprint": self.manifest.fingerprint}
        order = self.order()
        if order is not None:
            segments = [(segment.start, list(segment.counts)) for segment in order.segments]
            origin = (order.origin.samples, list(order.origin.counts))
            state["mixture"] = {"segments": segments, "origin": origin}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"] if self.resume_at is None else self.resume_at
        self._first_step = state["step"]
        self._saved_mixture = state.get("mixture")


def _concatenated(sources: list[Windows]) -> Windows | ConcatDataset[Tensor]:
    return sources[0] if len(sources) == 1 else ConcatDataset(sources)


def _mask(folder: Path, manifest: Manifest, split: str) -> TokenArray | None:
    return TokenArray(folder, manifest, split, masks=True) if manifest.masks(split) else None


def _share(limit: int | None, tokens: int, total: int) -> int | None:
    """The part of ``limit`` validation tokens that falls to ``tokens`` of ``total``."""
    return None if limit is None else max(1, limit * tokens // total)
