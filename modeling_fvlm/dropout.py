"""Dropout, and attention with dropout, made for the CPU: the same distribution, a fraction of the time and memory.

PyTorch draws one Bernoulli number per element, keeps the mask in the element's own type for the backward pass, and has
no fused attention kernel with dropout on the CPU. At the published size (12 heads, 1,232 tokens, rate 0.1) that is a
third of a training step. Here

(1) one 64-bit random number serves four elements: 16 bits each, compared with `rate * 2**16`, so the rate is met to
    1 / 2**17, and what is kept is divided by one minus the rate as rounded (unbiased);
(2) no mask is kept: a seed from PyTorch's default generator makes it, and makes it again in the backward pass; so
    activation checkpointing, the gradient cache and an exact resume replay it as they replay PyTorch's own dropout;
(3) attention runs over a few heads at a time in buffers that stay in the cache, and keeps neither logits nor
    probabilities: the backward pass computes them again, as FlashAttention does (Dao et al., NeurIPS 2022,
    https://arxiv.org/abs/2205.14135, section 3.1 and appendix B).

On every other device, and when a graph is compiled or exported, PyTorch's own functions run.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEVELS = 2**16  # of the 16 random bits of an element
ELEMENTS_AT_ONCE = 2**20
LOGITS_AT_ONCE = 2**21  # heads are taken together up to so many logits


def rounded_rate(rate: float) -> float:
    """The multiple of 1 / 2**16 that stands for a rate, below 1."""
    return min(round(rate * LEVELS), LEVELS - 1) / LEVELS


class KeptElements:
    """Draws which elements stay: 1 or 0 for each, from a seed, in the order of the calls."""

    def __init__(self, seed: int, rate: float, most: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.threshold = round(rounded_rate(rate) * LEVELS) - LEVELS // 2
        self.words = torch.empty(-(-most // 4), dtype=torch.int64, device="cpu")

    def draw(self, out: Tensor) -> Tensor:
        """Fill a contiguous tensor of at most `most` elements."""
        words = self.words[: -(-out.numel() // 4)].random_(-(2**63), None, generator=self.generator)
        bits = words.view(torch.int16)[: out.numel()].view(out.shape)
        return torch.ge(bits, self.threshold, out=out)


def new_seed() -> int:
    """A seed drawn from PyTorch's default generator."""
    return int(torch.randint(2**62, (), device="cpu"))


def _drop(values: Tensor, seed: int, rate: float) -> Tensor:
    values = values.contiguous()
    dropped = torch.empty_like(values)
    kept = KeptElements(seed, rate, min(values.numel(), ELEMENTS_AT_ONCE))
    scale = 1 / (1 - rounded_rate(rate))
    for part, source in zip(dropped.view(-1).split(ELEMENTS_AT_ONCE), values.view(-1).split(ELEMENTS_AT_ONCE)):
        kept.draw(part).mul_(source).mul_(scale)
    return dropped


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, rate: float) -> Tensor:
        ctx.seed, ctx.rate = new_seed(), rate
        return _drop(values, ctx.seed, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _drop(gradient, ctx.seed, ctx.rate), None


def runs_here(values: Tensor) -> bool:
    """Whether the functions of this file take a tensor; PyTorch's own take all others."""
    is_plain = type(values) in (Tensor, nn.Parameter) and values.device.type == "cpu" and values.is_floating_point()
    return is_plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster on the CPU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or not runs_here(hidden_states):
            return F.dropout(hidden_states, self.p, self.training)
        return _SeededDropout.apply(hidden_states, self.p)


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, key_is_real: Tensor | None, rate: float, scaling: float
) -> Tensor:
    """Attention whose probabilities are dropped at `rate`, on the CPU.

    Args:
        query, key, value: `(batch, heads, tokens, head size)`, float32 or float64; there may be fewer queries.
        key_is_real: `(batch, keys)` bool, False for keys that nobody may see; None: all are seen.
        rate: Share of the probabilities that is dropped, below 1.
        scaling: Factor of the logits.

    Returns:
        `(batch, queries, heads, head size)`.
    """
    return _DropoutAttention.apply(query, key, value, key_is_real, rate, scaling)


class _HeadProbabilities:
    """Probabilities of a few heads at a time, before and after dropout; the buffers are used again and again.

    Args:
        query, key: `(batch, heads, tokens, head size)`.
    """

    def __init__(self, query: Tensor, key: Tensor, key_is_real: Tensor | None, seed: int, rate: float):
        batch, self.num_heads, num_queries, _ = query.shape
        num_logits = num_queries * key.shape[2]
        heads_at_once = max(1, min(batch * self.num_heads, LOGITS_AT_ONCE // max(num_logits, 1)))
        starts = range(0, batch * self.num_heads, heads_at_once)
        self.chunks = [slice(start, min(start + heads_at_once, batch * self.num_heads)) for start in starts]
        self.buffers = query.new_empty(4, heads_at_once, num_queries, key.shape[2])
        self.kept = KeptElements(seed, rate, heads_at_once * num_logits)
        self.hidden_keys = None if key_is_real is None else ~key_is_real

    def of(self, chunk: slice, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax of the logits of some heads, which of them stay (1 or 0), and a free buffer of their shape.

        Args:
            query, key: `(batch * heads, tokens, head size)`; the query is scaled already.
        """
        logits, probabilities, kept = (buffer[: chunk.stop - chunk.start] for buffer in self.buffers[:3])
        torch.bmm(query[chunk], key[chunk].transpose(1, 2), out=logits)
        if self.hidden_keys is not None:
            sample = torch.arange(chunk.start, chunk.stop, device="cpu") // self.num_heads
            logits.masked_fill_(self.hidden_keys[sample][:, None], torch.finfo(logits.dtype).min)
        torch.softmax(logits, -1, out=probabilities)
        return probabilities, self.kept.draw(kept), logits


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_is_real, rate, scaling):
        ctx.seed, ctx.rate, ctx.scaling = new_seed(), rate, scaling
        scaled, keys, values = (query * scaling).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        context = torch.empty_like(scaled)
        heads = _HeadProbabilities(query, key, key_is_real, ctx.seed, rate)
        for chunk in heads.chunks:
            probabilities, kept, _ = heads.of(chunk, scaled, keys)
            torch.bmm(probabilities.mul_(kept), values[chunk], out=context[chunk])
        context = context.mul_(1 / (1 - rounded_rate(rate))).view(query.shape)
        ctx.save_for_backward(query, key, value, key_is_real, context)
        return context.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, key_is_real, context = ctx.saved_tensors
        gradient = gradient.transpose(1, 2)
        # The softmax's backward subtracts sum_j p_j dp_j from every dp: under dropout too that is gradient . context.
        inner = (gradient * context).sum(-1, keepdim=True).flatten(0, 1)
        scaled, keys, values = (query * ctx.scaling).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        gradient = (gradient / (1 - rounded_rate(ctx.rate))).flatten(0, 1)
        query_grad, key_grad, value_grad = (torch.empty_like(tensor) for tensor in (scaled, keys, values))
        heads = _HeadProbabilities(query, key, key_is_real, ctx.seed, ctx.rate)
        for chunk in heads.chunks:
            probabilities, kept, dropped = heads.of(chunk, scaled, keys)
            torch.mul(probabilities, kept, out=dropped)
            torch.bmm(dropped.transpose(1, 2), gradient[chunk], out=value_grad[chunk])
            logits_grad = heads.buffers[3, : chunk.stop - chunk.start]
            torch.bmm(gradient[chunk], values[chunk].transpose(1, 2), out=logits_grad)
            logits_grad.mul_(kept).sub_(inner[chunk]).mul_(probabilities)
            torch.bmm(logits_grad, keys[chunk], out=query_grad[chunk])
            torch.bmm(logits_grad.transpose(1, 2), scaled[chunk], out=key_grad[chunk])
        query_grad.mul_(ctx.scaling)
        return query_grad.view(query.shape), key_grad.view(key.shape), value_grad.view(value.shape), None, None, None
