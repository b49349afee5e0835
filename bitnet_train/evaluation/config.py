"""What ``command=evaluate`` and ``command=generate`` do: the parts of the configuration with these names."""

from dataclasses import dataclass


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
    # Seed of the sampling.
    seed: int = 0
