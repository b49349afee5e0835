"""lm-evaluation-harness without code from task files.

Its YAML names Python functions (``!function``) and its templates are rendered outside a sandbox. The tasks that come
with the harness keep their functions; a user's ``evaluate.task_folder`` is data.
"""

from pathlib import Path
from typing import Any

import lm_eval
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.tasks import _yaml_loader

from bitnet_train.errors import ConfigError

OWN = Path(lm_eval.__file__).resolve().parent


def distrust() -> None:
    """Have the harness refuse functions of task files outside its own folder, and render templates in a sandbox.

    Raises ConfigError when this version of the harness is made differently, so that it cannot be told.
    """
    plain = getattr(_yaml_loader, "_import_func_in_yml", None)
    if plain is None or not hasattr(utils, "env"):
        raise ConfigError(
            "This version of lm-evaluation-harness reads tasks in a way that bitnet_train does not know: install "
            'lm-eval 0.4.11 to 0.4.13, as pip install "bitnet-train[eval]" does.'
        )
    if getattr(plain, "guarded", False):
        return

    def import_function(name: str, folder: Path) -> Any:
        if not Path(folder).resolve().is_relative_to(OWN):
            raise ValueError(f"{folder} names the Python function {name}: tasks of your own are YAML without code")
        return plain(name, folder)

    import_function.guarded = True  # type: ignore[attr-defined]
    _yaml_loader._import_func_in_yml = import_function
    sandbox = SandboxedEnvironment(
        loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline
    )
    sandbox.filters.update(utils.env.filters)
    sandbox.globals.update(utils.env.globals)
    utils.env = sandbox
