"""What ``command=evaluate`` and ``command=generate`` do: the parts of the configuration with these names."""

from dataclasses import dataclass, field

from bitnet_train.errors import ConfigError


@dataclass
class EvaluateConfig:
    # Text file to measure; null for the run's own validation text.
    text: str | None = None
    # Tokens per window; null for the length the run trained with.
    window: int | None = None


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
