"""The console that commands print to."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from bitnet_train.ranks import this_process

# Columns of a table that is not printed to a terminal.
TABLE_WIDTH = 140


def make_console() -> Console:
    """Long lines wrap in a terminal and stay whole elsewhere, where tables have room; numbers are not coloured.

    Of several processes that train together the first one speaks.
    """
    console = Console(soft_wrap=True, highlight=False, quiet=not this_process().first)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console


def loudly(console: Console) -> Callable[[str], None]:
    """Prints a line that nobody should miss."""
    return lambda line: console.print(line, style="bold red", markup=False)


def print_table(console: Console, table: Table) -> None:
    """A table whose cells wrap where it is wider than the console."""
    console.print(table, soft_wrap=False)
