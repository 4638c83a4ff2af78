"""Finds the step whose loss or gradients are not finite, and says what was in it.

On a CPU a step is looked at before the optimizer moves anything. On a GPU that would make the host wait for the device
at every step: the few numbers that tell are copied without waiting and read one step later, and in any case before
something is logged or saved. A broken state is in no checkpoint either way.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

NAMED = 8  # as many rows, organs or parameters a message names; the file names all
ADVICE = (
    "If these rows look sound (`python -m data_builders inspect`), go on from an earlier checkpoint with a lower "
    "--learning_rate, a lower --max_grad_norm, or without fp16."
)


class BrokenStep(FloatingPointError):
    """A step whose loss or gradients are not finite ended the run."""


class Rows(Protocol):
    """What a report asks of a data set."""

    def scan_id(self, row: int) -> str:
        """The scan of a row."""

    def place_of(self, row: int) -> str:
        """The file a row lies in, and where."""


@dataclass
class Report:
    """What was in a broken step: `text` for people, `facts` in full for a file."""

    text: str
    facts: dict[str, Any]
    advice: str = ADVICE

    def write(self, path: str | Path) -> None:
        """Write the facts as JSON."""
        Path(path).write_text(json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class Contrast:
    """One contrast of a step: its patients' rows, and which of their numbers are finite.

    Attributes:
        rows: `(patients,)` int64, rows of the split.
        organ_is_finite: `(organs,)`: the organ's loss.
        image_is_finite, text_is_finite: `(patients, organs)`: the embeddings of the organ and of its caption.
    """

    rows: Tensor
    organ_is_finite: Tensor
    image_is_finite: Tensor
    text_is_finite: Tensor


@dataclass
class Step:
    """One optimizer step; its tensors may still be on their way from the device."""

    number: int
    loss: Tensor
    gradient_norm: Tensor
    organs: Sequence[str] = ()
    parameters: Sequence[str] = ()
    parameter_norms: Tensor | None = None
    contrasts: list[Contrast] = field(default_factory=list)
    arrived: Any = None  # a CUDA event, or None when they are here

    def is_broken(self) -> bool:
        """Whether loss or gradient is not finite; waits until it is known."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm))

    def report(self, dataset: Rows) -> Report:
        """Name everything that was in the step, and what in it was not finite."""
        rows = list(dict.fromkeys(row for contrast in self.contrasts for row in contrast.rows.tolist()))
        named = {row: {"row": row, "scan_id": dataset.scan_id(row), "place": dataset.place_of(row)} for row in rows}
        organs = [
            organ
            for place, organ in enumerate(self.organs)
            if not all(bool(contrast.organ_is_finite[place]) for contrast in self.contrasts)
        ]
        broken: dict[str, dict[int, list[str]]] = {"image": {}, "caption": {}}
        for contrast in self.contrasts:
            for side, is_finite in (("image", contrast.image_is_finite), ("caption", contrast.text_is_finite)):
                for patient, organ in (~is_finite).nonzero().tolist():
                    broken[side].setdefault(int(contrast.rows[patient]), []).append(self.organs[organ])
        parameters = []
        if self.parameter_norms is not None:
            parameters = [
                name for name, norm in zip(self.parameters, self.parameter_norms.tolist()) if not math.isfinite(norm)
            ]
        loss, norm = float(self.loss), float(self.gradient_norm)
        facts = {
            "step": self.number,
            "loss": str(loss),  # JSON has no NaN
            "gradient_norm": str(norm),
            "organs": organs,
            "parameters": parameters,
            "rows": list(named.values()),
            "image_embeddings": [{**named[row], "organs": names} for row, names in broken["image"].items()],
            "caption_embeddings": [{**named[row], "organs": names} for row, names in broken["caption"].items()],
        }
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is finite, the gradient {norm},"
        lines = [f"{what} at step {self.number}"]
        if organs:
            lines.append(f"organs: {_some(organs)}")
        if parameters:
            lines.append(f"parameters with such a gradient: {_some(parameters)}")
        for side, of_rows in broken.items():
            if of_rows and len(of_rows) == len(rows):
                lines.append(f"the {side} embeddings of all {len(rows)} rows: the weights are broken, not a row")
            elif of_rows:
                each = [f"{_name(named[row])} ({_some(names)})" for row, names in of_rows.items()]
                lines.append(f"the {side} embeddings of {_some(each)}")
        lines.append(f"in the batch: {_some([_name(entry) for entry in named.values()])}")
        return Report("; ".join(lines) + ".", facts)


class StepWatch:
    """Collects what tells a broken step from a whole one, and looks at it when that costs no waiting."""

    def __init__(self) -> None:
        self.organs: Sequence[str] = ()
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self._steps: deque[Step] = deque()
        self._contrasts: list[Contrast] = []
        self._parameters: list[str] = []
        self._parameter_norms: Tensor | None = None
        self.last_gradients: tuple[list[str], Tensor | None] = ([], None)

    @torch.no_grad()
    def note_contrast(self, rows: Tensor, organ_losses: Tensor, image_embeds: Tensor, text_embeds: Tensor) -> None:
        """Note a contrast of the step that is being computed.

        Args:
            rows: `(patients,)` rows of the split, of all ranks.
            organ_losses: `(organs,)`.
            image_embeds, text_embeds: `(patients, organs, dim)` of all ranks.
        """
        self._contrasts.append(
            Contrast(
                rows.detach(),
                organ_losses.isfinite(),
                image_embeds.isfinite().all(-1),
                text_embeds.isfinite().all(-1),
            )
        )

    @torch.no_grad()
    def note_gradients(self, model: torch.nn.Module) -> None:
        """Note the norm of each parameter's gradient: a norm over all of them that is not finite spoils all of them."""
        named = [
            (name.removeprefix("module."), getattr(parameter.grad, "_local_tensor", parameter.grad))
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        ]
        self._parameters = [name for name, _ in named]
        self._parameter_norms = torch.stack(torch._foreach_norm([grad for _, grad in named])) if named else None
        self.last_gradients = (self._parameters, self._parameter_norms)

    def end_step(self, number: int, loss: Tensor, gradient_norm: Tensor | float | None) -> None:
        """Close a step.

        Args:
            number: Of the step, from 1.
            loss: A scalar that is not finite if the step's loss is not; it is copied.
            gradient_norm: Of all parameters together; None: not to be judged.
        """
        if hasattr(gradient_norm, "full_tensor"):
            gradient_norm = gradient_norm.full_tensor()
        if not isinstance(gradient_norm, Tensor):
            gradient_norm = torch.tensor(0.0 if gradient_norm is None else float(gradient_norm))
        step = Step(
            number,
            _to_host(loss),
            _to_host(gradient_norm),
            self.organs,
            self._parameters,
            None if self._parameter_norms is None else _to_host(self._parameter_norms),
            [Contrast(*map(_to_host, vars(contrast).values())) for contrast in self._contrasts],
        )
        if loss.device.type == "cuda":
            step.arrived = torch.cuda.Event()
            step.arrived.record()
        self._steps.append(step)
        self._contrasts, self._parameters, self._parameter_norms = [], [], None

    def first_broken(self, is_last: bool = False) -> Step | None:
        """The first broken step among those that can be looked at.

        Args:
            is_last: Look at the last step, too, even if the device is still computing it.
        """
        while self._steps:
            if len(self._steps) == 1 and self._steps[0].arrived is not None and not is_last:
                return None  # the same on every rank, however far its device has got
            step = self._steps.popleft()
            if step.is_broken():
                return step
        return None


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, which may arrive later than this returns."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _name(entry: dict[str, Any]) -> str:
    return f"row {entry['row']} (scan {entry['scan_id']!r}, {entry['place']})"


def _some(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
