"""What a pipeline is asked: findings, the organ of each and its prompts, from whatever form they are given in.

    [{"finding": "Emphysema", "organ": "lung", "positive": "Emphysema.", "negative": "Not Emphysema."}]   as they are
    "my_findings.yaml"                      the items of a task file, as the evaluation reads it
    {"lung": ["Emphysema", "Nodule"]}       names by organ: prompts from the template
    ["Emphysema", "Pleural effusion"]       names alone: prompts from the template, asked of every organ

Prompts may be lists: the i-th positive one is set against the i-th negative one, and a single one serves for all.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from .organs import nearest_name

# "Emphysema." against "Not Emphysema.": the wording of the published zero-shot evaluation (Shui et al., ICLR 2025,
# https://openreview.net/forum?id=nYpPAT4L3D).
TEMPLATE = ("{}.", "Not {}.")
SIDES = ("positive", "negative")
FORMS = (
    "findings must be a non-empty list of {finding, organ, positive, negative}, of names, or {organ: [names]}, or the "
    "path of a task's .yaml file."
)


def read_findings(
    findings: str | PathLike | Mapping[str, Sequence[str] | str] | Sequence[Mapping | str],
    organs: Sequence[str],
    template: Sequence[str] = TEMPLATE,
) -> list[dict]:
    """Bring findings to one form.

    Args:
        findings: As in this module's docstring.
        organs: The model's, in their order.
        template: (positive, negative) with `{}` where the name of a finding without prompts goes.

    Returns:
        For each {finding, organ, positive: [...], negative: [...]}, both lists equally long; `template` as well, the
        pair as one text, where it made the prompts.

    Raises:
        ValueError: If one has no name, an organ the model lacks, prompts on one side alone or of unequal number.
    """
    if _is_task_file(findings):
        items = _task_items(Path(findings))
    elif isinstance(findings, str):
        items = [findings]
    elif isinstance(findings, Mapping) and "finding" not in findings:
        items = [
            {"finding": name, "organ": organ} for organ, names in findings.items() for name in _names_of(organ, names)
        ]
    elif isinstance(findings, Sequence):
        items = list(findings)
    else:
        raise ValueError(FORMS)
    if not items:
        raise ValueError(FORMS)
    _check_template(template)
    checked = []
    for place, item in enumerate(items):
        if isinstance(item, str):
            checked += [_with_template({"finding": item, "organ": organ}, template, place) for organ in organs]
            continue
        if not isinstance(item, Mapping):
            raise ValueError(f"findings[{place}] is {item!r}. {FORMS}")
        needed = {"finding", "organ", *(SIDES if any(side in item for side in SIDES) else ())}
        if missing := needed - set(item):
            raise ValueError(f"findings[{place}] lacks {sorted(missing)}: {dict(item)}.")
        if not isinstance(item["finding"], str):
            raise ValueError(f"findings[{place}]: {item['finding']!r} is no name of a finding.")
        if item["organ"] not in organs:
            raise ValueError(
                f"findings[{place}] ({item['finding']}): organ {item['organ']!r} is not in config.organs "
                f"{list(organs)}{nearest_name(str(item['organ']), organs)}."
            )
        make = _with_prompts if "positive" in item else _with_template
        checked.append(make(item, template, place))
    return checked


def _names_of(organ: str, names) -> list:
    """The names under one organ, of which there may be one."""
    if isinstance(names, str):
        return [names]
    if not isinstance(names, Sequence):
        raise ValueError(f"findings[{organ!r}] is {names!r}: give a name or a list of names, or leave the organ out.")
    return list(names)


def _with_template(item: Mapping, template: Sequence[str], place: int) -> dict:
    """A finding without prompts; a full stop of its own is not doubled."""
    name = item["finding"].strip().rstrip(".")
    if not name:
        raise ValueError(f"findings[{place}] is an empty name.")
    prompts = {side: [text.replace("{}", name)] for side, text in zip(SIDES, template)}
    return {"finding": item["finding"], "organ": item["organ"], **prompts, "template": " / ".join(template)}


def _with_prompts(item: Mapping, template: Sequence[str], place: int) -> dict:
    """A finding with prompts of its own; the template is not used."""
    prompts = {side: list(item[side]) if isinstance(item[side], (list, tuple)) else [item[side]] for side in SIDES}
    if wrong := [text for texts in prompts.values() for text in texts if not isinstance(text, str) or not text.strip()]:
        raise ValueError(
            f"findings[{place}] ({item['finding']}): {wrong[0]!r} is no sentence. In YAML put prompts in quotes: "
            "a bare No is read as false."
        )
    counts = {side: len(texts) for side, texts in prompts.items()}
    length = max(counts.values())
    if not length or not set(counts.values()) <= {1, length}:
        raise ValueError(
            f"findings[{place}] ({item['finding']}) has {counts['positive']} positive and {counts['negative']} "
            "negative prompts; they are compared in pairs and need equal numbers, or a single one on one side."
        )
    prompts = {side: texts * length if len(texts) == 1 else texts for side, texts in prompts.items()}
    return {"finding": item["finding"], "organ": item["organ"], **prompts}


def _check_template(template: Sequence[str]) -> None:
    if isinstance(template, str) or len(template) != 2 or not all("{}" in text for text in template):
        raise ValueError(
            f"template must be (positive, negative), each with {{}} where the finding goes, as {TEMPLATE}; got "
            f"{template!r}."
        )


def _is_task_file(findings) -> bool:
    is_text = isinstance(findings, (str, PathLike))
    return is_text and (isinstance(findings, PathLike) or Path(findings).suffix in (".yaml", ".yml"))


def _task_items(path: Path) -> list:
    import yaml

    if not path.is_file():
        raise ValueError(f"{path}: no such task file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    items = content.get("items") if isinstance(content, Mapping) else None
    if not isinstance(items, list):
        raise ValueError(f"{path}: a task file has a list `items` of {{finding, organ, positive, negative}}.")
    return items
