"""Turn the JSON files of the benchmarks into one table: benchmarks/RESULTS.md between its two marks.

    python -m benchmarks.results runs/bench/*.json
    python -m benchmarks.results runs/bench/*.json --into my_results.md

Only the part between `<!-- figures -->` and `<!-- /figures -->` is replaced; the words around it are the author's. A
file that is not there is made of the marks and the table.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

START, STOP = "<!-- figures -->", "<!-- /figures -->"
RESULTS = Path(__file__).with_name("RESULTS.md")


def figures(results: Iterable[dict]) -> str:
    """Markdown: machines, a table of all results, their notes."""
    results = list(results)
    machines = dict.fromkeys((result["machine"], result["date"]) for result in results)
    lines = [f"{machine}; {day}." for machine, day in machines]
    lines += ["", "| name | baseline | ours | ratio | difference | bound | ours / bound |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    notes: dict[str, list[str]] = {}
    for result in results:
        if "baseline_gb" in result:
            baseline, ours = f"{result['baseline_gb']:.2f} GB", f"{result['ours_gb']:.2f} GB"
        else:
            baseline, ours = f"{result['baseline_s']:.4g} s", f"{result['ours_s']:.4g} s"
        difference = "" if result["max_rel_diff"] is None else f"{result['max_rel_diff']:.1e}"
        bound = "" if result["bound_s"] is None else f"{result['bound_s']:.4g} s"
        distance = "" if result["distance"] is None else f"{result['distance']:.2f}"
        cells = (f"`{result['name']}`", baseline, ours, f"{result['ratio']:.2f}", difference, bound, distance)
        lines.append(f"| {' | '.join(cells)} |")
        if result["note"]:
            notes.setdefault(result["note"], []).append(result["name"])
    lines.append("")
    lines += [f"- {', '.join(f'`{name}`' for name in names)}: {note}" for note, names in notes.items()]
    return "\n".join(lines).rstrip() + "\n"


def put_between_marks(text: str, content: str) -> str:
    """The text with `content` between its marks."""
    before, rest = text.split(START, 1)
    return f"{before}{START}\n{content}{STOP}{rest.split(STOP, 1)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path, help="Files written with --json.")
    parser.add_argument("--into", type=Path, default=RESULTS, help="Markdown file (default: benchmarks/RESULTS.md).")
    options = parser.parse_args(arguments)
    results = []
    for path in options.json:
        try:
            results += json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"error: {path} cannot be read: {error}", file=sys.stderr)
            return 2
    old = options.into.read_text(encoding="utf-8") if options.into.is_file() else f"{START}\n{STOP}\n"
    if START not in old or STOP not in old:
        print(f"error: {options.into} has no marks {START} and {STOP}: nothing is written.", file=sys.stderr)
        return 2
    options.into.write_text(put_between_marks(old, figures(results)), encoding="utf-8")
    print(f"{len(results)} results written into {options.into}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
