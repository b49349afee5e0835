"""What ``--help`` prints."""

from bitnet_train.export.rules import FORMAT_RULES
from bitnet_train.recipes import Catalogue

USAGE = """\
bitnet_train: train ternary (1.58-bit) networks from scratch and export them to the runtimes people use.

Usage: python -m bitnet_train +recipe=NAME [group=option ...] [key=value ...]
       python -m bitnet_train command=COMMAND run=runs/NAME [key=value ...]

Commands (command=...)
  train      (the default) train a recipe; the same command again continues the run
  prepare    make the token shards that a recipe trains on
  estimate   what a recipe will cost: parameters, operations, memory, sizes, schedule
  export     write a run's checkpoint as the formats that can hold it, and verify each
  verify     reload a run's exports with their real consumers and compare with the run
  evaluate   loss and bits per byte of a run or an export, on any text; accuracy on test images
  generate   let a run or an export continue a prompt
  report     a page about a run, or about all runs of a sweep: curves, samples, exports
  convert    turn the linear layers of a transformers checkpoint into BitLinear, checked
  submit     the sbatch script of a recipe's job on a SLURM cluster; submit=true submits it
  benchmark  time a training step against the dense twin and other libraries

Examples (each after python -m bitnet_train)
  +recipe=tiny                             train on this Python's source, 3 to 6 minutes
  +recipe=tiny quant=none run_name=dense   the same without quantisation
  -m +recipe=tiny optimizer.lr=1e-2,2e-2   a sweep, each job in its own run folder
  +recipe=2b4t command=estimate            what BitNet b1.58 2B4T takes
  -m +recipe=digits_vit quant=none,ternary,binary      images: float, ternary and binary
  +recipe=small data=files data.corpus.path=~/texts
  command=export run=runs/tiny
  +recipe=tiny init.from=runs/tiny/export/hf-master run_name=more
  command=convert convert.from=~/llama convert.to=~/llama-ternary
  command=evaluate run=runs/tiny evaluate.text=README.md
  command=generate run=runs/tiny 'generate.prompt="import os"'
  +recipe=small command=benchmark          speed and memory beside bf16, on this machine
  --config-dir ~/mine +recipe=custom       your own recipe in ~/mine/custom.yaml
"""

FOOTER = """
Flags
  -m             run one job for every combination of comma-separated values
  --cfg job      print the configuration, explained, instead of running; add --resolve for the values
  --config-dir   a folder with recipes (NAME.yaml) and options (model/NAME.yaml) of your own
  --hydra-help   the other flags of Hydra, which reads this command line

Every setting, with its value and what it means:  python -m bitnet_train +recipe=tiny --cfg job
Exit codes: 0 done; 2 bad configuration or input; 3 diverged; 4 an export or a conversion failed its
checks; 5 hung; 130 Ctrl-C; 143 terminated or preempted. A continued sweep ends with its worst code.
"""


def help_text(catalogue: Catalogue) -> str:
    """The page, with every choice that exists, the user's own included."""
    groups = ["recipe", *sorted(set(catalogue.options) - {"recipe"})]
    width = max(len(group) for group in groups) + 2
    lines = ["", "Choices (group=option; recipes and sweeps are added with a plus, +recipe=NAME, -m +sweep=NAME)"]
    for group in groups:
        options = catalogue.options[group]
        if group == "recipe":
            in_ladders = {f"{ladder}_{size}" for ladder, sizes in catalogue.ladders.items() for size in sizes}
            options = [name for name in options if name not in in_ladders]
            options += [f"{ladder}_{{{','.join(sizes)}}}" for ladder, sizes in catalogue.ladders.items()]
        lines += _wrapped(f"  {group:<{width}}", options)
    lines += _wrapped(f"  {'export.formats=[...]':<{width}}", list(FORMAT_RULES))
    return USAGE + "\n".join(lines) + "\n" + FOOTER


def _wrapped(head: str, options: list[str], limit: int = 106) -> list[str]:
    lines, line = [], head
    for number, option in enumerate(options):
        part = option + ("," if number < len(options) - 1 else "")
        if len(line) + len(part) > limit and line.strip():
            lines.append(line.rstrip())
            line = " " * len(head)
        line += part + " "
    return [*lines, line.rstrip()]
