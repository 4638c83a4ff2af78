"""A training that ends itself with SIGKILL at a chosen moment: nothing is cleaned up, flushed or caught.

Moments are the syncs, renames and removals of a run's folder, and the writing of its files: torch's and safetensors'
own are killed when half of the bytes are there. Runs in a child of a fork server, which imports the command once.
"""

import io
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import torch

import train_fvlm


def train_and_die(argv: list[str], what: str, name: str, count: int) -> None:
    """Run the command and kill this process at the `count`-th time that `what` is done to something called `name`.

    Args:
        argv: Of the command.
        what: "half" (half of the file has been written), "fsync", "rename" (to that name) or "rmtree".
        name: Name of the file or folder.
        count: Counted from 1; 0: never.
    """
    left = [count]

    def is_it(kind: str, path: str) -> bool:
        if kind == what and os.path.basename(str(path)) == name:
            left[0] -= 1
        return left[0] == 0 and count > 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(thing, path, *args, **options):
        if is_it("half", path):
            content = io.BytesIO()
            torch_save(thing, content, *args, **options)
            Path(path).write_bytes(content.getvalue()[: content.tell() // 2])
            die()
        return torch_save(thing, path, *args, **options)

    def fsync(descriptor):
        if is_it("fsync", os.readlink(f"/proc/self/fd/{descriptor}")):
            die()
        return os_fsync(descriptor)

    def rename(source, target, **options):
        if is_it("rename", target):
            die()
        return os_rename(source, target, **options)

    def rmtree(path, *args, **options):
        if is_it("rmtree", path):
            die()
        return shutil_rmtree(path, *args, **options)

    torch_save, os_fsync, os_rename, shutil_rmtree = torch.save, os.fsync, os.rename, shutil.rmtree
    torch.save, os.fsync, os.rename, shutil.rmtree = save, fsync, rename, rmtree
    torch.set_num_threads(1)
    raise SystemExit(train_fvlm.main(argv))


def run(argv: list[str], what: str = "", name: str = "", count: int = 0) -> int:
    """`train_and_die` in a child: its exit status, minus the number of the signal that ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dying"])
    child = context.Process(target=train_and_die, args=(argv, what, name, count))
    child.start()
    child.join()
    return child.exitcode
