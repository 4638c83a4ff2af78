"""A run that is asked to stop: SIGTERM or SIGUSR1 saves a checkpoint at the next step boundary, then the run exits.

Batch systems and clouds send SIGTERM before they take a machine away; SLURM sends another signal a chosen time before
the time limit (`--signal=USR1@300`). The run then

(1) finishes the optimizer step it is in, all chunks of a gradient cache included: half a step cannot be saved. An
    evaluation is broken off at its next batch and done again by the run that goes on;
(2) agrees with the other ranks, of which one alone may have got the signal, and writes a checkpoint;
(3) exits with status 75 (EX_TEMPFAIL of sysexits.h: try again), on every rank, which tells a script to start it again
    with `--resume_from_checkpoint auto`.

So the signal must come earlier before the end than a step and a checkpoint take together. A second signal ends the
process at once, with status 128 + its number; what comes within two seconds of the first is the same signal, sent to a
group of processes and handed on by a launcher.

Behind a launcher (accelerate launch, torchrun) the processes hear of a SIGTERM through it, have its 30 seconds, and its
status is 1 whatever theirs was. On SLURM let srun start them: hub_configs/slurm/train.sh.
"""

import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Self

from transformers.utils import logging

logger = logging.get_logger(__name__)

EXIT_STATUS = 75
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
SAME_SECONDS = 2.0


class StopRequested(Exception):
    """Ends a run that was asked to stop, on all ranks together, when its checkpoint is written."""


class StopSignals:
    """Listens for the signals while its block lasts; only in the main thread, elsewhere it hears nothing.

    A thread reads them, since the main one may sit in C++ for minutes, in a step or waiting for another rank.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal that came
        self.may_interrupt = False  # whether the main thread may be torn out of what it does
        self._came_at: float | None = None  # when this process got its first one itself
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._interrupt) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._before = {}
        self._writer.send(bytes(1))  # closing it is no end: workers that were forked hold it open
        self._thread.join()
        self._writer.close(), self._reader.close()

    @property
    def name(self) -> str:
        """Of the signal that came, "" without one."""
        return signal.Signals(self.number).name if self.number else ""

    def _listen(self) -> None:
        while number := self._reader.recv(1)[0]:
            if number in SIGNALS:  # others come along, too
                self._note(number)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self._came_at is None:
            self.number, self._came_at = self.number or number, now
            logger.warning(
                "%s: the run stops after this step, with a checkpoint. A second signal ends it at once.", self.name
            )
        elif now - self._came_at > SAME_SECONDS:
            os._exit(128 + number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Python's own handler; it runs in the main thread, as soon as that is back from C++."""
        if self.may_interrupt:
            self.number = self.number or number
            self.may_interrupt = False
            raise StopRequested(self.name)


class ShieldedWorker:
    """`worker_init_fn` of a data loader whose workers live on when their whole group of processes gets a signal.

    Else they would die and take the run with them before it has saved anything. Their own process may still end them.

    Args:
        then: Another `worker_init_fn`, called afterwards.
    """

    def __init__(self, then=None):
        self.then = then

    def __call__(self, worker: int) -> None:
        if hasattr(signal, "pthread_sigmask"):
            parent = os.getppid()
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the thread inherits it
            threading.Thread(target=_obey, args=(parent,), daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _obey(parent: int) -> None:
    """Wait for a signal of the parent's and end this process then; pass over those of others."""
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)
