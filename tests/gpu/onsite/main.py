"""Runs the phases of a kit one after the other: see onsite.sh."""

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import process
import settings
import table
from phase import Phase, run_phase
from phases import HALVES, PHASES

# With result.json and table.txt, eight files.
MOST_PHASES = 6
# Seconds kept for ending a phase's processes, and for the table.
RESERVE = 4.0
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
    names = chosen(args.phases or ["first"])
    if isinstance(names, str):
        print(f"onsite.sh: {names}", file=sys.stderr)
        return 2

    deadline = time.monotonic() + args.seconds - (time.time() - args.started) - RESERVE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process.adopt_orphans()
    # bitsandbytes of the kit, if the machine has none.
    packages = args.kit / "python"
    if packages.is_dir() and importlib.util.find_spec("bitsandbytes") is None:
        sys.path.append(str(packages))
        os.environ["PYTHONPATH"] = ":".join(filter(None, (os.environ.get("PYTHONPATH"), str(packages))))
    manifest = json.loads((args.kit / "MANIFEST").read_text())
    if damaged := [
        name for name, file in manifest["files"].items() if digest(args.kit / name) != file["sha256"]
    ]:
        print(f"onsite.sh: {damaged[0]} of the kit is not the file that was packed", file=sys.stderr)
        return 2
    result = {
        "format": 1,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": manifest["commit"],
        "dirty": manifest["dirty"],
        "budget_seconds": args.seconds,
        "settings": settings.as_dict(),
        "phases": {},
    }
    for name in names:
        result["phases"][name] = outcome = attempt(PHASES[name], args, deadline)
        save(args.out / "result.json", json.dumps(result, indent=1))
        print(
            f"{name:<10}{outcome['status']:<9}{outcome['seconds']:>7.1f} s  {outcome['reason']}", flush=True
        )

    lines = table.lines(result)
    save(args.out / "table.txt", "\n".join(lines) + "\n")
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"({len(lines) - LINES + 1} more lines in table.txt)"]
    print("\n" + "\n".join(lines))
    bad = [name for name, outcome in result["phases"].items() if outcome["status"] in ("failed", "stopped")]
    return 1 if bad else 0


def chosen(words: list[str]) -> list[str] | str:
    """The phases that the words name, `env` first; a message if they are invalid."""
    names = [name for word in words for name in HALVES.get(word, [word])]
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        return f"invalid phase {unknown[0]}: must be {', '.join(HALVES)}, {', '.join(PHASES)}"
    # Whatever is measured, the machine is part of the result.
    names = list(dict.fromkeys(["env", *names]))
    if len(names) > MOST_PHASES:
        return f"invalid phases: {len(names)}, with env; at most {MOST_PHASES} fit in a run"
    return names


def attempt(phase: Phase, args: argparse.Namespace, deadline: float) -> dict:
    """Runs a phase if enough time is left."""
    left = deadline - time.monotonic()
    if left < phase.minimum:
        reason = f"no time: {max(left, 0):.0f} s left, {phase.minimum} s are the minimum"
        return {"status": "skipped", "reason": reason, "seconds": 0.0, "values": {}}
    return run_phase(phase, args.kit, args.out, args.work, left)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def save(path: Path, text: str) -> None:
    """Replaces a file, so that it is whole whenever the run is stopped."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    try:
        status = main()
    finally:
        process.end_descendants()
    sys.exit(status)
