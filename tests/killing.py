"""A build that ends itself with SIGKILL at a chosen moment: nothing is cleaned up, flushed or caught.

The moments are the calls that change the folder or put it on the disk. Runs in a child of a fork server
(`start_killed`), which imports the builders once: a Python of its own for each kill would take seconds.
"""

import multiprocessing
import os
import signal
from pathlib import Path

from data_builders.__main__ import main as build

CHANGING = ("fsync", "replace", "unlink", "mkdir", "rmdir", "link")


def build_and_die(arguments: list[str], moment: int, told: str | None, environment: dict[str, str]) -> None:
    """Run a command of data_builders and kill this process right before its `moment`-th change of a folder.

    Args:
        arguments: Of the command.
        moment: Counted from 1.
        told: File into which the number of changes is written if the command ends before that.
        environment: Variables to set, such as TMPDIR.
    """
    os.environ.update(environment)
    count = 0

    def counted(function):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in CHANGING:
        setattr(os, name, counted(getattr(os, name)))
    status = build(arguments)
    if told is not None:
        Path(told).write_text(f"{status} {count}", encoding="utf-8")


def run_killed(arguments: list[str], moment: int, told: Path | None = None, **environment: str) -> bool:
    """`build_and_die` in a child; whether it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_builders.build", "data_builders.ct_rate", "data_builders.organ_crops"])
    child = context.Process(target=build_and_die, args=(arguments, moment, str(told) if told else None, environment))
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL
