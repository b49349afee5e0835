"""A plain mapping with a name becomes the dataclass of that name, or is refused in one sentence."""

from typing import Any

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.training.clipping.config import CLIP_CONFIGS, NormClip, ZScoreClip, ZScoreTarget
from bitnet_train.training.schedules.config import SCHEDULE_CONFIGS, Shape, StageConfig, TwoStageSchedule
from bitnet_train.variants import variant_from


def test_a_mapping_becomes_its_dataclass() -> None:
    made = variant_from({"name": "zscore", "target": "mean", "alpha": "0.9", "max_norm": 2}, CLIP_CONFIGS, "x")
    assert made == ZScoreClip(target=ZScoreTarget.mean, alpha=0.9, max_norm=2.0)
    assert variant_from({"name": "norm"}, CLIP_CONFIGS, "x") == NormClip()


def test_nested_dataclasses_are_made_too() -> None:
    made = variant_from({"name": "two_stage", "stages": [{"share": 1, "shape": "cosine"}]}, SCHEDULE_CONFIGS, "x")
    assert isinstance(made, TwoStageSchedule)
    assert made.stages == [StageConfig(share=1.0, shape=Shape.cosine)]


@pytest.mark.parametrize(
    ("plain", "wanted"),
    [
        ("norm", "a.b must be a mapping with a name, one of none, norm, .*, not 'norm'"),
        (None, "a.b must be a mapping"),
        ({}, "its name is missing"),
        ({"max_norm": 1.0}, "its name is missing"),
        ({"name": "nrm"}, "a.b.name=nrm does not exist; choose one of none, norm, .* Did you mean 'norm'"),
        ({"name": "norm", "max_nrm": 1}, "a.b.max_nrm is not .*: norm has max_norm. Did you mean 'max_norm'"),
        ({"name": "norm", "window": 1}, "norm has max_norm. window belongs to percentile"),
        ({"name": "none", "xyz": 1}, "none has no settings"),
        ({"name": "norm", "max_norm": "abc"}, "a.b.max_norm must be a number, not 'abc'"),
        ({"name": "norm", "max_norm": None}, "a.b.max_norm cannot be null"),
        ({"name": "percentile", "window": 1.5}, "a.b.window must be a whole number, not '1.5'"),
        ({"name": "zscore", "target": "recip"}, "a.b.target=recip does not exist; .* Did you mean 'reciprocal'"),
        ({"name": "adaptive", "exclude": "a"}, "a.b.exclude must be a list"),
    ],
)
def test_what_is_wrong_is_said(plain: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        variant_from(plain, CLIP_CONFIGS, "a.b")


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        ({"share": 1, "shap": "linear"}, "shap is not a configuration key. Did you mean 'shape'"),
        ({"lr": 2}, "share has no value and needs one"),
        ({"share": "half"}, "share must be a number, not 'half'"),
    ],
)
def test_what_is_wrong_inside_a_list_is_said(stage: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        variant_from({"name": "two_stage", "stages": [stage]}, SCHEDULE_CONFIGS, "schedule")
