"""Kinds of runs that take no time, for tests of everything around a run."""

import os
import signal
import sys
import time
from pathlib import Path

from suffice.study import RunKind


def square(settings, seed, context):
    print("printed by a run")  # must not break the lines that a worker writes
    if settings["log"]:
        with open(settings["log"], "a") as file:
            file.write(f"{context.key}\n")
    context.log("squaring")
    time.sleep(settings["sleep"])
    if settings["fail"] == "raise":
        raise RuntimeError("no square today")
    if settings["fail"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if settings["fail"] == "exit":
        sys.exit(3)
    if settings["fail"] == "until a file exists" and not Path(settings["log"] + ".ok").exists():
        raise RuntimeError("no file yet")
    while settings["fail"] == "wait for a file" and not Path(settings["log"] + ".ok").exists():
        time.sleep(0.02)
    if settings["fail"] == "not JSON":
        return {"values": {"y": object()}}
    return {"values": {"y": float(settings["x"] ** 2 + seed), "threads": float(os.environ.get("OMP_NUM_THREADS", 0))}}


def read_input(settings, seed, context):
    return {"values": {"length": len((context.folder / "inputs" / "text").read_text())}, "process": os.getpid()}


def train(settings, seed, context):
    model, training = settings["model"], settings["train"]
    loss = model["hidden"] / training["epochs"] + len(model["norms"]["decoder"]) + seed
    return {"values": {"loss": loss}, "settings": settings}


def check_train(settings):
    if settings["train"]["epochs"] < 1:
        raise ValueError(f"train.epochs must be at least 1, got {settings['train']['epochs']}")
    return {**settings, "digest": "d41d8"}


SQUARE = RunKind("square", "tests.study.tiny:square", {"x": 1, "sleep": 0.0, "fail": "", "log": "", "rate": 1e-2})
READ_INPUT = RunKind("read_input", "tests.study.tiny:read_input", {"x": 1})
TRAIN = RunKind(
    "train",
    "tests.study.tiny:train",
    {
        "arm": None,  # a name, or a mapping that is a value and not a group of settings
        "options": {},  # a group that accepts any names
        "model": {"hidden": 8, "norms": {"encoder": "batch", "decoder": "batch"}},
        "train": {"epochs": 2, "rate": 0.1},
    },
    check="tests.study.tiny:check_train",
)
