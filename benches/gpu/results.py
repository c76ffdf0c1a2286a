#!/usr/bin/env python3
"""Makes the tables of RESULTS.md from the runs on GPUs.

    results.py                     rewrites the tables between the page's markers
    results.py --check             fails if the page would change
    results.py --add RESULT        adds result.json of a run of tests/gpu/onsite.sh, then rewrites
    --results DIR, --page FILE     other runs than results/, another page than RESULTS.md

The runs are results/DATE-CARD.json; the rows of the tables are in tables.toml. A row shows the
newest run that has a result for it, or `never`.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

from run_data import QUANTIZATIONS, Case, Run, model_name, step_ms

HERE = Path(__file__).resolve().parent
SIMULATED = "Simulated GPU"
NEVER = "never"
# Kernels and products of a profile or of the microbenchmarks that are listed.
MOST_KERNELS = 40


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the tables of RESULTS.md from the runs on GPUs.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the runs")
    parser.add_argument("--page", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--check", action="store_true", help="fail if the page would change")
    parser.add_argument("--add", type=Path, metavar="RESULT", help="result.json of another run")
    args = parser.parse_args()
    if args.add:
        print(f"added {add(args.add, args.results)}")
    runs = [Run.from_file(path) for path in args.results.glob("*.json")]
    runs.sort(key=lambda run: run.date, reverse=True)
    rows = tomllib.loads((HERE / "tables.toml").read_text())
    old = args.page.read_text()
    new = old
    for name, lines in tables(rows, runs).items():
        new = replace(new, name, lines, args.page)
    if args.check:
        if new != old:
            print(
                f"{args.page} is not what the runs in {args.results} give; run benches/gpu/results.py",
                file=sys.stderr,
            )
        return int(new != old)
    args.page.write_text(new)
    return 0


def add(result: Path, results: Path) -> Path:
    """Copies the result of a run to the others; a run on the simulated GPU is refused."""
    run = Run.from_file(result)
    if run.card == SIMULATED:
        sys.exit(f"{result}: the run was on a simulated GPU, not on hardware")
    card = re.sub(r"[^a-z0-9]+", "-", run.card.lower()).strip("-")
    path = results / f"{run.date.replace(':', '')}-{card}.json"
    results.mkdir(exist_ok=True)
    path.write_text(result.read_text().rstrip("\n") + "\n")
    return path


def replace(page: str, name: str, lines: list[str], path: Path) -> str:
    """The page with a table's lines between its markers."""
    begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{path}: the markers {begin} and {end} are missing")
    return "\n".join([before + begin, "", *lines, "", end + after])


def tables(rows: dict, runs: list[Run]) -> dict[str, list[str]]:
    """The tables by name; `runs`: the newest first."""
    return {
        "runs": all_runs(runs),
        "checks": checks(rows["item"], runs),
        "steps": steps(rows["step"], runs),
        "peft": against_peft(rows["step"], runs),
        "profile": profile(runs),
        "bench": bench(runs),
    }


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def all_runs(runs: list[Run]) -> list[str]:
    rows = []
    for run in runs:
        phases = [f"{name} {phase['status']}" for name, phase in run.phases.items()]
        rows.append(
            [
                run.date,
                run.card,
                run.driver,
                f"`{run.commit[:12]}`{' with changes' if run.dirty else ''}",
                ", ".join(phases),
            ]
        )
    return table(["date", "card", "driver", "commit", "phases"], rows or [[NEVER, "", "", "", ""]])


def checks(items: list[dict], runs: list[Run]) -> list[str]:
    rows = []
    known = tuple(prefix for item in items for prefix in item.get("checks", []))
    others = {
        name for run in runs for name in run.values("ops").get("checks", {}) if not name.startswith(known)
    }
    if others:
        names = sorted(others)
        items = [*items, {"name": ", ".join(names), "without_gpu": "simulated", "checks": names}]
    for item in items:
        shown = next((f"{verdict}: {run.label()}" for run in runs if (verdict := shows(item, run))), NEVER)
        rows.append([item["name"], " ".join(item["without_gpu"].split()), shown])
    return table(["item", "checked without a GPU", "on a GPU"], rows)


def shows(item: dict, run: Run) -> str | None:
    """`ok`, what is wrong, or None if the run has no result for the item."""
    bad, found = [], False
    operations = run.values("ops").get("checks", {})
    jobs = {**run.values("selftest").get("jobs", {}), **run.values("nccl").get("jobs", {})}
    for results, prefixes in ((operations, item.get("checks", [])), (jobs, item.get("jobs", []))):
        for name, result in results.items():
            # `--`: the machine cannot run it.
            if name.startswith(tuple(prefixes)) and result["status"] != "--":
                found = True
                if result["status"] != "ok":
                    bad.append(name)
    phase = run.phases.get(item.get("phase", ""))
    if phase and phase["status"] != "skipped":
        found = True
        if phase["status"] != "ok":
            bad.append(f"{item['phase']} {phase['status']}")
    if not found:
        return None
    return f"WRONG ({', '.join(bad)})" if bad else "ok"


def steps(wanted: list[dict], runs: list[Run]) -> list[str]:
    heads = ["base", "rows x positions", "tokens/s", "ms a step", "MFU", "peak memory", "pool", "run"]
    return table(heads, case_rows(wanted, runs, len(heads) - 2, step))


def step(run: Run, case: Case) -> list[str] | None:
    if not case.ours:
        return None
    ours = case.ours[-1]
    return [
        number(ours["tokens_per_s"], 0),
        number(step_ms(ours), 1),
        number(ours.get("mfu"), 1, 100, " %"),
        number(ours["peak_memory_bytes"], 1, 1e-9, " GB"),
        number(ours.get("peak_reserved_memory_bytes"), 1, 1e-9, " GB"),
        run.label(),
    ]


def against_peft(wanted: list[dict], runs: list[Run]) -> list[str]:
    heads = [
        "base",
        "rows x positions",
        "tokens/s",
        "PEFT",
        "ratio",
        "peak memory",
        "PEFT",
        "PEFT's kernel",
        "run",
    ]
    wanted = [group for group in wanted if group["peft"]]
    return table(heads, case_rows(wanted, runs, len(heads) - 2, both_sides))


def both_sides(run: Run, case: Case) -> list[str] | None:
    if not case.ours or not case.peft:
        return None
    ours, theirs = case.ours[-1], case.fastest_peft()
    return [
        number(ours["tokens_per_s"], 0),
        number(theirs["tokens_per_s"], 0),
        number(case.ratio(), 2),
        number(ours["peak_memory_bytes"], 1, 1e-9, " GB"),
        number(theirs["peak_memory_bytes"], 1, 1e-9, " GB"),
        theirs["sdpa"],
        run.label(),
    ]


def case_rows(wanted: list[dict], runs: list[Run], cells: int, show) -> list[list[str]]:
    """A row for each case, first the wanted ones: `show` gives a run's cells of a case, or None."""
    keys = [
        (group["model"], group["quantization"], *map(int, case.split("x")))
        for group in wanted
        for case in group["cases"]
    ]
    newest: dict[tuple, list[str]] = {}
    for run in runs:
        for key, case in run.cases().items():
            if key not in newest and (shown := show(run, case)):
                newest[key] = shown
    rows = []
    for key in dict.fromkeys([*keys, *newest]):
        model, quantization, micro_batch, positions = key
        name = [f"{model}, {QUANTIZATIONS.get(quantization, quantization)}", f"{micro_batch} x {positions}"]
        rows.append(name + newest.get(key, [NEVER] + [""] * (cells - 1)))
    return rows


def number(value: float | None, digits: int, factor: float = 1, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:,.{digits}f}{unit}"


def profile(runs: list[Run]) -> list[str]:
    """The newest profile of a training step: classes of kernels, then kernels and products."""
    heads = ["", "launches", "ms", "of the step", "GB/s", "TFLOP/s", "of the ceiling"]
    for run in runs:
        for case in run.values("steps").get("profiles", []):
            if "profile" not in case:
                continue
            shape = f"{QUANTIZATIONS[case['quantization']]}, {case['micro_batch']} x {case['sequence']}"
            step, gap = case["profiled_step_milliseconds"], case["gap_milliseconds"]
            times = (
                f"A profiled step takes {step:.1f} ms; {gap:.1f} ms of an unprofiled one are between kernels."
            )
            tables = [
                table([kind, *heads[1:]], [profile_row(entry) for entry in entries])
                for kind, entries in (
                    ("class", case["profile_classes"]),
                    ("kernel or product", case["profile"][:MOST_KERNELS]),
                )
            ]
            return [f"{model_name(case)}, {shape}; {run.label()}. {times}", "", *tables[0], "", *tables[1]]
    return table(["class, kernel or product", *heads[1:]], [[NEVER] + [""] * 6])


def profile_row(entry: dict) -> list[str]:
    return [
        entry["name"],
        f"{entry['count']:g}",
        number(entry["milliseconds"], 3),
        number(entry["percent_of_step"], 1, 1, " %"),
        *rates(entry),
        number(entry["percent_of_ceiling"], 0, 1, " %"),
    ]


def bench(runs: list[Run]) -> list[str]:
    """The newest measurements of operations alone."""
    heads = ["operation", "ms", "GB/s", "TFLOP/s", "of the ceiling"]
    for run in runs:
        measured = run.values("bench")
        if not measured:
            continue
        ceilings = measured["ceilings"]
        rows = []
        for row in measured["rows"]:
            if "error" in row:
                rows.append([row["name"], row["error"], "", "", ""])
            else:
                rows.append(
                    [
                        row["name"],
                        number(row["milliseconds"], 3),
                        *rates(row),
                        number(row["percent"], 0, 1, " %"),
                    ]
                )
        side, copied = ceilings["product_side"], ceilings["copy_bytes"] >> 20
        product = f"{ceilings['tflop_s']:.0f} TFLOP/s (product of {side} x {side} x {side} in bf16)"
        copy = f"{ceilings['gb_s']:.0f} GB/s (copy of {copied} MiB)"
        return [f"{run.label()}. Ceilings: {product}, {copy}.", "", *table(heads, rows)]
    return table(heads, [[NEVER, "", "", "", ""]])


def rates(entry: dict) -> list[str]:
    return [number(entry.get("gb_s"), 0), number(entry.get("tflop_s"), 1)]


if __name__ == "__main__":
    sys.exit(main())
