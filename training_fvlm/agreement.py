"""What all ranks decide together: a number that one of them alone may know, and messages that one alone may have.

Steps must end on every rank at the same place, or the others wait in a collective for ever. The exchange goes over the
CPU (gloo), so that it does not wait for what is queued on a GPU.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from .gather import is_distributed

_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}  # world -> the group of these exchanges


def largest(number: int, timeout: float) -> int:
    """The largest of the ranks' numbers. Every rank must ask at the same place.

    Args:
        number: This rank's.
        timeout: Seconds to wait for the others, as of the first call.
    """
    if not is_distributed():
        return number
    agreed = torch.tensor(number)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=_group(timeout))
    return int(agreed)


def all_of(thing: object, timeout: float) -> list:
    """What every rank has to tell, in rank order. Every rank must ask at the same place."""
    if not is_distributed():
        return [thing]
    things: list = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing, group=_group(timeout))
    return things


def _group(timeout: float) -> dist.ProcessGroup:
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()  # of a process group that was destroyed
        _groups[world] = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return _groups[world]
