"""Which findings belong to which organ, for targets by labels: read from a prompt set, whose sentences are not needed.

(1) read `items` of a YAML file, each with `finding` and `organ`, (2) keep those of the model's organs, (3) see that the
split has labels for them, (4) turn a row's labels into numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from modeling_fvlm.organs import nearest_name

from .arguments import SettingsError

PROMPTS_DIR = Path(__file__).resolve().parent.parent / "hub_configs" / "prompts"


@dataclass(frozen=True)
class LabelTask:
    """Findings and the organs they belong to.

    Attributes:
        findings: Names, as the split's `labels` spell them.
        finding_of_organ: `(organs, findings)` bool.
    """

    findings: tuple[str, ...]
    finding_of_organ: Tensor

    def encode_rows(self, rows: Iterable[dict[str, Any]]) -> Tensor:
        """(4) The labels of rows, `(rows, findings)` int64."""
        return torch.tensor([self.encode(row["labels"]) for row in rows])

    def encode(self, labels: Iterable[dict[str, Any]] | None) -> list[int]:
        """A row's labels in the order of `findings`: 1 present, 0 absent, -1 unknown or not labelled."""
        value_of = {entry["finding"]: entry["value"] for entry in labels or ()}
        return [int(value_of.get(finding, -1)) for finding in self.findings]


def read_label_task(name_or_path: str, organs: Sequence[str]) -> LabelTask:
    """(1) and (2).

    Args:
        name_or_path: A name of hub_configs/prompts, or a YAML file.
        organs: The model's organs.

    Raises:
        SettingsError: If there is no such set, or none of its findings belongs to an organ of the model.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PROMPTS_DIR / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(entry.stem for entry in PROMPTS_DIR.glob("*.yaml"))
        raise SettingsError(
            f"--label_task {name_or_path} is neither a YAML file nor one of {', '.join(known)}"
            f"{nearest_name(str(name_or_path), known)}."
        )
    try:
        items = yaml.safe_load(path.read_text(encoding="utf-8"))["items"]
        organ_of = {item["finding"]: item["organ"] for item in items}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise SettingsError(
            f"--label_task {path}: it must hold `items`, each with `finding` and `organ`, as the sets in "
            f"hub_configs/prompts do ({type(error).__name__}: {error})."
        ) from error
    findings = tuple(finding for finding, organ in organ_of.items() if organ in organs)
    if not findings:
        raise SettingsError(
            f"--label_task {path}: none of its organs {sorted(set(organ_of.values()))} is the model's {list(organs)}."
        )
    of_organ = torch.tensor([[organ_of[finding] == organ for finding in findings] for organ in organs])
    return LabelTask(findings, of_organ)


def check_labels(task: LabelTask, labels: Iterable[Sequence[dict[str, Any]] | None], where: str) -> None:
    """(3) Refuse a split in which no finding of the task is known of any row.

    Args:
        task: Of `read_label_task`.
        labels: Of every row.
        where: The split, for the message.
    """
    labelled: set[str] = set()
    for of_row in labels:
        known = {entry["finding"] for entry in of_row or () if entry["value"] >= 0}
        if not known.isdisjoint(task.findings):
            return
        labelled |= known
    some = sorted(labelled)[:5]
    raise SettingsError(
        f"--targets labels: {where} has no label for any finding of --label_task ({list(task.findings)[:5]} ...); "
        + (f"it has {some} ...: spell them alike." if some else "it has no labels at all: leave `labels` out.")
    )
