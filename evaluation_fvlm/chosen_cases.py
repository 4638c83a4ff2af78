"""Which cases of a run are worth a look: its surest mistakes, and what it was right about; and whose cases they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

SYNTHETIC_FINDINGS = Path(__file__).resolve().parent.parent / "hub_configs" / "synthetic" / "findings.yaml"


def worst_errors(frame: pd.DataFrame, count: int = 12, per_finding: int = 2) -> pd.DataFrame:
    """The surest mistakes of a table of scores, the worst first: half of them missed, half of them false alarms.

    Args:
        frame: Rows of one task or several.
        count: Rows at most.
        per_finding: Of one finding and kind at most, so that one weak finding does not fill the list.

    Returns:
        Rows of `frame` with `kind` ("missed", "false alarm") and `error`, the distance of score and label. A missed
        finding scores below 0.5, a false alarm above.
    """
    scored = frame[frame["score"].notna() & frame["label"].notna()]
    error = (scored["score"].astype(float) - scored["label"].astype(float)).abs()
    wrong = scored.assign(error=error, kind=np.where(scored["label"] == 1, "missed", "false alarm"))
    wrong = wrong[error > 0.5].sort_values("error", ascending=False, kind="stable")
    wrong = wrong[wrong.groupby(["task", "finding", "kind"]).cumcount() < per_finding]
    parts = [wrong[wrong["kind"] == kind].head(count // 2) for kind in ("missed", "false alarm")]
    return pd.concat(parts).sort_values("error", ascending=False, kind="stable")


def surest_hits(frame: pd.DataFrame, count: int = 6) -> pd.DataFrame:
    """Findings that are there and score above 0.5: of each organ the highest, best organs first; `kind` is "found"."""
    hits = frame[(frame["label"] == 1) & (frame["score"] > 0.5)].sort_values("score", ascending=False, kind="stable")
    return hits.drop_duplicates("organ").head(count).assign(kind="found")


def is_synthetic(frame: pd.DataFrame) -> bool:
    """Whether the scores are of the synthetic set, whose reports no patient stands behind.

    Its labels alone hold all that it paints, known for every scan. The set's prompts on other data would leave most
    labels unknown.
    """
    if not SYNTHETIC_FINDINGS.is_file() or frame.empty:
        return False
    rows = yaml.safe_load(SYNTHETIC_FINDINGS.read_text(encoding="utf-8"))["findings"]
    return bool(frame["label"].notna().all()) and set(frame["finding"]) == {row["finding"] for row in rows}
