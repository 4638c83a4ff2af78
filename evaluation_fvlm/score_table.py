"""Anybody's CSV of scores and CSV of labels, matched into the table that protocols.py evaluates.

Scores, one of:
    published   file_name, then a column `organ_finding_negative_positive` for every finding, as the published evaluator
                and `published_scores.csv` of ours have it
    plain       a name column, then a column for every finding, spelt as the finding (case and _ for a space do not
                matter)
    long        a row per case and finding with columns finding and score, as our scores.csv

Labels, one of:
    CT-RATE     VolumeName, then a column of 0 and 1 for every finding; of a task's findings case and _ do not matter
    RAD-ChestCT NoteAcc_DEID, then columns `abnormality*location`, or one for every abnormality; made into CT-RATE's
                findings by hub_configs/labels/rad_chest_ct.yaml
    long        a row per case and finding with columns finding and label, as our scores.csv, which needs no other file

(1) Files are read as text: no cell is guessed at. A row that comes twice, cell for cell, is dropped and counted; two
    rows of one case that differ are an error.
(2) Score columns are matched to findings. One that matches two findings, and two that match one, are an error; one that
    matches none is left out and named.
(3) Cases are matched by file name, without folder and ending. Cases of one file alone are counted and named.
(4) An empty cell or NaN is no score, and no label; -1 is no label. Both are counted later, per finding. Any other cell
    must be a probability (or, if said, a logit), and 0 or 1.
(5) Patient and scan come from columns `patient_id` and `scan_id`, or from a CT-RATE file name (`train_1_a_1`: patient
    train_1, scan train_1_a); else a case is a patient of its own, and that is said.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import yaml
from scipy.special import expit

from evaluation_fvlm.equal_reports import report_key
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.published_metrics import published_column, shortened
from evaluation_fvlm.tasks import Task
from modeling_fvlm.organs import nearest_name

RAD_CHEST_CT = Path(__file__).resolve().parent.parent / "hub_configs" / "labels" / "rad_chest_ct.yaml"
NAME_COLUMNS = (
    "file_name", "VolumeName", "recon_id", "NoteAcc_DEID", "AccessionNo", "study id", "volume", "name", "id", "case"
)  # fmt: skip
PATIENT_COLUMNS = ("patient_id", "MRN_DEID")
SCAN_COLUMN = "scan_id"
NOT_FINDINGS = {*NAME_COLUMNS, *PATIENT_COLUMNS, SCAN_COLUMN}
REPORT_COLUMNS = (("Findings_EN", "Impressions_EN"), ("findings", "impression"))
ENDINGS = (".nii.gz", ".nii", ".npz", ".npy", ".mha", ".nrrd")
CT_RATE_NAME = re.compile(r"((?:train|valid)_\d+)_([a-zA-Z]+)_\d+")
EMPTY = {"", "nan", "na", "n/a", "null", "none"}
NO_ORGAN = "not stated"
NO_LABELS = "no row in the label file"
NO_SCORES = "labelled, but no row in the score file"


@dataclass
class ScoreTable:
    """The table, and what became of the rest.

    `frame` has the columns of `zero_shot.SCORE_COLUMNS`, and `report` where reports were given. `dropped_cases` names
    cases by reason. `notes` is ready for JSON: files, columns matched and ignored, rows dropped.
    """

    frame: pd.DataFrame
    dropped_cases: dict[str, list[str]] = field(default_factory=dict)
    notes: dict = field(default_factory=dict)


@dataclass
class _File:
    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]  # place of every row in the file, the header being 1
    name_column: str
    names: list[str]  # of the cases, without folder and ending
    num_identical: int

    def column(self, name: str) -> list[str]:
        index = self.header.index(name)
        return [row[index] for row in self.rows]

    def first(self, names: Sequence[str]) -> str | None:
        """The first of the columns that the file has."""
        return next((name for name in names if name in self.header), None)

    @property
    def is_long(self) -> bool:
        return "finding" in self.header and bool({"score", "label", "value"} & set(self.header))

    def where(self, row: int) -> str:
        return f"{self.path}, row {self.lines[row]} ({shortened(self.names[row])})"


def read_score_table(
    scores: Path,
    labels: Path | None = None,
    task: Task | None = None,
    *,
    logits: bool = False,
    name_column: str | None = None,
    patient_column: str | None = None,
    reports: Path | None = None,
) -> ScoreTable:
    """Read and match the files; see the module's docstring.

    Args:
        scores: CSV of scores.
        labels: CSV of labels; None where the score file is long and has them.
        task: The findings that are asked, with their organs; None: the findings that have scores and labels.
        logits: Scores are log odds, any number: they are put through the logistic function.
        name_column: Of the cases, where it is none of `NAME_COLUMNS`; of every file that has it.
        patient_column: Of the patients, where it is none of `PATIENT_COLUMNS`, in either file.
        reports: CSV of reports (CT-RATE's columns, or findings and impression), to tell which scans have equal ones.

    Raises:
        EvaluationError: Naming file, row and column.
    """
    score_file = _read(Path(scores), name_column)
    label_file = None if labels is None else _read(Path(labels), name_column)
    if label_file is None and not (score_file.is_long and "label" in score_file.header):
        raise EvaluationError(f"{scores} has no column `label`: give a file of labels.")
    label_cells = _label_cells(label_file or score_file, task)
    if task is not None:
        findings = list(task.findings)
        label_cells = _as_spelt(label_cells, findings, label_file or score_file)
        _check_some_label(label_cells, findings, label_file or score_file)
    else:
        findings = list(label_cells)
    score_cells, organs, column_notes = _score_cells(score_file, findings, task)
    asked = findings if task is not None else [finding for finding in findings if finding in score_cells]

    scored, labelled = dict.fromkeys(score_file.names), dict.fromkeys((label_file or score_file).names)
    names = [name for name in scored if name in labelled]
    dropped = {
        NO_LABELS: [name for name in scored if name not in labelled],
        NO_SCORES: [name for name in labelled if name not in scored],
    }
    if not names:
        raise EvaluationError(
            f"no case of {scores} is in {labels}: {score_file.names[0]!r} there, {label_file.names[0]!r} here. Folders "
            "and endings such as .nii.gz do not count; name the column of cases with --name_column if it is another."
        )
    who, num_own = _patients(names, score_file, label_file, patient_column)
    parts = []
    for finding in asked:
        known_scores, known_labels = score_cells.get(finding, {}), label_cells.get(finding, {})
        part = who.copy()
        part["task"] = task.name if task is not None else score_file.path.stem
        part["finding"] = finding
        part["organ"] = organs.get(finding, NO_ORGAN)
        part["score"] = [_score(known_scores.get(name), logits) for name in names]
        part["label"] = [_label(known_labels.get(name)) for name in names]
        part["is_complete"] = True
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    frame = frame[["task", "patient_id", "scan_id", "recon_id", "finding", "organ", "score", "label", "is_complete"]]
    notes = {
        "scores": Path(scores).name,  # a result is handed on: no path of this machine
        "labels": Path(labels or scores).name,
        "identical_rows_dropped": score_file.num_identical + (label_file.num_identical if label_file else 0),
        **column_notes,
        "findings_without_scores": [finding for finding in findings if finding not in score_cells],
        "findings_without_labels": [finding for finding in asked if finding not in label_cells],
        "cases_taken_as_patients": num_own,
    }
    if reports is not None:
        frame["report"], notes["cases_without_report"] = _reports(frame, _read(Path(reports), name_column))
    return ScoreTable(frame, {reason: names for reason, names in dropped.items() if names}, notes)


# (1) reading


def case_name(text: str) -> str:
    """The name of a case in a cell: without folder and ending."""
    name = PurePosixPath(text.strip().replace("\\", "/")).name
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _read(path: Path, name_column: str | None) -> _File:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            rows, lines = [], []
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{path} cannot be read as CSV: {error}") from error
    shown = [shortened(column) for column in header[:6]]
    if len(set(header)) < len(header):
        repeated = next(column for column in header if header.count(column) > 1)
        raise EvaluationError(f"{path}: the column {shortened(repeated)!r} comes twice; keep one.")
    known = [name_column] if name_column else NAME_COLUMNS
    chosen = next((column for column in known if column in header), None)
    if chosen is None:
        by_case = {column.casefold(): column for column in header}
        chosen = next((by_case[column.casefold()] for column in known if column.casefold() in by_case), None)
    if chosen is None:
        hint = " Its cells seem to be parted by semicolons or tabs; commas are expected." if len(header) == 1 else ""
        raise EvaluationError(
            f"{path}: no column names the cases; expected one of {list(known)}, got {shown}. Name it with "
            f"--name_column.{hint}"
        )
    if not rows:
        raise EvaluationError(f"{path} has no rows below its header.")
    for row, line in zip(rows, lines):
        if len(row) != len(header):
            raise EvaluationError(f"{path}, row {line}: {len(row)} cells, where the header has {len(header)}.")
    index = header.index(chosen)
    names = [case_name(row[index]) for row in rows]
    for name, line in zip(names, lines):
        if not name:
            raise EvaluationError(f"{path}, row {line}: the cell of column {chosen!r} is empty.")
    file = _File(path, header, rows, lines, chosen, names, 0)
    _drop_identical(file)
    return file


def _drop_identical(file: _File) -> None:
    """Keep the first of rows that are equal cell for cell, the case's name aside; refuse those that differ."""
    name_index = file.header.index(file.name_column)
    finding_index = file.header.index("finding") if file.is_long else None
    task_index = file.header.index("task") if file.is_long and "task" in file.header else None
    seen: dict[tuple, int] = {}
    kept = []
    for n, (row, name) in enumerate(zip(file.rows, file.names)):
        key = (name, *(row[index] for index in (task_index, finding_index) if index is not None))
        first = seen.setdefault(key, n)
        if first == n:
            kept.append(n)
            continue
        other = file.rows[first]
        # A column without a heading is the row's number, as pandas writes it.
        compared = [k for k, heading in enumerate(file.header) if heading and k != name_index]
        differs = next((k for k in compared if row[k] != other[k]), None)
        if differs is not None:
            raise EvaluationError(
                f"{file.where(n)}: this case has a row already, row {file.lines[first]}, and they differ: "
                f"{shortened(file.header[differs])!r} is {shortened(row[differs])!r} here, "
                f"{shortened(other[differs])!r} there. Keep one row per case."
            )
    file.num_identical = len(file.rows) - len(kept)
    file.rows, file.lines, file.names = ([values[n] for n in kept] for values in (file.rows, file.lines, file.names))


# (2) scores and labels by finding and case: finding -> case -> (text, place for a message)

Cells = dict[str, dict[str, tuple[str, str]]]


def _column_cells(file: _File, column: str) -> dict[str, tuple[str, str]]:
    return {
        name: (text, f"{file.where(n)}, {shortened(column)!r}")
        for n, (name, text) in enumerate(zip(file.names, file.column(column)))
    }


def _long_cells(file: _File, column: str, task: Task | None = None) -> Cells:
    """Cells of a long file; of one with several tasks those of the task asked for."""
    rows = range(len(file.rows))
    if "task" in file.header and len(set(file.column("task"))) > 1:
        tasks = file.column("task")
        if task is None or task.name not in tasks:
            raise EvaluationError(f"{file.path} holds the tasks {sorted(set(tasks))}; name one of them with --task.")
        rows = [n for n in rows if tasks[n] == task.name]
    findings, values = file.column("finding"), file.column(column)
    cells: Cells = {}
    for n in rows:
        place = f"{file.where(n)}, {shortened(findings[n])!r}, {column}"
        cells.setdefault(findings[n], {})[file.names[n]] = (values[n], place)
    return cells


def _label_cells(file: _File, task: Task | None) -> Cells:
    if file.is_long:
        column = file.first(("label", "value"))
        if column is None:
            raise EvaluationError(f"{file.path} has a column `finding`, and neither `label` nor `value`.")
        return _long_cells(file, column, task)
    columns = [column for column in file.header if column not in NOT_FINDINGS and column != file.name_column]
    of_abnormality: dict[str, list[str]] = {}
    for column in columns:
        of_abnormality.setdefault(column.split("*")[0].strip(), []).append(column)
    content = yaml.safe_load(RAD_CHEST_CT.read_text(encoding="utf-8"))
    is_rad = any("*" in column for column in columns) or set(content["abnormalities"]) <= set(columns)
    if not is_rad:
        return {column: _column_cells(file, column) for column in columns}
    cells: Cells = {}
    for finding, abnormalities in content["findings"].items():
        if all(abnormality in of_abnormality for abnormality in abnormalities):
            parts = [column for abnormality in abnormalities for column in of_abnormality[abnormality]]
            cells[finding] = _any_of([_column_cells(file, column) for column in parts])
    if not cells:
        raise EvaluationError(
            f"{file.path}: columns `abnormality*location`, but none of RAD-ChestCT's abnormalities; expected such as "
            f"'emphysema*left_lung', got {[shortened(column) for column in columns[:4]]}."
        )
    return cells


def _any_of(parts: list[dict[str, tuple[str, str]]]) -> dict[str, tuple[str, str]]:
    """Present where any of several columns is, absent where all are known and none is."""
    cells = {}
    for name in parts[0]:
        values = [_label(part[name]) for part in parts]
        text = "1" if 1.0 in values else "" if any(np.isnan(values)) else "0"
        cells[name] = (text, parts[0][name][1])
    return cells


def _as_spelt(cells: Cells, findings: Sequence[str], file: _File) -> Cells:
    """The same under the findings' own spelling: case and _ for a space do not matter."""
    spelling = {_plain(finding): finding for finding in findings}
    result: Cells = {}
    name_of: dict[str, str] = {}
    for name, of_cases in cells.items():
        finding = name if name in findings else spelling.get(_plain(name), name)
        if finding in result:
            raise EvaluationError(
                f"{file.path}: {shortened(name_of[finding])!r} and {shortened(name)!r} both match the finding "
                f"{finding!r}; keep one."
            )
        result[finding], name_of[finding] = of_cases, name
    return result


def _check_some_label(cells: Cells, findings: Sequence[str], file: _File) -> None:
    if not set(cells) & set(findings):
        raise EvaluationError(
            f"{file.path}: none of the task's findings has labels; they are {list(findings)[:4]} ..., the file has "
            f"{[shortened(finding) for finding in list(cells)[:4]]}{nearest_name(findings[0], list(cells))}."
        )


def _score_cells(file: _File, findings: Sequence[str], task: Task | None) -> tuple[Cells, dict[str, str], dict]:
    """Scores by finding, organs of the findings, and notes on the columns."""
    items = () if task is None else task.items
    organs = {item.finding: item.organ for item in items}
    if file.is_long:
        if "score" not in file.header:
            raise EvaluationError(f"{file.path} has a column `finding`, and no column `score`.")
        cells = _as_spelt(_long_cells(file, "score", task), findings, file)
        if task is None and "organ" in file.header:
            organs = dict(zip(file.column("finding"), file.column("organ")))
        ignored = [finding for finding in cells if finding not in findings]
        columns = {finding: "score" for finding in cells if finding in findings}
        cells = {finding: cells[finding] for finding in columns}
    else:
        cells, columns, ignored = {}, {}, []
        headings = {published_column(item): [item.finding] for item in items}
        for column in file.header:
            if column in NOT_FINDINGS or column == file.name_column:
                continue
            matches = headings.get(column) or matching_findings(column, findings, organs)
            if len(matches) > 1:
                raise EvaluationError(
                    f"{file.path}: the column {shortened(column)!r} matches the findings {matches}; name the column as "
                    "one of them is spelt."
                )
            if not matches:
                ignored.append(column)
                continue
            (finding,) = matches
            if finding in columns:
                raise EvaluationError(
                    f"{file.path}: the columns {shortened(columns[finding])!r} and {shortened(column)!r} both match "
                    f"the finding {finding!r}; keep one."
                )
            columns[finding] = column
            cells[finding] = _column_cells(file, column)
            place = column.find(f"_{finding}")
            if finding not in organs and place > 0:
                organs[finding] = column[:place]
    if not cells:
        shown = [shortened(column) for column in ignored[:4]]
        raise EvaluationError(
            f"{file.path}: no column matches a finding; the columns are {shown}, the findings {list(findings)[:4]}. "
            "Columns are spelt organ_finding_negative_positive, or as the finding."
        )
    return cells, organs, {"columns": columns, "columns_ignored": ignored}


def matching_findings(column: str, findings: Sequence[str], organs: dict[str, str]) -> list[str]:
    """The findings that a score column may stand for.

    Args:
        column: Its heading.
        findings: To choose from.
        organs: Organ of every finding, as far as known.
    """
    plain = [finding for finding in findings if _plain(finding) == _plain(column)]
    if plain:
        exact = [finding for finding in plain if finding == column]
        return exact or plain
    # organ_finding_negative_positive: with the organ known the place of the finding is.
    headed = [f for f in findings if f in organs and f"{column}_".startswith(f"{organs[f]}_{f}_")]
    if headed:
        return headed
    # A prompt may name another finding, so the finding is what stands first.
    places = {finding: f"{column}_".find(f"_{finding}_") for finding in findings}
    first = min((place for place in places.values() if place > 0), default=None)
    return [finding for finding, place in places.items() if place == first] if first else []


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())


# (4) cells


def _number(cell: tuple[str, str] | None) -> float:
    """NaN where there is no cell or an empty one."""
    if cell is None or cell[0].strip().casefold() in EMPTY:
        return np.nan
    try:
        if "_" in cell[0]:  # Python reads 1_0 as ten
            raise ValueError
        return float(cell[0])
    except ValueError:
        raise EvaluationError(f"{cell[1]}: {shortened(cell[0])!r} is no number.") from None


def _score(cell: tuple[str, str] | None, logits: bool) -> float:
    value = _number(cell)
    if np.isnan(value):
        return value
    if not np.isfinite(value):
        raise EvaluationError(f"{cell[1]}: score {shortened(cell[0])!r} is not finite.")
    if logits:
        return float(expit(value))
    if not 0 <= value <= 1:
        raise EvaluationError(
            f"{cell[1]}: score {shortened(cell[0])} is no probability. If these are logits, say so with --logits."
        )
    return value


def _label(cell: tuple[str, str] | None) -> float:
    value = _number(cell)
    if np.isnan(value) or value == -1:
        return np.nan
    if value not in (0, 1):
        raise EvaluationError(f"{cell[1]}: label {shortened(cell[0])!r} is neither 0 nor 1 (unknown: empty or -1).")
    return value


# (5) patients and reports


def _patients(
    names: Sequence[str], score_file: _File, label_file: _File | None, patient_column: str | None
) -> tuple[pd.DataFrame, int]:
    """patient_id, scan_id and recon_id of every case, and how many cases are taken as patients of their own."""
    files = [file for file in (score_file, label_file) if file is not None]
    columns = [patient_column] if patient_column else PATIENT_COLUMNS
    told = next((file for file in files if file.first(columns)), None)
    if patient_column and told is None:
        known = [column for file in files for column in file.header]
        raise EvaluationError(
            f"--patient_column {patient_column}: neither file has it{nearest_name(patient_column, known)}."
        )
    patients = {} if told is None else dict(zip(told.names, told.column(told.first(columns))))
    scans_told = next((file for file in files if SCAN_COLUMN in file.header), None)
    scans = {} if scans_told is None else dict(zip(scans_told.names, scans_told.column(SCAN_COLUMN)))
    rows, num_own = [], 0
    for name in names:
        match = CT_RATE_NAME.fullmatch(name)
        patient = patients.get(name, "").strip() or (match and match[1])
        scan = scans.get(name, "").strip() or (match and f"{match[1]}_{match[2]}")
        num_own += not patient
        rows.append((patient or name, scan or name, name))
    return pd.DataFrame(rows, columns=["patient_id", "scan_id", "recon_id"]), num_own


def _reports(frame: pd.DataFrame, file: _File) -> tuple[list, int]:
    """A digest of the report per row of the frame (None: no report), and how many cases have none."""
    columns = next((pair for pair in REPORT_COLUMNS if set(pair) <= set(file.header)), None)
    if columns is None:
        raise EvaluationError(f"{file.path}: expected the columns {' or '.join(map(str, REPORT_COLUMNS))}.")
    digests = {}
    for name, *texts in zip(file.names, *(file.column(column) for column in columns)):
        if text := report_key(*texts):
            digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    missing = sum(name not in digests for name in frame["recon_id"].unique())
    return [digests.get(name) for name in frame["recon_id"]], missing
