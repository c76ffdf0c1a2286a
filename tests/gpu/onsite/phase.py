"""What a phase is, and what its commands run with."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import process

# A phase's text is cut to this: the beginning and the end.
LOG_BYTES = 15 << 20


class Skipped(Exception):
    """The phase needs something that this machine does not have."""


@dataclass(frozen=True)
class Phase:
    """Is not started with less than `minimum` seconds, and is stopped after `limit` seconds."""

    name: str
    minimum: int
    limit: int
    run: Callable[["Session"], None]


@dataclass
class Session:
    """A phase that runs; `values` go into result.json, also if the phase fails or is stopped."""

    kit: Path
    work: Path
    log: Path
    deadline: float
    values: dict = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def command(
        self, what: str, argv: list, limit: float | None = None, **variables: str
    ) -> process.Finished:
        """Runs a command for at most `limit` seconds; its failure is the phase's.

        `variables` are added to its environment.
        """
        limit = self.left() if limit is None else min(limit, self.left())
        environment = {**os.environ, "TMPDIR": str(self.work), **variables}
        finished = process.run([str(word) for word in argv], self.log, limit, environment, self.kit)
        if finished.status is None:
            self.stopped.append(f"{what} after {finished.seconds:.0f} s")
        elif finished.status != 0:
            self.failures.append(f"{what}: exit status {finished.status}: {message(finished.output)}")
        return finished

    def bin(self, program: str) -> Path:
        return self.kit / "bin" / program


def run_phase(phase: Phase, kit: Path, out: Path, work: Path, seconds: float) -> dict:
    """Runs a phase for at most `seconds`; returns its part of result.json."""
    started = time.monotonic()
    session = Session(kit, work, out / f"{phase.name}.txt", started + min(seconds, phase.limit))
    try:
        phase.run(session)
        status, reason = "ok", ""
        if session.failures:
            status, reason = "failed", "; ".join(session.failures)
        elif session.stopped:
            status, reason = "stopped", "; ".join(session.stopped)
    except Skipped as skipped:
        status, reason = "skipped", str(skipped)
    except (OSError, KeyError, TypeError, ValueError) as error:
        status, reason = "failed", f"{type(error).__name__}: {error}"
    cut(session.log)
    return {
        "status": status,
        "reason": reason,
        "seconds": round(time.monotonic() - started, 1),
        "values": session.values,
    }


def message(output: str) -> str:
    """The last line of an output that is an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w*error|WRONG)\b", line, re.IGNORECASE)]
    return ([*lines, *errors] or [""])[-1][:200]


def cut(log: Path) -> None:
    """Shortens a file that is too large, in its middle."""
    if not log.exists() or log.stat().st_size <= LOG_BYTES:
        return
    text = log.read_bytes()
    log.write_bytes(text[: LOG_BYTES // 2] + b"\n... shortened ...\n" + text[-LOG_BYTES // 2 :])
