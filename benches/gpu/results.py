#!/usr/bin/env python3
"""Makes the tables of RESULTS.md from the runs on GPUs.

    results.py                     rewrites the tables between the markers of the page
    results.py --check             fails if the page would change
    results.py --add RESULT        adds result.json of a run of tests/gpu/onsite.sh, then rewrites
    --results DIR, --page FILE     the directory of the runs instead of results/, the page instead of
                                   RESULTS.md

The runs are results/DATE-CARD.json. The rows of the tables are in tables.toml. A row shows the
newest run that attempted it with the default settings of onsite.sh, even if it failed in that run, or
`never`. The table of runs has all runs.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

from result_tables import tables
from run_data import UNKNOWN_CARD, Run

HERE = Path(__file__).resolve().parent
SIMULATED = "Simulated GPU"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the tables of RESULTS.md from the runs on GPUs.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the runs")
    parser.add_argument("--page", type=Path, default=HERE / "RESULTS.md")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if the page would change")
    action.add_argument("--add", type=Path, metavar="RESULT", help="result.json of another run")
    args = parser.parse_args()
    rows = tomllib.loads((HERE / "tables.toml").read_text())
    runs = {path: load(path, rows) for path in args.results.glob("*.json")}
    if args.add:
        added = load(args.add, rows)
        refuse_unpublishable(added, args.add)
        stored = args.results / file_name(added)
        runs[stored] = added
    newest_first = sorted(runs.values(), key=lambda run: run.date, reverse=True)
    old = args.page.read_text()
    new = old
    for name, lines in tables(rows, newest_first).items():
        new = replace(new, name, lines, args.page)
    if args.check:
        if new != old:
            print(
                f"invalid {args.page}: it differs from the tables of the runs in {args.results}; "
                "run benches/gpu/results.py",
                file=sys.stderr,
            )
        return int(new != old)
    if args.add:
        args.results.mkdir(exist_ok=True)
        stored.write_text(args.add.read_text().rstrip("\n") + "\n")
        print(f"added {stored}")
    args.page.write_text(new)
    return 0


def load(path: Path, rows: dict) -> Run:
    """Reads a run and checks that its tables can be made."""
    try:
        run = Run.from_file(path)
    except (OSError, ValueError) as error:
        sys.exit(f"invalid {path}: {error}")
    try:
        tables(rows, [run])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"invalid {path}: the tables cannot be made: {type(error).__name__}: {error}")
    return run


def refuse_unpublishable(run: Run, path: Path) -> None:
    if run.card == SIMULATED:
        sys.exit(f"invalid {path}: the run used a simulated GPU; it must use hardware")
    if run.card == UNKNOWN_CARD:
        sys.exit(f"invalid {path}: the card is unknown, because the phase env failed")


def file_name(run: Run) -> str:
    card = re.sub(r"[^a-z0-9]+", "-", run.card.lower()).strip("-")
    return f"{run.date.replace(':', '')}-{card}.json"


def replace(page: str, name: str, lines: list[str], path: Path) -> str:
    """Returns the page with the lines of a table between its markers."""
    begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"invalid {path}: it has no table {name}; it must contain {begin} and {end}")
    return "\n".join([before + begin, "", *lines, "", end + after])


if __name__ == "__main__":
    sys.exit(main())
