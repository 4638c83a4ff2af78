"""The table of organ losses, its figures against closed forms, and the picture drawn from it."""

import json
import math

import numpy as np
import pytest
import torch

from modeling_fvlm.loss import organ_contrastive_loss
from training_fvlm.curves import draw, main, progress, series, smooth, summary
from training_fvlm.organ_losses import (
    ABNORMAL,
    CAPTIONED,
    EVAL_FILE,
    PRESENT,
    TEXT_BITS,
    TRAIN_FILE,
    WHOLE,
    OrganLossFile,
    OrganLossRow,
    OrganLossWindow,
    last_rows,
    mean_over_rows,
)

ORGANS = ["lung", "heart", "aorta"]


def unit(shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch(image, text, caption_id, abnormal, valid):
    """Arguments of `OrganLossWindow.add` and the loss itself."""
    identity = (
        torch.tensor(caption_id),
        torch.tensor(abnormal, dtype=torch.bool),
        torch.tensor(valid, dtype=torch.bool),
    )
    return organ_contrastive_loss(image, text, *identity, 10.0), text, *identity


def rows_of(*organs, step=10, loss=1.0, chance=2.0):
    return [OrganLossRow(step, step / 10, organ, loss, chance, 0.25, 1.0) for organ in organs]


def test_a_model_that_cannot_tell_patients_apart_sits_on_the_chance_line():
    same = unit((1, 1, 4)).expand(5, 3, 4)
    ids = [[3 * patient + organ for organ in range(3)] for patient in range(5)]
    abnormal = [[True, patient < 1, False] for patient in range(5)]  # the aorta is normal everywhere: never active
    valid = [[True, patient != 4, True] for patient in range(5)]
    window = OrganLossWindow(ORGANS)
    window.add(*batch(same, same, ids, abnormal, valid))
    lung, heart, aorta = window.rows(7, 0.5)
    assert (lung.loss, lung.chance, lung.active) == pytest.approx((math.log(5), math.log(5), 1))
    assert lung.floor == pytest.approx(0, abs=1e-6), "five different abnormal captions: one positive each"
    assert (heart.loss, heart.chance) == pytest.approx((math.log(4), math.log(4)))
    assert heart.floor == pytest.approx(3 / 4 * math.log(3)), "three normal patients share their targets"
    assert math.isnan(aorta.loss) and math.isnan(aorta.chance) and aorta.active == 0
    assert (lung.step, lung.epoch, lung.organ) == (7, 0.5, "lung")
    assert mean_over_rows(window.rows(1, 0), "text_cosine") == pytest.approx(1.0), (
        "all captions at one point: collapsed"
    )


def test_a_perfect_model_reaches_the_floor():
    ids, abnormal = [[0], [0], [1], [2]], [[True], [True], [False], [False]]
    points = torch.eye(4)[[0, 0, 1, 1]][:, None]  # equal captions together, normal ones together
    window = OrganLossWindow(["lung"])
    identity = (torch.tensor(ids), torch.tensor(abnormal), torch.ones(4, 1, dtype=torch.bool))
    window.add(organ_contrastive_loss(points, points, *identity, 1000.0), points, *identity)
    (row,) = window.rows(1, 0)
    assert row.loss == pytest.approx(row.floor, abs=1e-5) and row.floor == pytest.approx(math.log(2))


def test_a_window_averages_over_the_batches_in_which_an_organ_was_active():
    window = OrganLossWindow(ORGANS)
    values, actives = [], []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        abnormal = generator.random((4, 3)) < 0.3
        arguments = batch(
            unit((4, 3, 8), seed),
            unit((4, 3, 8), 9 + seed),
            generator.integers(0, 9, (4, 3)),
            abnormal,
            np.ones((4, 3)),
        )
        window.add(*arguments)
        values.append(arguments[0].organ_losses.numpy()), actives.append(arguments[0].organ_is_active.numpy())
    values, actives = np.array(values), np.array(actives)
    assert 0 < actives.mean() < 1, "every batch or none would test nothing"
    for organ, row in enumerate(window.rows(4, 1)):
        assert row.active == actives[:, organ].mean()
        if row.active:
            assert row.loss == pytest.approx(values[actives[:, organ], organ].mean(), rel=1e-5)
    window.clear()
    assert window.num_batches == 0


def test_text_cosine_leaves_equal_and_invalid_captions_out():
    text = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0.6, 0.8]])[:, None]
    identity = (torch.tensor([[0], [0], [1], [2]]), torch.ones(4, 1).bool(), torch.tensor([[1], [1], [1], [0]]).bool())
    window = OrganLossWindow(["lung"])
    window.add(organ_contrastive_loss(text, text, *identity, 1.0), text, *identity)
    assert mean_over_rows(window.rows(1, 0), "text_cosine") == pytest.approx(0.0), (
        "only captions 0 and 1 differ and are valid"
    )


def test_autocast_rounds_no_column():
    """Embeddings of a text side that collapses: bfloat16 would call cosines of 0.998 one."""
    text = torch.nn.functional.normalize(1 + 0.05 * unit((6, 2, 8)), dim=-1)
    ids, yes = [[0, 0], [0, 1], [1, 2], [1, 3], [2, 4], [3, 5]], [[1, 1]] * 6
    rows = []
    for enabled in (False, True):
        window = OrganLossWindow(["lung", "heart"])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            window.add(*batch(unit((6, 2, 8), 1), text, ids, yes, yes), image_embeds=unit((6, 2, 8), 1))
        rows.append(window.rows(1, 0)[0])
    assert rows[0].text_cosine < 1 and abs(rows[0].fit) > 0
    assert (rows[1].text_cosine, rows[1].fit) == (rows[0].text_cosine, rows[0].fit)


def slow_row(batches, organ):
    """What a window says of one organ, patient by patient and pair by pair."""
    excess, active, cosines, equal, valid, abnormal, captioned, counts = [], 0, [], [], 0, 0, 0, [0, 0]
    for result, text, ids, is_valid, state in batches:
        patients = range(len(ids))
        if result.organ_is_active[organ]:
            active += 1
            excess.append(float(result.organ_losses[organ]) - math.log(sum(bool(is_valid[p, organ]) for p in patients)))
        for p in patients:
            valid += bool(is_valid[p, organ])
            counts[0] += bool(state[p, organ] & PRESENT)
            counts[1] += bool(state[p, organ] & WHOLE)
            captioned += bool(state[p, organ] & CAPTIONED)
            abnormal += bool(state[p, organ] & CAPTIONED) and bool(state[p, organ] & ABNORMAL)
            for q in patients:
                if p != q and is_valid[p, organ] and is_valid[q, organ]:
                    equal.append(bool(state[p, organ] >> TEXT_BITS == state[q, organ] >> TEXT_BITS))
                    if not equal[-1]:
                        cosines.append(float(text[p, organ] @ text[q, organ]))
    total = sum(len(ids) for _, _, ids, *_ in batches)
    return {
        **{"batches": len(batches), "active": active / len(batches), "spread": np.std(excess, ddof=1)},
        **{"text_cosine": np.mean(cosines), "equal": np.mean(equal), "valid": valid / total},
        **{"present": counts[0] / total, "whole": counts[1] / total, "captioned": captioned / total},
        **{"abnormal": abnormal / captioned},
    }


def test_columns_are_those_of_a_walk_over_patients_and_pairs():
    window, batches = OrganLossWindow(ORGANS), []
    for seed in range(6):
        generator = np.random.default_rng(seed)
        ids = torch.tensor(generator.integers(0, 5, (6, 3)))
        state = torch.tensor(generator.integers(0, 16, (6, 3)) | CAPTIONED * (generator.random((6, 3)) < 0.8))
        is_valid = ((state & WHOLE) > 0) & ((state & CAPTIONED) > 0)
        identity = (ids, (state & ABNORMAL) > 0, is_valid)
        state |= torch.tensor(generator.integers(-2, 2, (6, 3))) << TEXT_BITS  # texts, apart from captions' hashes
        text = unit((6, 3, 8), 20 + seed)
        result = organ_contrastive_loss(unit((6, 3, 8), seed), text, *identity, 10.0)
        window.add(result, text, *identity, organ_state=state)
        batches.append((result, text, ids, is_valid, state))
    for organ, row in enumerate(window.rows(1, 0.1)):
        expected = slow_row(batches, organ)
        assert 0 < expected["valid"] < 1 and 0 < expected["equal"] < 1 and 0 < expected["abnormal"] < 1
        assert {name: getattr(row, name) for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("is_collapsed", [False, True])
def test_fit_tells_related_images_from_unrelated_ones_without_any_training(is_collapsed):
    """Images carry their kind; captions are either of the same kind, or of another patient's."""
    fits = {True: [], False: []}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        kind = torch.randint(0, 2, (8, 1), generator=generator).bool()
        image = torch.randn((8, 1, 16), generator=generator)
        image[..., 0] += 4.0 * kind
        if is_collapsed:  # all at nearly one point, as fresh weights have it
            image = torch.ones(16) + 1e-3 * image
        image = torch.nn.functional.normalize(image, dim=-1)
        for is_own in (True, False):
            is_abnormal = kind if is_own else kind[torch.randperm(8, generator=generator)]
            identity = (torch.arange(8)[:, None], is_abnormal, torch.ones(8, 1, dtype=torch.bool))
            window = OrganLossWindow(["lung"])
            window.add(organ_contrastive_loss(image, image, *identity, 1.0), image, *identity, image_embeds=image)
            (row,) = window.rows(1, 0.0)
            if row.fit_batches:
                fits[is_own].append(row.fit)
    own, other = (np.array(fits[is_own]) for is_own in (True, False))
    assert len(own) > 30 and own.mean() > 5 * own.std() / len(own) ** 0.5
    assert abs(other.mean()) < 3 * other.std() / len(other) ** 0.5


def test_two_reconstructions_of_a_scan_are_no_sign_of_fit():
    """The same image twice, with one report for both that belongs to someone else."""
    fits = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        scan = torch.arange(12) // 2
        image = unit((6, 2, 16), seed)[scan]
        kind = torch.randint(0, 2, (6, 2), generator=generator).bool()[scan]
        identity = (scan[:, None] + 10 * torch.arange(2), kind, torch.ones(12, 2, dtype=torch.bool))
        window = OrganLossWindow(["lung", "heart"])
        window.add(organ_contrastive_loss(image, image, *identity, 1.0), image, *identity, image_embeds=image)
        fits += [row.fit for row in window.rows(1, 0.0) if row.fit_batches]
    assert len(fits) > 60 and abs(np.mean(fits)) < 3 * np.std(fits) / len(fits) ** 0.5


def test_fit_is_undefined_without_both_kinds_of_pairs():
    image = unit((3, 1, 8))
    for abnormal in ([True, True, True], [False, False, False]):  # no positives but oneself; no others
        identity = (torch.arange(3)[:, None], torch.tensor(abnormal)[:, None], torch.ones(3, 1, dtype=torch.bool))
        window = OrganLossWindow(["lung"])
        window.add(organ_contrastive_loss(image, image, *identity, 1.0), image, *identity, image_embeds=image)
        (row,) = window.rows(1, 0.0)
        assert row.fit_batches == 0 and math.isnan(row.fit) and math.isnan(row.fit_spread)


def test_retrieval_is_counted_by_hand():
    # Patients 0 and 1 are normal: positives of each other. Patient 3 is not whole.
    text = torch.eye(4)[:, None]
    image = torch.eye(4)[[1, 0, 2, 3]][:, None]  # each normal image finds the other normal caption
    identity = (
        torch.arange(4)[:, None],
        torch.tensor([False, False, True, True])[:, None],
        torch.tensor([True, True, True, False])[:, None],
    )

    def row_of(image, text):
        window = OrganLossWindow(["lung"])
        result = organ_contrastive_loss(image, text, *identity, 1.0)
        window.add(result, text, *identity, image_embeds=image, with_retrieval=True)
        return window.rows(1, 0.0)[0]

    row = row_of(image, text)
    assert row.retrieval == pytest.approx(1.0) and row.retrieval_chance == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    wrong = row_of(torch.eye(4)[[2, 2, 0, 3]][:, None], text)
    assert wrong.retrieval == 0.0
    collapsed = row_of(torch.ones_like(image), torch.ones_like(text))
    assert collapsed.retrieval == pytest.approx(collapsed.retrieval_chance), "ties are shared"
    window = OrganLossWindow(["lung"])
    for is_abnormal in (identity[1], torch.zeros(4, 1, dtype=torch.bool)):  # all normal: any caption would be a hit
        result = organ_contrastive_loss(image, text, identity[0], is_abnormal, identity[2], 1.0)
        window.add(result, text, identity[0], is_abnormal, identity[2], image_embeds=image, with_retrieval=True)
    assert window.rows(1, 0.0)[0].retrieval_chance == row.retrieval_chance, "only where the organ was active"


def test_table_is_read_back_and_cut_where_a_run_resumes(tmp_path):
    table = OrganLossFile(tmp_path / "run" / TRAIN_FILE)
    table.append(
        [*rows_of("lung", "heart", step=10), OrganLossRow(10, 1.0, "aorta", math.nan, math.nan, math.nan, 0.0)]
    )
    table.append(rows_of("lung", step=20, loss=0.5))
    columns = table.path.read_text().splitlines()[0].split(",")
    assert columns[:7] == ["step", "epoch", "organ", "loss", "chance", "floor", "active"] and "text_cosine" in columns
    read = table.read()
    assert [(row.step, row.organ, row.active) for row in read] == [
        (10, "lung", 1), (10, "heart", 1), (10, "aorta", 0), (20, "lung", 1)
    ]  # fmt: skip
    assert math.isnan(read[2].loss) and repr(read[3]) == repr(rows_of("lung", step=20, loss=0.5)[0])
    table.keep_until(10)
    assert [row.step for row in table.read()] == [10, 10, 10]
    table.keep_until(0)
    assert table.read() == []
    table.path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns step,epoch,organ"):
        table.read()


OLD_TABLE = """step,epoch,organ,loss,chance,floor,active
10,1,lung,1.5,2,0.25,1
10,1,heart,nan,nan,nan,0
20,2,lung,1.25,2,0.25,0.5
"""


@pytest.mark.parametrize("resumes", [True, False])
def test_a_table_of_an_earlier_version_is_read_and_continued(tmp_path, resumes):
    table = OrganLossFile(tmp_path / TRAIN_FILE)
    table.path.write_text(OLD_TABLE)
    old = table.read()
    assert [(row.step, row.organ, row.loss) for row in old][::2] == [(10, "lung", 1.5), (20, "lung", 1.25)]
    assert all(math.isnan(row.text_cosine) and math.isnan(row.batches) for row in old)
    assert series(old)["lung"].shape == (2, 4) and last_rows(old)["lung"].loss == 1.25
    if resumes:
        table.keep_until(20)
    added = OrganLossRow(30, 3.0, "lung", 1.0, 2.0, 0.25, 1.0, batches=10.0, text_cosine=0.5)
    table.append([added])
    assert repr(table.read()) == repr([*old, added]), "old rows keep what they have, new ones have all"


def test_last_rows_average_the_last_active_windows():
    rows = [OrganLossRow(step, 0.1 * step, "lung", float(step), 9.0, 0.0, 1.0) for step in (1, 2, 3)]
    rows += [OrganLossRow(4, 0.4, "lung", math.nan, math.nan, math.nan, 0.0)]
    rows += [OrganLossRow(4, 0.4, "heart", math.nan, math.nan, math.nan, 0.0)]
    assert last_rows(rows, 2)["lung"].loss == 2.5 and last_rows(rows)["lung"].step == 3
    assert "heart" not in last_rows(rows)


def test_smoothing_keeps_constants_and_ends():
    np.testing.assert_allclose(smooth(np.full(9, 2.0), 4), 2.0)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 6.0]), 3), [1.5, 3.0, 4.5])
    np.testing.assert_array_equal(smooth(np.arange(3.0), 1), np.arange(3.0))


def test_series_leave_windows_without_the_organ_out():
    rows = [*rows_of("lung", step=1), OrganLossRow(2, 0.2, "lung", math.nan, math.nan, math.nan, 0.0)]
    rows += rows_of("lung", step=3, loss=0.7)
    np.testing.assert_allclose(series(rows)["lung"], [[1, 1.0, 2.0, 0.25], [3, 0.7, 2.0, 0.25]])


def write_run(folder, level, organs=24, steps=range(20, 420, 20)):
    names = [f"organ {number}" for number in range(organs)]
    rows = [
        OrganLossRow(step, step / 100, name, 2.0 - level * (step / 400) * (number + 1) / organs, 2.0, 0.4, 0.9)
        for step in steps
        for number, name in enumerate(names)
    ]
    rows.append(OrganLossRow(400, 4.0, "never seen", math.nan, math.nan, math.nan, 0.0))
    OrganLossFile(folder / TRAIN_FILE).append(rows)
    OrganLossFile(folder / EVAL_FILE).append([OrganLossRow(400, 4.0, name, 1.5, 2.0, 0.4, 1.0) for name in names])


def keep_figures(monkeypatch):
    """A list that every saved figure is put into."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (kept.append(self), save(self, *args, **options))
    )
    return kept


def test_picture_has_a_curve_for_every_organ_and_the_chance_line(tmp_path, monkeypatch):
    write_run(tmp_path, level=1.5)
    kept = keep_figures(monkeypatch)
    path = draw(tmp_path)
    (figure,) = kept
    assert path == tmp_path / "loss_curves.png" and path.read_bytes().startswith(b"\x89PNG")
    overview, *small = figure.get_axes()
    curves = {line.get_label(): line for line in overview.get_lines()}
    assert {f"organ {number}" for number in range(24)} <= set(curves)
    (chance,) = (line for name, line in curves.items() if name.startswith("chance ln(n)"))
    np.testing.assert_allclose(chance.get_ydata(), 2.0)
    assert "n = 7.4" in chance.get_label()
    np.testing.assert_allclose(curves["organ 23"].get_ydata()[-1], 0.5)
    assert len({(line.get_color(), line.get_linestyle()) for line in curves.values()}) == 25, "organs can be told apart"
    titles = [axis.get_title() for axis in small if axis.get_title()]
    # Over the last ten lines, steps 220 to 400, the loss has fallen by 1.5 * 310 / 400 on the mean, of 1.6.
    assert titles[0] == "organ 23  73 %" and titles[-1] == "never seen" and len(titles) == 25
    assert [text.get_text() for axis in small for text in axis.texts] == ["never in the loss"]
    assert {line.get_label() for line in small[0].get_lines()} == {"training", "evaluation", "chance", "floor"}


def test_two_runs_are_drawn_side_by_side(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "own", level=1.5, organs=3)
    write_run(tmp_path / "shuffled", level=0.0, organs=3)
    out = tmp_path / "both.png"
    kept = keep_figures(monkeypatch)
    assert main([str(tmp_path / "own"), "--compare", str(tmp_path / "shuffled"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out) and out.is_file()
    assert [line.split(":")[0] for line in printed if "organs active" in line] == [
        str(tmp_path / name) for name in ("own", "shuffled")
    ]
    (figure,) = kept
    left, right, small, *_ = figure.get_axes()
    assert (left.get_title(), right.get_title()) == ("own", "shuffled")
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[0] < 0.5
    assert {"own", "shuffled"} <= {line.get_label() for line in small.get_lines()}


def write_alarms(folder, *alarms):
    entries = [
        {"step": step, "cause": "cut off", "is_alarm": is_alarm, "organs": organs, "text": "why", "learned_since": {}}
        for step, is_alarm, organs in alarms
    ]
    (folder / "run.json").write_text(json.dumps({"alarms": entries}))


def test_alarms_are_marked_on_the_organs_they_speak_of(tmp_path, monkeypatch):
    write_run(tmp_path, level=1.5, organs=3)
    write_alarms(tmp_path, (100, True, ["organ 0", "never seen"]), (200, False, ["organ 1"]))
    kept = keep_figures(monkeypatch)
    draw(tmp_path)
    (figure,) = kept
    marked = {
        axis.get_title().split("  ")[0]: [
            list(line.get_xdata()) for line in axis.get_lines() if line.get_color() == "red"
        ]
        for axis in figure.get_axes()
    }
    assert marked[tmp_path.name] == [[100, 100]]
    assert marked["organ 0"] == marked["never seen"] == [[100, 100]] and marked["organ 1"] == marked["organ 2"] == []


def test_the_table_is_that_of_ten_epochs_at_either_end(tmp_path):
    rows = []
    for step in range(10, 301, 10):  # 30 epochs, two lines an epoch but for the last ten
        for half in (0.4, 0.0) if step <= 200 else (0.0,):
            epoch = step / 10 - half
            loss = 2.0 - 0.05 * epoch
            rows.append(OrganLossRow(int(10 * epoch), epoch, "lung", loss, 2.0, 0.0, 1.0, text_cosine=0.3))
            rows.append(OrganLossRow(int(10 * epoch), epoch, "heart", 1.9, 2.0, 1.0, 0.5))
            rows.append(OrganLossRow(int(10 * epoch), epoch, "femur", math.nan, math.nan, math.nan, 0.0))
    evaluated = [OrganLossRow(300, 30.0, "lung", 1.7, 2.0, 0.0, 1.0, retrieval=0.75, retrieval_chance=0.25)]
    organs, ten = progress(rows, evaluated)
    assert ten == "10 epochs" and [each.organ for each in organs] == ["lung", "heart", "femur"]
    lung, heart, femur = organs
    first_epochs = [epoch - half for epoch in range(1, 11) for half in (0.4, 0.0)]
    assert lung.first == pytest.approx(2.0 - 0.05 * np.mean(first_epochs))
    assert lung.last == pytest.approx(2.0 - 0.05 * np.mean(range(21, 31)))
    assert (
        lung.learned == pytest.approx(0.05 * 25.5 / 2) and heart.learned == pytest.approx(0.1) and heart.active == 0.5
    )
    assert math.isnan(femur.last) and math.isnan(femur.learned) and femur.active == 0
    OrganLossFile(tmp_path / TRAIN_FILE).append(rows)
    OrganLossFile(tmp_path / EVAL_FILE).append(evaluated)
    write_alarms(tmp_path, (100, True, ["femur"]))
    text = "\n".join(summary(tmp_path))
    for words in (
        "300 steps, 30.0 epochs; 2 of 3 organs active",
        "not active in the last 10 epochs: femur",
        "loss over the first and the last 10 epochs",
        "best: lung 64 %, heart 10 %",
        "worst: heart 10 %, lung 64 %",
        "step 100, alarm: why",
    ):
        assert words in text
    (line,) = [line for line in text.splitlines() if line.startswith("lung ")]
    assert " ".join(line.split()) == "lung 1.735 0.725 2.000 0.000 64 % 100 % 0.300 1.700 0.750 (0.250)"
    assert "nan" not in text


@pytest.mark.parametrize(
    ("count", "number", "ten"), [(1, 1, "log line"), (5, 2, "2 log lines"), (40, 10, "10 log lines")]
)
def test_the_table_of_a_run_of_few_epochs_is_that_of_its_log_lines(count, number, ten):
    rows = [OrganLossRow(step, 0.1, "lung", 2.0 - 0.01 * step, 2.0, 1.0, 1.0) for step in range(1, count + 1)]
    (lung,), name = progress(rows)
    assert name == ten and lung.first == pytest.approx(2.0 - 0.01 * np.mean(range(1, number + 1)))
    assert lung.last == pytest.approx(2.0 - 0.01 * np.mean(range(count - number + 1, count + 1)))


def test_a_line_of_many_batches_weighs_more_than_the_first_of_one():
    rows = [OrganLossRow(step, 0.1, "lung", loss, 2.0, 1.0, 0.5, batches=count)
            for step, loss, count in ((1, 4.0, 1), (20, 1.0, 19), (40, 1.5, 20), (41, 3.5, 1))]  # fmt: skip
    (lung,), name = progress(rows)
    assert name == "2 log lines"
    assert (lung.first, lung.last) == pytest.approx(((4.0 + 19 * 1.0) / 20, (20 * 1.5 + 3.5) / 21))


def test_a_folder_without_losses_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no organ_losses.csv" in capsys.readouterr().err
