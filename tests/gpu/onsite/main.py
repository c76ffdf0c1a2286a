"""Runs the phases of a kit one after the other: see onsite.sh."""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import check
import process
import table
from guard import guard
from phase import Phase, run_phase
from phases import PHASES, chosen
from settings import SETTINGS

# Seconds reserved for ending a phase's processes, even if one of them hangs, and for the table.
RESERVE = process.GRACE + process.KILLED + 1
# Lines of the table that are printed.
LINES = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="onsite.sh")
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--started", type=int, required=True, help="when the budget began, in seconds since 1970"
    )
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("phases", nargs="*")
    args = parser.parse_args()
    if problem := check.problem(args.phases):
        print(f"onsite.sh: {problem}", file=sys.stderr)
        return 2

    deadline = time.monotonic() + args.seconds - (time.time() - args.started) - RESERVE
    add_packages(args.kit / "python")
    try:
        manifest = read_manifest(args.kit)
    except (OSError, ValueError, KeyError) as error:
        print(f"onsite.sh: invalid kit: {error}", file=sys.stderr)
        return 1
    result = {
        "format": 1,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": manifest["commit"],
        "dirty": manifest["dirty"],
        "prebuilt": manifest["prebuilt"],
        "budget_seconds": args.seconds,
        "settings": SETTINGS.as_dict(),
        "changed_settings": SETTINGS.changed(),
        "phases": {},
    }
    for name in chosen(args.phases):
        result["phases"][name] = outcome = attempt(PHASES[name], args, deadline)
        save(args.out / "result.json", json.dumps(result, indent=1))
        print(
            f"{name:<10}{outcome['status']:<9}{outcome['seconds']:>7.1f} s  {outcome['reason']}", flush=True
        )

    lines = table.lines(result)
    save(args.out / "table.txt", "\n".join(lines) + "\n")
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"({len(lines) - LINES + 1} more lines in table.txt)"]
    print("\n" + "\n".join(lines), flush=True)
    # 143 is the exit status that shells use for SIGTERM.
    return 143 if process.interrupted else exit_status(result["phases"])


def add_packages(packages: Path) -> None:
    """Adds the kit's bitsandbytes to Python's path, if the machine has none."""
    if packages.is_dir() and importlib.util.find_spec("bitsandbytes") is None:
        sys.path.append(str(packages))
        os.environ["PYTHONPATH"] = ":".join(filter(None, (os.environ.get("PYTHONPATH"), str(packages))))


def read_manifest(kit: Path) -> dict:
    """Reads the kit's MANIFEST. Raises ValueError if a file is not the one that was packed."""
    manifest = json.loads((kit / "MANIFEST").read_text())
    for name, file in manifest["files"].items():
        if digest(kit / name) != file["sha256"]:
            raise ValueError(f"{name} is not the file that was packed")
    return manifest


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def attempt(phase: Phase, args: argparse.Namespace, deadline: float) -> dict:
    """Runs a phase if enough time is left and the run was not interrupted."""
    left = deadline - time.monotonic()
    reason = ""
    if process.interrupted:
        reason = "the run was interrupted"
    elif left < phase.minimum:
        reason = f"no time: {max(left, 0):.0f} s left, {phase.minimum} s are the minimum"
    if reason:
        return {"status": "skipped", "reason": reason, "seconds": 0.0, "wrong": [], "values": {}}
    return run_phase(phase, args.kit, args.out, args.work, left)


def exit_status(outcomes: dict[str, dict]) -> int:
    """1 if a phase failed or was stopped, or if all phases except `env` were skipped."""
    if any(outcome["status"] in ("failed", "stopped") for outcome in outcomes.values()):
        return 1
    measured = [outcome for name, outcome in outcomes.items() if name != "env"]
    return int(bool(measured) and all(outcome["status"] == "skipped" for outcome in measured))


def save(path: Path, text: str) -> None:
    """Replaces a file atomically, so that the file is complete whenever the run is stopped."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    guard()
    try:
        status = main()
    finally:
        process.end_descendants()
    sys.exit(status)
