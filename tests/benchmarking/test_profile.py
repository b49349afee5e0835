"""Kinds of operation in a step's profile."""

import pytest

from bitnet_train.benchmarking.contenders import line_up
from bitnet_train.benchmarking.profile import (
    ATTENTION,
    CLIP,
    HEAD,
    OPTIMIZER,
    OTHER,
    PASSES,
    REFRESH,
    REFRESHING,
    Classifier,
    profile_step,
)
from bitnet_train.config import Config
from tests.benchmarking.conftest import SMALL
from tests.composing import compose_config


def test_the_kinds_of_a_small_step_add_up(small: Config) -> None:
    (contender,) = line_up(small, ["ternary"], {}).contenders
    kinds = profile_step(contender, 1)
    assert {ATTENTION, HEAD, OPTIMIZER, PASSES, REFRESH, OTHER} <= kinds.keys()
    assert any(kind.startswith("block matmuls") for kind in kinds)
    assert all(seconds >= 0 for seconds in kinds.values())
    assert 0 < sum(kinds.values()) < 10


@pytest.mark.parametrize(
    ("name", "shapes", "callers", "kind"),
    [
        ("aten::mm", [[128, 32], [32, 64]], (), "block matmuls, bf16"),
        ("aten::_int_mm", [[128, 32], [32, 64]], (), "block matmuls, int8"),
        ("aten::mm", [[128, 32], [32, 320]], (), HEAD),
        ("aten::bmm", [[4, 32, 32], [4, 32, 32]], (), ATTENTION),
        ("graph_0_cpp_fused__softmax_mul_3", None, (), ATTENTION),
        ("graph_0_cpp_fused_logsumexp_3", None, (), HEAD),
        ("graph_0_cpp_fused_add_mul_rsqrt_3", None, (), PASSES),
        ("aten::_fused_adamw_", [], ("Optimizer.step#AdamW.step",), OPTIMIZER),
        ("aten::abs", [], (REFRESHING, "Optimizer.step#AdamW.step"), REFRESH),
        ("aten::linalg_vector_norm", [], (CLIP,), OPTIMIZER),
        ("bitnet_train::avx512_matmul", [], (), "block matmuls, int8"),
        ("bitnet_train::avx512_grad_input", [], (), "block matmuls, int8"),
        ("bitnet_train::avx512_grad_weight", [], (), "block matmuls, bf16"),
        ("aten::mm", [[4, 4], [4, 4]], ("bitnet_train::triton_grad_weight",), "block matmuls, bf16"),
        ("bitnet_train::avx512_quantise", [], (), PASSES),
        ("ProfilerStep", None, (), OTHER),
    ],
)
def test_an_operator_is_of_one_kind(name: str, shapes: object, callers: tuple[str, ...], kind: str) -> None:
    cfg = compose_config(*SMALL, "trainer.precision=bf16-mixed")
    (contender,) = line_up(cfg, ["ternary"], {}).contenders
    assert Classifier(contender)(name, shapes, callers) == kind
