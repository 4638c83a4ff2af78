"""The ablation: rows that say what they do, commands that the training takes, a table of what is finished."""

import argparse
import json

import pytest

from benchmarks import ablation
from benchmarks.ablation import BASE, LARGEST_CHUNK, Row, rows
from training_fvlm.arguments import parse_settings


@pytest.fixture
def options(tmp_path) -> argparse.Namespace:
    return argparse.Namespace(recipe="ablation", data=tmp_path, out=tmp_path, task="synthetic", bf16=False)


def test_patients_and_steps_are_equal_where_they_should_be():
    table = rows(patients=3200, steps=100)
    assert len({row.name for row in table}) == len(table) > 20
    by_group: dict[str, list[Row]] = {}
    for row in table:
        by_group.setdefault(row.group, []).append(row)
    assert {row.contrast * row.steps for row in by_group["equal patients"]} == {3200}
    assert {row.contrast for row in by_group["equal patients"]} == {2, 8, 32, 128}
    assert {row.steps for row in by_group["equal steps"]} == {100}
    # 32 patients in 100 steps are 3200: that row stands among those of equal patients.
    assert {row.contrast for row in by_group["equal steps"]} == {2, 8, 128}
    assert all(row.has_seeds for group in ("equal patients", "equal steps") for row in by_group[group])
    others = [row for row in table if row.group not in ("equal patients", "equal steps")]
    assert all((row.contrast, row.steps) == (8, 400) and not row.has_seeds for row in others)


@pytest.mark.parametrize("row", [row for row in rows(3200, 100) if row.start is None], ids=lambda row: row.name)
def test_the_training_takes_every_row(row, options):
    words = ablation.train_command(row, 1, options)[2:]
    settings = parse_settings(words, description="")
    assert settings.training.group_size == row.contrast and settings.training.max_steps == row.steps
    assert settings.training.is_cached == (row.contrast > LARGEST_CHUNK) and settings.training.seed == 1


def test_rows_that_go_on_start_from_the_base(options):
    row = next(row for row in rows(3200, 100) if row.start is not None)
    words = ablation.train_command(row, 0, options)
    assert words[words.index("--init_from") + 1] == str(options.out / f"{BASE}-seed0" / "model")


def test_what_is_finished_is_tabled_and_not_run_again(options, monkeypatch):
    table = rows(80, 5)[:2]
    for seed, auc in ((0, 0.5), (1, 0.7)):
        folder = options.out / f"contrast-2-seed{seed}" / "eval"
        folder.mkdir(parents=True)
        metrics = {"macro_auc": auc, "per_finding": {"a": {"auc": 0.95}, "b": {"auc": auc}, "c": {"auc": None}}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    text = ablation.table_of(table, [0, 1, 2], options)
    assert "| contrast 2 | 0.600 (0.500, 0.700) | 1 | 40 | 80 |" in text and "contrast 8" not in text
    monkeypatch.setattr(ablation.subprocess, "run", lambda *args, **kwargs: pytest.fail("it was run again"))
    assert ablation.run(table[0], 0, options) is None


def test_a_row_that_fails_is_named(options, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "HOME", options.out)  # no train_fvlm.py there
    into = options.out / "table.md"
    words = ["--data", str(options.out), "--out", str(options.out), "--rows", "contrast-8", "--seeds", "0"]
    assert ablation.main([*words, "--into", str(into)]) == 1
    assert "contrast-8-seed0 ended with status" in capsys.readouterr().out and into.is_file()
    with pytest.raises(SystemExit):
        ablation.main([*words[:-4], "--rows", "contrast-3"])
