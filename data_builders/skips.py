"""What a stream left out, gathered from every process that reads it.

The workers of a DataLoader or of `download_and_prepare(num_proc=...)` are processes of their own: what they skip would
be known to them alone. They append to one small file instead, which the process that began the stream reads.
"""

import json
import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)


class Skips:
    """Cases that were left out, with their reasons; each is logged once by the process that first meets it.

    The file is gone with this object, in the process that made it; copies that were sent to others only add to it.
    """

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="fvlm-skips-")
        self.path = Path(folder, "skips.jsonl")
        self.path.touch()
        # A forked worker holds this object as well, and must not take the file away.
        weakref.finalize(self, _remove, folder, os.getpid())

    def add(self, case: str, reason: str) -> None:
        if case in self.read():
            return
        logger.warning(f"skipped {case}: {reason}")
        line = json.dumps([case, reason]) + "\n"
        if self.path.is_file():  # the process that would ask may have ended before its workers
            # One write to a file opened for appending: lines of two processes do not mix.
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())

    def read(self) -> dict[str, str]:
        """Case -> why it was left out, in the order in which it happened."""
        if not self.path.is_file():
            return {}
        found: dict[str, str] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            case, reason = json.loads(line)
            found.setdefault(case, reason)
        return found


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
