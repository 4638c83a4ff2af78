"""Workers of tests on several processes: how they are started, and how they end."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import torch

CONFIGS = Path(__file__).resolve().parents[1] / "hub_configs" / "accelerate"
# Below what Linux gives to outgoing connections and to servers that ask for any port (from 32768 on): a launcher opens
# its port seconds after it was chosen, and whoever else is at work here would come upon it by chance.
PORTS = range(20001, 32000)


def free_port() -> int:
    """A port that nobody listens on, and that nobody gets without asking for it."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def environment(**more: str) -> dict[str, str]:
    """This process's, for one thread and no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def launch(config: str, processes: int, worker: Path, *words: str | Path, timeout: float = 280, **more: str) -> None:
    """Run a worker of the tests on so many processes of `accelerate launch`, and see that it came to its end.

    Args:
        config: Name of a configuration in hub_configs/accelerate.
        processes: Their number.
        worker: Its file.
        words: What it is told.
        timeout: Seconds; less than what pytest gives a test, so that a worker that hangs is told of.
        more: Variables of its environment.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", str(processes), "--main_process_port", str(free_port()), str(worker)]
    command += map(str, words)
    run = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stderr[-4000:]


def leave() -> None:
    """End a worker that has written all its files, without taking anything down.

    Now and then a thread of gloo is still at work when Python or the process group is taken down, and the process
    aborts.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
