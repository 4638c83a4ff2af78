"""Tell what lies in a processed split, and draw some of its cases.

python -m data_builders inspect --data out/ct_rate --cases 4 --out out/pictures
"""

import argparse
import json
from pathlib import Path

from .build import console, print_summary
from .cases import SPLITS
from .previews import write_previews


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="Folder of a processed split.")
    parser.add_argument("--split", choices=SPLITS, help="Split to draw from (default: each that is there).")
    parser.add_argument("--cases", type=int, default=4, help="Cases to draw per split (default: 4).")
    parser.add_argument("--out", type=Path, help="Folder for the pictures (default: previews/ in --data).")


def run(args: argparse.Namespace) -> int:
    path = args.data / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"--data {args.data}: there is no manifest.json; the build was not completed, or this is another folder."
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    print_summary(manifest)
    for split, content in manifest["splits"].items():
        if content["rows"] and args.split in (None, split):
            for picture in write_previews(args.data, split, args.cases, args.out or args.data / "previews"):
                console.print(str(picture), soft_wrap=True, markup=False)
    return 0
