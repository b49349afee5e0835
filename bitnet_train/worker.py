"""``python -m bitnet_train.worker JOB``: one of several processes that train together; ``training.distributed.launch``
starts it with the composed configuration of the command line."""

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from bitnet_train import signals
from bitnet_train.cluster.job import PREEMPTED
from bitnet_train.commands import run
from bitnet_train.config import from_plain
from bitnet_train.errors import BitnetTrainError
from bitnet_train.messages import TERMINATED, of_the_machine, say
from bitnet_train.training.distributed.launch import LOST
from bitnet_train.validation import to_config


def main() -> NoReturn:
    """Trains and exits; what went wrong is said by the first process."""
    job, code = Path(sys.argv[1]), 0
    try:
        with signals.listening():
            code = run(to_config(from_plain(json.loads(job.read_text()), job)))
    except BitnetTrainError as error:
        code = error.exit_code
        if code != LOST:  # else the launcher says it
            say(str(error))
    except (MemoryError, OSError, RuntimeError) as error:
        sentence = of_the_machine(error)
        if sentence is None:
            raise
        say(sentence)
        code = 2
    except signals.Terminated:
        say(TERMINATED)
        code = PREEMPTED
    except KeyboardInterrupt:
        say("Interrupted; nothing was changed since the last save.")
        code = 130
    if code:
        # The others may be gone: nothing is left that could be taken down together with them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(0)


if __name__ == "__main__":
    main()
