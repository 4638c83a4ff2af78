"""The training collator against slow, obvious versions of what it does; the order and the control of the rows."""

import shutil

import numpy as np
import pytest
import torch
from tiny_split import MARGIN, ORGANS, SIZE, SPACING, tiny_row, write_tiny_split

from modeling_fvlm import FVLMConfig
from modeling_fvlm.captions import normal_caption
from modeling_fvlm.geometry import crop_or_pad, crop_start, organ_token_mask
from modeling_fvlm.processed_split import decode_volume, encode_array
from training_fvlm.arguments import SettingsError
from training_fvlm.collator import FVLMCollator
from training_fvlm.data import (
    EpochSampler,
    ProcessedSplit,
    SplitDescription,
    caption_rows_of_other_patients,
    check_against_recipe,
    load_split,
    read_description,
)
from training_fvlm.organ_losses import ABNORMAL, CAPTIONED, PRESENT, TEXT_BITS, WHOLE
from training_fvlm.text import train_tokenizer

PATCH = (2, 4, 8)


@pytest.fixture(scope="module")
def config():
    vision = {"volume_size": SIZE, "patch_size": PATCH, "hidden_size": 16, "num_hidden_layers": 1, "feature_levels": []}
    vision |= {"num_attention_heads": 2, "intermediate_size": 16}
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"pooling_num_heads": 2, "max_text_length": 24}
    return FVLMConfig(vision_config=vision, text_config=text, organs=list(ORGANS), **sizes)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([entry["caption"] for n in range(8) for entry in tiny_row(n)["captions"]], 120, 24)


@pytest.fixture
def split(tmp_path):
    return write_tiny_split(tmp_path / "split", train=6, validation=2)


def addressed(row, index=0, epoch=0):
    return {**row, "row": index, "epoch": epoch}


def row_with(mask, volume=None, **fields):
    volume = np.full(mask.shape, 40, np.int16) if volume is None else volume
    arrays = {"volume": encode_array(volume), "mask": encode_array(mask), "shape": list(mask.shape)}
    return addressed({**tiny_row(0), **arrays, **fields})


def slow_crop(array, size, value):
    """Visit every voxel of the centred crop."""
    out = np.full(size, value, array.dtype)
    gaps = [extent - edge for extent, edge in zip(array.shape, size)]
    starts = [gap // 2 if gap > 0 else -(-gap // 2) for gap in gaps]
    for place in np.ndindex(*size):
        source = tuple(start + offset for start, offset in zip(starts, place))
        if all(0 <= index < extent for index, extent in zip(source, array.shape)):
            out[place] = array[source]
    return out


@pytest.mark.parametrize("number", range(3))
def test_centred_batch_equals_a_walk_over_voxels(config, tokenizer, number):
    row = addressed(tiny_row(number))
    batch = FVLMCollator(tokenizer, config, is_random=False)([row])
    volume, mask = decode_volume(row)
    assert volume.shape != SIZE, "a stored volume of the crop's size would not be cropped"
    crop, cropped_mask = slow_crop(volume, SIZE, -1024), slow_crop(mask, SIZE, 0)
    assert batch["volume"].dtype == torch.int16
    np.testing.assert_array_equal(batch["volume"][0].numpy(), crop)
    expected = np.array(
        [
            [
                (cropped_mask[z : z + PATCH[0], y : y + PATCH[1], x : x + PATCH[2]] == organ_id).any()
                for z in range(0, SIZE[0], PATCH[0])
                for y in range(0, SIZE[1], PATCH[1])
                for x in range(0, SIZE[2], PATCH[2])
            ]
            for organ_id in (1, 2, 3)
        ]
    )
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(batch["organ_token_mask"][0].numpy(), expected)


def test_the_state_of_an_organ_tells_of_captions_that_are_left_out(config, tokenizer):
    rows = [addressed(tiny_row(number, cut=number == 0), number) for number in range(4)]
    rows[3]["captions"][0] |= {"caption": rows[0]["captions"][0]["caption"], "is_abnormal": True}
    rows[0]["captions"][0]["is_abnormal"] = False  # the same text, called normal here and abnormal there
    rows[1]["captions"] = [entry for entry in rows[1]["captions"] if entry["organ"] != "heart"]
    rows[2]["mask"] = encode_array(np.where(decode_volume(rows[2])[1] == 3, 0, decode_volume(rows[2])[1]))
    batch = FVLMCollator(tokenizer, config, is_random=False)(rows)
    state = batch["organ_state"]
    for number, row in enumerate(rows):
        captions = {entry["organ"]: entry for entry in row["captions"]}
        for place, organ in enumerate(ORGANS):
            assert bool(state[number, place] & PRESENT) == bool(batch["organ_token_mask"][number, place].any())
            assert bool(state[number, place] & WHOLE) == bool(batch["organ_is_complete"][number, place])
            assert bool(state[number, place] & CAPTIONED) == (organ in captions)
            assert bool(state[number, place] & ABNORMAL) == (organ in captions and captions[organ]["is_abnormal"])
            for other, of_other in enumerate(rows):
                texts = {entry["organ"]: entry["caption"] for entry in of_other["captions"]}
                if organ in captions and organ in texts:
                    is_same = bool(state[number, place] >> TEXT_BITS == state[other, place] >> TEXT_BITS)
                    assert is_same == (captions[organ]["caption"] == texts[organ])
    lung, heart, aorta = ORGANS.index("lung"), ORGANS.index("heart"), ORGANS.index("aorta")
    assert state[0, lung] & (WHOLE | PRESENT | CAPTIONED) == PRESENT | CAPTIONED and not state[1, heart] & CAPTIONED
    assert not state[2, aorta] & PRESENT and state[2, aorta] & CAPTIONED


def test_captions_are_encoded_once_and_point_back(config, tokenizer):
    rows = [addressed(tiny_row(number), number) for number in range(6)]
    batch = FVLMCollator(tokenizer, config, is_random=False)(rows)
    texts = [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).replace(" .", ".")
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    assert len(set(texts)) == len(texts), "a caption is encoded once"
    seen = set()
    for number, row in enumerate(rows):
        captions = {entry["organ"]: entry for entry in row["captions"]}
        for organ_index, organ in enumerate(ORGANS):
            place = int(batch["caption_index"][number, organ_index])
            if not batch["organ_is_complete"][number, organ_index]:
                assert place == -1
                continue
            seen.add(place)
            assert texts[place] == captions[organ]["caption"].lower()
            assert bool(batch["organ_is_abnormal"][number, organ_index]) == captions[organ]["is_abnormal"]
    assert seen == set(range(len(texts))), "every encoded caption is used"
    hashes = batch["caption_hash"][batch["caption_index"] >= 0]
    assert len(hashes.unique()) == len(texts)


def test_an_organ_is_whole_only_inside_crop_and_scan(config, tokenizer):
    collator = FVLMCollator(tokenizer, config, is_random=False)

    def whole(mask):
        return collator([row_with(mask)])["organ_is_complete"][0].tolist()

    inside = np.zeros((12, 20, 40), np.uint8)  # the centred crop is voxels 2:10, 2:18, 4:36
    inside[4:6, 6:9, 10:14], inside[4:6, 6:9, 16:20], inside[4:6, 6:9, 24:28] = 1, 2, 3
    assert whole(inside) == [True, True, True]
    cut_by_crop = inside.copy()
    cut_by_crop[4:11, 6:9, 10:14] = 1  # reaches voxel 9, the crop's last slice
    assert whole(cut_by_crop) == [False, True, True]
    one_side_lost = inside.copy()
    one_side_lost[4:6, 0:2, 16:20] = 2  # a second piece entirely outside, touching no face of the crop
    assert whole(one_side_lost) == [True, False, True]
    small = np.zeros((6, 12, 20), np.uint8)  # smaller than the crop, which pads it on every side
    small[2:4, 3:5, 3:5], small[0:3, 6:8, 10:12], small[2:4, 8:12, 14:16] = 1, 2, 3
    assert whole(small) == [True, False, False], "padding must not hide that the scan cut the organ"


def test_min_voxels_counts_what_is_in_the_crop(config, tokenizer):
    config = FVLMConfig(**{**config.to_dict(), "completeness": "min_voxels", "min_organ_voxels": 24})
    mask = np.zeros((12, 20, 40), np.uint8)
    mask[0:12, 4:6, 4:6], mask[4:6, 6:9, 16:20], mask[4:6, 6:9, 24:27] = 1, 2, 3  # 32 of 48 inside, 24, 18
    batch = FVLMCollator(tokenizer, config, is_random=False)([row_with(mask)])
    assert batch["organ_is_complete"][0].tolist() == [True, True, False]


def test_random_crops_hang_on_seed_epoch_and_row_alone(config, tokenizer):
    volume = np.arange(14 * 24 * 48, dtype=np.int16).reshape(14, 24, 48)  # each crop has its own values
    row = row_with(np.ones(volume.shape, np.uint8), volume)

    def crop(index=3, epoch=1, seed=0, batch_before=()):
        collator = FVLMCollator(tokenizer, config, is_random=True, seed=seed)
        np.random.seed(epoch)  # global state must not matter
        return collator([*batch_before, {**row, "row": index, "epoch": epoch}])["volume"][-1]

    assert torch.equal(crop(), crop())
    assert torch.equal(crop(), crop(batch_before=[addressed(tiny_row(1))])), "neighbours in the batch must not matter"
    others = [crop(epoch=2), crop(index=4), crop(seed=1)]
    assert not any(torch.equal(crop(), other) for other in others)


def test_random_crops_reach_both_ends_and_stay_inside(config, tokenizer):
    volume = np.zeros((10, 16, 32), np.int16)
    volume += np.arange(10, dtype=np.int16)[:, None, None]
    collator = FVLMCollator(tokenizer, config, is_random=True)
    row = row_with(np.ones(volume.shape, np.uint8), volume)
    starts = {int(collator([{**row, "epoch": epoch}])["volume"][0, 0, 0, 0]) for epoch in range(40)}
    assert starts == {0, 1, 2}


@pytest.mark.parametrize(("axis", "name"), [(0, "depth"), (1, "height"), (2, "width")])
def test_flips_turn_volume_and_mask_together(config, tokenizer, axis, name):
    row = addressed(tiny_row(2))
    plain = FVLMCollator(tokenizer, config, is_random=True)
    flipped = FVLMCollator(tokenizer, config, is_random=True, flip_axes=[name], flip_probability=1.0)
    before, after = plain([row]), flipped([row])
    assert torch.equal(after["volume"], before["volume"].flip(axis + 1))
    grid = [size // patch for size, patch in zip(SIZE, PATCH)]
    tokens = before["organ_token_mask"].view(1, 3, *grid).flip(axis + 2).flatten(2)
    assert torch.equal(after["organ_token_mask"], tokens) and not torch.equal(tokens, before["organ_token_mask"])
    assert not torch.equal(after["volume"], before["volume"])


def test_tokens_after_flips_are_those_of_the_flipped_mask(config, tokenizer):
    names = ["depth", "height", "width"]
    row = addressed(tiny_row(2))
    collator = FVLMCollator(tokenizer, config, is_random=True, flip_axes=names, flip_probability=0.5)
    mask = decode_volume(row)[1]
    orders = set()
    for epoch in range(12):
        batch = collator([{**row, "epoch": epoch}])
        # The same draws as the collator's: the crop first, then one number an axis.
        generator = np.random.default_rng((0, epoch, row["row"]))
        crop = crop_or_pad(mask, crop_start(mask.shape, SIZE, generator=generator), SIZE, 0)
        axes = tuple(axis for axis in range(3) if generator.random() < 0.5)
        orders.add(axes)
        expected = organ_token_mask(np.ascontiguousarray(np.flip(crop, axes)), len(ORGANS), PATCH)
        np.testing.assert_array_equal(batch["organ_token_mask"][0].numpy(), expected)
    assert () in orders and any(len(axes) > 1 for axes in orders)


def test_a_batch_without_a_whole_organ_still_feeds_the_text_encoder(config, tokenizer):
    row = row_with(np.ones((8, 16, 32), np.uint8))  # one organ on all faces
    batch = FVLMCollator(tokenizer, config, is_random=False)([row])
    assert len(batch["input_ids"]) == 1
    assert not (batch["organ_is_complete"] & (batch["caption_index"] >= 0)).any()


def test_a_damaged_row_stops_the_run_and_names_itself(config, tokenizer):
    row = addressed({**tiny_row(0), "volume": b"no zstd"}, index=7)
    with pytest.raises(ValueError, match=r"row 7 \(scan 'train_0_a'\)"):
        FVLMCollator(tokenizer, config, is_random=False)([addressed(tiny_row(1)), row])


def test_rows_come_from_parquet_with_epoch_and_number(split):
    rows = load_split(str(split), "train", max_rows=4)
    dataset = ProcessedSplit(rows)
    assert len(dataset) == 4
    item = dataset[(5, 2)]
    assert (item["epoch"], item["row"], item["scan_id"]) == (5, 2, "train_2_a")
    for stored, made in zip(decode_volume(item), decode_volume(tiny_row(2))):
        np.testing.assert_array_equal(stored, made)
    assert dataset[3]["epoch"] == 0


def test_a_folder_is_never_taken_for_another_of_its_name(tmp_path):
    first = write_tiny_split(tmp_path / "a" / "split", train=3, validation=2)
    second = write_tiny_split(tmp_path / "b" / "split", train=5, validation=2)
    assert [len(load_split(str(folder), "train")) for folder in (first, second)] == [3, 5]
    shutil.rmtree(first)
    write_tiny_split(first, train=4, validation=2)
    assert len(load_split(str(first), "train")) == 4, "built again in the same place"
    with pytest.raises(SettingsError, match="no split 'test'.*it has .'train', 'validation'."):
        load_split(str(second), "test")


def test_the_control_moves_all_captions_of_a_patient_and_keeps_none(split):
    patients = ["a", "a", "b", "c", "c", "c", "d"]
    source = caption_rows_of_other_patients(patients, seed=1)
    giver_of = {}
    for row, patient in enumerate(patients):
        giver = patients[source[row]]
        assert giver != patient
        assert giver_of.setdefault(patient, giver) == giver, "one giver for all rows of a patient"
    assert sorted(giver_of.values()) == ["a", "b", "c", "d"], "every patient's captions are used once"
    assert not np.array_equal(source, caption_rows_of_other_patients(patients, seed=2))

    rows = load_split(str(split), "train")
    shuffled = ProcessedSplit(rows, caption_rows_of_other_patients(list(rows["patient_id"]), seed=0))
    for index in range(len(rows)):
        mine, theirs = shuffled[index], ProcessedSplit(rows)[int(shuffled.caption_rows[index])]
        assert mine["captions"] == theirs["captions"] and mine["volume"] != theirs["volume"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_giver_and_taker_of_captions_meet_in_a_batch_by_chance_alone(seed):
    """In one batch the true caption of a scan is a negative of it: the control would learn the truth, inverted."""
    num_patients, batch_size = 400, 8
    source = caption_rows_of_other_patients([f"p{number}" for number in range(num_patients)], seed)
    sampler = EpochSampler(num_patients, seed)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = np.array([row for _, row in sampler])
        batch_of = np.empty(num_patients, int)
        batch_of[order] = np.arange(num_patients) // batch_size
        met = (batch_of[source] == batch_of).sum()
        assert met < 30, f"epoch {epoch}: {met} met, by chance {batch_size - 1}"


def test_the_control_needs_two_patients():
    with pytest.raises(SettingsError, match="two patients"):
        caption_rows_of_other_patients(["a", "a"], seed=0)


def test_sampler_orders_rows_by_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(0, 0)
    assert sorted(row for _, row in first) == list(range(50)) and {epoch for epoch, _ in first} == {0}
    assert order(0, 0) == first
    rows = [[row for _, row in order(seed, epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(each) for each in rows}) == 3


def test_description_of_a_split_and_recipes_that_do_not_fit_it(split):
    description = read_description(str(split))
    assert description == SplitDescription("tiny", ORGANS, {organ: {} for organ in ORGANS}, SPACING, MARGIN)
    check_against_recipe(description, {"organ_set": "tiny", "spacing": [3.0, 1.0, 1.0]}, "split")
    check_against_recipe(description, {}, "split")
    with pytest.raises(SettingsError, match=r"chest_4 \(4 organs\) is not the split's tiny \(3 organs.*'esophagus'"):
        check_against_recipe(description, {"organ_set": "chest_4"}, "split")
    with pytest.raises(SettingsError, match="spacing .*not the split's"):
        check_against_recipe(description, {"spacing": [1.0, 1.0, 3.0]}, "split")
    with pytest.raises(SettingsError, match="margin_voxels"):
        check_against_recipe(description, {"margin_voxels": [5, 20, 20]}, "split")
    with pytest.raises(SettingsError, match="manifest.json"):
        read_description(str(split / "volumes"))


def test_tokenizer_is_the_same_every_time_and_reads_every_caption(tokenizer):
    texts = [entry["caption"] for number in range(8) for entry in tiny_row(number)["captions"]]
    vocabularies = [train_tokenizer(order, 120, 24).get_vocab() for order in (texts, texts[::-1], texts)]
    # The tokenizers library alone gives three different ones here: hash tables decide its ties.
    assert vocabularies[0] == vocabularies[1] == vocabularies[2] == tokenizer.get_vocab()
    ids = tokenizer(normal_caption("lung"))["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert tokenizer("LUNG shows")["input_ids"] == tokenizer("lung shows")["input_ids"]
    assert tokenizer.model_max_length == 24
