"""A Python for jobs that sleeps $SLOW seconds in every step: a run is long enough to be stopped on any machine."""

import os
import runpy
import sys
import time

from bitnet_train import signals

look = signals.requested


def look_slowly() -> int | None:
    time.sleep(float(os.environ["SLOW"]))
    return look()


signals.requested = look_slowly
assert sys.argv[1:3] == ["-m", "bitnet_train"]
sys.argv[:] = sys.argv[2:]
runpy.run_module("bitnet_train", run_name="__main__", alter_sys=True)
