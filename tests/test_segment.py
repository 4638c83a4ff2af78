"""Masks made on the way by TotalSegmentator: a stand-in takes its place, with its function's parameters.

The stand-in labels the boxes of `tiny_release` where they lie in millimetres, by the affine it is handed: a volume that
is handed over turned, mirrored or shifted gets another mask. Its labels are numbered its own way.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_series import write_series
from test_folder import rows_of
from test_folder_formats import AFFINE, save_itk
from tiny_release import REPORT, arrays, save_nifti, write_csv

from data_builders import segment
from data_builders.__main__ import main
from modeling_fvlm.organs import TOTALSEGMENTATOR_V2
from modeling_fvlm.processed_split import decode_volume

NAMES = ("rai", "lps", "dicom", "mha")
ROOT = Path(__file__).resolve().parent.parent
# Parameters of the function in TotalSegmentator 2.4; later versions have added to them.
PYTHON_API = """
import json, sys
from pathlib import Path
import nibabel
import numpy as np
from totalsegmentator.map_to_binary import class_map

HERE = Path(__file__).parent
BOXES = {name: [slice(*edges) for edges in box] for name, box in json.loads((HERE / "boxes.json").read_text()).items()}


def totalsegmentator(input, output=None, ml=False, nr_thr_resamp=1, nr_thr_saving=6, fast=False, nora_tag="None",
                     preview=False, task="total", roi_subset=None, statistics=False, radiomics=False, crop_path=None,
                     body_seg=False, force_split=False, output_type="nifti", quiet=False, verbose=False, test=0,
                     skip_saving=False, device="gpu", license_number=None, statistics_exclude_masks_at_border=True,
                     no_derived_masks=False, v1_order=False, fastest=False, roi_subset_robust=None):
    calls = HERE / "calls.json"
    before = json.loads(calls.read_text()) if calls.exists() else []
    hu = np.asarray(input.dataobj)
    call = {"task": task, "fast": fast, "device": device, "ml": ml, "output": output, "least": int(hu.min())}
    calls.write_text(json.dumps([*before, call]))
    failure = (HERE / "failure").read_text() if (HERE / "failure").exists() else ""
    if task != "total" or failure == "exit":
        print("this task needs a license")
        sys.exit(1)
    if failure and len(before) == 1:
        raise RuntimeError(failure)
    ijk = np.stack(np.meshgrid(*(np.arange(size) for size in hu.shape), indexing="ij"), axis=-1)
    x, y, z = np.moveaxis(ijk @ input.affine[:3, :3].T + input.affine[:3, 3], -1, 0)
    depth, height, width = (np.rint(place).astype(int) for place in ((z + 100) / 3, (50 - y) / 4, (60 - x) / 4))
    labels = np.zeros(hu.shape, dtype=np.uint8)
    for label, name in class_map["total"].items():
        if name in BOXES:
            parts = zip((depth, height, width), BOXES[name])
            labels[np.all([(place >= part.start) & (place < part.stop) for place, part in parts], axis=0)] = label
    return nibabel.Nifti1Image(labels, input.affine)
"""


@pytest.fixture
def total_segmentator(tmp_path, monkeypatch):
    """The stand-in's folder, importable; its classes are numbered from the last to the first."""
    from tiny_release import BOXES

    package = tmp_path / "site" / "totalsegmentator"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "python_api.py").write_text(PYTHON_API)
    classes = dict(enumerate(reversed(TOTALSEGMENTATOR_V2), start=1))
    (package / "map_to_binary.py").write_text(f"class_map = {{'total': {classes!r}}}\n")
    boxes = {name: [[part.start, part.stop] for part in box] for name, box in BOXES.items()}
    (package / "boxes.json").write_text(json.dumps(boxes))
    monkeypatch.syspath_prepend(str(package.parent))
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "totalsegmentator"]:
        del sys.modules[name]


@pytest.fixture
def source(tmp_path):
    """Volumes in four forms without any mask, and their reports."""
    for seed, name in enumerate(NAMES):
        volume = arrays(seed)[0]
        if name == "dicom":
            write_series(tmp_path / "ct" / name, volume, AFFINE)
        elif name == "mha":
            save_itk(volume, tmp_path / "ct" / "mha.mha")
        else:
            save_nifti(volume, tmp_path / "ct" / f"{name}.nii.gz", name.upper())
    write_csv(tmp_path / "reports.csv", [{"id": name, **REPORT} for name in NAMES])
    return tmp_path


def options(source, *more) -> list[str]:
    grid = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--previews", "0", "--workers", "1"]
    places = ["--volumes", source / "ct", "--reports", source / "reports.csv", "--out", source / "out" / "split"]
    fixed = ["--ids", "kept", "--validation_fraction", "0", "--segment", "--segment_device", "cpu"]
    return ["folder", *map(str, places), *grid, *fixed, *map(str, more)]


def calls_of(package) -> list[dict]:
    path = package / "calls.json"
    return json.loads(path.read_text()) if path.exists() else []


def skipped(source) -> dict[str, str]:
    manifest = json.loads((source / "out" / "split" / "manifest.json").read_text())
    return {entry["case"]: entry["reason"] for entry in manifest["skipped"]}


def check_masks(source, names=NAMES):
    """As if the masks of `tiny_release` had lain beside the volumes."""
    from modeling_fvlm.organs import load_organ_set, organ_label_table

    organ_set = load_organ_set("body_24")
    table = organ_label_table(organ_set, organ_set.organs, "totalsegmentator_v2")
    rows = rows_of(source / "out" / "split")
    assert sorted(rows) == sorted(names)
    for name, row in rows.items():
        volume, mask = arrays(NAMES.index(name))
        inside = (slice(1, 19), slice(3, 23), slice(2, 30))
        stored_volume, stored_mask = decode_volume(row)
        assert np.array_equal(stored_volume, volume[inside]), name
        assert np.array_equal(stored_mask, table[mask[inside]]), name


def test_masks_are_made_in_a_process_of_its_own(source, total_segmentator):
    """The whole command, as a user starts it; then once more, and nothing is made again."""
    paths = os.pathsep.join([str(total_segmentator.parent), str(ROOT)])
    command = [sys.executable, "-m", "data_builders", *options(source, "--segment_fast")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "making 4 masks with TotalSegmentator on cpu, its fast model" in " ".join(done.stdout.split())
    check_masks(source)
    calls = calls_of(total_segmentator)
    assert len(calls) == 4
    for call in calls:
        least = call.pop("least")
        assert call == {"task": "total", "fast": True, "device": "cpu", "ml": True, "output": None}
        assert -1030 <= least <= -1000, "HU, not what a DICOM file stores"
    folder = source / "out" / "masks_totalsegmentator"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.nii.gz" for name in NAMES)
    manifest = json.loads((source / "out" / "split" / "manifest.json").read_text())
    assert manifest["settings"]["numberings"] == {"totalsegmentator_v2": "totalsegmentator_v2"}
    assert main(options(source, "--segment_fast")) == 0
    assert len(calls_of(total_segmentator)) == 4


def test_what_is_there_is_kept_and_what_is_missing_is_made(source, total_segmentator):
    """A mask of the user's beside the volumes, one in the folder of masks, and one that was made before."""
    labels = arrays(0)[1]
    save_nifti(labels, source / "ct" / "rai_seg.nii.gz")
    save_nifti(arrays(1)[1], source / "masks" / "lps.nii.gz", "PSR")
    assert main(options(source, "--segment_out", source / "masks")) == 0
    assert len(calls_of(total_segmentator)) == 2 and skipped(source) == {}
    check_masks(source)
    assert not (source / "masks" / "rai.nii.gz").exists()
    (source / "masks" / "mha.nii.gz").unlink()
    times = {path: path.stat().st_mtime_ns for path in (source / "masks").iterdir()}
    assert main(options(source, "--segment_out", source / "masks")) == 0
    assert len(calls_of(total_segmentator)) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize(
    ("failure", "failed", "told"),
    [
        ("no /tmp/a1/x.nii here", ["lps"], "TotalSegmentator failed: RuntimeError: no x.nii here"),
        ("exit", list(NAMES), "TotalSegmentator failed: SystemExit: 1"),
    ],
)
def test_a_case_that_fails_is_skipped_with_its_reason(source, total_segmentator, failure, failed, told):
    (total_segmentator / "failure").write_text(failure)
    assert main(options(source)) == (0 if len(failed) < len(NAMES) else 1)
    assert skipped(source) == dict.fromkeys(sorted(failed), told)
    check_masks(source, [name for name in NAMES if name not in failed])
    assert not any((source / "out" / "masks_totalsegmentator" / f"{name}.nii.gz").exists() for name in failed)


def test_a_volume_that_cannot_be_read_is_not_segmented(source, total_segmentator):
    (source / "ct" / "lps.nii.gz").write_bytes(b"no scan")
    assert main(options(source)) == 0
    assert len(calls_of(total_segmentator)) == 3
    assert list(skipped(source)) == ["lps"] and str(source) not in skipped(source)["lps"]


def test_a_case_without_report_is_not_segmented(source, total_segmentator):
    rows = [{"id": name, **REPORT, **({"findings": "", "impression": ""} if name == "rai" else {})} for name in NAMES]
    write_csv(source / "reports.csv", rows)
    assert main(options(source)) == 0
    assert len(calls_of(total_segmentator)) == 3 and skipped(source) == {"rai": "report is empty"}


def test_a_wrong_table_is_told_before_the_work_begins(source, total_segmentator, capsys):
    write_csv(source / "reports.csv", [{"id": name, **REPORT} for name in (*NAMES, "rai")])
    assert main(options(source)) == 2
    assert "the id 'rai' comes twice" in capsys.readouterr().err and calls_of(total_segmentator) == []


def test_a_killed_run_leaves_whole_masks_only(source, total_segmentator, monkeypatch, capsys):
    save, saved = nibabel.save, []

    def stop_at_the_third(image, path):
        saved.append(path)
        if len(saved) == 3:
            Path(path).write_bytes(b"half a mask")
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(nibabel, "save", stop_at_the_third)
    assert main(options(source)) == 2
    assert "run the same command again to continue" in capsys.readouterr().err
    folder = source / "out" / "masks_totalsegmentator"
    assert len(list(folder.iterdir())) == 2
    (folder / ".99.dicom.nii.gz").write_bytes(b"what SIGKILL leaves")  # no listing may take it for a mask
    monkeypatch.setattr(nibabel, "save", save)
    assert main(options(source)) == 0
    assert len(calls_of(total_segmentator)) == 5
    check_masks(source)


@pytest.mark.parametrize(
    ("change", "more", "told"),
    [
        (
            lambda ct: save_nifti(arrays(9)[0][1:], ct / "lps.nii.gz", "LPS"),
            [],
            "lps.nii.gz was made of another volume",
        ),
        (lambda ct: None, ["--segment_fast"], "was made in the other mode (--segment_fast)"),
    ],
)
def test_a_mask_of_another_volume_or_mode_is_not_taken(source, total_segmentator, capsys, change, more, told):
    assert main(options(source)) == 0
    change(source / "ct")
    assert main([*options(source, *more), "--out", str(source / "out" / "other")]) == 2
    message = capsys.readouterr().err
    assert told in message and "Name another folder, or delete that mask" in message


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--segment_device", "cuda:1"], "--segment_device 'cuda:1' is none of auto, cpu, gpu and gpu:N"),
        (["--segment_device", "gpu:97"], "--segment_device gpu:97: torch sees"),
        (["--shard", "1/4"], "every task would make all the masks"),
        (["--segment_out", "reports.csv"], "--segment_out reports.csv is a file"),
    ],
)
def test_wrong_options(source, total_segmentator, capsys, monkeypatch, more, told):
    monkeypatch.chdir(source)
    assert main(options(source, *more)) == 2
    assert told in capsys.readouterr().err
    assert calls_of(total_segmentator) == [] and not (source / "out" / "split").exists()


@pytest.mark.parametrize("option", [["--segment_fast"], ["--segment_out", "x"], ["--segment_device", "cpu"]])
def test_options_that_need_segment(source, capsys, option):
    arguments = [argument for argument in options(source) if argument != "--segment"]
    place = arguments.index("--segment_device")
    assert main([*arguments[:place], *arguments[place + 2 :], *option]) == 2
    assert f"{option[0]} says how masks are made: add --segment." in capsys.readouterr().err


def test_without_total_segmentator_the_message_says_what_to_install(source, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(options(source)) == 2
    message = capsys.readouterr().err
    assert 'pip install "fvlm[segment]"' in message and "give their folder as --masks" in message
    assert not (source / "out").exists()


def test_labels_go_by_the_names_of_the_classes(capsys):
    """An added class is no organ of v2; one that is gone is told; a release of version 1 is refused."""
    newer = dict(enumerate(("thymus", *TOTALSEGMENTATOR_V2[::-1]), start=1))
    table = segment.labels_to_v2(newer)
    assert table[0] == table[1] == 0
    assert [TOTALSEGMENTATOR_V2[table[label] - 1] for label in range(2, 119)] == list(TOTALSEGMENTATOR_V2[::-1])
    segment.labels_to_v2({label: name for label, name in newer.items() if name != "vertebrae_S1"})
    assert "lacks the classes ['vertebrae_S1']" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="lacks 117 of the 117 classes of version 2"):
        segment.labels_to_v2({1: "organ"})
