"""What a mixture of corpora consists of: its parts, their shares of the samples, and the stages with other shares.

No torch here: the checks answer when a recipe is composed, and ``estimate`` counts with the same functions.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bitnet_train.data.config import (
    CORPUS_CONFIGS,
    BpeTokenizer,
    ChatCorpus,
    CorpusConfig,
    DataConfig,
    MixtureCorpus,
    check_corpus,
)
from bitnet_train.errors import ConfigError, did_you_mean
from bitnet_train.variants import variant_from

# Samples over which shares are exact.
BLOCK = 1000
KEY = "data.corpus.corpora"
# What can be a part.
PART_CONFIGS = {name: kind for name, kind in CORPUS_CONFIGS.items() if kind is not MixtureCorpus}


@dataclass(frozen=True)
class Part:
    """One corpus of a mixture and its weight at the start of the run."""

    corpus: CorpusConfig
    weight: float


@dataclass(frozen=True)
class Stage:
    """The samples of each corpus in a block of :data:`BLOCK`, by sorted name, from optimizer step ``step`` on."""

    step: int
    counts: tuple[int, ...]


def parts(cfg: MixtureCorpus) -> dict[str, Part]:
    """The corpora of a mixture, by sorted name. Raises ConfigError for one that is set wrongly."""
    if not isinstance(cfg.corpora, Mapping) or not cfg.corpora:
        raise ConfigError(f"{KEY} names no corpora: give {{NAME: {{corpus: files, weight: 1, path: ...}}, ...}}.")
    found = {}
    for name in sorted(cfg.corpora, key=str):
        key, given = f"{KEY}.{name}", cfg.corpora[name]
        if not re.fullmatch(r"\w+", str(name), re.ASCII):
            raise ConfigError(f"{key}: a name is letters, digits and underscores (it becomes the name of shard files).")
        settings = {k: v for k, v in given.items() if k != "weight"} if isinstance(given, Mapping) else given
        corpus = variant_from(settings, PART_CONFIGS, key, "corpus")
        check_corpus(corpus, key)
        found[str(name)] = Part(corpus, _weight(given.get("weight", 1.0), f"{key}.weight"))
    return found


def stages(cfg: DataConfig, max_steps: int) -> list[Stage]:
    """The mixture at step 0 and every later one of ``data.stages``, in order.

    Raises ConfigError for weights without a corpus, corpora that no stage uses, shares below one sample in a block, and
    stages that are out of order or do not begin within ``max_steps``.
    """
    assert isinstance(cfg.corpus, MixtureCorpus)
    given = parts(cfg.corpus)
    found = [Stage(0, block_counts({name: part.weight for name, part in given.items()}, KEY))]
    for number, stage in enumerate(cfg.stages or []):
        key = f"data.stages[{number}]"
        for name in stage.weights:
            if name not in given:
                raise ConfigError(f"{key}.weights.{name} is not in {KEY}.{did_you_mean(str(name), given)}")
        weights = {name: _weight(stage.weights.get(name, 0.0), f"{key}.weights.{name}") for name in given}
        step = _first_step(getattr(stage, "from"), max_steps, key)
        if step <= found[-1].step:
            raise ConfigError(f"{key} begins at step {step}, not after the one before it (step {found[-1].step}).")
        found.append(Stage(step, block_counts(weights, key)))
    for index, name in enumerate(given):
        if not any(stage.counts[index] for stage in found):
            later = ", nor in any of data.stages" if cfg.stages else ""
            raise ConfigError(f"{KEY}.{name}.weight must be positive, it is 0{later}: leave the corpus out instead.")
    return found


def chats(cfg: CorpusConfig) -> dict[str, ChatCorpus]:
    """The chat corpora, by the key they stand at. With any of them every token has a mask."""
    if isinstance(cfg, ChatCorpus):
        return {"data.corpus": cfg}
    found = parts(cfg) if isinstance(cfg, MixtureCorpus) else {}
    return {f"{KEY}.{name}": part.corpus for name, part in found.items() if isinstance(part.corpus, ChatCorpus)}


def check_mixture(cfg: DataConfig, max_steps: int) -> None:
    """Raises ConfigError for a mixture or stages that are set wrongly (see :func:`parts` and :func:`stages`), and for
    chat corpora without a template or with several.
    """
    if isinstance(cfg.corpus, MixtureCorpus):
        stages(cfg, max_steps)
    elif cfg.stages:
        raise ConfigError(f"data.stages needs data/corpus=mixture; data/corpus={cfg.corpus.name} has nothing to weigh.")
    given = {key: corpus.template for key, corpus in chats(cfg.corpus).items()}
    if len(set(given.values())) > 1:
        raise ConfigError(f"{' and '.join(f'{key}.template' for key in given)} differ: a model has one chat template.")
    if isinstance(cfg.tokenizer, BpeTokenizer) and None in given.values():
        key = next(iter(given))
        raise ConfigError(f"{key}.template is not set, and a tokenizer that is trained here has none of its own.")


def block_counts(weights: Mapping[str, float], key: str) -> tuple[int, ...]:
    """Samples of each corpus in a block, by largest remainder: they add up to :data:`BLOCK`.

    Raises ConfigError, naming ``key``, when nothing has a weight or a positive one would get less than one sample.
    """
    total = sum(weights.values())
    if total <= 0:
        raise ConfigError(f"{key}: every weight is 0; at least one must be positive.")
    quotas = {name: weight / total * BLOCK for name, weight in weights.items()}
    for name, quota in quotas.items():
        if 0 < quota < 1 - 1e-9:
            raise ConfigError(
                f"{key}: {name} gets {quota / BLOCK:.2%} of the samples, and the smallest share is {1 / BLOCK:.1%}: "
                "raise its weight, or leave it out."
            )
    counts = {name: math.floor(quota + 1e-9) for name, quota in quotas.items()}
    remainders = sorted(quotas, key=lambda name: (counts[name] - quotas[name], name))
    for name in remainders[: BLOCK - sum(counts.values())]:
        counts[name] += 1
    return tuple(counts.values())


def expected_samples(cfg: DataConfig, max_steps: int, consumed: Callable[[int], int]) -> dict[str, float]:
    """About how many windows of each corpus a whole run sees (exact but for the last block of each stage).

    ``consumed`` gives the windows before a step.
    """
    assert isinstance(cfg.corpus, MixtureCorpus)
    names, run = list(parts(cfg.corpus)), stages(cfg, max_steps)
    seen = dict.fromkeys(names, 0.0)
    for stage, end in zip(run, [*(later.step for later in run[1:]), max_steps], strict=True):
        for name, count in zip(names, stage.counts, strict=True):
            seen[name] += (consumed(end) - consumed(stage.step)) * count / BLOCK
    return seen


def shares_text(names: list[str], counts: tuple[int, ...]) -> str:
    """``"code 30.0%, web 70.0%"``; corpora without samples are left out."""
    return ", ".join(f"{name} {count / BLOCK:.1%}" for name, count in zip(names, counts, strict=True) if count)


def _weight(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{key} must be a positive number (0 only with data.stages), not {value}.")
    return float(value)


def _first_step(start: int | float | str, max_steps: int, key: str) -> int:
    if isinstance(start, str):
        raise ConfigError(f"{key} lacks 'from': a step, or a share of trainer.max_steps such as 0.8.")
    if isinstance(start, float) and not 0 < start < 1:
        raise ConfigError(f"{key}.from={start} must be a share between 0 and 1, or a step as a whole number.")
    step = max(1, round(start * max_steps)) if isinstance(start, float) else start
    if max_steps and not 0 < step < max_steps:
        raise ConfigError(
            f"{key}.from={start} is step {step}, outside of the run (1 to {max_steps - 1}): choose another, or leave "
            "the stage out."
        )
    return step
