"""How much memory a worker of a builder takes: a process that imports what a worker imports, and prepares cases.

    python -m benchmarks.worker < job        # a pickled (case, settings), as `memory_of_a_worker` sends it

No figure of its own: benchmarks/prepare.py, which needs PyTorch for its baseline, asks here.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

from data_builders.build import Settings  # unpickling the settings imports it in every worker, too
from data_builders.cases import Case
from data_builders.run_cases import prepare_case

CASES = 3  # one after the other: not all that one leaves is given back before the next
MB = 1e6


def memory_of_a_worker(case: Case, settings: Settings) -> tuple[float, float]:
    """MB that are resident in a fresh worker before its first case, and the most that ever were after `CASES` times it.

    Raises:
        RuntimeError: If the worker failed.
    """
    folder = Path(__file__).resolve().parent.parent
    places = [str(folder), *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker"],
        input=pickle.dumps((case, settings)),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )
    if run.returncode:
        raise RuntimeError(f"the worker failed:\n{run.stderr.decode(errors='replace')[-2000:]}")
    before, most = json.loads(run.stdout)
    return before, most


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the most ever) of this process; Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / MB


def prepare_and_send(case: Case, settings: Settings) -> None:
    """What a worker does with one case; nothing of it is kept."""
    built = prepare_case(case, settings)
    if built.row is None:
        raise RuntimeError(built.skip_reason or built.stop_reason)
    pickle.dumps(built)  # as it goes to the process that writes


def main() -> int:
    case, settings = pickle.load(sys.stdin.buffer)
    before = resident_mb("VmRSS")
    for _ in range(CASES):
        prepare_and_send(case, settings)
    print(json.dumps([before, resident_mb("VmHWM")]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
