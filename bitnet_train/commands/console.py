"""The console that commands print to."""

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from bitnet_train.ranks import this_process

# Columns of a table that is not printed to a terminal.
TABLE_WIDTH = 140


class _Stdout:
    """Standard output as it is at the moment; what it cannot take is dropped.

    A log file on a full disk, a closed terminal or a ``| tee`` that Ctrl-C ended first must not stop a run before it
    has saved.
    """

    def write(self, text: str) -> int:
        try:
            return sys.stdout.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            sys.stdout.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def make_console() -> Console:
    """Long lines wrap in a terminal and stay whole elsewhere, where tables have room; numbers are not coloured.

    Of several processes that train together the first one speaks.
    """
    quiet = not this_process().first
    console = Console(soft_wrap=True, highlight=False, quiet=quiet, file=_Stdout())  # type: ignore[arg-type]
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console


def loudly(console: Console) -> Callable[[str], None]:
    """Prints a line that nobody should miss."""
    return lambda line: console.print(line, style="bold red", markup=False)


def print_table(console: Console, table: Table) -> None:
    """A table whose cells wrap where it is wider than the console."""
    console.print(table, soft_wrap=False)
