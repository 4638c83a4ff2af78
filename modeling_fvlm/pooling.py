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
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
            `(batch, organs, hidden)`, meaningless (but finite) for an organ without tokens, and the probabilities
            `(batch, organs, heads, levels * tokens)` before dropout, or None.
        """
        tokens = torch.cat(feature_levels, dim=1)  # (batch, levels * tokens, hidden)
        batch, num_tokens, hidden = tokens.shape
        num_organs, num_heads, head_size = len(self.query_tokens), self.num_heads, hidden // self.num_heads
        query_weight, key_weight, value_weight = self.in_proj_weight.view(3, num_heads, head_size, hidden)
        query_bias, _, value_bias = self.in_proj_bias.view(3, hidden)

        # (1)
        queries = F.linear(self.query_tokens, query_weight.flatten(0, 1), query_bias)
        queries = queries.view(num_organs, num_heads, head_size) * head_size**-0.5
        folded_queries = torch.einsum("ohd,hdc->ohc", queries, key_weight).flatten(0, 1)  # (organs * heads, hidden)

        # (2)
        logits = (folded_queries @ tokens.transpose(1, 2)).view(batch, num_organs, num_heads, num_tokens)
        outside = ~organ_token_mask.repeat(1, 1, len(feature_levels))[:, :, None]  # (batch, organs, 1, levels * tokens)
        # A finite fill: the softmax of an absent organ stays finite, and so do its (zero) gradients.
        logits = logits.masked_fill(outside, torch.finfo(logits.dtype).min)
        probabilities = logits.softmax(-1, dtype=torch.float32).to(tokens.dtype)
        weights = F.dropout(probabilities, self.dropout, self.training)

        # (3)
        pooled = (weights.flatten(1, 2) @ tokens).view(batch, num_organs, num_heads, hidden)
        values = torch.einsum("bohc,hdc->bohd", pooled, value_weight)
        # Under dropout the weights do not sum to one, and the value bias is weighted like every value.
        values = values + weights.sum(-1, keepdim=True) * value_bias.view(num_heads, head_size)
        return self.out_proj(values.flatten(2)), probabilities if output_attentions else None


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
