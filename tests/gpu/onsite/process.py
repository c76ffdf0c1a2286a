"""Runs a command under a time limit and ends every process that the command started."""

import ctypes
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

# Seconds between SIGTERM and SIGKILL.
GRACE = 2.0
# Seconds after SIGKILL.
KILLED = 15.0
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Finished:
    """A command that ended; `status` is its exit status, or None if it was stopped at its limit."""

    status: int | None
    seconds: float
    output: str


def adopt_orphans() -> None:
    """Makes this process the parent of processes whose parents end: `descendants` finds them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run(argv: list[str], log: Path, limit: float, environment: dict[str, str], directory: Path) -> Finished:
    """Runs `argv` for at most `limit` seconds; appends it and its output to `log` as they come."""
    started = time.monotonic()
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(argv)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            cwd=directory,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(timeout=max(limit, 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_descendants()
            # It may have been reaped there.
            process.poll()
    seconds = time.monotonic() - started
    with open(log, "rb") as file:
        file.seek(begin)
        output = file.read().decode(errors="replace")
    return Finished(status, seconds, output)


def descendants() -> list[int]:
    """The processes that this process started, and those that they started."""
    parents = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text()
        except OSError:
            continue
        # Fields are counted after the command's name, which may hold spaces and parentheses.
        state, parent = stat.rpartition(")")[2].split()[:2]
        if state != "Z":
            parents[int(entry)] = int(parent)
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def end_descendants() -> None:
    """Ends all descendants, by SIGTERM, then by SIGKILL, and reaps those that are children. A process
    that hangs in the kernel, as one may whose GPU does not answer, is left after a while."""
    give_up = time.monotonic() + GRACE
    asked = set()
    while (left := descendants()) and time.monotonic() < give_up + KILLED:
        for process in left:
            try:
                if time.monotonic() > give_up:
                    os.kill(process, signal.SIGKILL)
                elif process not in asked:
                    os.kill(process, signal.SIGTERM)
            except ProcessLookupError:
                pass
            asked.add(process)
        reap()
        time.sleep(0.02)
    reap()


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass
    except ChildProcessError:
        pass
