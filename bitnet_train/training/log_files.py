"""Files that tell about a run and decide nothing: a disk that does not take them costs no step."""

from collections.abc import Callable
from pathlib import Path

from bitnet_train.durable import append_whole, reason
from bitnet_train.training.distributed import group


class LogFile:
    """Appends to a file, in the first process; ``say`` hears once when that fails, and once when it works again."""

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self.path, self.say = path, say
        self._failing = False

    def append(self, text: str) -> None:
        """Append all of ``text``, or nothing of it."""
        if not group.first():
            return
        try:
            append_whole(self.path, text)
        except OSError as error:
            if not self._failing:
                self.say(f"warning: {self.path} is not written ({reason(error)}): training goes on without it")
            self._failing = True
            return
        if self._failing:
            self.say(f"{self.path} is written again")
        self._failing = False
