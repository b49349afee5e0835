"""A run is continued with the teacher that it began with."""

from pathlib import Path
from typing import Any

from bitnet_train.errors import ConfigError
from bitnet_train.training.distributed.checkpoint_files import read_outline

# Where a checkpoint keeps the teacher's identity.
TEACHER = "teacher"


def check_same_teacher(checkpoint: Path, now: dict[str, Any]) -> None:
    """Raises ConfigError when the checkpoint was trained with a teacher of another step or configuration."""
    before = read_outline(checkpoint)[0].get(TEACHER) or {}
    for key, what in (("kind", "kind"), ("step", "step"), ("config_sha256", "configuration")):
        if before.get(key) != now[key]:
            found = f", {before.get(key)} then and {now[key]} now" if key == "step" else ""
            raise ConfigError(
                f"loss.teacher={now['source']} is not what {checkpoint} was trained with (another {what}{found}): "
                f"restore it, or fork with resume.from={checkpoint.parent.parent} run_name=NAME "
                "(loss.teacher=RUN@STEP names a step)."
            )
