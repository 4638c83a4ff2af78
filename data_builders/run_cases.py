"""From cases to rows: in this process, in workers beside it, or on a dask cluster. The same rows in the same order.

A case that cannot be used comes back with its reason. What is no fault of the case (the source does not answer, a disk
is full) comes back as a reason to stop: a row that is missing for such a cause would be missing for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import platform
import re
import signal
import tempfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modeling_fvlm.defaults import DEFAULT_VOLUME_SIZE, DEFAULT_WINDOW
from modeling_fvlm.geometry import organ_voxels
from modeling_fvlm.one_pass import can_be_streamed, prepare_files
from modeling_fvlm.organs import STRUCTURE_NAMES, organ_label_table
from modeling_fvlm.preparation import PreparedScan, prepare_scan, resampled_mask
from modeling_fvlm.processed_split import encode_array
from modeling_fvlm.published_preparation import as_stored, prepare_published_scan
from modeling_fvlm.reading import (
    notes_alone,
    read_affine,
    read_mask,
    read_nifti,
    read_nifti_mask,
    read_structures,
    read_volume,
)

from .cases import Case, OrganText
from .decompose import caption_rows, decompose_report
from .privacy import scrub
from .progress import AGAIN, BuildStopped, is_disk_full
from .report_labels import label_values
from .shards import VANISHED, BuiltRow
from .sources import SourceGoneError, local_copy

if TYPE_CHECKING:
    from .build import Settings

# Published scans are padded for the published model: no other has seen such scans.
PADDED_TO, PADDING_WINDOWS = DEFAULT_VOLUME_SIZE, (DEFAULT_WINDOW,)
STRUCTURES = "structures"  # numbering of a mask that is a folder with one file per structure
SECONDS_TO_CONNECT = 30  # to a dask scheduler

# Median HU that a healthy or a diseased organ can have. Outside of it the HU were probably rescaled wrongly, or the
# mask was read with the wrong numbering or belongs to another scan: silent otherwise, and fatal for training.
PLAUSIBLE_MEDIAN_HU = {"lung": (-980, -200), "liver": (-60, 250), "autochthon": (-120, 150)}
FEWEST_VOXELS_FOR_A_MEDIAN = 1000  # in thick slices a small organ is mostly edge, mixed with what lies beside it

# Files that are gone one after the other: no clean-up of single cases, but a source that is being taken away.
MOST_VANISHED_IN_A_ROW = 16


def label_tables(settings: Settings) -> dict[str, np.ndarray]:
    """For each numbering in use the table from label values to organ labels."""
    return {name: label_table(settings, name) for name in settings.numberings}


def label_table(settings: Settings, numbering: str) -> np.ndarray:
    organ_set = settings.organ_set
    return organ_label_table(organ_set, organ_set.organs, settings.numberings[numbering])


def prepare_case(case: Case, settings: Settings) -> BuiltRow:
    """Read and prepare one case, and make its rows. What no reason covers is our bug, and is raised."""
    places: list[Path] = []  # where the files lie on this machine
    say = partial(told, case=case, places=places, is_hashed=settings.ids == "hashed")
    try:
        with notes_alone(), contextlib.ExitStack() as copies:
            for file in (case.volume, case.mask):
                places.append(copies.enter_context(local_copy(file)))
            scan, notes = read_scan(case, settings, *places)
    except SourceGoneError:
        kind = "mask" if places else "volume"
        return vanished(case, kind)
    except (ValueError, FileNotFoundError) as error:
        for kind, file in (("volume", case.volume), ("mask", case.mask)):
            if isinstance(file, Path) and not file.exists():  # taken away between two looks at it
                return vanished(case, kind)
        return BuiltRow(case.recon_id, skip_reason=say(str(error)))
    except ImportError as error:  # pydicom and the like: not one case of its kind could be read
        return BuiltRow(case.recon_id, stop_reason=str(error))
    except OSError as error:
        if is_disk_full(error):
            return BuiltRow(case.recon_id, stop_reason=temporary_disk_is_full())
        return BuiltRow(case.recon_id, stop_reason=f"{case.recon_id}: {say(str(error))}")
    return make_row(case, settings, scan, tuple(say(note) for note in notes))


def temporary_disk_is_full() -> str:
    return f"{tempfile.gettempdir()} is full; let TMPDIR name a folder on another disk."


def vanished(case: Case, kind: str) -> BuiltRow:
    """What is told of a case whose volume or mask is gone, as seen from this machine."""
    reason = f"the {kind} file {VANISHED}"
    return BuiltRow(case.recon_id, skip_reason=reason, is_vanished=True, machine=platform.node())


def read_scan(case: Case, settings: Settings, volume_path: Path, mask_path: Path) -> tuple[PreparedScan, Sequence[str]]:
    """Volume and mask of one case, prepared as the settings say, and what the user should know of them."""
    geometry = (label_table(settings, case.numbering), settings.spacing, settings.margin_voxels)
    affine = None if case.affine is None else np.array(case.affine, dtype=np.float64)
    values = {"rescale": case.rescale, "rescale_mode": settings.rescale_mode}
    if settings.preprocessing == "published":
        if case.numbering == STRUCTURES or case.series_uid is not None:
            raise ValueError(
                "preprocessing 'published' takes a NIfTI volume and one multilabel mask: it goes by the order in which "
                "they store their voxels."
            )
        if settings.rescale_mode == "auto":  # the published preparation believes what a header declares, whatever it is
            values["rescale_mode"] = "apply"
        stored = read_affine(volume_path) if affine is None else affine
        volume = as_stored(partial(read_nifti, **values), volume_path, stored)
        own = affine if affine is not None and has_blank_header(mask_path) else read_affine(mask_path)
        mask = as_stored(read_nifti_mask, mask_path, own)
        return prepare_published_scan(volume, mask, *geometry, PADDED_TO, PADDING_WINDOWS), (*volume.notes, *mask.notes)
    is_plain = affine is None and case.rescale is None and case.series_uid is None and case.numbering != STRUCTURES
    if is_plain and can_be_streamed(volume_path, mask_path):  # the same result, in less time and memory
        return prepare_files(volume_path, mask_path, *geometry, settings.rescale_mode)
    own = affine if affine is not None and has_blank_header(mask_path) else None
    if case.numbering == STRUCTURES:
        mask = read_structures(mask_path, STRUCTURE_NAMES, own)
    else:
        mask = read_mask(mask_path, own)
    mask = resampled_mask(mask, settings.spacing)  # before the volume is read: a third less memory
    volume = read_volume(volume_path, affine, **values, series_uid=case.series_uid)
    return prepare_scan(volume, mask, *geometry), (*volume.notes, *mask.whole.notes)


def has_blank_header(path: Path) -> bool:
    """Whether a mask, or the first file of a folder of them, is NIfTI without an orientation.

    Its volume's affine then holds for it.
    """
    import nibabel

    if path.is_dir():
        path = next((file for file in sorted(path.iterdir()) if file.is_file()), path)
    try:
        image = nibabel.load(path)
    except (
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
        OSError,
        EOFError,
        zlib.error,
    ):
        return False  # another format, or a damaged file: who reads it says what is wrong with it
    is_nifti = isinstance(image, nibabel.Nifti1Pair)
    return is_nifti and not (image.header["sform_code"] or image.header["qform_code"])


def make_row(case: Case, settings: Settings, scan: PreparedScan, notes: Sequence[str]) -> BuiltRow:
    """The rows of a prepared scan, and what to count and to say of it."""
    organs = settings.organ_set.organs
    organ_texts, labels = said_of(case, settings)
    row = {
        "patient_id": case.patient_id,
        "scan_id": case.scan_id,
        "recon_id": case.recon_id,
        "volume": encode_array(scan.volume),
        "mask": encode_array(scan.mask),
        "shape": list(scan.volume.shape),
        "spacing": list(scan.spacing),
        "captions": caption_rows(
            case.findings,
            case.impression,
            organs,
            settings.lexicon,
            organ_texts,
            published=settings.preprocessing == "published",
        ),
        "findings": case.findings,
        "impression": case.impression,
        "labels": [{"finding": finding, "value": value} for finding, value in labels],
    }
    voxels = organ_voxels(scan.mask, len(organs))
    present = tuple(organ for organ, count in zip(organs, voxels) if count)
    strange = implausible_hu(scan.volume, scan.mask, organs, voxels)
    crops = []
    if "organ_crops" in settings.configs:
        from .organ_crops import organ_crop_rows

        crops = list(organ_crop_rows(row, organs, settings.margin_voxels))
    return BuiltRow(case.recon_id, row, present, warnings=(*notes, *([strange] if strange else [])), organ_crops=crops)


def said_of(case: Case, settings: Settings) -> tuple[Mapping[str, OrganText] | None, tuple[tuple[str, int], ...]]:
    """What is said of each organ, None: to be found in the report; and the labels that the source brings, with those
    of the other findings by the words of the report.
    """
    rules = settings.finding_rules
    if rules is None:
        return case.organ_texts, case.labels
    brought = {finding for finding, _ in case.labels}
    others = [finding for finding in rules.findings if finding not in brought]
    organs = settings.organ_set.organs if case.organ_texts is None else ()
    said = decompose_report(case.findings, case.impression, organs, settings.lexicon, rules=rules)
    organ_texts = said.organs if case.organ_texts is None else case.organ_texts
    if said.labels is None:  # no words, or not English ones: nothing is said by what they leave out
        return organ_texts, case.labels + label_values({}, others)
    return organ_texts, case.labels + label_values(said.labels, others, settings.unmentioned)


def implausible_hu(volume: np.ndarray, mask: np.ndarray, organs: Sequence[str], voxels: np.ndarray) -> str | None:
    """Name the organs whose median HU no such organ has, or None."""
    strange = []
    for organ, (lowest, highest) in PLAUSIBLE_MEDIAN_HU.items():
        index = organs.index(organ) if organ in organs else None
        if index is not None and voxels[index] >= FEWEST_VOXELS_FOR_A_MEDIAN:
            # Every second row and column: a quarter of the work, and the same verdict.
            median = int(np.median(volume[:, ::2, ::2][mask[:, ::2, ::2] == index + 1]))
            if not lowest <= median <= highest:
                strange.append(f"{organ} has a median of {median} HU, expected {lowest} to {highest}")
    if not strange:
        return None
    return f"{'; '.join(strange)}: look at rescale slope and intercept, and at numbering and patient of the mask"


def told(text: str, case: Case, places: Sequence[Path], is_hashed: bool) -> str:
    """A message as it may go into the manifest.

    No folder of this machine: it says nothing to its reader, and the bytes would hang on it. With hashed ids no name of
    the source either, for file names are often the ids of patients.
    """
    files = (case.volume, case.mask)
    volume, mask = (*places, *files[len(places) :])
    # A folder of structures may hold the volume as well: what begins with both means the longer.
    spoken_of = [place for place in (volume, mask) if isinstance(place, Path) and text.startswith(str(place))]
    if spoken_of and max(spoken_of, key=lambda place: len(str(place))) == mask != volume:
        text = f"mask {text}"  # it often has the name of its volume
    for place in (*places, *files):
        if isinstance(place, Path):
            text = text.replace(f"{place.parent}{os.sep}", "")
    if is_hashed:
        # By the copies where these are: what lies inside an archive is not known from its address.
        text = scrub(text, dataclasses.replace(case, volume=volume, mask=mask))
    return text


class SourceWatch:
    """Tells a file that was taken away, whose case is skipped, from a source that is gone, or that one of the machines
    does not see, which stops the build.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        by_split = [[case for case in cases if case.split == split] for split in {case.split for case in cases}]
        roots = {common_folder(members, kind) for members in by_split for kind in ("volume", "mask")}
        self.roots = sorted(root for root in roots if root is not None)
        self.cases = {case.recon_id: case for case in cases}
        self.vanished_in_a_row = 0

    def check(self, item: BuiltRow) -> BuiltRow:
        """Pass a row on.

        Raises:
            BuildStopped: If the source is gone or does not answer.
        """
        if item.stop_reason is not None:
            raise BuildStopped(f"{item.stop_reason} {AGAIN}")
        self.vanished_in_a_row = self.vanished_in_a_row + 1 if item.is_vanished else 0
        if item.is_vanished:
            case = self.cases[item.recon_id]
            gone = case.mask if item.skip_reason.startswith("the mask") else case.volume
            if isinstance(gone, Path) and gone.exists():
                here = platform.node()
                if item.machine == here and gone.is_absolute():
                    raise BuildStopped(f"the files of {item.recon_id} were gone and are there again. {AGAIN}")
                raise BuildStopped(
                    f"a worker on {item.machine} does not see the files of {item.recon_id}, which are there on {here}: "
                    "mount the source under the same path on every machine that prepares cases, and give an absolute "
                    f"path. {AGAIN}"
                )
            for root in self.roots:
                # A disk or a share that is not mounted any more leaves an empty folder.
                if not (root.is_dir() and any(root.iterdir())):
                    raise BuildStopped(f"the source {root} is gone. Bring it back. {AGAIN}")
            if self.vanished_in_a_row >= MOST_VANISHED_IN_A_ROW:
                raise BuildStopped(
                    f"{self.vanished_in_a_row} cases in a row had a file that is gone: the source is being taken away. "
                    f"Bring it back. {AGAIN}"
                )
        return item


def common_folder(cases: Sequence[Case], kind: str) -> Path | None:
    """The folder in which all local volumes, or masks, lie; None for a single one, of which none is common."""
    parents = [str(path.absolute().parent) for case in cases if isinstance(path := getattr(case, kind), Path)]
    if len(parents) < 2:
        return None
    try:
        return Path(os.path.commonpath(parents))
    except ValueError:  # on several drives
        return None


def num_cores() -> int:
    """Cores this process may use (a container or a batch system often lends fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_executor(executor: str) -> None:
    """Raise a ValueError where `--executor` names nothing that could run."""
    if executor != "processes" and not re.fullmatch(r"dask://[^\s/]+:\d+", executor):
        raise ValueError(f"--executor {executor!r} is neither 'processes' nor of the form dask://host:port.")
    if executor != "processes":
        dask_client_class()


def built_rows(
    cases: Sequence[Case], settings: Settings, workers: int, executor: str = "processes"
) -> Iterator[BuiltRow]:
    """Rows in the order of `cases`, prepared by `workers` processes or by the workers of a dask cluster."""
    if executor != "processes":
        yield from rows_from_dask(cases, settings, executor)
    elif workers == 1 or len(cases) < 2:
        yield from (prepare_case(case, settings) for case in cases)
    else:
        yield from rows_from_processes(cases, settings, workers)


# Set once per process: a case sent to a worker should not carry the organ set and the lexicon with it.
_settings: Settings | None = None


def start_worker(settings: Settings) -> None:
    """Give a worker process what all cases share, and let it end with the process that started it, not before."""
    global _settings
    _settings = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the builder alone says what to do
    # A builder that is killed outright cannot end its workers, and they would wait for work for ever.
    threading.Thread(target=_end_with_the_builder, daemon=True).start()


def _end_with_the_builder() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def build_row(case: Case) -> BuiltRow:
    """`prepare_case` in a worker process."""
    return prepare_case(case, _settings)


def rows_from_processes(cases: Sequence[Case], settings: Settings, workers: int) -> Iterator[BuiltRow]:
    """Rows from a pool of processes of this machine."""
    # Not "fork": the libraries of this process may hold threads and locks. A pool of multiprocessing would wait for
    # ever when the system kills a worker for its memory; the executor raises.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])  # one import for all workers
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(settings,)) as pool:
        yield from in_order(partial(pool.submit, build_row), cases, most_pending=4 * workers)


def rows_from_dask(cases: Sequence[Case], settings: Settings, executor: str) -> Iterator[BuiltRow]:
    """Rows from a dask cluster on which this package is installed.

    Its workers read the source themselves (the same paths, or a remote source), and send rows back; shards are written
    here alone.

    Raises:
        ValueError: If dask.distributed is not installed, or no scheduler answers.
    """
    client_class = dask_client_class()
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    address = executor.replace("dask://", "tcp://")
    try:
        client = client_class(address, timeout=SECONDS_TO_CONNECT)
    except OSError as error:
        raise ValueError(
            f"--executor {executor}: no dask scheduler answers there; start one with `dask scheduler`."
        ) from error
    with client:
        client.wait_for_workers(1)
        shared = client.scatter(settings, broadcast=True, hash=False)
        submit = partial(client.submit, prepare_case, settings=shared, pure=False)
        try:
            yield from in_order(submit, cases, most_pending=4 * sum(client.nthreads().values()))
        except (CancelledError, CommClosedError, KilledWorker) as error:
            raise BuildStopped(
                f"the dask cluster broke off ({type(error).__name__}: {error}). Look whether its workers have enough "
                f"memory. {AGAIN}"
            ) from error


def dask_client_class() -> type:
    """`distributed.Client`, or a ValueError that says how to install it."""
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--executor dask://... needs dask.distributed: pip install 'fvlm[dask]'.") from None
    return Client


def in_order(submit: Callable, cases: Sequence[Case], most_pending: int) -> Iterator[BuiltRow]:
    """Results in the order of the cases. `most_pending` bounds the finished rows that wait behind a slow one."""
    pending: deque = deque()
    try:
        for case in cases:
            pending.append(submit(case))
            if len(pending) > most_pending:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
