"""Organ pooling of fVLM: one learned query per organ attends over that organ's tokens of all feature levels.

From Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D. The published model calls one
`nn.MultiheadAttention` per organ and patient on the organ's own tokens. Here all organs of all patients are pooled at
once. An organ's query is the same for every patient, so with `q = W_q query + b_q` of one head

    softmax_t(q . (W_k x_t + b_k)) = softmax_t((W_k^T q) . x_t)      since q . b_k is the same for all tokens t
    sum_t p_t (W_v x_t + b_v) = W_v (sum_t p_t x_t) + b_v sum_t p_t

and neither keys nor values of the tokens are ever computed. Steps:

(1) fold the key weight into the query: one vector per organ and head;
(2) its product with every token of every level, softmax over the organ's tokens;
(3) weighted sum of the raw tokens, then the value weight, then the output layer.

The tokens are read (2), (3) where the tower left them, level by level: joined, they would be copied once forward, and
their gradients, one from the logits and one from the sum, added and split again backward.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


class _AttendToLevels(torch.autograd.Function):
    """Attention of constant queries over the raw tokens of several levels, which are keys and values alike.

    A function of its own for its backward: a token's gradient is `sum_q dlogit_q query_q + weight_q dpooled_q`, here
    one product for each level. It saves the tokens themselves, no copy of them.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, queries: Tensor, organ_token_mask: Tensor, keep: Tensor | None, *levels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            queries: `(organs * heads, hidden)`, of the levels' dtype.
            organ_token_mask: `(batch, organs, tokens)` bool: the tokens that an organ's queries see, in every level.
            keep: Their dropout as factors of the probabilities, `(batch, organs * heads, levels * tokens)`.
            levels: Tokens, each `(batch, tokens, hidden)`.

        Returns:
            Weighted sums of tokens `(batch, organs * heads, hidden)`, the sums of the weights
            `(batch, organs * heads)`, and the probabilities before dropout `(batch, organs * heads, levels * tokens)`;
            the latter two float32 or better.
        """
        batch, num_organs, num_tokens = organ_token_mask.shape
        logits = torch.cat([queries @ level.mT for level in levels], dim=-1)  # (batch, organs * heads, levels * tokens)
        by_organ = logits.view(batch, num_organs, -1, len(levels), num_tokens)
        # A finite fill: the softmax of an absent organ stays finite.
        by_organ.masked_fill_(~organ_token_mask[:, :, None, None], torch.finfo(logits.dtype).min)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        probabilities = logits.softmax(-1, dtype=dtype)
        # It is uniform over all tokens there; as zeros it moves nothing, neither forward nor backward.
        is_present = organ_token_mask.any(-1, keepdim=True).to(dtype)  # (batch, organs, 1)
        probabilities.view(batch, num_organs, -1).mul_(is_present)
        weights = probabilities if keep is None else probabilities * keep
        # Summed in the softmax's dtype: in bf16 every level would round the sum once more.
        parts = weights.to(queries.dtype).split(num_tokens, -1)
        pooled = sum((part @ level).to(dtype) for part, level in zip(parts, levels)).to(queries.dtype)
        ctx.save_for_backward(queries, probabilities, keep, *levels)
        ctx.set_materialize_grads(False)
        return pooled, weights.sum(-1), probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_pooled: Tensor | None, grad_total: Tensor | None, grad_attended: Tensor | None):
        """Gradients of the queries and of every level."""
        queries, probabilities, keep, *levels = ctx.saved_tensors
        batch, num_tokens, _ = levels[0].shape
        if grad_pooled is None:
            grad_pooled = queries.new_zeros(batch, *queries.shape)
        grad = torch.cat([grad_pooled @ level.mT for level in levels], dim=-1).to(probabilities.dtype)
        if grad_total is not None:
            grad += grad_total[..., None]
        if keep is not None:
            grad *= keep
        if grad_attended is not None:
            grad += grad_attended
        # The gradients of the logits and the weights stand side by side, as the tokens' gradient wants them. A token
        # outside an organ has probability 0, and 0 comes out for it.
        grad = grad * probabilities
        grad = torch.addcmul(grad, probabilities, grad.sum(-1, keepdim=True), value=-1)
        both = torch.stack([grad, probabilities if keep is None else probabilities * keep], dim=1)
        both = both.to(queries.dtype)

        grad_queries, grad_levels = None, [None] * len(levels)
        if ctx.needs_input_grad[0]:
            parts = both[:, 0].split(num_tokens, -1)
            grad_queries = sum((part @ level).sum(0, dtype=grad.dtype) for part, level in zip(parts, levels))
            grad_queries = grad_queries.to(queries.dtype)
        if any(ctx.needs_input_grad[3:]):
            other = torch.cat(
                [queries.expand(batch, -1, -1), grad_pooled], dim=1
            )  # (batch, 2 * organs * heads, hidden)
            grad_levels = [part.mT @ other for part in both.flatten(1, 2).split(num_tokens, -1)]
        return grad_queries, None, None, *grad_levels


class OrganPooling(nn.Module):
    """Pool each organ's tokens into one vector. Parameters are laid out as in `nn.MultiheadAttention`."""

    def __init__(self, num_organs: int, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_tokens = nn.Parameter(torch.zeros(num_organs, hidden_size))
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))  # rows: query, key, value
        # Its key third has no influence (see above) and a zero gradient; it stays so that weights map one to one.
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, feature_levels: tuple[Tensor, ...], organ_token_mask: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Pool.

        Args:
            feature_levels: Tokens of each level, `(batch, tokens, hidden)`.
            organ_token_mask: `(batch, organs, tokens)` bool: the tokens of each organ.
            output_attentions: Return the attention probabilities as well.

        Returns:
            `(batch, organs, hidden)`, the output layer's bias for an organ without tokens, and the probabilities
            `(batch, organs, heads, levels * tokens)` before dropout (zeros for such an organ), or None.
        """
        batch, num_organs, num_tokens = organ_token_mask.shape
        num_heads, hidden = self.num_heads, self.query_tokens.shape[1]
        head_size = hidden // num_heads
        query_weight, key_weight, value_weight = self.in_proj_weight.view(3, num_heads, head_size, hidden)
        query_bias, _, value_bias = self.in_proj_bias.view(3, hidden)

        # (1)
        queries = F.linear(self.query_tokens, query_weight.flatten(0, 1), query_bias)
        queries = queries.view(num_organs, num_heads, head_size) * head_size**-0.5
        folded_queries = torch.einsum("ohd,hdc->ohc", queries, key_weight).flatten(0, 1)  # (organs * heads, hidden)

        # (2) and the sum of (3). Under autocast the queries have its dtype by now, and the tokens follow.
        levels = [level.to(folded_queries.dtype) for level in feature_levels]
        keep = None
        if self.training and self.dropout > 0:
            # Drawn here, from torch's generator: activation checkpointing can draw the same numbers again.
            ones = queries.new_ones(batch, num_organs, num_heads, len(levels) * num_tokens, dtype=torch.float32)
            keep = F.dropout(ones, self.dropout, training=True).flatten(1, 2)
        pooled, total, probabilities = _AttendToLevels.apply(folded_queries, organ_token_mask, keep, *levels)

        # (3)
        pooled = pooled.view(batch, num_organs, num_heads, hidden)
        values = torch.einsum("bohc,hdc->bohd", pooled, value_weight)
        # Under dropout the weights do not sum to one, and the value bias is weighted like every value.
        total = total.view(batch, num_organs, num_heads, 1).to(values.dtype)
        values = values + total * value_bias.view(num_heads, head_size)
        pooled = self.out_proj(values.flatten(2))
        if not output_attentions:
            return pooled, None
        attentions = probabilities.view(batch, num_organs, num_heads, -1)
        return pooled, attentions.to(feature_levels[0].dtype)


class OrganProjection(nn.Module):
    """A linear layer of its own for each organ: `weight_0`, `bias_0`, `weight_1`, ...

    Parameters of their own, not rows of one: an optimizer can then pass over the organs that did not enter a step, as
    the published run did. No `ParameterList` either: transformers 5.23 passes over a module of remote code that holds
    no parameter itself when it initialises weights.
    """

    def __init__(self, num_organs: int, hidden_size: int, projection_dim: int):
        super().__init__()
        self.num_organs = num_organs
        for index in range(num_organs):
            self.register_parameter(f"weight_{index}", nn.Parameter(torch.empty(projection_dim, hidden_size)))
            self.register_parameter(f"bias_{index}", nn.Parameter(torch.zeros(projection_dim)))

    def organ_parameters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weight `(projection_dim, hidden)` and bias `(projection_dim,)` of every organ."""
        return [(getattr(self, f"weight_{index}"), getattr(self, f"bias_{index}")) for index in range(self.num_organs)]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project `(batch, organs, hidden)` to `(batch, organs, projection_dim)`, each organ by its own weight."""
        weight, bias = (torch.stack(parameters) for parameters in zip(*self.organ_parameters()))
        return torch.einsum("boh,odh->bod", hidden_states, weight) + bias
