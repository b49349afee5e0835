"""Charts of layers.csv."""

import csv
from pathlib import Path

from bitnet_train.reporting.layer_charts import layer_charts
from bitnet_train.training.telemetry.layers import COLUMNS


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def row(step: int, layer: str, zeros: float, saturated: object = 0.1) -> dict[str, object]:
    figures = {"flips": 0.01, "scale": 0.02, "input_absmax": 3.0, "grad_norm": 1.0, "grad_norm_clipped": 0.5}
    return {"step": step, "layer": layer, "zeros": zeros, "input_saturated": saturated, **figures}


def test_a_line_per_kind_is_the_mean_over_blocks(tmp_path: Path) -> None:
    path = tmp_path / "layers.csv"
    write(path, [row(5, "layers.0.self_attn.q_proj", 0.2), row(5, "layers.1.self_attn.q_proj", 0.4),
                 row(5, "layers.0.mlp.up_proj", 0.5), row(10, "layers.0.self_attn.q_proj", 0.1),
                 row(10, "layers.1.self_attn.q_proj", 0.1), row(10, "layers.0.mlp.up_proj", 0.6)])  # fmt: skip
    chart = next(chart for chart in layer_charts(path) if chart.title.startswith("Share of codes that are zero"))
    lines = {line.name: (list(line.steps), list(line.values)) for line in chart.lines}
    assert lines.keys() == {"q_proj", "up_proj"}
    assert lines["q_proj"][0] == [5, 10]
    assert abs(lines["q_proj"][1][0] - 0.3) < 1e-12
    assert lines["up_proj"][1] == [0.5, 0.6]


def test_float_inputs_have_no_saturation(tmp_path: Path) -> None:
    path = tmp_path / "layers.csv"
    write(path, [row(1, "layers.0.self_attn.q_proj", 0.2, "nan")])
    assert not any("end of the codes" in chart.title for chart in layer_charts(path))


def test_no_file_and_a_damaged_one_give_no_charts(tmp_path: Path) -> None:
    assert layer_charts(tmp_path / "layers.csv") == []
    (tmp_path / "layers.csv").write_text("step,layer\n1,x\n")
    assert layer_charts(tmp_path / "layers.csv") == []
