"""The type of a phase, and the session in which its commands run."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import process


class Skipped(Exception):
    """The phase needs something that this machine does not have."""


@dataclass(frozen=True)
class Phase:
    """A phase: skipped if less than `minimum` seconds are left, stopped after `limit` seconds."""

    name: str
    minimum: int
    limit: int
    run: Callable[["Session"], None]


@dataclass
class Session:
    """A running phase. `values` go into result.json, also if the phase fails or is stopped."""

    kit: Path
    work: Path
    log: Path
    deadline: float
    values: dict = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    # Parts of the phase without a result that are not failures, with their reasons.
    not_measured: list[str] = field(default_factory=list)
    # Names of results that are incorrect. Each has a failure.
    wrong: list[str] = field(default_factory=list)

    def left(self) -> float:
        return 0.0 if process.interrupted else self.deadline - time.monotonic()

    def half(self) -> float:
        """The limit of a command that is not the last: if it hangs, time is left for the others."""
        return self.left() / 2

    def has_time(self, seconds: float, what: str) -> bool:
        """Returns whether `seconds` are left; if not, reports `what` as not measured."""
        if self.left() >= seconds:
            return True
        self.not_measured.append(f"{what}: no time")
        return False

    def command(
        self, what: str, argv: list, limit: float | None = None, **variables: object
    ) -> process.Finished:
        """Runs a command for at most `limit` seconds. If the command fails, the phase fails.

        `variables` are added to the command's environment.
        """
        limit = self.left() if limit is None else min(limit, self.left())
        if limit <= 0:
            self.stopped.append(f"{what}: not started")
            return process.Finished(None, 0.0, "")
        environment = {**os.environ, "TMPDIR": str(self.work)}
        environment |= {name: str(value) for name, value in variables.items()}
        finished = process.run([str(word) for word in argv], self.log, limit, environment, self.kit)
        if finished.status is None:
            self.stopped.append(f"{what}: {finished.how()}")
        elif finished.status != 0:
            self.failures.append(f"{what}: {finished.how()}: {message(finished.output)}")
        return finished

    def append_to_log(self, file: Path) -> None:
        """Appends the beginning of a file that a command wrote."""
        with open(file, "rb") as source, open(self.log, "ab") as log:
            log.write(f"$ cat {file.name}\n".encode() + source.read(process.KEPT_BYTES))

    def bin(self, program: str) -> Path:
        return self.kit / "bin" / program


def run_phase(phase: Phase, kit: Path, out: Path, work: Path, seconds: float) -> dict:
    """Runs a phase for at most `seconds`; returns its part of result.json."""
    started = time.monotonic()
    session = Session(kit, work, out / f"{phase.name}.txt", started + min(seconds, phase.limit))
    skipped = ""
    try:
        phase.run(session)
    except Skipped as reason:
        skipped = str(reason)
    except Exception as error:  # An error in this phase must not prevent the next phases.
        session.failures.append(f"{type(error).__name__}: {error}")
    if process.interrupted:
        session.stopped.append("the run was interrupted")
    parts = session.failures + session.stopped
    if session.not_measured:
        parts.append(f"not measured: {', '.join(session.not_measured)}")
    return {
        "status": status(session, skipped),
        "reason": skipped or "; ".join(parts),
        "seconds": round(time.monotonic() - started, 1),
        "wrong": list(dict.fromkeys(session.wrong)),
        "values": session.values,
    }


def status(session: Session, skipped: str) -> str:
    if skipped:
        return "skipped"
    if session.failures:
        return "failed"
    return "stopped" if session.stopped else "ok"


def message(output: str) -> str:
    """The last line with an error or a result that is not ok, otherwise the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    pattern = re.compile(r"(==)?([\w.]*error|WRONG|stopped)\b", re.IGNORECASE)
    errors = [line for line in lines if pattern.match(line)]
    return ([*lines, *errors] or [""])[-1][:200]


def json_lines(output: str, key: str) -> list[dict]:
    """The objects with `key` among the lines of an output; other lines are skipped.

    NaN and infinities, which are not JSON, become None.
    """
    found = []
    for line in output.splitlines():
        try:
            value = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            continue
        if isinstance(value, dict) and key in value:
            found.append(value)
    return found
