"""One report taken apart: what it says of each organ, in memory and as JSON.

    {"id": ..., "organs": {organ: {"findings": [...], "impression": [...], "abnormal": true}}, "labels": {finding:
     "present", "absent" or "uncertain"}, "method": "rules", "uncertain": [sentences], "notes": {"html": 2}}

`labels` is left out where none were asked for, `uncertain` and `notes` where they are empty. The sentences are verbatim
but for white space.
"""

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
        method: "rules" or "llm": who split it.
        uncertain_sentences: Those whose organ is a guess, or that state a finding of no known place.
        notes: What was wrong with the text, and how often: html, control_characters, empty, not_english,
            long_sentences, no_id; and why it is not by the model.
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
