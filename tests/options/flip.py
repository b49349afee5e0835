"""How one field of the configuration is changed, and where the change must show."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flip:
    """``to`` on top of ``on``: what the two configurations do must differ in what ``see`` (of ``observe``) looks at.

    ``@name@`` in a setting stands for a path of the place. A flip that is ``refused`` must end in a ConfigError that
    names the field: it contradicts something else, and says so.
    """

    to: str
    on: tuple[str, ...] = ()
    see: str = "trained"
    refused: bool = False


def each(flips: dict[str, str], *on: str, see: str = "trained", under: str = "") -> dict[str, Flip]:
    """Field -> Flip from field -> new value, all on top of ``on``; ``under`` is the part of the names before them.

    The key that is set is the field's name without its variants.
    """
    return {f"{under}{name}": Flip(f"{_key(under + name)}={value}", on, see) for name, value in flips.items()}


def items(flips: dict[str, str], base: str, *on: str, under: str, see: str = "trained") -> dict[str, Flip]:
    """The same for the fields of a list's items: the new values are the whole list, ``base`` the list before."""
    key = _key(under)
    return {f"{under}[].{name}": Flip(f"{key}={value}", (*on, f"{key}={base}"), see) for name, value in flips.items()}


def _key(name: str) -> str:
    return ".".join(part.partition("=")[0] for part in name.split("."))
