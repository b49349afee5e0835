"""``command=verify``: the exports of a run, reloaded and compared with the run once more."""

from bitnet_train.commands.console import make_console
from bitnet_train.commands.export import verify_all
from bitnet_train.commands.sources import open_run
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.export.writers import FORMATS


def run(cfg: Config) -> int:
    """Verify ``export.formats``, or every export that the run has; 0, or VerificationError when one fails."""
    console = make_console()
    opened = open_run(cfg)
    exports = opened.folder.exports
    there = [name for name in FORMATS if (exports / name).is_dir()]
    missing = [name for name in cfg.export.formats or [] if name not in there]
    if missing or not there:
        absent = exports / missing[0] if missing else exports
        raise ConfigError(f"{absent} does not exist: export first with command=export run={cfg.run}.")
    verify_all(cfg, opened, opened.held_out(cfg), [exports / name for name in cfg.export.formats or there], console)
    return 0
