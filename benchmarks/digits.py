"""Test accuracy of the recipes on scikit-learn's digits: float, ternary and binary, several seeds, as a table.

    python benchmarks/digits.py [--recipes digits_mlp,digits_vit] [--seeds 1,2,3,4,5] [--runs runs] [KEY=VALUE ...]

It runs ``-m +recipe=RECIPE quant=none,ternary,binary seed=...`` and then ``command=evaluate`` on every run. Runs that
are there are continued, so a second call only evaluates them and prints the table.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from bitnet_train.__main__ import answer

QUANTS = ("none", "ternary", "binary")


def main() -> int:
    """Train, evaluate, print; the exit code of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="digits_mlp,digits_vit")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    lines = [
        "| recipe | weights | test accuracy, mean | standard deviation | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for recipe in options.recipes.split(","):
        sweep = ["-m", f"+recipe={recipe}", f"quant={','.join(QUANTS)}", f"seed={options.seeds}"]
        code = answer([*sweep, f"paths.runs={options.runs}", *options.settings])
        if code:
            return code
        found: dict[str, list[float]] = {quant: [] for quant in QUANTS}
        for run in sorted((Path(options.runs) / recipe).glob("quant=*")):
            quant = run.name.partition("+")[0].removeprefix("quant=")
            code = answer(["command=evaluate", f"run={run}"])
            if code:
                return code
            found[quant].append(json.loads((run / "evaluation.json").read_text())["test"]["accuracy"])
        for quant, values in found.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            lines.append(f"| {recipe} | {quant} | {statistics.mean(values):.2%} | {spread:.2%} | {len(values)} |")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
