"""Make the masks that are missing with TotalSegmentator, where the extra is installed: pip install "fvlm[segment]"

(1) the volume is read by our own reader, whatever its format, and handed over in HU on its own grid
(2) TotalSegmentator runs its task "total", the one whose weights are free for any use; no other is ever asked for
(3) labels are brought to the v2 numbering by the names of their classes
(4) the mask is written under a temporary name, then renamed: a killed run keeps what is whole, and goes on from there
A mask that lies there already is kept. One that we made tells in its header of which volume and how, so that it cannot
be taken for the mask of another. What fails for one case is the reason why that case is skipped.

The weights are fetched by TotalSegmentator itself when it runs for the first time, and it sends anonymous counts of its
use to its authors, unless `send_usage_stats` is false in its config file (~/.totalsegmentator/config.json).
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from modeling_fvlm.organs import TOTALSEGMENTATOR_V2
from modeling_fvlm.reading import Volume, notes_alone, read_volume

from .cases import Case, names_and_sizes
from .summary import console

TASK = "total"
NUMBERING = "totalsegmentator_v2"
DEVICE = re.compile(r"auto|cpu|gpu(:\d+)?")
MARK = "TotalSegmentator total"  # a header that begins so is of our making
FOLDERS = re.compile(r"(?:\b[A-Za-z]:)?[\\/](?:[^\s'\"\\/:]+[\\/])+")  # in front of a file name in a message


@dataclass(frozen=True)
class Segmenter:
    """TotalSegmentator as it was asked for.

    Attributes:
        run: Its function.
        labels: uint8 `(256,)`: its label -> label of the v2 numbering, 0 for classes that v2 has not.
        device: "cpu", "gpu" or "gpu:N", as it calls them.
        is_fast: Whether its 3 mm model runs instead of the 1.5 mm models.
    """

    run: Callable
    labels: np.ndarray
    device: str
    is_fast: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("missing masks")
    group.add_argument(
        "--segment",
        action="store_true",
        help='Make masks that are missing with TotalSegmentator (pip install "fvlm[segment]"), its task "total".',
    )
    group.add_argument(
        "--segment_out",
        type=Path,
        help="Folder for these masks; those that lie there are kept (default: masks_totalsegmentator beside --out).",
    )
    group.add_argument(
        "--segment_device", default="auto", help="auto, cpu, gpu or gpu:N (default: auto: a GPU where there is one)."
    )
    group.add_argument(
        "--segment_fast",
        action="store_true",
        help="Its 3 mm model: a fraction of the time and memory, coarser masks. Without a GPU the other takes minutes.",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Fail before any file is read. `--segment_out` gets its default here.

    Raises:
        ValueError: If an option is wrong or says nothing without --segment, or TotalSegmentator is not installed.
    """
    if not args.segment:
        given = [name for name in ("segment_out", "segment_fast") if getattr(args, name)]
        if given or args.segment_device != "auto":
            raise ValueError(f"--{given[0] if given else 'segment_device'} says how masks are made: add --segment.")
        return
    if not DEVICE.fullmatch(args.segment_device):
        raise ValueError(
            f"--segment_device {args.segment_device!r} is none of auto, cpu, gpu and gpu:N (such as gpu:1)."
        )
    if args.shard is not None:
        raise ValueError(
            "--segment and --shard: every task would make all the masks. Make them first, by one build without "
            "--shard or by TotalSegmentator itself, and give their folder as --masks."
        )
    args.segment_out = args.segment_out or args.out.absolute().parent / "masks_totalsegmentator"
    if args.segment_out.exists() and not args.segment_out.is_dir():
        raise ValueError(f"--segment_out {args.segment_out} is a file; name a folder.")
    if importlib.util.find_spec("totalsegmentator") is None:
        raise ValueError(
            '--segment needs TotalSegmentator, which is not installed: pip install "fvlm[segment]". Or make the masks '
            "elsewhere (TotalSegmentator -i ct.nii.gz -o mask.nii.gz --ml) and give their folder as --masks."
        )


def load_segmenter(device: str, is_fast: bool) -> Segmenter:
    """Import TotalSegmentator and look how it numbers its classes.

    Raises:
        ValueError: If it cannot be imported, has no task "total" as we know it, or there is no such GPU.
    """
    import torch

    number = int(device.partition(":")[2] or 0)
    has_gpu = torch.cuda.is_available() and number < torch.cuda.device_count()
    if device.startswith("gpu") and not has_gpu:  # TotalSegmentator would go on with the CPU
        raise ValueError(f"--segment_device {device}: torch sees {torch.cuda.device_count()} GPUs; use cpu or auto.")
    if device == "auto":
        device = "gpu" if has_gpu else "cpu"
    try:
        run = importlib.import_module("totalsegmentator.python_api").totalsegmentator
        classes = importlib.import_module("totalsegmentator.map_to_binary").class_map[TASK]
    except (ImportError, AttributeError, KeyError) as error:
        raise ValueError(
            f"--segment: the installed TotalSegmentator cannot be used ({error!r}); version 2.4 or later is needed."
        ) from error
    return Segmenter(run, labels_to_v2(classes), device, is_fast)


def labels_to_v2(classes: dict[int, str]) -> np.ndarray:
    """Lookup table from the installed release's labels to the v2 numbering, by the names of the classes.

    Raises:
        ValueError: If most classes are unknown: that is no release of version 2.
    """
    table = np.zeros(256, dtype=np.uint8)
    for label, name in classes.items():
        if name in TOTALSEGMENTATOR_V2:
            table[label] = TOTALSEGMENTATOR_V2.index(name) + 1
    missing = sorted(set(TOTALSEGMENTATOR_V2) - set(classes.values()))
    if len(missing) > len(TOTALSEGMENTATOR_V2) // 10:
        raise ValueError(
            f"--segment: the installed TotalSegmentator lacks {len(missing)} of the {len(TOTALSEGMENTATOR_V2)} classes "
            f"of version 2, {missing[:4]} among them; install version 2.4 or later."
        )
    if missing:
        console.print(f"TotalSegmentator lacks the classes {missing}: they are absent from the masks it makes.")
    return table


def make_masks(cases: Sequence[Case], args: argparse.Namespace) -> list[Case]:
    """Make the masks that do not exist yet of all cases whose mask lies in `--segment_out`.

    Returns:
        The cases in their order; one whose mask could not be made carries the reason.

    Raises:
        ValueError: If a mask there was made of another volume or in another mode, or TotalSegmentator cannot be used.
    """
    args.segment_out.mkdir(parents=True, exist_ok=True)
    waiting = {
        case.recon_id
        for case in cases
        if case.skip_reason is None and case.mask.parent == args.segment_out and not is_made(case, args.segment_fast)
    }
    if not waiting:
        return list(cases)
    segmenter = load_segmenter(args.segment_device, args.segment_fast)
    console.print(
        f"making {len(waiting)} masks with TotalSegmentator on {segmenter.device}"
        f"{', its fast model' if segmenter.is_fast else ''}, into {args.segment_out}",
        soft_wrap=True,
    )
    done = []
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("segmenting", total=len(waiting))
        for case in cases:
            if case.recon_id in waiting:
                reason = make_mask(case, segmenter, args.rescale)
                case = replace(case, skip_reason=reason)
                progress.advance(task)
            done.append(case)
    failed = sum(case.recon_id in waiting and case.skip_reason is not None for case in done)
    console.print(f"made {len(waiting) - failed} masks; {failed} failed, and their cases are skipped.")
    return done


def make_mask(case: Case, segmenter: Segmenter, rescale_mode: str) -> str | None:
    """Segment the volume of one case into its mask file; returns the reason where that fails."""
    try:
        with notes_alone():  # the build reads it again, and tells
            volume = read_volume(
                case.volume, rescale=case.rescale, rescale_mode=rescale_mode, series_uid=case.series_uid
            )  # (1)
    except (ValueError, FileNotFoundError) as error:
        return str(error).replace(f"{case.volume.parent}{os.sep}", "")
    try:
        labels = segment(volume, segmenter)
    except (Exception, SystemExit) as error:  # a library of others: it may raise anything, and calls sys.exit
        text = FOLDERS.sub("", " ".join(str(error).split()))
        return f"TotalSegmentator failed: {type(error).__name__}: {text[:300]}"
    write_mask(labels, volume, case.mask, mark_of(case, segmenter.is_fast))
    return None


def segment(volume: Volume, segmenter: Segmenter) -> np.ndarray:
    """Labels of a volume in the v2 numbering: uint8 `(depth, height, width)` on its grid.

    Raises:
        ValueError: If what comes back has another shape. Besides, whatever TotalSegmentator raises.
    """
    import nibabel

    image = nibabel.Nifti1Image(np.ascontiguousarray(volume.array.T), as_stored(volume.affine))
    made = segmenter.run(
        image, None, ml=True, task=TASK, fast=segmenter.is_fast, device=segmenter.device, quiet=True
    )  # (2)
    labels = np.asarray(made.dataobj).T
    if labels.shape != volume.array.shape:
        raise ValueError(f"the mask has the shape {labels.shape}, the volume {volume.array.shape}")
    return segmenter.labels[labels.astype(np.uint8)]  # (3)


def as_stored(affine: np.ndarray) -> np.ndarray:
    """The affine of a (depth, height, width) array for the same array with its axes reversed, as NIfTI keeps them."""
    return affine[:, [2, 1, 0, 3]]


def write_mask(labels: np.ndarray, volume: Volume, path: Path, mark: str) -> None:
    """Write a mask so that it is there whole or not at all (step 4)."""
    import nibabel

    image = nibabel.Nifti1Image(np.ascontiguousarray(labels.T), as_stored(volume.affine))
    image.header["descrip"] = mark.encode()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # hidden: no listing takes it for a mask
    try:
        nibabel.save(image, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def mark_of(case: Case, is_fast: bool) -> str:
    """What stands in the header of the mask: how it was made, and a hash over name and size of the volume's files."""
    volume = json.dumps([names_and_sizes(case.volume), case.series_uid])
    return f"{MARK} {'fast' if is_fast else 'full'} of {hashlib.sha256(volume.encode()).hexdigest()[:16]}"


def is_made(case: Case, is_fast: bool) -> bool:
    """Whether the mask is there already.

    Raises:
        ValueError: If it was made of another volume, or in the other mode.
    """
    import nibabel

    if not case.mask.is_file():
        return False
    try:
        there = nibabel.load(case.mask).header["descrip"].item().decode(errors="replace")
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, EOFError, OSError):
        return True  # no mask of ours; the build says what is wrong with it
    mark = mark_of(case, is_fast)
    if there.startswith(MARK) and there != mark:
        what = "in the other mode (--segment_fast)" if there.split()[-1] == mark.split()[-1] else "of another volume"
        raise ValueError(
            f"--segment_out: {case.mask} was made {what}. Name another folder, or delete that mask to make it anew."
        )
    return True
