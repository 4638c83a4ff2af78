"""What a card tells that no setting says: how long a run took, what energy it used, under what licence its data are."""

import csv
import math
import time
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub import errors as hub_errors
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)
EMISSIONS_FILE = "emissions.csv"  # codecarbon's name


class TrainingClock(TrainerCallback):
    """Seconds that a run has trained, those before it was stopped and went on among them.

    Steps that had to be done again are counted once: what came after the last checkpoint is not in it.
    """

    def __init__(self):
        self.before = 0.0
        self.started_at: float | None = None

    @property
    def seconds(self) -> float:
        """Until now, or until training ended."""
        return self.before + (0.0 if self.started_at is None else time.monotonic() - self.started_at)

    def on_train_begin(self, args, state, control, **kwargs):
        self.before, self.started_at = 0.0, time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.before, self.started_at = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.before = state["seconds"]


def measured_energy(run: str | Path) -> dict[str, float] | None:
    """`kwh` and `co2_kg` that codecarbon wrote into the folder of a run, all its sessions together; None without it."""
    path = Path(run) / EMISSIONS_FILE
    if not path.is_file():
        return None
    sums = {"kwh": 0.0, "co2_kg": 0.0}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                sums["kwh"] += float(row["energy_consumed"])
                sums["co2_kg"] += float(row["emissions"])
            except (KeyError, TypeError, ValueError):
                logger.warning("%s is no table of codecarbon's: its energy is left out of the card.", path)
                return None
    return sums if math.isfinite(sums["kwh"]) and sums["kwh"] > 0 else None


def data_licence(data: str, revision: str | None = None) -> str | None:
    """The licence in the card of a data set, in a folder or on the Hub; None where there is none that can be read."""
    path = Path(data) / "README.md"
    try:
        if not Path(data).is_dir():
            if "://" in data:
                return None
            path = Path(hf_hub_download(data, "README.md", repo_type="dataset", revision=revision))
        fields = DatasetCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError, hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled):
        return None
    licence = fields.get("license")
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    if licence == "other" and fields.get("license_name"):
        link = fields.get("license_link")
        licence = f"{fields.get('license_name')}{f' ({link})' if link else ''}"
    return str(licence) if licence else None
