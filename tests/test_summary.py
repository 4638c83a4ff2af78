"""What is printed at the end of a build: the reasons first where nothing was written, and how to find a case."""

import pytest
from tiny_release import GEOMETRY, REPORT, arrays, save_nifti, write_csv

from data_builders.__main__ import main
from data_builders.summary import kind_of

NAMES = ("anna_1", "berta_2")


@pytest.fixture
def build(tmp_path, capsys):
    """A function that builds two scans, some of them broken, and returns the exit status and what was printed."""
    reports = write_csv(tmp_path / "reports.csv", [{"id": name, **REPORT} for name in NAMES])

    def run(*more: str, num_broken: int) -> tuple[int, str]:
        for seed, name in enumerate(NAMES):
            volume, mask = arrays(seed)
            save_nifti(mask, tmp_path / "seg" / f"{name}.nii.gz")
            path = save_nifti(volume, tmp_path / "ct" / f"{name}.nii.gz")
            if seed < num_broken:
                path.write_bytes(path.read_bytes()[:300])
        source = ["--volumes", tmp_path / "ct", "--masks", tmp_path / "seg", "--reports", reports]
        options = [*GEOMETRY, "--workers", "1", "--previews", "0", "--out", tmp_path / "split", *more]
        status = main(["folder", *map(str, [*source, *options])])
        return status, " ".join(capsys.readouterr().out.split())

    return run


def test_reasons_take_the_place_of_organs_where_nothing_was_written(build):
    status, told = build(num_broken=2)
    assert status == 1
    assert "2 skipped" in told and "end early or are damaged" in told
    assert "organs: in the mask" not in told and "in no mask" not in told
    assert told.index("end early or are damaged") < told.index("Nothing was written: every case was skipped")


def test_organs_are_counted_where_there_are_rows(build):
    status, told = build(num_broken=1)
    assert status == 0
    assert told.index("organs: in the mask") < told.index("1 skipped")


def test_a_skipped_case_with_a_hashed_id_can_be_found(build, tmp_path):
    """By the table that the message names, from the very same build."""
    _, told = build(num_broken=1)
    assert "the table that the same build with --id_key FILE writes" in told
    assert build("--id_key", str(tmp_path / "key.csv"), num_broken=1)[0] == 0
    key = dict(line.split(",")[:0:-1] for line in (tmp_path / "key.csv").read_text().splitlines())
    skipped = told[told.index(" skipped r") :].split()[1].rstrip(":")
    assert key[skipped] == "anna_1"


@pytest.mark.parametrize(("more", "num_broken"), [(("--ids", "kept"), 1), ((), 0)])
def test_nothing_is_said_of_a_key_where_it_is_not_wanted(build, more, num_broken):
    assert "--id_key" not in build(*more, num_broken=num_broken)[1]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("a_1.nii.gz: cut short (12 of 400 bytes)", "cut short .."),
        ("volume 'a' has 3.5 mm, [1, 2]", "volume .. has .. mm, .."),
    ],
)
def test_reasons_are_counted_without_what_differs_from_case_to_case(reason, kind):
    assert kind_of(reason) == kind
