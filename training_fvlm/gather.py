"""Gather tensors over all processes with the gradient of one process holding the whole batch.

`dist.all_gather` has no gradient: what a rank's embeddings contribute as negatives of other ranks is then lost, and
under DistributedDataParallel, which averages gradients over W ranks, every gradient is 1/W of what it should be
(FVLM oddity 8). Here the backward pass SUMS the gradients all ranks hold for a rank's slice. Every rank computes the
same loss over the same gathered batch, so that sum is W times the single-process gradient, and DDP's average takes
the W away again: no factor is needed, neither on the loss nor on the temperature.

The published run is reproduced by `keeps_other_ranks=False`: the backward pass then takes a rank's own gradient alone.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True if more than one process trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherWithGradient(torch.autograd.Function):
    """All-gather along the first axis; backward is a sum over ranks (or not) and the own slice of it."""

    @staticmethod
    def forward(ctx, tensor: Tensor, keeps_other_ranks: bool) -> Tensor:
        ctx.length, ctx.keeps_other_ranks = len(tensor), keeps_other_ranks
        return _all_gather(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.keeps_other_ranks:
            gradient = gradient.contiguous().clone()  # all_reduce writes in place, and autograd may still hold it
            dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.length
        return gradient[start : start + ctx.length], None


def gather_with_gradient(tensor: Tensor, keeps_other_ranks: bool = True) -> Tensor:
    """Concatenate `tensor` of all ranks along its first axis, in rank order, keeping the gradient.

    Args:
        tensor: Float tensor `(batch, ...)` of the same shape on every rank.
        keeps_other_ranks: Add the gradients that other ranks hold for this rank's slice. False: as published, 1/W of
            the gradient after DDP's average.

    Returns:
        `(ranks * batch, ...)`, the same on every rank; the tensor itself when there is one process.
    """
    return _GatherWithGradient.apply(tensor, keeps_other_ranks) if is_distributed() else tensor


def gather(tensor: Tensor) -> Tensor:
    """Concatenate `tensor` of all ranks along its first axis, in rank order, without a gradient.

    Args:
        tensor: Tensor `(batch, ...)` of the same shape on every rank; for numbers gloo and NCCL both carry, so no bool.
    """
    return _all_gather(tensor) if is_distributed() else tensor


def _all_gather(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)
