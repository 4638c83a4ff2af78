"""The chance alarm: its rule on made-up log lines, and one real run for every fault it must name."""

import math

import numpy as np
import pytest
import torch
from tiny_split import tiny_row
from tiny_training import tiny_rows, tiny_trainer

from training_fvlm.alarm import CAUSES, LATE, NOTES, ROUNDING, ChanceAlarm, pool
from training_fvlm.data import caption_rows_of_other_patients
from training_fvlm.organ_losses import TRAIN_FILE, OrganLossFile, OrganLossRow

ORGANS = ["lung", "heart", "aorta", "liver", "spleen"]
CHANCE, FLOOR = math.log(8), 1.1  # a contrast of eight
SOUND = {"present": 1.0, "whole": 0.9, "captioned": 1.0, "abnormal": 0.3, "valid": 0.9, "equal": 0.1}


def line(step, gains, *, noise=0.05, fit=0.4, cosine=0.5, seed=0, batches=20, chance=CHANCE, floor=FLOOR, **columns):
    """One log line: `gains` is the share of the room that each organ has gained, None where it did not enter."""
    rows = []
    for place, organ in enumerate(ORGANS):
        generator = np.random.default_rng((seed, step, place))
        gain = gains[organ] if isinstance(gains, dict) else gains
        active = 0 if gain is None else 16
        losses = chance - (gain or 0) * (chance - floor) + noise * generator.standard_normal(max(active, 2))
        fits = fit + 0.7 * generator.standard_normal(max(active, 2))
        loss_columns = (losses.mean(), chance, floor) if active else (math.nan,) * 3
        measured = {"spread": losses.std(ddof=1), "text_cosine": cosine, "fit": fits.mean(), "fit_batches": 16}
        measured |= {"fit_spread": fits.std(ddof=1)} | SOUND
        measured |= {name: value[organ] if isinstance(value, dict) else value for name, value in columns.items()}
        rows.append(OrganLossRow(step, 0.0, organ, *loss_columns, active / batches, batches=batches, **measured))
    return rows


def alarm_over(last_step, gains, *, alarm_steps=200, warmup_steps=0, group_size=8, every=20, **columns):
    """An alarm that has taken a log line every so many steps."""
    alarm = ChanceAlarm(ORGANS, alarm_steps, group_size, warmup_steps)
    for step in range(every, last_step + 1, every):
        alarm.add(line(step, gains(step) if callable(gains) else gains, **columns))
    return alarm


def said(alarm):
    return [(finding.step, finding.cause, finding.organs) for finding in alarm.findings]


def test_pooled_lines_are_the_numbers_they_were_made_of():
    generator = np.random.default_rng(0)
    rows, excess, fits, cosines, batches = [], [], [], [], []
    for step in range(1, 8):
        count = int(generator.integers(0, 6))
        of_line = generator.normal(-0.1, 0.3, count)
        of_fit = generator.normal(0.2, 0.5, count + 1)
        excess += list(of_line)
        fits += list(of_fit)
        loss = 2.0 + of_line.mean() if count else math.nan
        spread = of_line.std(ddof=1) if count > 1 else math.nan
        size = count + 2
        cosines.append(generator.random())
        batches.append(size)
        measured = {"fit": of_fit.mean(), "fit_batches": count + 1, "text_cosine": cosines[-1]}
        measured |= {"fit_spread": of_fit.std(ddof=1) if count else math.nan}
        known = (2.0, 1.0) if count else (math.nan, math.nan)
        rows.append(OrganLossRow(step, 0.0, "lung", loss, *known, count / size, size, spread, **measured))
    assert 0 in [row.active for row in rows] and len(excess) > 5
    evidence = pool(rows, 7)
    assert evidence.gain == pytest.approx(-np.mean(excess)) and evidence.room == pytest.approx(1.0)
    assert evidence.error == pytest.approx(np.std(excess, ddof=1) / len(excess) ** 0.5)
    assert evidence.fit == pytest.approx(np.mean(fits))
    assert evidence.fit_error == pytest.approx(np.std(fits, ddof=1) / len(fits) ** 0.5)
    assert evidence.text_cosine == pytest.approx(np.average(cosines, weights=batches))
    assert evidence.active == pytest.approx(len(excess))


def test_float32_leaves_no_gain_at_a_loss_of_exactly_chance():
    rows = [OrganLossRow(step, 0.0, "lung", CHANCE - 1e-7, CHANCE, FLOOR, 1.0, 20, 1e-9) for step in range(1, 5)]
    evidence = pool(rows, 4)
    assert evidence.error == ROUNDING and evidence.is_at_chance and not evidence.learns


@pytest.mark.parametrize("seed", range(5))
def test_silent_while_organs_learn_however_slowly(seed):
    slow = alarm_over(1500, lambda step: dict.fromkeys(ORGANS, 0.0002 * step), seed=seed)
    assert said(slow) == []
    late = {"lung": 400, "heart": 50, "aorta": 900, "liver": 100, "spleen": 20}  # steps at which they leave chance
    apart = alarm_over(1500, lambda step: {organ: 0.3 * (step > since) for organ, since in late.items()}, seed=seed)
    assert said(apart) == []


def test_captions_that_fit_nothing_are_told_from_a_text_side_that_has_collapsed():
    """Texts may lie at one point in either case; what differs is whether images and captions belong together."""
    for fit, cosine, cause in ((0.0, 0.5, "captions do not fit"), (0.0, 0.999, "captions do not fit"),
                               (0.2, 0.999, "text collapsed"), (0.2, 0.6, "not learned")):  # fmt: skip
        alarm = alarm_over(300, 0.0, fit=fit, cosine=cosine)
        assert said(alarm) == [(200, cause, ORGANS)], "once, at the first line that may judge"
        (finding,) = alarm.findings
        assert finding.is_alarm and "all 5 organs" in finding.text and "chance 2.079, floor 1.100" in finding.text
    unknown = {"fit": math.nan, "fit_batches": 0}
    two = alarm_over(600, 0.0, chance=math.log(2), floor=0.0, cosine=0.999, group_size=2, **unknown)
    assert said(two) == [(200, "small contrast", ORGANS)]
    eight = alarm_over(600, 0.0, cosine=0.999, **unknown)
    assert said(eight) == [(200, "text collapsed", ORGANS)] and "cannot be told" in eight.findings[0].text
    assert "2.0 patients of an organ" in two.findings[0].text and "--contrastive_batch_size" in two.findings[0].text


def test_it_waits_until_it_can_say_whether_captions_fit():
    faint = {"fit": 0.03, "fit_spread": 2.0}  # neither nothing nor something: error 0.5 / sqrt(lines)
    alarm = alarm_over(LATE * 200 + 100, 0.0, **faint)
    assert [(step, organs) for step, _, organs in said(alarm)] == [(LATE * 200, ORGANS)], "late, with what there is"
    assert said(alarm)[0][1] == "captions do not fit" and "(fit 0.0" in alarm.findings[0].text
    assert said(alarm_over(400, 0.0, fit=0.0, fit_spread=0.4)) == [(200, "captions do not fit", ORGANS)]


def test_the_warm_up_does_not_count():
    assert said(alarm_over(480, 0.0, warmup_steps=300)) == []
    assert said(alarm_over(500, 0.0, warmup_steps=300)) == [(500, "not learned", ORGANS)]
    assert said(alarm_over(500, lambda step: 0.3 * (step > 300), warmup_steps=300)) == []
    assert said(alarm_over(900, 0.0, alarm_steps=0)) == [], "0: never"
    # Far above chance at first, as fresh weights are; then so noisy that more lines are asked for: not those.
    assert said(alarm_over(500, lambda step: 0.06 if step > 300 else -3.0, warmup_steps=300, noise=0.6)) == []


def test_few_organs_at_chance_are_given_longer():
    gains = dict.fromkeys(ORGANS, 0.4) | {"aorta": 0.0}
    assert said(alarm_over(LATE * 200 - 20, gains)) == []
    alarm = alarm_over(LATE * 200 + 60, gains)
    assert said(alarm) == [(LATE * 200, "not learned", ["aorta"])]
    half = dict.fromkeys(ORGANS[:3], 0.0) | dict.fromkeys(ORGANS[3:], 0.4)
    assert said(alarm_over(300, half)) == [(200, "not learned", ORGANS[:3])], "most of them: at once"


def test_noise_larger_than_what_is_looked_for_is_no_evidence():
    assert said(alarm_over(LATE * 200 + 100, 0.0, noise=0.6, floor=CHANCE - 0.3)) == []
    noisy = {"noise": 0.6, "floor": CHANCE - 0.1}  # a perfect model would gain next to nothing
    assert said(alarm_over(LATE * 200 - 20, 0.0, **noisy)) == []
    late = alarm_over(LATE * 200, 0.0, **noisy)
    assert said(late) == [(LATE * 200, "nothing to tell apart", ORGANS)] and not late.findings[0].is_alarm
    assert "floor 1.979" in late.findings[0].text


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        ({"captioned": 0.0, "abnormal": math.nan, "valid": 0.0}, "no caption"),
        ({"abnormal": 0.0}, "never abnormal"),
        ({"present": 0.0, "whole": 0.0, "valid": 0.0}, "no mask"),
        ({"whole": 0.0, "valid": 0.0}, "cut off"),
        ({"whole": 0.0, "valid": 0.0, "abnormal": 0.0}, "never abnormal"),  # nothing is lost by the cut
        ({"equal": 1.0, "abnormal": 1.0}, "equal captions"),
        ({"abnormal": 0.001}, "seldom abnormal"),
    ],
)
def test_why_an_organ_never_enters(columns, cause):
    gains = dict.fromkeys(ORGANS, 0.4) | {"liver": None}
    of_liver = {name: dict.fromkeys(ORGANS, SOUND[name]) | {"liver": value} for name, value in columns.items()}
    alarm = alarm_over(400, gains, **of_liver)
    assert said(alarm) == [(200, cause, ["liver"])]
    (finding,) = alarm.findings
    assert finding.is_alarm == (cause not in NOTES) and finding.text.startswith("not learning after 200 steps: liver.")
    assert "nan" not in finding.text


def test_an_organ_that_is_held_back_by_a_schedule_is_passed_over():
    gains = dict.fromkeys(ORGANS, 0.4) | {"liver": None}  # abnormal, whole, captioned: and yet it does not enter
    assert said(alarm_over(2000, gains)) == []
    late = alarm_over(1300, lambda step: gains | ({"liver": 0.0} if step > 900 else {}))
    assert said(late) == [], "its time begins when it enters"


def test_equal_captions_are_said_of_an_organ_that_enters_by_their_flags():
    equal = dict.fromkeys(ORGANS, 0.1) | {"liver": 1.0}
    alarm = alarm_over(300, dict.fromkeys(ORGANS, 0.4) | {"liver": 0.0}, equal=equal)
    assert said(alarm) == [(200, "equal captions", ["liver"])]


def test_an_organ_at_chance_is_given_one_cause():
    alarm = ChanceAlarm(ORGANS, 100, 8)
    for step in range(20, 601, 20):
        alarm.add(line(step, 0.0, fit=0.0 if step <= 200 else 0.8))  # learned by heart, say
    assert said(alarm) == [(100, "captions do not fit", ORGANS)]


def test_a_run_that_goes_on_says_nothing_twice(tmp_path):
    table = OrganLossFile(tmp_path / TRAIN_FILE)
    calls = []
    alarm = ChanceAlarm(ORGANS, 100, 8, listener=lambda: calls.append(len(alarm.findings)))
    for step in range(20, 401, 20):
        rows = line(step, 0.0 if step < 200 else 0.5)
        table.append(rows)
        alarm.add(rows)
    assert said(alarm) == [(100, "not learned", ORGANS)] and calls == [1]
    assert set(alarm.findings[0].learned_since) == set(ORGANS), "well below chance after all"
    assert 200 <= min(alarm.findings[0].learned_since.values()) <= 300
    again = ChanceAlarm(ORGANS, 100, 8)
    again.restart(table.read())
    assert again.entries() == alarm.entries() and again.add(line(420, 0.5)) == []
    assert alarm.entries()[0]["cause"] in CAUSES


def test_a_table_from_before_there_was_an_alarm_is_no_evidence():
    alarm = ChanceAlarm(ORGANS, 100, 8)
    old = [OrganLossRow(step, 0.0, organ, 2.0, 2.0, 1.0, 1.0) for step in range(20, 401, 20) for organ in ORGANS]
    alarm.restart(old)
    assert said(alarm) == []


# Real runs of a tiny model

QUICK = {"max_steps": 60, "per_device_train_batch_size": 8, "logging_steps": 5, "learning_rate": 1e-2}
QUICK |= {"lr_scheduler_type": "constant", "is_random": False, "alarm_steps": 40}


def run(folder, rows, *, change=lambda trainer: None, **settings):
    trainer = tiny_trainer(folder, rows, **(QUICK | settings))
    change(trainer)
    trainer.train()
    return trainer.alarm


def collapse(trainer):
    """A text projection that gives every caption the same point."""
    with torch.no_grad():
        trainer.model.text_projection.weight.zero_()
    trainer.model.text_projection.weight.requires_grad_(False)


@pytest.mark.parametrize("seed", range(2))
def test_silent_on_a_run_that_learns(tmp_path, seed):
    alarm = run(tmp_path, tiny_rows(96), seed=seed)
    assert alarm.rows["lung"][-1].step == 60 and said(alarm) == []


@pytest.mark.parametrize("seed", range(2))
def test_shuffled_captions_are_named(tmp_path, seed):
    rows = tiny_rows(96)
    shuffled = caption_rows_of_other_patients([row["patient_id"] for row in rows], seed=seed)
    (finding,) = run(tmp_path, rows, caption_rows=shuffled, seed=seed, max_steps=140).findings
    assert (finding.cause, finding.organs) == ("captions do not fit", ["lung", "heart", "aorta"])


def test_a_collapsed_text_side_is_named(tmp_path):
    (finding,) = run(tmp_path, tiny_rows(96), change=collapse).findings
    assert (finding.cause, finding.organs) == ("text collapsed", ["lung", "heart", "aorta"])
    assert "cosine between different captions is 1.000" in finding.text


def test_an_organ_that_is_always_cut_off_is_named(tmp_path):
    (finding,) = run(tmp_path, [tiny_row(number, cut=True) for number in range(96)]).findings
    assert (finding.cause, finding.organs) == ("cut off", ["lung"])
    assert "in 100 % of the crops, whole in 0 %" in finding.text


@pytest.mark.parametrize("are_abnormal", [None, True])
def test_captions_that_are_all_equal_are_named(tmp_path, are_abnormal):
    rows = tiny_rows(96)
    for row in rows:
        entry = next(entry for entry in row["captions"] if entry["organ"] == "heart")
        entry["caption"] = "The heart was examined."
        entry["is_abnormal"] = entry["is_abnormal"] if are_abnormal is None else are_abnormal
    (finding,) = run(tmp_path, rows).findings
    assert (finding.cause, finding.organs) == ("equal captions", ["heart"])
