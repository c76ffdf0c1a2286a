"""Helpers of the tests of the kit's scripts."""

import os
import sys
import tempfile
import time
import unittest
from pathlib import Path

import process

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.append(str(REPOSITORY / "benches/gpu"))


class InDirectory(unittest.TestCase):
    """A test case with a temporary directory."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name).resolve()
        process.adopt_orphans()

    def program(self, name: str, text: str, first_line: str = "#!/bin/sh") -> Path:
        """Writes a script that replaces a program, and returns its path."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{first_line}\n{text}\n")
        path.chmod(0o755)
        return path

    def assert_ended(self, marker: str) -> None:
        """Fails if a process with `marker` in its command line is left after some seconds."""
        give_up = time.monotonic() + 10
        while found := processes_with(marker):
            if time.monotonic() > give_up:
                self.fail(f"processes {found} were left")
            time.sleep(0.05)


def processes_with(marker: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        try:
            command = Path("/proc", entry, "cmdline").read_bytes()
        except OSError:
            continue
        if marker.encode() in command and int(entry) != os.getpid():
            found.append(int(entry))
    return found


def wait_for(condition, what: str, seconds: float = 20) -> None:
    """Waits until `condition` returns a true value. Raises AssertionError after `seconds`."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            raise AssertionError(f"{what} did not happen in {seconds} s")
        time.sleep(0.02)
