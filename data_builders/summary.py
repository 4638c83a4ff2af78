"""What came of a build: its manifest, and the summary that is printed."""

import re
import textwrap
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from modeling_fvlm.geometry import AXES

from .cases import Case
from .shards import ShardRecord

FORMAT_VERSION = 1  # up when the columns, or the meaning of one, change

console = Console()


def make_manifest(
    cases: Sequence[Case], identity: dict, records: Sequence[ShardRecord], concerns: dict[str, int]
) -> dict:
    """Everything a reader of the split may ask: settings, counts, every case without a row with its reason.

    Args:
        cases: All of them; their files are not looked at.
        identity: Settings and hash of the source.
        records: One per shard.
        concerns: Kind -> how often the reports seem to hold a date, a name or the like.
    """
    settings = identity["settings"]
    skipped = [
        {"split": case.split, "case": case.recon_id, "reason": case.skip_reason}
        | ({"is_excluded": True} if case.is_excluded else {})
        for case in cases
        if case.skip_reason
    ]
    skipped += [entry for record in records for entry in record.skipped]
    left_out = {entry["case"] for entry in skipped}
    splits = {}
    for split in dict.fromkeys(case.split for case in cases):
        members = [case for case in cases if case.split == split]
        written = [case for case in members if case.recon_id not in left_out]
        organs: dict[str, Counter] = {organ: Counter() for organ in settings["organ_set"]["organs"]}
        for record in records:
            for organ, counts in record.counts.items() if record.split == split else ():
                organs[organ].update(counts)
        splits[split] = {
            "cases": len(members),
            "excluded": sum(case.is_excluded for case in members),
            "rows": len(written),
            "scans": len({case.scan_id for case in written}),
            "patients": len({case.patient_id for case in written}),
            "organs": {
                organ: {kind: count[kind] for kind in ("present", "mentioned", "abnormal")}
                for organ, count in organs.items()
            },
        }
    return {
        "tool": f"fVLM data_builders, format {FORMAT_VERSION}",
        **identity,
        "splits": splits,
        "skipped": skipped,
        "duplicates": [
            {"split": case.split, "case": case.recon_id, "duplicate_of": case.duplicate_of}
            for case in cases
            if case.duplicate_of is not None and case.recon_id not in left_out
        ],
        "privacy_concerns": concerns,
        "warnings": [{"split": "all", "case": "all", "warning": warning} for warning in general_warnings(settings)]
        + [entry for record in records for entry in record.warnings],
        "shards": [record.as_json() for record in records],
    }


def general_warnings(settings: dict) -> list[str]:
    """What looks wrong with the whole split, from its settings as they stand in the manifest."""
    warnings = []
    if settings["options"].get("splits_by") == "id":
        warnings.append(
            "splits are by id, because the table has no column patient_id: scans of one patient may stand in several "
            "splits, which makes validation look better than it is"
        )
    bare = [axis for axis, margin in zip(AXES, settings["margin_voxels"]) if margin == 0]
    if bare:
        warnings.append(
            f"the margin is 0 along {', '.join(bare)}: organs that touch the box of all organs lie on the edge of the "
            "volume, and count as cut off in training under the border rule"
        )
    return warnings


def skipped_and_excluded(manifest: dict) -> tuple[list[dict], list[dict]]:
    """Entries of `skipped` that something is wrong with, and those that were left out on purpose."""
    entries = manifest.get("skipped", ())
    return (
        [entry for entry in entries if not entry.get("is_excluded")],
        [entry for entry in entries if entry.get("is_excluded")],
    )


def kind_of(reason: str) -> str:
    """A skip reason without what differs from case to case: the file in front, names in quotes, numbers."""
    kind = re.sub(r"^(mask )?\S+: ", r"\1", reason)
    return textwrap.shorten(re.sub(r"'[^']*'|\[[^\]]*\]|\([^)]*\)|[\d.]*\d", "..", kind), 72, placeholder=" ...")


def print_summary(manifest: dict) -> None:
    """Counts per split and organ, what was skipped, and what looks wrong."""
    splits = manifest["splits"]
    table = Table(title="processed split")
    table.add_column("")
    for split in splits:
        table.add_column(split, justify="right")
    for kind in ("cases", "rows", "scans", "patients"):
        table.add_row(kind, *(str(content[kind]) for content in splits.values()))
    skipped, excluded = skipped_and_excluded(manifest)
    for kind, entries in (("skipped", skipped), ("left out on purpose", excluded)):
        counts = Counter(entry["split"] for entry in entries)
        if counts:
            table.add_row(kind, *(str(counts[split]) for split in splits))
    console.print(table)

    has_rows = any(content["rows"] for content in splits.values())
    if has_rows:  # else there is nothing but zeros to show, and the reasons are what is looked for
        organs = Table(title="organs: in the mask / mentioned / abnormal")
        organs.add_column("")
        for split in splits:
            organs.add_column(split, justify="right")
        for organ in manifest["settings"]["organ_set"]["organs"]:
            counts = [content["organs"][organ] for content in splits.values()]
            organs.add_row(organ, *(f"{c['present']} / {c['mentioned']} / {c['abnormal']}" for c in counts))
        console.print(organs)

    if excluded:
        kinds = Counter(kind_of(entry["reason"]) for entry in excluded)
        told = "; ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(4))
        console.print(
            f"  {len(excluded):,} left out on purpose ({told}): in manifest.json, key `skipped`, marked `is_excluded`",
            markup=False,
        )
    if skipped:
        kinds = Counter(kind_of(entry["reason"]) for entry in skipped)
        reasons = Table("cases", "skipped because", title=f"{len(skipped)} skipped")
        for kind, count in kinds.most_common(12):
            reasons.add_row(str(count), kind)
        console.print(reasons)
        for entry in skipped[:8]:
            console.print(f"  skipped {entry['case']}: {entry['reason']}", style="yellow", markup=False)
        if len(skipped) > 8:
            console.print("  ... all of them in manifest.json, key `skipped`", style="yellow", markup=False)
        if manifest["settings"].get("ids") == "hashed":
            console.print(
                "  Which of your cases these are stands in the table that the same build with --id_key FILE writes "
                "(outside the split).",
                style="yellow",
                markup=False,
            )
    duplicates = manifest.get("duplicates", ())  # splits from before there was such a key have none
    if duplicates:
        console.print(
            f"  {len(duplicates)} cases have the report of another case word for word; they are in manifest.json, key "
            "`duplicates`",
            style="yellow",
            markup=False,
        )
    by_kind: dict[str, list[dict]] = {}
    for entry in manifest["warnings"]:
        by_kind.setdefault(kind_of(entry["warning"]), []).append(entry)
    for entries in list(by_kind.values())[:8]:
        more = f" (and {len(entries) - 1} more like it)" if len(entries) > 1 else ""
        console.print(f"  check {entries[0]['case']}: {entries[0]['warning']}{more}", style="red", markup=False)
    if len(manifest["warnings"]) > min(len(by_kind), 8):
        console.print("  ... all of them in manifest.json, key `warnings`", style="red", markup=False)
    never = [
        o
        for o in manifest["settings"]["organ_set"]["organs"]
        if not any(c["organs"][o]["present"] for c in splits.values())
    ]
    if never and has_rows:
        console.print(
            f"in no mask: {', '.join(never)}. Right if the scans show another region; else the numbering is wrong.",
            style="yellow",
            markup=False,
        )
