"""Signals that ask a run to stop, by themselves: heard in any state of the main thread, and only twice."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from training_fvlm.durable import _interruptible as interruptible
from training_fvlm.signals import SIGNALS, ShieldedWorker, StopRequested, StopSignals

ROOT = Path(__file__).resolve().parents[1]


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number, monkeypatch):
    monkeypatch.setattr("training_fvlm.signals.SAME_SECONDS", 60.0)  # a machine that stalls ends no test process
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals() as signals:
        assert signals.number == 0 and signals.name == ""
        os.kill(os.getpid(), number)
        wait_for(lambda: signals.number)
        assert signals.name == signal.Signals(number).name
        os.kill(os.getpid(), number)  # at once: the same signal, handed on by a launcher
        time.sleep(0.1)
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert not any(thread.name == "stop signals" for thread in threading.enumerate())


def test_no_handlers_outside_of_the_main_thread():
    names = []

    def elsewhere():
        with StopSignals() as signals:
            names.append(signals.name)

    thread = threading.Thread(target=elsewhere)
    thread.start(), thread.join()
    assert names == [""]


def test_work_that_may_be_broken_off_is():
    with StopSignals() as signals, pytest.raises(StopRequested, match="SIGUSR1"), interruptible(signals):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(20)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: signals.number)
        time.sleep(0.01)  # other work is not
        with pytest.raises(StopRequested), interruptible(signals):
            raise AssertionError("a signal that came before is not forgotten")


BUSY = """
import hashlib
from training_fvlm.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, which no handler of Python's interrupts
"""


def test_a_second_signal_ends_a_process_that_is_deep_in_c():
    line = [sys.executable, "-c", BUSY]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    said = iter(process.stderr.readline, "")
    assert any("SIGUSR1: the run stops after this step" in line for line in said), "told at once"
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


class Pids:
    """A data set that tells which process reads it."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.02)
        return os.getpid()


def test_a_forked_worker_does_not_hold_up_the_end():
    with StopSignals():
        loader = iter(DataLoader(Pids(), num_workers=1, worker_init_fn=ShieldedWorker()))
        assert next(loader)  # the worker lives, with copies of all that is open here


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_live_on_when_everybody_gets_the_signal(number):
    loader = DataLoader(Pids(), num_workers=1, collate_fn=list, worker_init_fn=ShieldedWorker())
    pids = set()
    for count, (pid,) in enumerate(loader):
        pids.add(pid)
        if count == 5:
            sender = subprocess.Popen(["kill", f"-{int(number)}", str(pid)])  # not by its own process
            assert sender.wait() == 0
    assert count == 39 and len(pids) == 1 and os.getpid() not in pids


def sleeping(_, ready):
    ShieldedWorker(lambda worker: ready.set())(0)
    time.sleep(600)


def test_workers_obey_their_own_process():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=sleeping, args=(0, ready), daemon=True)
    worker.start()
    assert ready.wait(60)
    subprocess.run(["kill", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    for _ in range(60):  # one that comes while another's has not been taken yet, is none
        worker.terminate()
        worker.join(1)
        if worker.exitcode is not None:
            break
    assert worker.exitcode == 0
