"""Build a processed split: CT volumes, organ masks and organ captions in Parquet shards that any trainer can stream.

A synthetic release of 40 patients in CT-RATE's layout, and the split made of it:
    python -m data_builders synthetic --out out/release --patients 32 --validation 8 --seed 0
    python -m data_builders ct_rate --source out/release --out out/split --organs body_24 --spacing 20 4 4

Your own CTs with TotalSegmentator masks and a CSV of reports (columns id, findings, impression):
    python -m data_builders folder --volumes scans --masks masks --reports reports.csv --out out/split

What came of it, what looks wrong, and how to mend it (terminal, and the page out/split/doctor.html):
    python -m data_builders inspect out/split

CT-RATE straight from the Hub, on one of 32 machines:
    python -m data_builders ct_rate --source hf://datasets/ibrahimhamamci/CT-RATE --out out/ct_rate --shard 1/32

To the Hub, private unless you say otherwise (log in first with `hf auth login`):
    python -m data_builders push --data out/split --repo owner/name --license cc-by-4.0

A build that was killed is continued by the same command. Each command tells its options with --help.
"""

import argparse
import importlib
import sys

from .sources import SourceError

# name -> (module with add_arguments and run, one line). A module is imported only for its own command.
COMMANDS = {
    "synthetic": ("synthetic", "a made-up release in CT-RATE's layout: no data needed"),
    "lesions": ("lesions", "where the findings of the made-up release lie, voxel by voxel"),
    "ct_rate": ("ct_rate", "CT-RATE, from the Hub, a mirror or a folder in its layout -> processed split"),
    "rad_chest_ct": ("rad_chest_ct", "RAD-ChestCT: npz volumes, 84 abnormalities, no reports -> processed split"),
    "folder": ("folder", "your own CTs (NIfTI, NRRD, MetaImage, DICOM) + masks + reports -> processed split"),
    "merge": ("merge", "finish a split whose shards were built by several tasks (--shard i/n)"),
    "cache": ("cache", "a processed split -> memory-mapped Arrow files, for speed in training"),
    "inspect": ("inspection", "what lies in a processed split, and what looks wrong with it"),
    "decompose": ("decompose_command", "reports -> sentences by organ, by rules or a language model"),
    "decompose-score": ("decompose_score", "how good a split of reports by organ is, against gold"),
    "decompose-agree": ("decompose_agreement", "Cohen's kappa of two splits of the same reports by organ"),
    "report-page": ("report_page", "a split of reports by organ -> HTML page with the organs in colour"),
    "correct": ("correction_csv", "a split of reports by organ -> CSV to correct by hand, and back"),
    "push": ("push", "a processed split -> dataset repository on the Hub, private unless you say otherwise"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m data_builders", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in argv if word in COMMANDS), None)
    modules = {}
    for name, (module_name, line) in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=line)
            continue
        module = modules[name] = importlib.import_module(f".{module_name}", __package__)
        command = commands.add_parser(
            name, help=line, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return modules[args.command].run(args)
    except (ValueError, SourceError) as error:  # what a user can mend: the message says how, a traceback would hide it
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
