"""The chance alarm: which organs of a run are not learning, and the likely cause with its mend.

It looks at every log line from --alarm_steps steps on, and says once of each organ and cause what it finds: in the log,
in run.json and on the model card. It reads nothing but the rows of organ_losses.csv, so a run that goes on from a
checkpoint knows what was said. How it judges:

(1) Evidence of an organ are its last log lines after the warm-up, over at least half of --alarm_steps steps and as many
    more as (2) needs: `gain` = chance - loss, the mean over batches in which the organ entered; `error`, its standard
    error, from the spread between those batches; `room` = chance - floor, what a perfect model would gain.
(2) An organ LEARNS if its gain is above 0 by Z standard errors. It is AT CHANCE if it does not learn though a twentieth
    of the room would have been seen: gain + Z error < PART room. Else nothing is known yet: the noise is larger than
    that, as with few patients in a contrast, or with a floor close to chance.
(3) Organs leave chance at different times. If more than half of them are at chance, that is said as soon as
    --alarm_steps steps have passed since the warm-up; of a few, while others learn, after LATE times as many.
(4) The cause. Whether captions and images belong together shows in `fit` (organ_losses.py), which is 0 on average if
    they do not, whatever the model makes of them, and needs no learning. If its mean over organs is not above 0 by Z
    standard errors though ALIKE would have been seen, or LATE has come, the captions do not fit the images; while
    neither can be said, it waits. Else, if the different captions of an organ lie at one point, the text side has
    collapsed. (Their cosine alone does not tell: captions that fit nothing are drawn together as well, since that is
    the best that can be done about them.) Else, a contrast of few patients.
(5) The data alone say why an organ never enters the loss: no mask, always cut off, no caption, or never an abnormal one
    (no fault of the run: that is noted, without alarm). So do captions that are all equal.

In nine runs of the demo's recipe (tests/test_alarm_synthetic.py) --alarm_steps 100 and 200, the default, were silent on
five good seeds and named four faults; 50 called organs late that left chance soon after.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers.utils import logging

from .organ_losses import OrganLossRow, weighted_mean

logger = logging.get_logger(__name__)

Z = 3.0  # standard errors: one in 740 by chance
PART = 0.05  # of the room: what an organ must be seen to have gained
LATE = 5  # times --alarm_steps until an organ is called late
ALIKE = 0.1  # standard deviations between pairs: what `fit` must be seen to fall short of
NEAR = 0.95  # cosine from which on captions are said to lie at one point
FEW = 4  # patients: a contrast of fewer is called small
SELDOM = 0.1  # expected abnormal patients of an organ in a contrast
ROUNDING = 1e-5  # nats: what float32 leaves of a loss at chance exactly

LAYOUT = "`python -m data_builders inspect` on the split shows it"
# cause -> what is likely, and the mend; {} is the evidence.
CAUSES = {
    "no mask": (
        "never in the crop: {}. The masks hold no such organ, or under another number (TotalSegmentator v1 and v2 "
        f"differ): {LAYOUT}. Build it again with the right --numbering, or leave the organ out of the organ set."
    ),
    "cut off": (
        "always cut off: {}. Only a whole organ is contrasted. Take a larger model.vision_config.volume_size, or "
        "coarser voxels (--spacing when the split is built); what every scan cuts off, cannot be learned."
    ),
    "no caption": (
        "no caption: {}. Captions name the organ otherwise than the organ set, or not at all: "
        f"{LAYOUT}. Mend the lexicon or the captions' organ names and build it again."
    ),
    "equal captions": (
        "captions all equal: {}. Patients who share a caption are positives of each other, so there is nothing to "
        "tell apart. Look at the captions (a column joined wrongly, a template), and build the split again."
    ),
    "never abnormal": (
        "never abnormal: {}. Normal is contrasted with abnormal, so the organ never enters. If the reports do speak of "
        "findings there, mend the lexicon; else nothing is wrong, and the organ's embeddings mean nothing."
    ),
    "seldom abnormal": (
        "hardly ever in the loss: {}. A larger --contrastive_batch_size, or --organ_sampling balanced, brings its rare "
        "findings together."
    ),
    "nothing to tell apart": (
        "the floor is as good as chance: {}. Nearly all patients are positives of each other, so even a perfect model "
        "would gain next to nothing. More patients with findings there, or a larger --contrastive_batch_size."
    ),
    "captions do not fit": (
        "captions do not fit the images: {}. They may belong to other patients (--shuffle_captions does it on "
        "purpose), or the masks may: look at the split's previews. Or the image tower cannot see what they speak of: "
        "HU windows, patch size, spacing."
    ),
    "text collapsed": (
        "the text side has collapsed: {}. Let HU windows be standardised "
        "(`mean: auto, std: auto`), start with --centring_rows 48, lower --learning_rate or lengthen --warmup_steps, "
        "take a shallower or a pretrained text encoder."
    ),
    "small contrast": (
        "the contrast is too small: {}. Two patients are mostly both normal. Take a larger --contrastive_batch_size, "
        "with --micro_batch_size for what fits into memory."
    ),
    "not learned": (
        "no fault found in its data: {}. Look at --learning_rate, at what is frozen, and at the gradient norms of the "
        "towers in the log (`grad_norm/...`): one that is far below the others stands still."
    ),
}
NOTES = ("never abnormal", "seldom abnormal", "nothing to tell apart")  # no fault of the run: said without alarm


@dataclass
class Evidence:
    """Log lines of an organ, pooled.

    Attributes:
        steps: Optimizer steps they span.
        active: Batches in which the organ entered.
        loss, chance, floor: Means over those, in nats.
        error: Standard error of chance - loss.
        fit, fit_error: Mean of the column `fit`, and its standard error.
        text_cosine, present, whole, captioned, abnormal, valid, equal: Means of the columns.
    """

    steps: int
    active: float
    loss: float
    chance: float
    floor: float
    error: float
    fit: float
    fit_error: float
    text_cosine: float
    present: float
    whole: float
    captioned: float
    abnormal: float
    valid: float
    equal: float

    @property
    def gain(self) -> float:
        return self.chance - self.loss

    @property
    def room(self) -> float:
        return self.chance - self.floor

    @property
    def learns(self) -> bool:
        return self.gain > Z * self.error

    @property
    def is_at_chance(self) -> bool:
        return not self.learns and self.gain + Z * self.error < PART * self.room

    @property
    def is_cramped(self) -> bool:
        """Chance and floor are as good as one, and the noise is larger than what lies between."""
        return not self.learns and self.room < PART * self.chance and Z * self.error > PART * self.room


def pool(rows: Sequence[OrganLossRow], steps: int) -> Evidence:
    """Pool log lines of one organ; each counts by its batches."""
    counts = [row.active * row.batches for row in rows]
    excess, error = _pooled([row.loss - row.chance for row in rows], [row.spread for row in rows], counts)
    fit, fit_error = _pooled([row.fit for row in rows], [row.fit_spread for row in rows], [r.fit_batches for r in rows])
    chance = weighted_mean([row.chance for row in rows], counts)
    shares = {
        name: weighted_mean([getattr(row, name) for row in rows], [row.batches for row in rows])
        for name in ("text_cosine", "present", "whole", "captioned", "abnormal", "valid", "equal")
    }
    floor = weighted_mean([row.floor for row in rows], counts)
    error = max(error, ROUNDING)
    return Evidence(steps, sum(counts), chance + excess, chance, floor, error, fit, fit_error, **shares)


def _pooled(means: Sequence[float], spreads: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Mean of all numbers, and its standard error, from mean, standard deviation and count of groups of them."""
    groups = [
        (mean, 0.0 if math.isnan(spread) else spread, count)
        for mean, spread, count in zip(means, spreads, counts)
        if count > 0 and not math.isnan(mean)
    ]
    total = sum(count for _, _, count in groups)
    if total < 2:
        return weighted_mean(means, counts), math.inf
    mean = sum(mean * count for mean, _, count in groups) / total
    squares = sum((count - 1) * spread**2 + count * (of_group - mean) ** 2 for of_group, spread, count in groups)
    return mean, math.sqrt(squares / (total - 1) / total)


@dataclass
class Finding:
    """What the alarm says at a log line: some organs, one cause.

    Attributes:
        step: Optimizer steps done.
        cause: One of `CAUSES`.
        is_alarm: False: a note, no fault of the run.
        organs: Their names.
        text: A sentence with evidence and mend.
        learned_since: organ -> step from which on it was well below chance after all.
    """

    step: int
    cause: str
    is_alarm: bool
    organs: list[str]
    text: str
    learned_since: dict[str, int]


class ChanceAlarm:
    """Takes the rows of one log line after the other.

    Args:
        organs: Their names.
        alarm_steps: Steps after the warm-up before anything is judged; 0: never.
        group_size: Patients of a contrast.
        warmup_steps: Steps of the learning rate's warm-up.
        listener: Called after every new finding.
    """

    def __init__(
        self,
        organs: Sequence[str],
        alarm_steps: int,
        group_size: int,
        warmup_steps: int = 0,
        listener: Callable[[], None] | None = None,
    ):
        self.organs, self.alarm_steps, self.group_size = list(organs), alarm_steps, group_size
        self.warmup_steps, self.listener = warmup_steps, listener
        self.restart([])

    def restart(self, rows: Sequence[OrganLossRow]) -> None:
        """Begin with the rows of a run that goes on: what was said of them is known, and not said again."""
        self.findings: list[Finding] = []
        self.rows: dict[str, list[OrganLossRow]] = {organ: [] for organ in self.organs}
        self.first_active: dict[str, int] = {}
        self.said: set[tuple[str, str]] = set()
        by_step: dict[int, list[OrganLossRow]] = {}
        for row in rows:
            by_step.setdefault(row.step, []).append(row)
        for of_step in by_step.values():
            self._take(of_step)
        if self.findings and self.listener is not None:
            self.listener()

    def add(self, rows: Sequence[OrganLossRow]) -> list[Finding]:
        """Take the rows of a log line; what is new is written to the log."""
        new = self._take(rows)
        for finding in new:
            logger.warning("%s: %s", "alarm" if finding.is_alarm else "note", finding.text)
        if new and self.listener is not None:
            self.listener()
        return new

    def entries(self) -> list[dict[str, Any]]:
        """All findings, for run.json."""
        return [asdict(finding) for finding in self.findings]

    def _take(self, rows: Sequence[OrganLossRow]) -> list[Finding]:
        if not self.alarm_steps:
            return []
        for row in rows:
            if row.organ in self.rows and not math.isnan(row.batches):  # NaN: a table from before there was an alarm
                before = self.rows[row.organ]
                if row.active:
                    self.first_active.setdefault(row.organ, before[-1].step if before else 0)
                before.append(row)
        step = rows[0].step if rows else 0
        found: dict[str, dict[str, str]] = {}  # cause -> organ -> evidence
        if step >= self.alarm_steps:
            for organ, cause, evidence in [*self._from_data(step), *self._from_losses(step)]:
                if (organ, cause) not in self.said:
                    self.said.add((organ, cause))
                    found.setdefault(cause, {})[organ] = evidence
        new = [self._finding(step, cause, organs) for cause, organs in found.items()]
        self.findings += new
        return new

    def _finding(self, step: int, cause: str, organs: dict[str, str]) -> Finding:
        if len(set(organs.values())) == 1:
            evidence = next(iter(organs.values()))
        else:
            evidence = "; ".join(f"{organ} {text}" for organ, text in organs.items())
        names = ", ".join(organs) if len(organs) < len(self.organs) else f"all {len(organs)} organs"
        text = f"not learning after {step} steps: {names}. Likely cause: {CAUSES[cause].format(evidence)}"
        return Finding(step, cause, cause not in NOTES, list(organs), text, {})

    def _evidence(self, organ: str, start: int, at_least: int, until_judged: bool = True) -> Evidence | None:
        """Pool an organ's log lines from the last one back, none that began before `start`.

        Args:
            organ: Its name.
            start: Optimizer step.
            at_least: Steps to span.
            until_judged: Go on beyond them until the organ can be judged, as far as there are lines.

        Returns:
            None if the lines span fewer steps.
        """
        rows = self.rows[organ]
        evidence = None
        for first in range(len(rows) - 1, -1, -1):
            begins = rows[first - 1].step if first else 0
            if begins < start:
                break
            steps = rows[-1].step - begins
            if steps >= at_least:
                evidence = pool(rows[first:], steps)
                if not until_judged or evidence.learns or evidence.is_at_chance:
                    break
        return evidence

    def _from_data(self, step: int) -> Iterator[tuple[str, str, str]]:
        """(5) Organs that never entered, or with one caption for all: organ, cause, evidence."""
        for organ in self.organs:
            seen = self._evidence(organ, 0, self.alarm_steps, until_judged=False)
            if seen is None or (organ in self.first_active and seen.equal < 1):
                continue
            whole, abnormal = _percent(seen.whole), _percent(seen.abnormal)
            captioned, present = _percent(seen.captioned), _percent(seen.present)
            if seen.captioned == 0:
                yield organ, "no caption", "in none of the patients"
            elif seen.abnormal == 0:
                yield organ, "never abnormal", f"all captions seen, of {captioned} of the patients, are normal"
            elif seen.present == 0:
                yield organ, "no mask", f"though {captioned} of the patients have a caption of it"
            elif seen.valid * self.group_size < 1:
                yield organ, "cut off", f"in {present} of the crops, whole in {whole}"
            elif seen.equal == 1:
                yield organ, "equal captions", f"one text for all patients, called abnormal in {abnormal}"
            elif seen.valid * seen.abnormal * self.group_size < SELDOM:
                known = f"whole in {whole} of the crops, abnormal in {abnormal} of its captions"
                yield organ, "seldom abnormal", f"{known}, {self.group_size} patients in a contrast"

    def _from_losses(self, step: int) -> Iterator[tuple[str, str, str]]:
        """(1) to (4) Organs that entered: organ, cause, evidence."""
        judged, since = {}, {}
        start = max(self.warmup_steps, step - LATE * self.alarm_steps)
        for organ, first in self.first_active.items():
            since[organ] = step - max(self.warmup_steps, first)
            if since[organ] >= self.alarm_steps:
                evidence = self._evidence(organ, start, max(self.alarm_steps // 2, 1))
                if evidence is not None and evidence.active > 1:
                    judged[organ] = evidence
        at_chance = {organ: evidence for organ, evidence in judged.items() if evidence.is_at_chance}
        learning = {organ: evidence for organ, evidence in judged.items() if evidence.learns}
        for finding in self.findings:
            for organ in finding.organs:
                now = learning.get(organ)
                if now is not None and now.gain - Z * now.error > PART * now.room:
                    finding.learned_since.setdefault(organ, step)
        are_most = 2 * len(at_chance) > len(judged)
        late = {organ for organ in judged if since[organ] >= LATE * self.alarm_steps}
        late_at_chance = [evidence for organ, evidence in at_chance.items() if organ in late]
        cramped = [evidence for evidence in judged.values() if evidence.is_cramped]
        for organ, evidence in judged.items():
            is_said = any(organ in each.organs and organ not in each.learned_since for each in self.findings)
            if is_said or evidence.learns or not (are_most or organ in late):
                continue
            if evidence.is_at_chance:
                asked, told = (judged, at_chance.values()) if are_most else ([organ], late_at_chance)
                cause = self._cause(evidence, list(told), self._fit(asked, start), organ in late)
                if cause is not None:
                    yield organ, *cause
            elif evidence.is_cramped:
                yield organ, "nothing to tell apart", _losses(cramped)

    def _fit(self, organs: Iterable[str], start: int) -> tuple[float, float]:
        """Mean `fit` over organs since `start`, and its standard error; infinite where no organ has one (a contrast of
        two has no pair of either kind to compare)."""
        known = []
        for organ in organs:
            rows = self.rows[organ]
            begins = [0, *(row.step for row in rows[:-1])]
            evidence = pool([row for row, step in zip(rows, begins) if step >= start], 0)
            if evidence.fit_error < math.inf:
                known.append(evidence)
        if not known:
            return math.nan, math.inf
        error = math.sqrt(sum(each.fit_error**2 for each in known)) / len(known)
        return sum(each.fit for each in known) / len(known), error

    def _cause(
        self, evidence: Evidence, at_chance: Sequence[Evidence], fit_and_error: tuple[float, float], is_late: bool
    ) -> tuple[str, str] | None:
        """(4) The likely cause why an organ is at chance, and what speaks for it; None if it cannot be told yet.

        Args:
            evidence: The organ's.
            at_chance: What the losses are told of: all organs at chance if they are most, else those that are late.
            fit_and_error: Whether captions belong to images: of all organs together if most are at chance.
            is_late: It waits no longer.
        """
        losses, (fit, error) = _losses(at_chance), fit_and_error
        if error < math.inf and fit <= Z * error:
            if fit + Z * error > ALIKE and not is_late:
                return None
            alike = f"images of the same caption are no more alike than others (fit {fit:.2f}, error {error:.2f})"
            return "captions do not fit", f"{alike}, {losses}"
        contrasted = sum(math.exp(each.chance) for each in at_chance) / len(at_chance)
        if evidence.text_cosine > NEAR and (error < math.inf or contrasted >= FEW):
            cosine = sum(each.text_cosine for each in at_chance) / len(at_chance)
            belong = f"though captions and images belong together (fit {fit:.2f}, error {error:.2f})"
            if error == math.inf:
                belong = "and whether captions fit the images cannot be told, as no two patients are positives"
            return "text collapsed", f"the mean cosine between different captions is {cosine:.3f}, {belong}; {losses}"
        if contrasted < FEW:
            of_batch = f"{contrasted:.1f} patients of an organ on average, of {self.group_size} in a batch"
            return "small contrast", f"{of_batch}, {losses}"
        return "not learned", losses


def _losses(group: Sequence[Evidence]) -> str:
    """Mean losses in words."""
    loss, chance, floor = (
        sum(getattr(each, name) for each in group) / len(group) for name in ("loss", "chance", "floor")
    )
    return f"the loss is {loss:.3f} over the last {group[0].steps} steps (chance {chance:.3f}, floor {floor:.3f})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0.095 or share == 0 else f"{100 * share:.1g} %"
