"""What lies in an archive of volumes or masks, and which of it belongs to a case. Told by names: no file is opened.

(1) the archive is walked once; its files, folders of structures and folders without any volume are kept by name
(2) a case takes what is named as its id: a file or zip, a folder of DICOM slices, a folder of structures
(3) else what lies in a folder named as the id: scans/p_1/ct.nii.gz
(4) else the same once more for names that go on after the id: p_1_seg.nii.gz
What fits twice is not guessed: the case is skipped, and the choices are named. Headers are read only of folders that
are one choice of several, or hold a volume and other files besides: to see whether those are DICOM slices.
"""

import os
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from modeling_fvlm.dicom import find_series
from modeling_fvlm.organs import STRUCTURE_NAMES
from modeling_fvlm.reading import BadVolumeError

from .cases import nearest, resolve_inside

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
ZIP_ENDING = ".zip"  # of DICOM slices
STRUCTURES = frozenset(STRUCTURE_NAMES)
# Where TotalSegmentator puts its files beside the CT: every file in there is a structure, its name known or not.
STRUCTURE_FOLDER = "segmentations"
# In a folder named as the case a multilabel mask is known by one of these names. Any other may be one structure under
# a name of the user's own, and would pass for a mask whose label 1 is the spleen.
MASK_NAMES = frozenset(
    {"mask", "masks", "seg", "segmentation", "segmentations", "label", "labels", "labelmap", "multilabel", "total"}
)
MOST_NAMES_TO_COMPARE = 2000


class Found(NamedTuple):
    """A file or folder, or the reason why there is none. `is_absent`: nothing there fits at all."""

    place: Path | None
    reason: str | None = None
    is_absent: bool = False


@dataclass(frozen=True)
class Archive:
    """What one walk over an archive has found.

    Attributes:
        root: The archive.
        files: Volumes, multilabel masks and zips, sorted.
        structures: Folder -> names of the structures in it, as its files are called.
        slice_folders: Folders that hold files but no volume, here and in every folder below: perhaps DICOM slices.
        mixed_folders: Folders that hold volumes and other files, here or in folders below.
        folders: Every folder but the root.
    """

    root: Path
    files: tuple[Path, ...]
    structures: dict[Path, tuple[str, ...]]
    slice_folders: frozenset[Path]
    mixed_folders: frozenset[Path]
    folders: frozenset[Path]

    @cached_property
    def by_name(self) -> dict[str, list[Path]]:
        """Files by their name without ending, folders by their name."""
        places: dict[str, list[Path]] = {}
        for path in self.files:
            places.setdefault(stem_of(path), []).append(path)
        for path in sorted(self.folders):
            places.setdefault(path.name, []).append(path)
        return places

    @cached_property
    def sorted_names(self) -> list[str]:
        return sorted(self.by_name)

    @cached_property
    def structure_folders(self) -> list[Path]:
        return sorted(self.structures)

    @cached_property
    def outermost_slice_folders(self) -> list[Path]:
        return sorted(path for path in self.slice_folders if path.parent not in self.slice_folders)

    def named(self, name: str) -> list[Path]:
        return self.by_name.get(name, [])

    def named_longer(self, name: str) -> list[Path]:
        """What is named as `name` and something after it that begins with no letter or digit: or p_1 took p_10's."""
        found = []
        place = bisect_left(self.sorted_names, name)
        while place < len(self.sorted_names) and self.sorted_names[place].startswith(name):
            other = self.sorted_names[place]
            if other != name and not other[len(name)].isalnum():
                found += self.by_name[other]
            place += 1
        return found

    def unused(self, used: Iterable[Path | None]) -> list[Path]:
        """Files, and outermost folders of slices, that belong to none of the `used` places."""
        taken = {path for path in used if path is not None}
        above = {parent for path in taken for parent in path.parents}
        return [
            path
            for path in (*self.files, *self.outermost_slice_folders)
            if path not in taken and path not in above and taken.isdisjoint(path.parents)
        ]


def list_archive(root: Path, without: Collection[Path] = ()) -> Archive:
    """Walk over an archive (step 1). Hidden files and folders, such as the `._` files of a Mac, are passed over.

    Args:
        root: The archive.
        without: Folders to pass over, because what lies there is made by us.
    """
    ours = {os.path.abspath(folder) for folder in without}
    files: list[Path] = []
    structures: dict[Path, tuple[str, ...]] = {}
    folders, with_files, with_images, with_others = set(), set(), set(), set()
    for place, names_of_folders, names in os.walk(root):
        folder = Path(place)
        names_of_folders[:] = [
            name for name in names_of_folders if not name.startswith(".") and os.path.abspath(folder / name) not in ours
        ]
        names = sorted(name for name in names if not name.startswith("."))
        images = [folder / name for name in names if name.lower().endswith((*IMAGE_ENDINGS, ZIP_ENDING))]
        in_tree = [folder, *folder.parents][: len(folder.parts) - len(root.parts)]  # this folder .. below the root
        folders.update(in_tree)
        if names:
            with_files.update(in_tree)
        if images:
            with_images.update(in_tree)
        if len(names) > len(images):
            with_others.update(in_tree)
        if folder != root and any(stem_of(path) in STRUCTURES for path in images):
            is_all = folder.name == STRUCTURE_FOLDER
            structures[folder] = tuple(stem_of(path) for path in images)
            images = [path for path in images if not is_all and stem_of(path) not in STRUCTURES]
        files += images
    return Archive(
        root,
        tuple(sorted(files)),
        structures,
        slice_folders=frozenset(with_files - with_images),
        mixed_folders=frozenset(with_images & with_others),
        folders=frozenset(folders),
    )


def stem_of(path: Path) -> str:
    """File name without the ending of a volume, mask or zip."""
    return without_ending(path.name)


def without_ending(name: str) -> str:
    """A name without the ending of a volume, mask or zip: tables and reports often have the file's name as the id."""
    for ending in (*IMAGE_ENDINGS, ZIP_ENDING):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def is_zip(path: Path) -> bool:
    return path.name.lower().endswith(ZIP_ENDING)


def find_volume(named: str | None, name: str, archive: Archive, is_hashed: bool = False) -> Found:
    """The file, zip or folder that a row names, or else the one that is named after the case.

    Raises:
        ValueError: If the row names a place outside the archive.
    """
    if named:
        path = resolve_inside(archive.root, named)
        return Found(path) if path.exists() else named_is_missing(named, "volume", archive)
    for places in (archive.named(name), archive.named_longer(name)):
        folders = [path for path in places if path in archive.folders]
        found = [path for path in places if path not in archive.folders]  # (2)
        found += outermost(path for path in folders if path in archive.slice_folders)
        if not found:  # (3)
            found = [path for path in below(folders, archive.files) if stem_of(path).lower() not in MASK_NAMES]
            found += dicom_beside_volumes(folders, archive)
        if len(found) > 1:  # a folder of notes is no choice
            found = [path for path in found if path not in archive.slice_folders or holds_dicom(path)] or found
        if found:
            return one_of(found, "volume")
    return is_missing(name, "volume", "file, zip or folder", is_hashed)


def find_mask(
    named: str | None,
    name: str,
    archive: Archive,
    volume: Path | None,
    is_hashed: bool = False,
    has_table: bool = True,
) -> Found:
    """The multilabel file or folder of structures that a row names, or else the one that is named after the case.

    Args:
        named: What the row names, if it does.
        name: The id of the case.
        archive: The masks.
        volume: The volume of the case, which is no mask.
        is_hashed: Whether the id stays out of what is told.
        has_table: Whether there is a table in whose column `mask` one of several may be named.

    Raises:
        ValueError: If the row names a place outside the archive.
    """
    if named:
        path = resolve_inside(archive.root, named)
        if path.is_dir() and path not in archive.structures and path / STRUCTURE_FOLDER in archive.structures:
            path = path / STRUCTURE_FOLDER
        if path.is_dir() and path not in archive.structures:
            return Found(None, unknown_structures(path, below([path], archive.files)))
        return Found(path) if path.is_file() or path.is_dir() else named_is_missing(named, "mask", archive)
    for places in (archive.named(name), archive.named_longer(name)):
        folders = [path for path in places if path in archive.folders]
        found = [path for path in places if path not in archive.folders and path != volume and not is_zip(path)]  # (2)
        found += below(folders, archive.structure_folders)
        inside = [path for path in below(folders, archive.files) if path != volume and not is_zip(path)]
        if not found:  # (3)
            found = [path for path in inside if stem_of(path).lower() in MASK_NAMES or stem_of(path).startswith(name)]
        if found:
            return one_of(found, "mask", has_table)
        # Where the volume lies in the same folder, the files beside it may be anything.
        if inside and not (volume and any(folder in volume.parents for folder in folders)):
            return Found(None, unknown_structures(folders[0], inside, has_table))
    return is_missing(name, "mask", "file or folder", is_hashed)


def below(folders: Iterable[Path], places: Sequence[Path]) -> list[Path]:
    """Those of the sorted `places` that are one of the folders, or lie in one."""
    found: dict[Path, None] = {}
    for folder in folders:
        place = bisect_left(places, folder)
        while place < len(places) and (places[place] == folder or folder in places[place].parents):
            found[places[place]] = None
            place += 1
    return list(found)


def outermost(folders: Iterable[Path]) -> list[Path]:
    """The folders that lie in none of the others."""
    members = set(folders)
    return sorted(path for path in members if members.isdisjoint(path.parents))


def dicom_beside_volumes(folders: Sequence[Path], archive: Archive) -> list[Path]:
    """Of folders that hold volumes and other files, those whose other files are DICOM: which is meant, is not known."""
    mixed = outermost(path for path in folders if path in archive.mixed_folders)
    places = (place for folder in mixed for place in below([folder], archive.outermost_slice_folders) or [folder])
    return [place for place in places if holds_dicom(place)]


def holds_dicom(folder: Path) -> bool:
    try:
        return bool(find_series(folder))
    except BadVolumeError:  # of a kind that is not read, but DICOM
        return True


def one_of(found: Sequence[Path], what: str, has_table: bool = True) -> Found:
    if len(found) == 1:
        return Found(found[0])
    names = [path.name for path in found[:4]]
    mend = f"name one in a column {what!r}" if has_table else "leave one, named as the scan"
    return Found(None, f"several files fit as {what}: {names}; {mend}")


def named_is_missing(named: str, what: str, archive: Archive) -> Found:
    return Found(None, f"{what} file {named} is missing{hint(named, [path.name for path in archive.files])}")


def is_missing(name: str, what: str, places: str, is_hashed: bool) -> Found:
    known = "as its id" if is_hashed else repr(name)  # what was looked for is the user's id, not its hash
    return Found(None, f"{what} file is missing: no {places} is named {known} or begins with it", is_absent=True)


def hint(name: str, known: Collection[str]) -> str:
    """`nearest`, where that takes no time: over a whole release it would be seconds for every name that is missing."""
    return nearest(name, known) if len(known) <= MOST_NAMES_TO_COMPARE else ""


def unknown_structures(folder: Path, files: Sequence[Path], has_table: bool = True) -> str:
    """Why a folder cannot be read as a mask: not one of its files has the name of a structure."""
    names = [stem_of(path) for path in files]
    near = next((text for text in (nearest(name, STRUCTURE_NAMES) for name in names) if text), "")
    other = ", or name a multilabel file in a column 'mask'" if has_table else ""
    return (
        f"mask folder {folder.name} holds no structure under its name of TotalSegmentator, but {names[:4]}{near}; "
        f"rename the files{other}"
    )
