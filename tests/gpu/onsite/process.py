"""Runs a command under a time limit and ends every process that the command started."""

import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Seconds between SIGTERM and SIGKILL.
GRACE = 2.0
# Seconds to wait after SIGKILL. A process that is left then hangs in the kernel, for example in the
# driver.
KILLED = 3.0
# Number of bytes that are kept of the beginning of an output, and also of its end.
KEPT_BYTES = 1 << 20
# Seconds between two polls of a command.
POLL = 0.02
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None, use_errno=True)

# Whether the run was asked to stop: the running command is ended, and no other one is started.
interrupted = False
# Processes that SIGKILL did not end. They are not waited for again.
abandoned: set[int] = set()


@dataclass
class Finished:
    """A command that ended; `status` is its exit status, minus a signal's number, or None if it was
    stopped."""

    status: int | None
    seconds: float
    output: str

    def how(self) -> str:
        """Describes how the command ended."""
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}"


def interrupt(*_: object) -> None:
    """Asks the run to stop. This is a signal handler."""
    global interrupted
    interrupted = True


def adopt_orphans() -> None:
    """Makes this process the parent of orphaned descendants, so that `descendants` finds them."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Makes the kernel send this process a signal when its parent ends."""
    prctl(PR_SET_PDEATHSIG, number)


def prctl(option: int, value: int) -> None:
    if LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def run(argv: list[str], log: Path, limit: float, environment: dict[str, str], directory: Path) -> Finished:
    """Runs `argv` for at most `limit` seconds; appends it and its output to `log` at once."""
    started = time.monotonic()
    with open(log, "ab", buffering=0) as file:
        file.write(f"$ {' '.join(argv)}\n".encode())
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=directory,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        with process.stdout as pipe:
            output = Output(pipe.fileno(), file)
            while (status := process.poll()) is None:
                if interrupted or time.monotonic() - started >= limit:
                    break
                output.copy(POLL)
            end_descendants(output.copy)
            while output.copy(0):
                pass
            output.finish()
            # `end_descendants` may have reaped the process.
            process.poll()
    return Finished(status, time.monotonic() - started, output.text())


class Output:
    """Copies a pipe to a log. The middle of a long output is read and dropped."""

    def __init__(self, pipe: int, log: BinaryIO) -> None:
        self.pipe = pipe
        self.log = log
        self.head = bytearray()
        self.tail = bytearray()
        self.dropped = 0
        self.closed = False

    def copy(self, seconds: float) -> bool:
        """Copies output that arrives within `seconds`; returns whether some arrived."""
        if self.closed:
            time.sleep(seconds)
            return False
        if not select.select([self.pipe], [], [], seconds)[0]:
            return False
        chunk = os.read(self.pipe, 1 << 16)
        self.closed = not chunk
        free = KEPT_BYTES - len(self.head)
        self.head += chunk[:free]
        self.log.write(chunk[:free])
        self.tail += chunk[free:]
        if len(self.tail) > 2 * KEPT_BYTES:
            self.shorten()
        return bool(chunk)

    def shorten(self) -> None:
        surplus = max(len(self.tail) - KEPT_BYTES, 0)
        del self.tail[:surplus]
        self.dropped += surplus

    def finish(self) -> None:
        """Writes the end of an output whose middle was dropped."""
        self.shorten()
        if self.dropped:
            self.log.write(f"\n... {self.dropped} bytes dropped ...\n".encode())
        self.log.write(self.tail)

    def text(self) -> str:
        middle = b"\n" if self.dropped else b""
        return (self.head + middle + self.tail).decode(errors="replace")


def descendants() -> list[int]:
    """The ids of the processes that this process started, directly or indirectly."""
    parents = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text()
        except OSError:
            continue
        # Fields are counted after the command's name, which may contain spaces and parentheses.
        state, parent = stat.rpartition(")")[2].split()[:2]
        if state != "Z":
            parents[int(entry)] = int(parent)
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def end_descendants(wait: Callable[[float], object] = time.sleep, grace: float = GRACE) -> None:
    """Ends all descendants: SIGTERM, after `grace` seconds SIGKILL. Reaps the children.

    Processes that start meanwhile, such as those that print why a command was stopped, get only
    SIGKILL. A process that is left `KILLED` seconds later is abandoned.
    """
    kill_at = time.monotonic() + grace
    if grace > 0:
        send(signal.SIGTERM, descendants())
    while left := [process for process in descendants() if process not in abandoned]:
        now = time.monotonic()
        if now > kill_at + KILLED:
            abandoned.update(left)
            break
        if now >= kill_at:
            send(signal.SIGKILL, left)
        reap()
        wait(POLL)
    reap()


def send(number: int, processes: list[int]) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            pass


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass
    except ChildProcessError:
        pass
