"""The tables of RESULTS.md, as lines of Markdown."""

from collections.abc import Callable

from run_data import QUANTIZATIONS, STEP_SETTINGS, Case, Run, model_name, short, step_ms

NEVER = "never"
# The maximum number of kernels and products that the table of a profile lists.
MAX_KERNELS = 40
# The maximum length of a reason, in characters.
MAX_REASON_LENGTH = 150


def tables(rows: dict, runs: list[Run]) -> dict[str, list[str]]:
    """Returns the tables by name. `runs` has the newest run first."""
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
        phases = ", ".join(outcome(name, phase) for name, phase in run.phases.items())
        if run.changed_settings:
            phases += f"; not the default: {', '.join(sorted(run.changed_settings))}"
        commit = f"`{run.commit[:12]}`{run.source()}"
        rows.append([run.date, run.card, run.driver, commit, phases])
    return table(["date", "card", "driver", "commit", "phases"], rows or [[NEVER, "", "", "", ""]])


def outcome(name: str, phase: dict) -> str:
    return f"{name} {phase['status']}" + (f" ({reason(phase)})" if phase["reason"] else "")


def reason(phase: dict) -> str:
    """Returns why a phase is not ok or not complete, on one line, shortened if necessary."""
    text = " ".join(phase["reason"].split())
    return text if len(text) <= MAX_REASON_LENGTH else text[: MAX_REASON_LENGTH - 3] + "..."


def checks(items: list[dict], runs: list[Run]) -> list[str]:
    rows = []
    known = tuple(prefix for item in items for prefix in item.get("checks", []))
    others = {
        name
        for run in runs
        if run.attempted("ops")
        for name in run.values("ops").get("checks", {})
        if not name.startswith(known)
    }
    if others:
        names = sorted(others)
        items = [*items, {"name": ", ".join(names), "without_gpu": "simulated", "checks": names}]
    for item in items:
        shown = next((f"{verdict}: {run.label()}" for run in runs if (verdict := shows(item, run))), NEVER)
        rows.append([item["name"], " ".join(item["without_gpu"].split()), shown])
    return table(["item", "checked without a GPU", "on a GPU"], rows)


def shows(item: dict, run: Run) -> str | None:
    """Returns the result of an item in a run: `ok`, or what is wrong or missing.

    Returns None if the run did not attempt the item.
    """
    if "phase" in item:
        return verdict_of_phase(item["phase"], run)
    if "checks" in item:
        return verdict_of_results("ops", "checks", item["checks"], run)
    return verdict_of_results("selftest", "jobs", item["jobs"], run)


def verdict_of_phase(name: str, run: Run) -> str | None:
    if not run.attempted(name):
        return None
    phase = run.phases[name]
    if phase["wrong"]:
        return f"WRONG ({', '.join(phase['wrong'])})"
    if phase["status"] != "ok":
        return f"{phase['status']} ({reason(phase)})"
    return f"incomplete ({reason(phase)})" if phase["reason"] else "ok"


def verdict_of_results(phase: str, kind: str, prefixes: list[str], run: Run) -> str | None:
    """Returns the verdict on those results of a phase whose names begin with one of `prefixes`."""
    if not run.attempted(phase):
        return None
    values = run.values(phase)
    found = {
        name: result["status"]
        for name, result in values.get(kind, {}).items()
        # The status `--` means that the machine cannot run the check.
        if name.startswith(tuple(prefixes)) and result["status"] != "--"
    }
    by_status = {
        status: [n for n, s in found.items() if s == status] for status in ("ok", "WRONG", "stopped")
    }
    if by_status["WRONG"]:
        return f"WRONG ({', '.join(by_status['WRONG'])})"
    if not values.get("complete"):
        return f"incomplete ({phase} {run.phases[phase]['status']}; {len(by_status['ok'])} ok)"
    if by_status["stopped"]:
        return f"incomplete (stopped: {', '.join(by_status['stopped'])})"
    return "ok" if found else None


def steps(wanted: list[dict], runs: list[Run]) -> list[str]:
    heads = ["base", "rows x positions", "tokens/s", "ms a step", "MFU", "peak memory", "pool", "run"]
    return table(heads, case_rows(wanted, runs, len(heads) - 2, step))


def step(run: Run, case: Case) -> list[str] | None:
    error = case.error("ours")
    if not case.ours:
        return [error, "", "", "", "", run.label()] if error else None
    ours = case.ours[-1]
    return [
        number(ours["tokens_per_s"], 0),
        number(step_ms(ours), 1),
        number(ours.get("mfu"), 1, 100, " %"),
        number(ours["peak_memory_bytes"], 1, 1e-9, " GB"),
        number(ours.get("peak_reserved_memory_bytes"), 1, 1e-9, " GB"),
        run.label() + (f"; in another phase: {error}" if error else ""),
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
    ours, theirs = case.ours[-1] if case.ours else None, case.fastest_peft()
    errors = case.error("ours"), case.error("peft")
    if not (ours or errors[0]) or not (theirs or errors[1]):
        return None
    sides = list(zip((ours, theirs), errors, strict=True))
    return [
        *(number(side["tokens_per_s"], 0) if side else error for side, error in sides),
        number(case.ratio(), 2),
        *(number(side["peak_memory_bytes"], 1, 1e-9, " GB") if side else "-" for side, _ in sides),
        theirs["sdpa"] if theirs else "-",
        run.label(),
    ]


def case_rows(wanted: list[dict], runs: list[Run], cells: int, show: Callable) -> list[list[str]]:
    """Returns a row for each case, the wanted cases first.

    `show` returns the cells of a case in a run, or None. Runs with other numbers of steps are ignored,
    because their medians are not comparable.
    """
    keys = [
        (group["model"], group["quantization"], *map(int, case.split("x")))
        for group in wanted
        for case in group["cases"]
    ]
    newest: dict[tuple, list[str]] = {}
    for run in runs:
        if run.changed_settings & STEP_SETTINGS:
            continue
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
    """Returns the newest profile of a training step: kernel classes, then kernels and products."""
    heads = ["launches", "ms", "of the step", "GB/s", "TFLOP/s", "of the ceiling"]
    for run in runs:
        cases = run.values("steps").get("profiles", []) if run.attempted("steps") else []
        if not cases:
            continue
        case = next((case for case in cases if "profile" in case), cases[0])
        shape = f"{QUANTIZATIONS[case['quantization']]}, {case['micro_batch']} x {case['sequence']}"
        caption = f"{model_name(case)}, {shape}; {run.label()}."
        if "profile" not in case:
            return [f"{caption} No profile: {case['error']}"]
        step, gap = case["profiled_step_milliseconds"], case["gap_milliseconds"]
        times = f"A profiled step takes {step:.1f} ms; {gap:.1f} ms of an unprofiled one are between kernels."
        classes = [profile_row(entry) for entry in case["profile_classes"]]
        kernels = [profile_row(entry) for entry in case["profile"][:MAX_KERNELS]]
        return [
            f"{caption} {times}",
            "",
            *table(["class", *heads], classes),
            "",
            *table(["kernel or product", *heads], kernels),
        ]
    return table(["class, kernel or product", *heads], [[NEVER] + [""] * 6])


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
    """Returns the newest measurements of single operations."""
    heads = ["operation", "ms", "GB/s", "TFLOP/s", "of the ceiling"]
    for run in runs:
        if not run.attempted("bench"):
            continue
        phase, measured = run.phases["bench"], run.values("bench")
        caption = f"{run.label()}."
        if phase["status"] != "ok":
            caption += f" Incomplete: {outcome('bench', phase)}."
        if not measured:
            return [caption]
        ceilings = measured["ceilings"]
        side, copied = ceilings["product_side"], ceilings["copy_bytes"] >> 20
        product = f"{ceilings['tflop_s']:.0f} TFLOP/s (product of {side} x {side} x {side} in bf16)"
        copy = f"{ceilings['gb_s']:.0f} GB/s (copy of {copied} MiB)"
        rows = [bench_row(row) for row in measured["rows"]]
        return [f"{caption} Ceilings: {product}, {copy}.", "", *table(heads, rows)]
    return table(heads, [[NEVER, "", "", "", ""]])


def bench_row(row: dict) -> list[str]:
    if "error" in row:
        return [row["name"], short(row["error"]), "", "", ""]
    percent = number(row["percent"], 0, 1, " %")
    return [row["name"], number(row["milliseconds"], 3), *rates(row), percent]


def rates(entry: dict) -> list[str]:
    return [number(entry.get("gb_s"), 0), number(entry.get("tflop_s"), 1)]
