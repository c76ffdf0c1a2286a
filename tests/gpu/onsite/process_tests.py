"""Tests of limits and signals: python3 tests/gpu/onsite/process_tests.py"""

import os
import signal
import subprocess
import sys
import time
import unittest
import warnings
from pathlib import Path
from unittest import mock

import process
from testing import InDirectory, processes_with, wait_for

# A process that ignores SIGTERM and has its own session.
STUBBORN = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); "
    "print('begun', flush=True); time.sleep(600)"
)


class Commands(InDirectory):
    def run_shell(self, text: str, limit: float = 60) -> process.Finished:
        return process.run(
            ["sh", "-c", text], self.directory / "log", limit, dict(os.environ), self.directory
        )

    def test_a_command_at_its_limit_leaves_no_process(self) -> None:
        began = time.monotonic()
        finished = self.run_shell(f'{sys.executable} -c "{STUBBORN}" & echo started; wait', 1.5)
        self.assertIsNone(finished.status)
        self.assertIn("started", finished.output)
        self.assertEqual(process.descendants(), [])
        self.assertLess(time.monotonic() - began, 1.5 + process.GRACE + 3)

    def test_a_command_that_ends_leaves_no_process(self) -> None:
        finished = self.run_shell(
            f'mkfifo pipe; {sys.executable} -c "{STUBBORN}" >pipe & read line <pipe; echo $line; exit 3'
        )
        self.assertEqual((finished.status, finished.output), (3, "begun\n"))
        self.assertEqual(process.descendants(), [])

    def test_output_of_a_command_that_is_being_stopped_is_kept(self) -> None:
        finished = self.run_shell(
            "trap 'yes last line | head -n 20000; exit 1' TERM; echo first; sleep 600 & wait", 0.5
        )
        self.assertIsNone(finished.status)
        self.assertEqual(finished.output.count("last line\n"), 20000)

    def test_a_long_output_is_shortened_in_its_middle(self) -> None:
        finished = self.run_shell("echo first; yes | head -c 300000000; echo last")
        self.assertEqual(finished.status, 0)
        for text in (finished.output, (self.directory / "log").read_text()):
            self.assertLess(len(text), 2 * process.KEPT_BYTES + 1000)
            self.assertTrue("first\n" in text[:200] and text.endswith("last\n"))
        self.assertIn(" bytes dropped ...\n", text)

    def test_a_process_that_does_not_end_is_waited_for_once(self) -> None:
        # Popen warns because nothing waits for the abandoned process.
        warnings.simplefilter("ignore", ResourceWarning)
        with (
            mock.patch.object(process.os, "kill"),
            mock.patch.multiple(process, GRACE=0.1, KILLED=0.2),
        ):
            finished = self.run_shell("exec sleep 600", 0.1)
            self.assertIsNone(finished.status)
            self.assertLess(finished.seconds, 3)
            began = time.monotonic()
            process.end_descendants(grace=5)
            self.assertLess(time.monotonic() - began, 2)
        self.assertEqual(len(process.abandoned), 1)
        process.abandoned.clear()
        process.end_descendants(grace=0)
        self.assertEqual(process.descendants(), [])

    def test_an_interrupted_command_is_stopped(self) -> None:
        before = signal.signal(signal.SIGALRM, process.interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            finished = self.run_shell("echo begun; sleep 600")
        finally:
            process.interrupted = False
            signal.signal(signal.SIGALRM, before)
        self.assertEqual((finished.status, finished.output), (None, "begun\n"))
        self.assertLess(finished.seconds, 10)
        self.assertEqual(process.descendants(), [])


# A guarded run. Its descendants have the path of its log in their command lines.
GUARDED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import process
from guard import guard
guard()
log = Path(sys.argv[2])
Path(sys.argv[2] + ".pid").write_text(str(os.getpid()))
program = ["sh", "-c", f"sleep 600 & sh -c 'echo begun; sleep 600; : {log}'; : {log}"]
process.run(program, log, 600, dict(os.environ), log.parent)
Path(sys.argv[2] + ".end").write_text("interrupted" if process.interrupted else "")
sys.exit(7)
"""


class Guards(InDirectory):
    def start(self, shell: bool = False) -> tuple[subprocess.Popen, Path]:
        """Starts a guarded run, in a shell or as a direct child, and waits until its program runs.

        Returns the process and the path of the log.
        """
        log = self.directory / "log"
        argv = [sys.executable, "-c", GUARDED, str(Path(__file__).parent), str(log)]
        if shell:
            argv = ["sh", "-c", '"$@" & wait', "sh", *argv]
        run = subprocess.Popen(argv, start_new_session=True)
        self.addCleanup(run.wait)
        wait_for(lambda: log.exists() and log.read_text().endswith("begun\n"), "the program's start")
        return run, log

    def main_process(self) -> int:
        return int((self.directory / "log.pid").read_text())

    def assert_stopped(self, log: Path) -> None:
        """Fails unless the run wrote its results and no process is left."""
        end = self.directory / "log.end"
        wait_for(lambda: end.exists() and end.read_text() == "interrupted", "the end of the run")
        self.assert_ended(str(log))

    def test_a_signal_stops_the_run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            run, log = self.start()
            run.send_signal(number)
            self.assertEqual(run.wait(timeout=20), 7)
            self.assert_stopped(log)
            for file in self.directory.iterdir():
                file.unlink()

    def test_a_killed_run_leaves_no_program(self) -> None:
        run, log = self.start()
        os.kill(self.main_process(), signal.SIGKILL)
        self.assertEqual(run.wait(timeout=20), 128 + signal.SIGKILL)
        self.assert_ended(str(log))

    def test_a_run_whose_guard_is_killed_stops(self) -> None:
        run, log = self.start()
        run.kill()
        run.wait()
        self.assert_stopped(log)

    def test_a_run_whose_process_group_is_killed_stops(self) -> None:
        run, log = self.start(shell=True)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        self.assert_stopped(log)

    def test_the_program_ends_with_both_of_its_guards(self) -> None:
        run, log = self.start()
        # The guard is killed first, so that it cannot react to the death of the run.
        run.kill()
        os.kill(self.main_process(), signal.SIGKILL)
        run.wait()
        program = f"sleep 600 & sh -c 'echo begun; sleep 600; : {log}'"
        wait_for(lambda: not processes_with(program), "the program's end")
        process.end_descendants(grace=0)
        self.assert_ended(str(log))


if __name__ == "__main__":
    unittest.main()
