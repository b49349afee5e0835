"""A recipe whose training step takes milliseconds."""

import pytest

from bitnet_train.config import Config
from tests.composing import compose_config

SMALL = (
    "+recipe=tiny", "command=benchmark", "data.tokenizer.vocab_size=320", "data.sequence_length=32", "model.hidden=32",
    "quant.gradient={dx:auto,dw:auto}",  # whatever the recipe's are by now
    "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.ffn=64", "trainer.batch_tokens=128",
    "trainer.micro_batch=2", "trainer.compile=false", "benchmark.rounds=2", "benchmark.warmup=1",
)  # fmt: skip


@pytest.fixture
def small() -> Config:
    return compose_config(*SMALL)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
