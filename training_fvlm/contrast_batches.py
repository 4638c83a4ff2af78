"""The order in which a rank reads the patients of each contrast, chunk by chunk, for the gradient cache.

A contrast is `contrast_size` consecutive rows of the epoch's order, whatever the number of ranks; each rank owns an
equal, consecutive part of it. The part is cut into chunks of `micro_batch_size` rows. The first pass over a contrast
reads all of them; the second needs them again, and reads those once more that were not held in memory in between.
"""

from collections.abc import Iterator

from torch.utils.data import Sampler

from .data import EpochSampler


class ContrastBatches(Sampler):
    """A batch sampler: lists of (epoch, row) keys, `loads` of them a contrast.

    Args:
        order: The epoch's order of rows, the same on every rank.
        contrast_size: Patients of a contrast over all ranks.
        micro_batch_size: Patients of a chunk; the last one of a rank's part may be smaller.
        num_held: Chunks that are held between the passes: the first so many.
        world_size, rank: How many processes train together, and which is this one.
    """

    def __init__(
        self,
        order: EpochSampler,
        contrast_size: int,
        micro_batch_size: int,
        num_held: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ):
        self.order, self.contrast_size, self.micro_batch_size = order, contrast_size, micro_batch_size
        self.num_held, self.rank = num_held, rank
        self.rank_size = contrast_size // world_size
        self.num_chunks = -(-self.rank_size // micro_batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) // self.contrast_size * (2 * self.num_chunks - self.num_held)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = list(self.order)
        # Rows that do not fill a last contrast are left out: it would contrast fewer patients.
        for contrast in range(len(keys) // self.contrast_size):
            start = contrast * self.contrast_size + self.rank * self.rank_size
            mine = keys[start : start + self.rank_size]
            chunks = [
                mine[place : place + self.micro_batch_size] for place in range(0, len(mine), self.micro_batch_size)
            ]
            yield from chunks
            yield from chunks[self.num_held :]


def num_held_chunks(num_chunks: int, chunk_bytes: int, held_bytes: float) -> int:
    """How many chunks fit into `held_bytes` of memory between the passes."""
    return min(num_chunks, int(held_bytes // chunk_bytes))
