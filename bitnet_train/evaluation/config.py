"""What ``command=evaluate`` and ``command=generate`` do: the parts of the configuration with these names."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from bitnet_train.errors import ConfigError


@dataclass
class EvaluateConfig:
    # Text file to measure; null for the run's own validation text.
    text: str | None = None
    # Tokens per window; null for the length the run trained with.
    window: int | None = None
    # Tasks of lm-evaluation-harness to run (instead of the validation text).
    tasks: list[str] = field(default_factory=list)
    # Folder with tasks of your own, YAML files as the harness describes them.
    task_folder: str | None = None
    # Examples in front of each question; null for what the task says.
    shots: int | None = None
    # Only so many questions of each task; null for all.
    limit: int | None = None
    # Run the tasks also during training, every so many steps and at the end; null for never.
    every_steps: int | None = None


@dataclass
class GenerateConfig:
    # What the text begins with.
    prompt: str = "def "
    # Most tokens to add.
    max_new_tokens: int = 128
    # Softmax temperature; 0 takes the most likely token.
    temperature: float = 0.8
    # Sample among the k most likely tokens; null for all.
    top_k: int | None = None
    # Sample among the fewest tokens whose probabilities add up to this; 1 for all.
    top_p: float = 1.0
    # Sample among tokens at least this many times as likely as the most likely one; 0 for all.
    min_p: float = 0.0
    # Strings that end the text; they are not printed.
    stop: list[str] = field(default_factory=list)
    # How many texts, made together as one batch, each with a seed of its own.
    samples: int = 1
    # Text file with a prompt on each line, instead of generate.prompt; made together as one batch.
    prompts_file: str | None = None
    # Seed of the sampling.
    seed: int = 0


def check_evaluate(cfg: EvaluateConfig) -> None:
    """Raises ConfigError for settings that are out of range, or do nothing."""
    if cfg.shots is not None and cfg.shots < 0:
        raise ConfigError(f"evaluate.shots is {cfg.shots}; it must be at least 0, or null for the task's own.")
    for name in ("window", "limit", "every_steps"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ConfigError(f"evaluate.{name} is {value}; it must be at least 1, or null.")
    if not cfg.tasks:
        idle = [name for name in ("task_folder", "shots", "limit", "every_steps") if getattr(cfg, name) is not None]
        if idle:
            raise ConfigError(f"evaluate.{idle[0]} does nothing without evaluate.tasks: name the tasks to run.")


def check_tasks_can_run(cfg: EvaluateConfig) -> None:
    """Raises ConfigError when the folder of the tasks or the harness that runs them is missing."""
    if cfg.task_folder is not None and not Path(cfg.task_folder).expanduser().is_dir():
        raise ConfigError(f"evaluate.task_folder={cfg.task_folder} is no folder.")
    if find_spec("lm_eval") is None:
        raise ConfigError(
            'evaluate.tasks are run by lm-evaluation-harness, not installed here: pip install "bitnet-train[eval]".'
        )


def check_generate(cfg: GenerateConfig) -> None:
    """Raises ConfigError for settings that are out of range or exclude each other."""
    if cfg.max_new_tokens < 1 or cfg.temperature < 0 or (cfg.top_k is not None and cfg.top_k < 1) or cfg.samples < 1:
        raise ConfigError(
            "generate.max_new_tokens, generate.top_k and generate.samples must be at least 1 and generate.temperature "
            "at least 0."
        )
    if not 0 < cfg.top_p <= 1 or not 0 <= cfg.min_p <= 1:
        raise ConfigError(
            f"generate.top_p={cfg.top_p:g} must be above 0 and at most 1, generate.min_p={cfg.min_p:g} between 0 and 1."
        )
    if not all(cfg.stop):
        raise ConfigError("generate.stop holds an empty string, which would end every text at once: remove it.")
    if cfg.samples > 1 and cfg.prompts_file is not None:
        raise ConfigError("generate.samples is for one prompt: leave it out, or leave out generate.prompts_file.")
