"""Zero-shot tasks: versioned sets of prompts, read from YAML and checked before anything is scored.

A task is data, not code (STYLE.md, section 9): every item names a finding as the split's label column spells it, the
organ whose embedding is asked, and the sentences that assert and deny the finding. Sets that ship with the project lie
in `hub_configs/prompts/`; a user's own file is named by its path, and may leave out `version`, `source` and `changes`.

    name: my_findings
    version: 1
    source: "where findings and wording come from"
    changes: {1: "first version"}
    items:
      - {finding: "Pleural effusion", organ: "lung", positive: "Pleural effusion.", negative: "No pleural effusion."}

Several sentences make an ensemble: `positive: ["Pleural effusion.", "There is pleural effusion."]`. The i-th positive
is set against the i-th negative sentence, so both lists are equally long, or one of them holds a single sentence that
serves for all.

`paraphrases` say the same in other words: further pairs, measured one by one beside those of the score and never part
of it. They tell how far a figure hangs on wording (wording.py), also of a set whose score must keep the published
sentences: `paraphrases: [{positive: "Fluid in the pleural space.", negative: "No fluid in the pleural space."}]`.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from evaluation_fvlm.errors import EvaluationError
from modeling_fvlm.organs import nearest_name

PROMPTS_DIR = Path(__file__).resolve().parent.parent / "hub_configs" / "prompts"

_TASK_KEYS = {"name", "items"}
_OPTIONAL_TASK_KEYS = {"version", "source", "changes"}  # the sets that ship have them all
_ITEM_KEYS = {"finding", "organ", "positive", "negative"}
_OPTIONAL_ITEM_KEYS = {"paraphrases"}
_EXAMPLE = """It should look like

    name: my_findings
    items:
      - {finding: "Splenomegaly", organ: "spleen", positive: "Splenomegaly.", negative: "No splenomegaly."}"""


@dataclass(frozen=True)
class Item:
    """One finding of a task. `positive` and `negative` are equally long: sentence i of one against i of the other."""

    finding: str
    organ: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    paraphrases: tuple[tuple[str, str], ...] = ()  # (positive, negative), no part of the score

    @property
    def wordings(self) -> list[tuple[str, str]]:
        """Every (positive, negative) pair, those of the score first."""
        return [*zip(self.positive, self.negative), *self.paraphrases]


@dataclass(frozen=True)
class Task:
    """A prompt set. `digest` is over what moves a figure, so an edit without a new version shows in the results."""

    name: str
    version: int
    source: str
    items: tuple[Item, ...]

    @property
    def findings(self) -> list[str]:
        return [item.finding for item in self.items]

    @property
    def prompts(self) -> list[str]:
        """Every sentence once, in the order of first use."""
        return list(
            dict.fromkeys(
                text
                for item in self.items
                for text in (*item.negative, *item.positive, *(text for pair in item.paraphrases for text in pair))
            )
        )

    @property
    def digest(self) -> str:
        # Paraphrases only where there are any: sets without keep the digest that their results carry.
        content = "\n".join(
            repr(
                (item.finding, item.organ, item.positive, item.negative, *([item.paraphrases] * bool(item.paraphrases)))
            )
            for item in self.items
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def available_tasks() -> list[str]:
    """Names of the prompt sets that ship with the project."""
    return sorted(path.stem for path in PROMPTS_DIR.glob("*.yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """Read one prompt set.

    Args:
        name_or_path: A name from `available_tasks()`, or the path of a YAML file.

    Raises:
        EvaluationError: If there is no such set, or its content breaks a rule of this module's docstring; the message
            names the file and the item.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PROMPTS_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            raise EvaluationError(
                f"no prompt set named '{name_or_path}'; there are {available_tasks()}"
                f"{nearest_name(str(name_or_path), available_tasks())}. A set of your own is named "
                f"by its path, ending in .yaml."
            )
    if not path.is_file():
        raise EvaluationError(f"prompt set {path} does not exist.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise EvaluationError(f"prompt set {path} is not readable YAML: {error}") from error
    return _task_from_content(content, str(path))


def check_task_organs(task: Task, organs: Sequence[str]) -> None:
    """Refuse a task that asks for an organ the model has no embedding of."""
    for item in task.items:
        if item.organ not in organs:
            raise EvaluationError(
                f"task '{task.name}', finding '{item.finding}': organ '{item.organ}' is not in config.organs "
                f"{list(organs)}{nearest_name(item.organ, organs)}. Name one of the model's organs, or choose "
                f"a task made for them."
            )


def check_task_labels(task: Task, findings: Iterable[str]) -> list[str]:
    """Findings of the task that the split has no label for, in the task's order.

    Raises:
        EvaluationError: If the split labels none of them: nothing could be measured.
    """
    labelled = sorted(set(findings))
    missing = [finding for finding in task.findings if finding not in labelled]
    if len(missing) == len(task.items):
        some = labelled[:5] + ["..."] * (len(labelled) > 5)
        raise EvaluationError(
            f"task '{task.name}': none of its findings is among the split's {len(labelled)} labels {some}"
            f"{nearest_name(missing[0], labelled)}. Spell the findings as the `labels` column does, or "
            f"choose another task."
        )
    return missing


def _task_from_content(content: object, where: str) -> Task:
    _check_keys(content, _TASK_KEYS, where, _OPTIONAL_TASK_KEYS, _EXAMPLE)
    version = content.get("version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise EvaluationError(f"{where}: version {version!r} must be a whole number from 1 on.")
    changes = content.get("changes", {version: "first version"})
    if not isinstance(changes, dict) or version not in changes:
        raise EvaluationError(
            f"{where}: changes must say what version {version} changed, as `changes: {{{version}: ...}}`."
        )
    if not isinstance(content["items"], list) or not content["items"]:
        raise EvaluationError(f"{where}: items must be a list with at least one finding.")

    items = tuple(_item_from_content(item, f"{where}, item {n}") for n, item in enumerate(content["items"], start=1))
    findings = [item.finding for item in items]
    repeated = sorted({finding for finding in findings if findings.count(finding) > 1})
    if repeated:
        raise EvaluationError(f"{where}: findings {repeated} appear more than once; keep one item each.")
    name, source = _text(content["name"], "name", where), _text(content.get("source", "not stated"), "source", where)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise EvaluationError(
            f"{where}: name {name!r} becomes part of file names; spell it with letters, digits, _ and - only."
        )
    return Task(name=name, version=version, source=source, items=items)


def _item_from_content(content: object, where: str) -> Item:
    _check_keys(content, _ITEM_KEYS, where, _OPTIONAL_ITEM_KEYS)
    finding, organ = (_text(content[key], key, where) for key in ("finding", "organ"))
    where = f"{where} ('{finding}')"
    positive, negative = (_texts(content[key], key, where) for key in ("positive", "negative"))
    length = max(len(positive), len(negative))
    if not {len(positive), len(negative)} <= {1, length}:
        raise EvaluationError(
            f"{where}: {len(positive)} positive against {len(negative)} negative sentences; sentence i of one is set "
            f"against sentence i of the other, so give equally many, or a single one on one side."
        )
    positive, negative = (texts * length if len(texts) == 1 else texts for texts in (positive, negative))
    paraphrases = _paraphrases(content["paraphrases"], where) if "paraphrases" in content else ()
    item = Item(finding, organ, positive, negative, paraphrases)
    pairs = item.wordings
    if len(set(pairs)) < len(pairs):
        raise EvaluationError(f"{where}: a pair of sentences appears more than once; it would count double.")
    same = [text for text, other in pairs if text == other]
    if same:
        raise EvaluationError(
            f"{where}: {same[0]!r} stands as positive and as negative: its score is 0.5 for every scan."
        )
    return item


def _paraphrases(content: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(content, list) or not content:
        raise EvaluationError(
            f'{where}: paraphrases must be a list of pairs, as `- {{positive: "...", negative: "..."}}`; leave it out '
            "if there are none."
        )
    pairs = []
    for n, pair in enumerate(content, start=1):
        place = f"{where}, paraphrase {n}"
        _check_keys(pair, {"positive", "negative"}, place)
        pairs.append((_text(pair["positive"], "positive", place), _text(pair["negative"], "negative", place)))
    return tuple(pairs)


def _check_keys(
    content: object, expected: set[str], where: str, optional: Iterable[str] = (), example: str = ""
) -> None:
    if not isinstance(content, dict):
        raise EvaluationError(
            f"{where}: expected a mapping with the keys {sorted(expected)}, got {type(content).__name__}. {example}"
        )
    known = sorted({*expected, *optional})
    for key in content:
        if key not in known:
            hint = nearest_name(str(key), known)
            raise EvaluationError(f"{where}: unknown key '{key}'{hint}; the keys are {known}. {example}")
    missing = sorted(expected - set(content))
    if missing:
        raise EvaluationError(f"{where}: the keys {missing} are missing. {example}")


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        # A bare `no`, `12` or `null` is no text to YAML.
        raise EvaluationError(f"{where}: {key} {value!r} is not a text; put it in quotes.")
    return value


def _texts(value: object, key: str, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise EvaluationError(f"{where}: {key} is an empty list; give at least one sentence.")
    return tuple(_text(text, key, where) for text in values)
