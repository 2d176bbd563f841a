"""Runs that take no time, for tests of what is around them."""

import os
import signal
import sys
import time
from pathlib import Path

from suffice.study import Kind


def square(settings, seed, context):
    print("printed by a run")  # must not disturb the worker's own lines
    if settings["log"]:
        with open(settings["log"], "a") as file:
            file.write(f"{context.key}\n")
    context.say("squaring")
    time.sleep(settings["sleep"])
    if settings["fail"] == "raise":
        raise RuntimeError("no square today")
    if settings["fail"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if settings["fail"] == "exit":
        sys.exit(3)
    if settings["fail"] == "until there is a file" and not Path(settings["log"] + ".ok").exists():
        raise RuntimeError("no file yet")
    if settings["fail"] == "no JSON":
        return {"values": {"y": object()}}
    return {"values": {"y": float(settings["x"] ** 2 + seed), "threads": float(os.environ.get("OMP_NUM_THREADS", 0))}}


def reading(settings, seed, context):
    return {"values": {"length": len((context.folder / "inputs" / "text").read_text())}, "node": os.getpid()}


SQUARE = Kind("square", "tests.study.tiny:square", {"x": 1, "sleep": 0.0, "fail": "", "log": "", "rate": 1e-2})
READING = Kind("reading", "tests.study.tiny:reading", {"x": 1})
