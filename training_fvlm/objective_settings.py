"""Settings of the objective: which captions are positives, how organs are weighed, drawn and brought in.

A part of `FVLMTrainingArguments`, so every field is an option of the command line and a name of a recipe's training
section. All defaults are the published objective.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

TARGETS = ("published", "momentum", "co_teaching", "labels")
# `0.02 gallbladder=0.1`, as words; in a recipe also a number, or {gallbladder: 0.1}.
OrganNumbers = Sequence[str | float] | Mapping[str, float] | str | float


@dataclass
class ObjectiveSettings:
    """Fields and their checks; `FVLMTrainingArguments` inherits them."""

    targets: list[str] = field(
        default_factory=lambda: ["published"],
        metadata={
            "help": "Which captions count as right for a patient's organ. `published` always holds: the own one, equal "
            "ones, and normal with normal. Added to it, for pairs of abnormal patients: `momentum` (how alike a slowly "
            "following copy of the text encoder finds their captions), `labels` (how many findings of the organ they "
            "share: needs --label_task and a split with labels), `co_teaching` (a second model trains beside the first "
            "and each corrects the other: about 2.8 times the time and twice the memory for weights). Several may be "
            "named.",
        },
    )
    momentum_alpha: float = field(
        default=1.0, metadata={"help": "Weight of the soft positives of --targets momentum (RADAR: 1)."}
    )
    teacher_momentum: float = field(
        default=0.995,
        metadata={
            "help": "--targets momentum: after each optimizer step the teacher keeps this share of its weights and "
            "takes the rest from the model (RADAR: 0.995, some 200 steps behind)."
        },
    )
    label_alpha: float = field(default=1.0, metadata={"help": "Weight of the soft positives of --targets labels."})
    label_task: str | None = field(
        default=None,
        metadata={
            "help": "--targets labels: which findings belong to which organ; a prompt set of hub_configs/prompts, or a "
            "YAML file with `items`, each with `finding` and `organ`."
        },
    )
    co_teaching_alpha: float = field(
        default=0.5,
        metadata={
            "help": "--targets co_teaching: share of an abnormal patient's target that the other model decides "
            "(published: 0.5)."
        },
    )
    organ_label_smoothing: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Share of every target that is spread evenly over all patients: a number for all organs, or "
            "ORGAN=NUMBER for one, or both (`0.02 gallbladder=0.1`). Keeps organs with few examples from becoming "
            "certain."
        },
    )
    organ_token_dropout: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Chance that a token of an organ is left out of a training crop, at least one being kept; written "
            "as --organ_label_smoothing is. It holds for organs of up to --organ_token_dropout_size tokens, and falls "
            "with the inverse of the number for larger ones: a regularisation of small organs."
        },
    )
    organ_token_dropout_size: int = field(
        default=8, metadata={"help": "Tokens up to which an organ is small for --organ_token_dropout."}
    )
    global_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the contrast of whole volumes with whole reports beside that of the organs. Only with a "
            "global branch (--model.volume_pooling mean or attention), and with reports in the split."
        },
    )
    global_schedule: Literal["constant", "warmup", "alternate"] = field(
        default="constant",
        metadata={
            "help": "`warmup` raises --global_weight from 0 over the first --global_warmup of the run; `alternate` "
            "trains the global contrast alone in every even step and the organs alone in every odd one (RADAR)."
        },
    )
    global_warmup: float = field(
        default=0.1, metadata={"help": "Share of the run over which --global_schedule warmup rises."}
    )
    dwa_window: int = field(
        default=50,
        metadata={
            "help": "--model.organ_reduction dwa: steps over which an organ's loss is averaged before it is compared "
            "with the window before (published: an epoch)."
        },
    )
    dwa_temperature: float = field(
        default=2.0, metadata={"help": "The higher, the more alike the weights of dwa (published: 2)."}
    )
    organ_sampling: Literal["uniform", "balanced"] = field(
        default="uniform",
        metadata={
            "help": "`balanced` puts at least two patients who are abnormal in the same organ into every group that is "
            "contrasted, organs taking turns, rare ones as often as common ones. Each row comes at most "
            "--organ_sampling_repeats times an epoch, so some others wait for the next one."
        },
    )
    organ_sampling_repeats: int = field(
        default=2, metadata={"help": "How often --organ_sampling balanced may take a row in one epoch."}
    )
    curriculum: Literal["none", "frequency", "difficulty"] = field(
        default="none",
        metadata={
            "help": "Organs enter the loss one after the other: `frequency` begins with those that are most often "
            "abnormal in the training captions; `difficulty` trains all for the first --curriculum_probe of the run "
            "and then begins with those whose loss fell lowest against its chance level."
        },
    )
    curriculum_start: float = field(
        default=0.25, metadata={"help": "Share of the organs that are in when --curriculum begins."}
    )
    curriculum_end: float = field(
        default=0.5, metadata={"help": "Share of the run after which --curriculum has let all organs in."}
    )
    curriculum_probe: float = field(
        default=0.05,
        metadata={"help": "Share of the run over which --curriculum difficulty measures, with all organs in."},
    )

    def uses(self, target: str) -> bool:
        """Whether `target` is among --targets."""
        return target in self.targets

    @property
    def needs_abnormal_captions(self) -> bool:
        """Whether the abnormal captions of the whole split are read before the first step."""
        return self.organ_sampling == "balanced" or self.curriculum == "frequency"

    def objective_faults(self) -> list[str]:
        """What is wrong with these settings, each as a message; nothing if they can run."""
        faults = []
        for target in self.targets:
            if target not in TARGETS:
                faults.append(f"--targets {target!r} is none of {', '.join(TARGETS)}.")
        if self.uses("labels") and self.label_task is None:
            faults.append("--targets labels needs --label_task: which findings belong to which organ.")
        if self.label_task is not None and not self.uses("labels"):
            faults.append(f"--label_task {self.label_task} without --targets labels would never be read.")
        for name, low, high in (
            ("momentum_alpha", 0, float("inf")),
            ("label_alpha", 0, float("inf")),
            ("co_teaching_alpha", 0, 1),
            ("teacher_momentum", 0, 1),
            ("global_weight", 0, float("inf")),
            ("global_warmup", 0, 1),
            ("curriculum_start", 0, 1),
            ("curriculum_end", 0, 1),
            ("curriculum_probe", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                faults.append(f"--{name} {getattr(self, name)} must lie in [{low}, {high}].")
        for name in ("dwa_window", "organ_sampling_repeats", "organ_token_dropout_size"):
            if getattr(self, name) < 1:
                faults.append(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.dwa_temperature <= 0:
            faults.append(f"--dwa_temperature {self.dwa_temperature} must be above 0.")
        for name, known in (
            ("global_schedule", ("constant", "warmup", "alternate")),
            ("organ_sampling", ("uniform", "balanced")),
            ("curriculum", ("none", "frequency", "difficulty")),
        ):
            if getattr(self, name) not in known:  # a recipe's value passes by the choices
                faults.append(f"--{name} {getattr(self, name)!r} is none of {', '.join(known)}.")
        if self.curriculum == "difficulty" and self.curriculum_probe >= self.curriculum_end:
            faults.append(
                f"--curriculum_probe {self.curriculum_probe} must end before --curriculum_end {self.curriculum_end}."
            )
        for name in ("organ_label_smoothing", "organ_token_dropout"):
            try:
                split_organ_numbers(getattr(self, name), f"--{name}")
            except ValueError as error:
                faults.append(str(error))
        return faults


OBJECTIVE_FIELDS = tuple(entry.name for entry in fields(ObjectiveSettings))


def organ_numbers(words: OrganNumbers, organs: Sequence[str], option: str) -> list[float]:
    """A number for each organ from words such as `0.02 gallbladder=0.1`; 0 where none is given.

    Args:
        words: A number for all organs, ORGAN=NUMBER for one.
        organs: The model's organs.
        option: Where the words come from, for messages.

    Raises:
        ValueError: If a number is not in [0, 1), or an organ is not the model's.
    """
    of_all, of_organ = split_organ_numbers(words, option)
    if unknown := sorted(set(of_organ) - set(organs)):
        raise ValueError(f"{option}: {unknown} are none of the model's organs {list(organs)}.")
    return [of_organ.get(organ, of_all) for organ in organs]


def organ_words(words: OrganNumbers) -> list[str]:
    """The same as the command line would have it, so that a resumed run's can be compared."""
    if isinstance(words, Mapping):
        return [f"{organ}={number}" for organ, number in words.items()]
    return [str(word) for word in ([words] if isinstance(words, (str, float, int)) else words)]


def split_organ_numbers(words: OrganNumbers, option: str) -> tuple[float, dict[str, float]]:
    """The number for all organs, and those of single ones."""
    of_all, of_organ = 0.0, {}
    for word in organ_words(words):
        organ, _, text = word.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number < 1:
            raise ValueError(f"{option} {word}: give a number in [0, 1), for one organ as ORGAN=NUMBER.")
        if organ:
            of_organ[organ] = number
        else:
            of_all = number
    return of_all, of_organ
