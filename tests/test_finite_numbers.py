"""No number of a configuration may be NaN or infinite, wherever it stands."""

import pytest

from bitnet_train.errors import ConfigError
from tests.composing import compose_config


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("optimizer.lr=nan", "optimizer.lr"),
        ("optimizer.betas=[0.9,nan]", r"optimizer.betas\[1\]"),
        ("clip.max_norm=inf", "clip.max_norm"),
        ("samples.temperature=nan", "samples.temperature"),
        ("model.norm_eps=nan", "model.norm_eps"),
        ("init.sub_norm_gain=inf", "init.sub_norm_gain"),
        ("checkpoint.every_minutes=nan", "checkpoint.every_minutes"),
        ("quant.weight.threshold=nan", "quant.weight.threshold"),
        ("telemetry.scale_factor=inf", "telemetry.scale_factor"),
        ("guard.outlier_sigma=nan", "guard.outlier_sigma"),
        ("optimizer.groups=[{pattern: 'layers.*', lr: nan}]", r"optimizer.groups\[0\].lr"),
        ("clip=by_pattern; clip.rules=[{pattern:'*',clip:{name:norm,max_norm:inf}}]", r"clip.rules\[0\].clip.max_norm"),
        ("regulariser=codes; regulariser.start=nan", "regulariser.start"),
    ],
)
def test_it_is_refused_by_name(setting: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is (nan|inf); it must be a finite number"):
        compose_config("+recipe=tiny", *setting.split("; "))
