"""The table of organ losses, its figures against closed forms, and the picture drawn from it."""

import math

import numpy as np
import pytest
import torch

from modeling_fvlm.loss import organ_contrastive_loss
from training_fvlm.curves import draw, main, series, smooth
from training_fvlm.organ_losses import EVAL_FILE, TRAIN_FILE, OrganLossFile, OrganLossRow, OrganLossWindow, last_rows

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
    assert window.text_cosine() == pytest.approx(1.0), "all captions at one point: collapsed"


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
    assert window.text_cosine() == pytest.approx(0.0), "only captions 0 and 1 differ and are valid"


def test_table_is_read_back_and_cut_where_a_run_resumes(tmp_path):
    table = OrganLossFile(tmp_path / "run" / TRAIN_FILE)
    table.append(
        [*rows_of("lung", "heart", step=10), OrganLossRow(10, 1.0, "aorta", math.nan, math.nan, math.nan, 0.0)]
    )
    table.append(rows_of("lung", step=20, loss=0.5))
    assert table.path.read_text().splitlines()[0] == "step,epoch,organ,loss,chance,floor,active"
    read = table.read()
    assert [(row.step, row.organ, row.active) for row in read] == [
        (10, "lung", 1), (10, "heart", 1), (10, "aorta", 0), (20, "lung", 1)
    ]  # fmt: skip
    assert math.isnan(read[2].loss) and read[3] == rows_of("lung", step=20, loss=0.5)[0]
    table.keep_until(10)
    assert [row.step for row in table.read()] == [10, 10, 10]
    table.keep_until(0)
    assert table.read() == []
    table.path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns step,epoch,organ"):
        table.read()


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
    assert titles[0] == "organ 23" and titles[-1] == "never seen" and len(titles) == 25
    assert {line.get_label() for line in small[0].get_lines()} == {"training", "evaluation", "chance", "floor"}


def test_two_runs_are_drawn_side_by_side(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "own", level=1.5, organs=3)
    write_run(tmp_path / "shuffled", level=0.0, organs=3)
    out = tmp_path / "both.png"
    kept = keep_figures(monkeypatch)
    assert main([str(tmp_path / "own"), "--compare", str(tmp_path / "shuffled"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.is_file()
    (figure,) = kept
    left, right, small, *_ = figure.get_axes()
    assert (left.get_title(), right.get_title()) == ("own", "shuffled")
    assert left.get_ylim() == right.get_ylim()
    assert {"own", "shuffled"} <= {line.get_label() for line in small.get_lines()}


def test_a_folder_without_losses_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no organ_losses.csv" in capsys.readouterr().err
