"""An order of rows in which abnormal patients of one organ meet: `--organ_sampling balanced`.

In a uniform order a group of patients that are contrasted seldom holds two who are abnormal in a rare organ: it then
learns nothing of that organ, or only how a normal one differs from a single abnormal one. Here each group of N rows is
made so:

(1) organs take turns as anchors, in an order drawn anew each time all have had theirs, one for every four seats of the
    group (at least one): a rare organ as often as a common one;
(2) an anchor gets two rows in which it is abnormal: one of those that came least often so far in this epoch, then
    another of them, of another patient, and with another caption of that organ if there is one (equal captions are each
    other's positives, and nothing would be told apart). A row that is in the group already for another anchor counts;
(3) the other seats go to rows that did not come yet in this epoch, in a random order;
(4) the group is put in a random order, so that all ranks get rows of all kinds.

No row comes twice in a group, nor more than `max_repeats` times in an epoch. An organ of which fewer than two abnormal
patients are left is passed over. An epoch has as many groups as in the uniform order, so rows that come twice leave
others out: which ones is drawn anew each epoch. The order hangs on (seed, epoch) alone, and captions alone are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from modeling_fvlm.captions import caption_hash

from .data import EpochSampler, SplitRows

SEATS_PER_ANCHOR = 4


@dataclass(frozen=True)
class AbnormalCaptions:
    """What the captions of a split say, row by row.

    Attributes:
        hashes: `(rows, organs)` int64: of the caption where the organ is abnormal, 0 elsewhere.
        patients: `(rows,)` int64: equal for rows of one patient.
    """

    hashes: np.ndarray
    patients: np.ndarray

    @property
    def num_abnormal(self) -> list[int]:
        """Abnormal captions of each organ."""
        return (self.hashes != 0).sum(0).tolist()


def read_abnormal_captions(dataset: SplitRows, organs: Sequence[str]) -> AbnormalCaptions:
    """Read which organs are abnormal in which rows, in the captions that the rows are trained with.

    Args:
        dataset: Its captions and patients are read, and no volume.
        organs: The model's organs; captions of others are passed over.
    """
    index_of = {organ: index for index, organ in enumerate(organs)}
    hashes = np.zeros((len(dataset), len(organs)), dtype=np.int64)
    for row, content in enumerate(dataset.captions):
        for entry in content["captions"]:
            if entry["is_abnormal"] and entry["organ"] in index_of:
                hashes[row, index_of[entry["organ"]]] = caption_hash(entry["caption"], True)
    if dataset.caption_rows is not None:
        hashes = hashes[dataset.caption_rows]
    number_of: dict[str, int] = {}
    patients = [number_of.setdefault(patient, len(number_of)) for patient in dataset.patient_ids()]
    return AbnormalCaptions(hashes, np.array(patients, dtype=np.int64))


class BalancedSampler(EpochSampler):
    """(epoch, row) pairs in the order described above, the same on every rank.

    Args:
        abnormal: Of `read_abnormal_captions`.
        group_size: Rows that are contrasted with each other.
        seed: With the epoch it fixes the order.
        max_repeats: How often a row may come in an epoch.
    """

    def __init__(self, abnormal: AbnormalCaptions, group_size: int, seed: int, max_repeats: int = 2):
        super().__init__(len(abnormal.hashes), seed)
        self.abnormal, self.group_size, self.max_repeats = abnormal, group_size, max_repeats
        self.rows_of = [np.flatnonzero(column) for column in abnormal.hashes.T]

    def __len__(self) -> int:
        return self.num_rows // self.group_size * self.group_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        # A stream of its own: `default_rng((seed, epoch))` is that of the uniform order.
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, epoch), spawn_key=(2,)))
        order = _Epoch(self, generator)
        rows = [row for _ in range(self.num_rows // self.group_size) for row in order.next_group()]
        return ((epoch, int(row)) for row in rows)


class _Epoch:
    """The groups of one epoch, one after the other."""

    def __init__(self, sampler: BalancedSampler, generator: np.random.Generator):
        self.generator, self.group_size, self.max_repeats = generator, sampler.group_size, sampler.max_repeats
        self.hashes, self.patients = sampler.abnormal.hashes, sampler.abnormal.patients
        self.uses = np.zeros(sampler.num_rows, dtype=np.int64)
        # Shuffled once: among rows that came equally often the first of this order is taken.
        self.shuffled = generator.permutation(sampler.num_rows)
        place = np.empty(sampler.num_rows, dtype=np.int64)
        place[self.shuffled] = np.arange(sampler.num_rows)
        self.rows_of = [rows[np.argsort(place[rows])] for rows in sampler.rows_of]
        self.turns: list[int] = []
        self.fresh = 0  # rows before this place of `shuffled` have all come

    def next_group(self) -> list[int]:
        """(1) to (4)."""
        group: list[int] = []
        for _ in range(max(self.group_size // SEATS_PER_ANCHOR, 1)):
            self._seat_an_anchor(group)
        self._fill(group)
        self.uses[group] += 1
        return [group[place] for place in self.generator.permutation(len(group))]

    def _seat_an_anchor(self, group: list[int]) -> None:
        """(1) and (2): the next organ that has a pair, if there is one."""
        untried = set(range(len(self.rows_of)))
        while untried:
            if not self.turns:
                self.turns = self.generator.permutation(len(self.rows_of)).tolist()
            organ = self.turns.pop()
            untried.discard(organ)
            if (pair := self._pair(organ, group)) is not None:
                new = [row for row in pair if row not in group]
                if len(group) + len(new) <= self.group_size:
                    group += new
                    return

    def _pair(self, organ: int, group: list[int]) -> list[int] | None:
        """Two rows in which the organ is abnormal, those of the group first; None if there are no two."""
        rows = self.rows_of[organ]
        taken = np.isin(rows, group)
        usable = rows[taken | (self.uses[rows] < self.max_repeats)]
        if len(usable) < 2:
            return None
        cost = np.where(np.isin(usable, group), -1, self.uses[usable])
        first = int(usable[np.argmin(cost)])
        is_other = self.patients[usable] != self.patients[first]
        if not is_other.any():
            return None
        usable, cost = usable[is_other], cost[is_other]
        differs = self.hashes[usable, organ] != self.hashes[first, organ]
        if differs.any():
            usable, cost = usable[differs], cost[differs]
        return [first, int(usable[np.argmin(cost)])]

    def _fill(self, group: list[int]) -> None:
        """(3). There are always enough: before the last group at most all rows but a group's have come."""
        while self.uses[self.shuffled[self.fresh]]:
            self.fresh += 1
        place = self.fresh
        while len(group) < self.group_size:
            row = int(self.shuffled[place])
            if not self.uses[row] and row not in group:
                group.append(row)
            place += 1
