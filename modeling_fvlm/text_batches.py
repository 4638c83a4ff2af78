"""Batches of texts without padding: short texts share a row, or run in buckets of similar length.

A batch holds as many captions as patients times organs, of 5 to 120 tokens; padded to the longest, two tokens of three
are padding. Packed, every row holds several texts, a token sees only its own text, and positions start anew with each:
one pass of the encoder over hardly more tokens than there are. That needs an encoder that takes a mask of its own per
token and positions; all others get buckets, cut where they cost least.
"""

from bisect import bisect_right

import torch
from torch import Tensor

# Encoders of transformers that take `position_ids` and a mask `(batch, 1, tokens, tokens)`, and need nothing else to
# know where a text begins.
PACKABLE_MODELS = ("bert",)
# Attention costs a token as much as its linear layers at some thousand keys: rows of 128 tokens add 3 %.
SHORTEST_ROW, LONGEST_ROW, KEYS_OF_EQUAL_COST = 64, 256, 4608
MAX_TEXTS_TO_TRY_ROWS = 128
# What one more bucket costs, in tokens: on a CPU a pass over the weights and their gradients, on a GPU the launches of
# all kernels of the encoder.
BUCKET_COST_CPU, BUCKET_COST_GPU = 48, 8192


def real_tokens(attention_mask: Tensor) -> Tensor:
    """Which tokens count, `(texts, tokens)` bool; the first token of a text that has none."""
    is_real = attention_mask.bool()
    first_column = is_real[:, :1] | ~is_real.any(1, keepdim=True)
    return torch.cat([first_column, is_real[:, 1:]], dim=1)


def pack_rows(lengths: list[int], row_length: int) -> tuple[list[int], int]:
    """Place texts in rows, the longest first, each in the row that it fills best.

    Args:
        lengths: Tokens of every text, none above `row_length`.

    Returns:
        Start of every text in the flattened rows, and the number of rows.
    """
    starts = [0] * len(lengths)
    num_rows = 0
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free tokens
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        room = next((room for room in range(length, row_length + 1) if rows_with_room[room]), None)
        if room is None:
            room, row = row_length, num_rows
            num_rows += 1
        else:
            row = rows_with_room[room].pop()
        starts[text] = row * row_length + row_length - room
        rows_with_room[room - length].append(row)
    return starts, num_rows


def best_row_length(lengths: list[int]) -> int:
    """The row length at which packed texts cost least: padding and attention together."""
    longest = max(lengths)
    if len(lengths) > MAX_TEXTS_TO_TRY_ROWS:
        return max(longest, 2 * SHORTEST_ROW)
    candidates = {longest, *(length for length in range(SHORTEST_ROW, LONGEST_ROW + 1, 8) if length > longest)}
    return min(sorted(candidates), key=lambda row: pack_rows(lengths, row)[1] * row * (1 + row / KEYS_OF_EQUAL_COST))


class PackedTexts:
    """Texts that share rows.

    Args:
        input_ids: `(texts, tokens)`, padded.
        is_real: `(texts, tokens)` bool, from `real_tokens`.

    Attributes:
        input_ids, position_ids: `(rows, row length)`; a token keeps the position it had in the padded batch.
        text_of_token: `(rows, row length)`, -1 where a row is padded.
    """

    def __init__(self, input_ids: Tensor, is_real: Tensor):
        device = input_ids.device
        lengths = is_real.sum(1)
        length_list = lengths.tolist()
        row_length = best_row_length(length_list)
        start_list, num_rows = pack_rows(length_list, row_length)
        self.lengths, self.starts = lengths, torch.tensor(start_list, device=device)
        text, column = is_real.nonzero(as_tuple=True)  # text by text
        within = torch.arange(len(text), device=device) - (lengths.cumsum(0) - lengths)[text]
        self.text, self.places = text, self.starts[text] + within

        def in_rows(values: Tensor, fill: int) -> Tensor:
            rows = values.new_full((num_rows * row_length,), fill)
            return rows.scatter(0, self.places, values).view(num_rows, row_length)

        self.input_ids = in_rows(input_ids[text, column], 0)
        self.position_ids = in_rows(column, 0)
        self.text_of_token = in_rows(text, -1)

    def attention_mask(self, additive: torch.dtype | None) -> Tensor:
        """Who sees whom, `(rows, 1, row length, row length)`: bool, or zeros and a large negative number.

        Padding sees padding: a softmax over nothing would be undefined.
        """
        is_seen = (self.text_of_token[:, :, None] == self.text_of_token[:, None, :])[:, None]
        if additive is None:
            return is_seen
        return torch.zeros_like(is_seen, dtype=additive).masked_fill(~is_seen, torch.finfo(additive).min)

    def first_tokens(self, hidden_states: Tensor) -> Tensor:
        """The first token of every text, `(texts, hidden)`."""
        return hidden_states.flatten(0, 1).index_select(0, self.starts)

    def means(self, hidden_states: Tensor) -> Tensor:
        """The mean over every text's tokens, `(texts, hidden)`."""
        tokens = hidden_states.flatten(0, 1).index_select(0, self.places).float()
        sums = tokens.new_zeros(len(self.lengths), tokens.shape[1]).index_add(0, self.text, tokens)
        return (sums / self.lengths[:, None]).to(hidden_states.dtype)


def bucket_cost(device: torch.device) -> int:
    """What a further bucket costs on a device, in tokens."""
    return BUCKET_COST_CPU if device.type == "cpu" else BUCKET_COST_GPU


def length_buckets(lengths: list[int], bucket_cost: int) -> tuple[list[int], list[int]]:
    """Cut sorted lengths into the buckets that cost least: every bucket is padded to its longest.

    Args:
        lengths: In rising order.
        bucket_cost: What a further bucket costs, in tokens.

    Returns:
        Number of texts of every bucket, and its longest length; at least 1, also for texts without a token.
    """
    # Texts of one length stay together: the best cut is found over the different lengths, each bucket's end in turn.
    different = sorted(set(lengths))
    texts_until = [0, *(bisect_right(lengths, length) for length in different)]
    best: list[tuple[int, int]] = [(0, 0)]  # least cost of the first lengths, and where their last bucket begins
    for stop, length in enumerate(different, start=1):
        best.append(
            min(
                (best[start][0] + (texts_until[stop] - texts_until[start]) * length + bucket_cost, start)
                for start in range(stop)
            )
        )
    sizes: list[int] = []
    longest: list[int] = []
    stop = len(different)
    while stop:
        start = best[stop][1]
        sizes.append(texts_until[stop] - texts_until[start])
        longest.append(max(different[stop - 1], 1))
        stop = start
    return sizes[::-1], longest[::-1]
