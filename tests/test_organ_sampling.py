"""Balanced order of rows: pairs of abnormal patients in every group, no row too often, the same order everywhere."""

from collections import Counter

import numpy as np
import pytest
from tiny_split import ORGANS, tiny_row
from tiny_training import dataset_of

from training_fvlm.data import EpochSampler
from training_fvlm.organ_sampling import AbnormalCaptions, BalancedSampler, read_abnormal_captions


def make_abnormal(num_rows=120, shares=(0.5, 0.2, 0.05, 0.0), seed=0, num_captions=4, rows_per_patient=1):
    """Organs that are abnormal in so large shares of the rows; patients with several reconstructions."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(1, num_captions + 1, (num_rows, len(shares)))
    hashes[generator.random(hashes.shape) >= shares] = 0
    return AbnormalCaptions(hashes, np.arange(num_rows) // rows_per_patient)


def groups_of(sampler, group_size):
    rows = [row for _, row in sampler]
    return [rows[start : start + group_size] for start in range(0, len(rows), group_size)]


@pytest.mark.parametrize("max_repeats", [1, 2, 4])
@pytest.mark.parametrize("group_size", [2, 8, 12])
@pytest.mark.parametrize("seed", range(3))
def test_every_group_has_its_pairs_and_no_row_comes_too_often(seed, group_size, max_repeats):
    abnormal = make_abnormal(seed=seed)
    sampler = BalancedSampler(abnormal, group_size, seed, max_repeats)
    uses = Counter()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert {each for each, _ in sampler} == {epoch}
        groups = groups_of(sampler, group_size)
        assert len(groups) == 120 // group_size and len(sampler) == len(groups) * group_size
        uses = Counter(row for group in groups for row in group)
        assert max(uses.values()) <= max_repeats
        left = [int((column != 0).sum()) * max_repeats for column in abnormal.hashes.T]
        for group in groups:
            assert len(set(group)) == group_size, "no row is contrasted with itself"
            counts = (abnormal.hashes[group] != 0).sum(0)
            left = [have - used for have, used in zip(left, counts)]
            if max(left) > 2 * max_repeats:  # while there is a pair to be had
                assert counts.max() >= 2
    if max_repeats == 1:
        assert set(uses.values()) == {1}


def test_rare_organs_meet_far_more_often_than_in_a_uniform_order():
    abnormal = make_abnormal(num_rows=400, shares=(0.6, 0.6, 0.6, 0.03))
    rare = {int(row) for row in np.flatnonzero(abnormal.hashes[:, 3])}
    assert 5 < len(rare) < 25

    def share_of_groups_with_a_pair(sampler):
        pairs, total = 0, 0
        for epoch in range(5):
            sampler.set_epoch(epoch)
            for group in groups_of(sampler, 8)[:50]:
                pairs, total = pairs + (len(rare & set(group)) >= 2), total + 1
        return pairs / total

    uniform = share_of_groups_with_a_pair(EpochSampler(400, seed=0))
    balanced = share_of_groups_with_a_pair(BalancedSampler(abnormal, 8, seed=0))
    assert balanced > 0.2 > 0.06 > uniform
    # Two anchors a group and four organs: the rare one's turn comes in half of the groups, as long as its rows last.
    assert balanced <= len(rare) / 50


def test_pairs_are_of_two_patients_and_of_two_captions_if_there_are_two():
    # Organ 1 is abnormal in two rows of one patient only: never an anchor. Organ 0 has one caption unlike the others.
    hashes = np.zeros((40, 2), dtype=np.int64)
    hashes[10:30, 0], hashes[20, 0] = 5, 6
    hashes[[38, 39], 1] = 7
    patients = np.arange(40) // 2
    patients[20] = 99
    sampler = BalancedSampler(AbnormalCaptions(hashes, patients), 2, seed=1, max_repeats=40)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        for group in groups_of(sampler, 2):
            assert set(group) != {38, 39}
            assert 20 in group, "the one that differs meets all others"
            assert sorted(hashes[group, 0]) == [5, 6]


def test_all_rows_have_their_turn_over_the_epochs():
    abnormal = make_abnormal()
    sampler, seen = BalancedSampler(abnormal, 8, seed=0), Counter()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        seen.update(row for _, row in sampler)
    assert len(seen) == 120 and min(seen.values()) > 8


def test_without_an_abnormal_caption_it_is_a_plain_shuffle():
    sampler = BalancedSampler(make_abnormal(shares=(0.0, 0.0)), 7, seed=0)
    rows = [row for _, row in sampler]
    assert len(rows) == len(set(rows)) == 119 and rows != sorted(rows)


def test_the_order_hangs_on_seed_and_epoch_alone():
    abnormal = make_abnormal()

    def order(seed, epoch):
        sampler = BalancedSampler(abnormal, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = BalancedSampler(abnormal, 8, 0)
    list(first), first.set_epoch(3)
    assert order(0, 3) == list(first) == list(first), "what was drawn before does not matter"
    rows = {(seed, epoch): [row for _, row in order(seed, epoch)] for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(each) for each in rows.values()}) == 4


def test_captions_alone_are_read(monkeypatch):
    rows = [tiny_row(number) for number in range(6)]
    rows[1]["captions"] = [entry for entry in rows[1]["captions"] if entry["organ"] != "heart"]
    for number, patient in enumerate("abaccb"):
        rows[number]["patient_id"] = patient
    dataset = dataset_of(rows)
    monkeypatch.setattr(type(dataset), "read", None)
    abnormal = read_abnormal_captions(dataset, ORGANS)
    for number, row in enumerate(rows):
        for organ, name in enumerate(ORGANS):
            is_abnormal = any(entry["organ"] == name and entry["is_abnormal"] for entry in row["captions"])
            assert (abnormal.hashes[number, organ] != 0) == is_abnormal
    texts = [entry["caption"] for row in rows for entry in row["captions"] if entry["is_abnormal"]]
    assert len(set(abnormal.hashes.flatten().tolist())) == len(set(texts)) + 1
    assert sum(abnormal.num_abnormal) == len(texts) and abnormal.patients.tolist() == [0, 1, 0, 2, 2, 1]
    assert read_abnormal_captions(dataset, ORGANS[1:]).num_abnormal == abnormal.num_abnormal[1:]
    dataset.caption_rows = np.array([5, 4, 3, 2, 1, 0])
    shuffled = read_abnormal_captions(dataset, ORGANS)
    assert (shuffled.hashes == abnormal.hashes[::-1]).all(), "the control is trained with others' captions"
    assert (shuffled.patients == abnormal.patients).all()
