"""One report taken apart: what it says of each organ, in memory and as JSON.

    {"id": ..., "organs": {organ: {"findings": [...], "impression": [...], "abnormal": true}}, "labels": {finding:
     "present", "absent" or "uncertain"}, "method": "rules", "uncertain": [sentences], "notes": {"html": 2}}

`labels` is left out where none were asked for, `uncertain` and `notes` where they are empty. The sentences are verbatim
but for white space.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .cases import OrganText

Labels = dict[str, str]
SECTIONS = ("findings", "impression")


@dataclass(frozen=True)
class Decomposition:
    """A report by organ.

    Attributes:
        id: Of the report.
        organs: What is said of each organ that is spoken of, in the order of the organ set.
        labels: finding -> present, absent or uncertain; None: not asked for.
        method: "rules", "llm" or "hybrid": who split it.
        uncertain_sentences: Those whose organ is a guess, or that state a finding of no known place.
        notes: What was wrong with the text, and how often: html, control_characters, empty, not_english,
            long_sentences.
    """

    id: str
    organs: dict[str, OrganText]
    labels: Labels | None = None
    method: str = "rules"
    uncertain_sentences: tuple[str, ...] = ()
    notes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict:
        """As it is written; the form of the gold splits."""
        organs = {
            organ: {"findings": list(text.findings), "impression": list(text.impression), "abnormal": text.is_abnormal}
            for organ, text in self.organs.items()
        }
        content: dict = {"id": self.id, "organs": organs}
        if self.labels is not None:
            content["labels"] = dict(self.labels)
        content["method"] = self.method
        if self.uncertain_sentences:
            content["uncertain"] = list(self.uncertain_sentences)
        if self.notes:
            content["notes"] = dict(self.notes)
        return content

    @classmethod
    def from_json(cls, content: Mapping) -> "Decomposition":
        """Read what `to_json` wrote, or one entry of a gold split.

        Raises:
            ValueError: If it is not of that form.
        """
        name = content.get("id", "") if isinstance(content, Mapping) else ""
        try:
            organs = {
                organ: OrganText(sentences(said["impression"]), sentences(said["findings"]), truth(said["abnormal"]))
                for organ, said in content["organs"].items()
            }
            return cls(
                id=str(content["id"]),
                organs=organs,
                labels=None if content.get("labels") is None else dict(content["labels"]),
                method=content.get("method", "rules"),
                uncertain_sentences=sentences(content.get("uncertain", [])),
                notes=dict(content.get("notes", {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"decomposition {name!r} is not of the form {{id, organs: {{organ: {{findings, impression, "
                f"abnormal}}}}}}: {error!r}."
            ) from None


def sentences(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{value!r} is no list of sentences")
    return tuple(value)


def truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"abnormal must be true or false, not {value!r}")
    return value
