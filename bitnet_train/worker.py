"""``python -m bitnet_train.worker JOB``: one of several processes that train together; ``training.distributed.launch``
starts it with the composed configuration of the command line."""

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from bitnet_train.commands import run
from bitnet_train.config import from_plain, to_config
from bitnet_train.errors import BitnetTrainError
from bitnet_train.ranks import this_process
from bitnet_train.training.out_of_memory import is_out_of_memory


def main() -> NoReturn:
    """Trains and exits; what went wrong is said by the first process."""
    job, code = Path(sys.argv[1]), 0
    try:
        code = run(to_config(from_plain(json.loads(job.read_text()), job)))
    except BitnetTrainError as error:
        _say(str(error))
        code = error.exit_code
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _say(f"This machine ran out of memory ({lines[0][:160].rstrip('. ')}); what was saved before is intact.")
        code = 2
    except KeyboardInterrupt:
        _say("Interrupted; nothing was changed since the last save.")
        code = 130
    if code:
        # The others may be gone: nothing is left that could be taken down together with them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(0)


def _say(sentence: str) -> None:
    if this_process().first:
        print(f"bitnet_train: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
