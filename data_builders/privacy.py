"""Keep patients' identities in the source: ids become keyed hashes, and reports are searched for what names a person.

(1) `pseudonymise` turns patient, scan and reconstruction ids into HMAC-SHA256 of them under a salt: the same id gives
    the same pseudonym in every build with this salt, and without the salt nobody can try out ids until one fits
(2) `scrub` takes ids, file names, paths and quoted cells out of skip reasons and warnings
(3) `scan_reports` tells where a report seems to hold a date, a name, a number of a person or a way to reach one. It
    tells place and kind, never the text, and changes nothing: what to do about a report is for its owner to say

The salt is a secret like a password. It lies beside the processed split, never in it: the manifest holds a check value
of it, by which a build that is continued with another salt is refused.
"""

import contextlib
import csv
import dataclasses
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TextIO

from modeling_fvlm.organs import NUMBERINGS
from modeling_fvlm.processed_split import natural_key

from .cases import Case, counted
from .personal_text import kinds_in_id, kinds_in_text, without_dates
from .shards import PROGRESS_FOLDER

LEVELS = {"patient_id": "p", "scan_id": "s", "recon_id": "r"}  # field of a case -> first letter of its pseudonyms
PSEUDONYM = re.compile(r"[psr][0-9a-f]{16}")
KEY_COLUMNS = ("level", "source_id", "pseudonym")

# File and folder names that say nothing of a patient, and stand in messages as plain words too.
PLAIN_NAMES = {
    "ct",
    "data",
    "dataset",
    "dicom",
    "export",
    "file",
    "files",
    "folder",
    "image",
    "images",
    "mask",
    "masks",
}
PLAIN_NAMES |= {
    "nifti",
    "report",
    "reports",
    "scan",
    "scans",
    "seg",
    "segmentation",
    "segmentations",
    "series",
    "slice",
}
PLAIN_NAMES |= {"slices", "studies", "study", "volume", "volumes"}

# Where a message may name a file, a place or a cell of a table.
_ENDING = r"\.(?:nii(?:\.gz)?|nrrd|nhdr|mha|mhd|raw|dcm|ima|zip|npz|csv|json|txt|xlsx?|ya?ml)(?![A-Za-z0-9])"
_FILE = re.compile(rf"[^\s'\"(\[]+{_ENDING}", re.IGNORECASE)
_UNQUOTED = re.compile(r"\b(file|folder) (?!is\b).+?(?= (?:is missing|holds)\b)")
_QUOTED = re.compile(r"(?<!\w)(?:'([^']*)'|\"([^\"]*)\")(?!\w)")  # not what stands between two apostrophes
_PLACE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+|(?<![\w.])(?:[A-Za-z]:)?[\\/](?:[^\s'\"\\/:]+[\\/])+[^\s'\":,;]*")


def default_salt_file(out: Path) -> Path:
    """Where the salt lies unless the user says otherwise: beside the processed split, as OUT.salt."""
    folder = Path(os.path.abspath(out))
    return folder.with_name(f"{folder.name}.salt")


def read_salt(path: Path, out: Path) -> str:
    """The salt in a file; where there is none yet, the file is written, readable by its owner alone.

    Several machines may begin one build at the same time: the first to write wins, and all of them read its salt.

    Args:
        path: File of 64 hexadecimal digits.
        out: Folder of the processed split.

    Raises:
        ValueError: If the file lies inside `out`, is no salt file, or is gone while a build was begun in `out`.
    """
    check_outside(path, out, "--id_salt")
    # Looked up before the salt is: another process may write first the salt and then the folder.
    is_begun = (out / "manifest.json").is_file() or (out / PROGRESS_FOLDER).is_dir()
    if not path.exists():
        if is_begun:
            raise ValueError(
                f"there is no salt file {path}, but a build was begun in {out}: ids under a new salt would not fit "
                "those that are there. Bring the file back or name it with --id_salt, or delete that folder."
            )
        _write_salt(path)
    try:
        salt = path.read_text(encoding="ascii").strip()
    except (UnicodeDecodeError, IsADirectoryError):
        salt = ""
    if not re.fullmatch("[0-9a-f]{64}", salt):
        raise ValueError(
            f"--id_salt {path} is no salt file (64 hexadecimal digits). Name one that an earlier build wrote, or a "
            "file that is not there yet: it is written then."
        )
    return salt


def check_outside(path: Path, out: Path, option: str) -> None:
    """Raise a ValueError where a secret would lie in the folder that is going to be handed on."""
    if path.resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"{option} {path} lies inside the processed split {out}, and would be handed on with it; name a place "
            "outside."
        )


def salt_check(salt: str) -> str:
    """Eight digits that tell one salt from another and give nothing of it away; the manifest holds them."""
    return _digest(salt, "check of the salt")[:8]


def pseudonymise(cases: Sequence[Case], salt: str) -> list[Case]:
    """The same cases under pseudonyms, in the order given; their skip reasons are scrubbed.

    A pseudonym hangs on the id, its level and the salt alone, so a patient's scans stay together. `sort_cases` sorts by
    the pseudonyms afterwards: the order of the source does not show.

    Raises:
        ValueError: If two ids have one pseudonym.
    """
    ids = {level: {getattr(case, level) for case in cases} for level in LEVELS}
    ids["recon_id"] |= {case.duplicate_of for case in cases if case.duplicate_of is not None}
    hidden = {level: {name: _pseudonym(level, name, salt) for name in names} for level, names in ids.items()}
    for level, names in hidden.items():
        if len(set(names.values())) < len(names):
            raise ValueError(f"two values of {level} have the same pseudonym; use another salt (--id_salt).")
    known = hidden["patient_id"] | hidden["scan_id"] | hidden["recon_id"]
    renamed = []
    for case in cases:
        own = {level: hidden[level][getattr(case, level)] for level in LEVELS}
        duplicate_of = None if case.duplicate_of is None else hidden["recon_id"][case.duplicate_of]
        new = dataclasses.replace(case, **own, duplicate_of=duplicate_of)
        if case.skip_reason is not None:
            names = {getattr(case, level): pseudonym for level, pseudonym in own.items()}
            new = dataclasses.replace(new, skip_reason=scrub(case.skip_reason, new, names, known))
        renamed.append(new)
    return renamed


def write_key(path: Path, out: Path, cases: Sequence[Case], hashed: Sequence[Case]) -> None:
    """Write the owner's table of source ids and pseudonyms, readable by its owner alone.

    Args:
        path: CSV to write; an earlier one is replaced.
        out: Folder of the processed split.
        cases, hashed: What went into `pseudonymise` and what came out.

    Raises:
        ValueError: If the file lies inside `out`, or is there and something else.
    """
    check_outside(path, out, "--id_key")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if file.readline().strip() != ",".join(KEY_COLUMNS):
                raise ValueError(f"--id_key {path} is there and no table of pseudonyms; name another file.")
    rows = {
        (level, getattr(before, level), getattr(after, level))
        for before, after in zip(cases, hashed, strict=True)
        for level in LEVELS
    }
    with _secret_file(path) as (file, temporary):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(KEY_COLUMNS)
        writer.writerows(sorted(rows, key=lambda row: (list(LEVELS).index(row[0]), natural_key(row[1]), row[1])))
        file.close()
        os.replace(temporary, path)


def scrub(text: str, case: Case, own: Mapping[str, str] | None = None, known: Mapping[str, str] | None = None) -> str:
    """A skip reason or warning of a case without what names a patient.

    Names of the case's files, and of what lies in its folder or archive, become its pseudonym. Other file names, paths,
    dates, UIDs and quoted words become dots: a quoted word is a cell of a table, unless it names an organ or a class.

    Args:
        text: The message.
        case: The case, under its pseudonyms.
        own: Source ids of this case -> their pseudonyms.
        known: Source ids of all cases -> their pseudonyms, for those in quotes.
    """
    known = known or {}
    # First, or the part of another case's id that is an id of this one would be taken out of it.
    text = _QUOTED.sub(lambda match: _quoted(match, known) if (match[1] or match[2]) in known else match[0], text)
    names = {name: case.recon_id for place in (case.volume, case.mask) for name in _names_of(place)} | dict(own or {})
    names = {name: new for name, new in names.items() if name.lower() not in PLAIN_NAMES}
    # "12" may count slices, and "a" be an article: they are ids only where they stand as ids.
    short = {name for name in names if re.fullmatch(r"\d{1,5}|.{1,2}", name)}
    long = sorted(names.keys() - short, key=len, reverse=True)
    patterns = [rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])" for name in long]
    patterns += [rf"^{re.escape(name)}(?=:)|(?<=['\"]){re.escape(name)}(?=['\"])" for name in short]
    if patterns:
        text = re.sub("|".join(patterns), lambda match: names[match[0]], text)
    text = _UNQUOTED.sub(r"\1", text)
    text = _QUOTED.sub(lambda match: _quoted(match, known), text)
    text = _PLACE.sub("...", text)
    text = _FILE.sub(lambda match: _file_name(match[0]), text)
    return without_dates(text)


@dataclass(frozen=True)
class Concern:
    """Something in a case that seems to name a person.

    Attributes:
        scan_id, recon_id: The case, under the ids that the processed split has.
        field: "findings", "impression", "captions", "patient_id", "scan_id" or "recon_id".
        kind: "date", "name", "number" (of a record, an accession, an insurance) or "contact" (phone, e-mail).
        count: How many of them.
    """

    scan_id: str
    recon_id: str
    field: str
    kind: str
    count: int


def scan_reports(cases: Iterable[Case]) -> list[Concern]:
    """Where reports, ready captions and ids seem to name a person. Cases that are skipped are not looked at."""
    concerns = []
    for case in cases:
        if case.skip_reason is not None:
            continue
        captions = [
            sentence
            for text in (case.organ_texts or {}).values()
            for sentence in (*text.impression, *text.findings)
            if sentence not in case.findings and sentence not in case.impression  # these are looked at already
        ]
        texts = {"findings": case.findings, "impression": case.impression, "captions": "\n".join(captions)}
        found = {field: kinds_in_text(text) for field, text in texts.items()}
        # One id on all three levels is told once, as the patient's.
        for name, level in {getattr(case, level): level for level in reversed(LEVELS)}.items():
            if not PSEUDONYM.fullmatch(name):
                found[level] = tuple((kind, 1) for kind in kinds_in_id(name))
        concerns += [
            Concern(case.scan_id, case.recon_id, field, kind, count)
            for field, kinds in found.items()
            for kind, count in kinds
        ]
    return concerns


def concern_lines(concerns: Sequence[Concern], show: int = 8) -> list[str]:
    """What to tell the user: how many of which kind, and where the first ones are; nothing where there are none."""
    if not concerns:
        return []
    counts: Counter[tuple[str, str]] = Counter()
    for concern in concerns:
        counts[concern.kind, "ids" if concern.field in LEVELS else "texts"] += concern.count
    what = ", ".join(f"{kind} in {where}: {count}" for (kind, where), count in sorted(counts.items()))
    cases = len({concern.recon_id for concern in concerns})
    told = counted(cases, "case seems", "cases seem")
    lines = [f"{told} to name a person or a day ({what}). Look at what is there before the split is handed on:"]
    lines += [
        f"  {item.recon_id}, {item.field}: {item.kind}, {counted(item.count, 'time')}" for item in concerns[:show]
    ]
    return lines + [f"  ... and {len(concerns) - show} more"] * (len(concerns) > show)


def _pseudonym(level: str, name: str, salt: str) -> str:
    # The level goes in: patient "7" and scan "7" of another patient have nothing in common.
    return LEVELS[level] + _digest(salt, f"{level} {name}")[:16]


def _digest(salt: str, text: str) -> str:
    return hmac.new(salt.encode(), text.encode(), hashlib.sha256).hexdigest()


@contextmanager
def _secret_file(path: Path) -> Iterator[tuple[TextIO, str]]:
    """A file beside `path`, mode 0600 from its first moment, open for writing, and its name; gone on leaving."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "w", encoding="utf-8", newline="") as file:
            yield file, temporary
    finally:
        Path(temporary).unlink(missing_ok=True)


def _write_salt(path: Path) -> None:
    """Write a new salt, whole or not at all; where another process was first, its salt stays."""
    with _secret_file(path) as (file, temporary):
        file.write(secrets.token_hex(32) + "\n")
        file.close()
        try:
            os.link(temporary, path)  # unlike a rename, it fails where the name is taken
        except FileExistsError:
            pass
        except OSError as error:
            raise ValueError(
                f"the salt file {path} cannot be written ({error.strerror}); name a place on another file system with "
                "--id_salt."
            ) from None


def _names_of(place) -> Iterator[str]:
    """All by which a message may call a volume or mask, and what lies in a folder or archive of slices."""
    if place is None:
        return
    inside = []
    if isinstance(place, Path):
        yield str(place)
        if place.is_dir():
            inside = [path.relative_to(place).as_posix() for path in place.rglob("*")]
        elif place.is_file() and zipfile.is_zipfile(place):
            # A damaged one is named by who reads it.
            with (
                contextlib.suppress(OSError, ValueError, NotImplementedError, zipfile.BadZipFile),
                zipfile.ZipFile(place) as archive,
            ):
                inside = archive.namelist()
    for path in (PurePosixPath(place.name), *map(PurePosixPath, inside)):
        if not _is_vocabulary(_stem(path.name)):  # liver.nii.gz is a structure
            for part in (str(path), *path.parts):
                yield from {part, _stem(part)} - {"", "/", ".", ".."}


def _stem(name: str) -> str:
    return re.sub(f"{_ENDING}$", "", name, flags=re.IGNORECASE)


@cache
def _vocabulary() -> frozenset[str]:
    names = {name for classes in NUMBERINGS.values() for name in classes} | set(NUMBERINGS)
    return frozenset(names | {name.split("_")[0] for name in names})  # lung_upper_lobe_left also gives the organ lung


def _is_vocabulary(word: str) -> bool:
    return word in _vocabulary()


def _quoted(match: re.Match, known: Mapping[str, str]) -> str:
    word = match[1] if match[1] is not None else match[2]
    if _is_vocabulary(word) or word in PLAIN_NAMES or PSEUDONYM.fullmatch(word):
        return match[0]
    return f"'{known.get(word, known.get(_stem(word), '...'))}'"


def _file_name(name: str) -> str:
    if _is_vocabulary(_stem(PurePosixPath(name).name)):
        return name
    found = PSEUDONYM.search(name)
    return found[0] if found else "..."
