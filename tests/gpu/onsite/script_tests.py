"""Tests of the kit's shell scripts with stand-ins for its programs, without a GPU.

    python3 tests/gpu/onsite/script_tests.py
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import unittest
from pathlib import Path

from testing import REPOSITORY, InDirectory, wait_for

SCRIPTS = REPOSITORY / "tests/gpu"
# Prints one check, and then hangs.
HANGING_CHECKS = "echo 'ok    rms_norm forward f32                       0.02 s  y 1.4e-7'; sleep 600"


class Onsite(InDirectory):
    def setUp(self) -> None:
        super().setUp()
        self.kit = self.directory / "kit"
        for name in ("tests/gpu/onsite", "benches/gpu", "benches/models"):
            shutil.copytree(REPOSITORY / name, self.kit / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("onsite.sh", "libraries.sh", "selftest.sh"):
            shutil.copy(SCRIPTS / name, self.kit / "tests/gpu")
        for name in ("lora-worker", "lora-gpu", "train_step", "loractl"):
            self.program(f"kit/bin/{name}", "exit 0")
        self.pack()

    def pack(self) -> None:
        """Writes the kit's MANIFEST."""
        files = {
            str(path.relative_to(self.kit)): {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in self.kit.rglob("*")
            if path.is_file() and path.name != "MANIFEST"
        }
        manifest = {"commit": "0123456789abcdef", "dirty": True, "prebuilt": True, "files": files}
        (self.kit / "MANIFEST").write_text(json.dumps(manifest))

    def archive(self) -> Path:
        path = self.directory / "kit.tar.xz"
        with tarfile.open(path, "w:xz", preset=0) as archive:
            archive.add(self.kit, "kit")
        return path

    def start(self, *arguments: object, script: Path = SCRIPTS / "onsite.sh", **variables: object):
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHON", "MODEL")},
            "TMPDIR": str(self.directory),
            # This PATH has none of NVIDIA's tools.
            "PATH": "/usr/bin:/bin",
            "PYTHON": sys.executable,
            **{name: str(value) for name, value in variables.items()},
        }
        # The script has its own session, so that a signal to its process group does not reach the
        # tests.
        return subprocess.Popen(
            ["bash", str(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.directory,
            start_new_session=True,
        )

    def onsite(self, *arguments: object, **more: object) -> tuple[int, str]:
        """Runs onsite.sh; returns its exit code and its output."""
        run = self.start(*arguments, **more)
        output, _ = run.communicate(timeout=100)
        return run.returncode, output

    def result(self, out: str = "out") -> dict:
        return json.loads((self.directory / out / "result.json").read_text())

    def test_help(self) -> None:
        for flag in ("-h", "--help"):
            status, output = self.onsite(flag)
            self.assertEqual(status, 0)
            self.assertTrue(output.startswith("Runs a kit"))
            self.assertIn("\nExit code: 0", output)
            self.assertNotIn("set -euo", output)

    def test_invalid_arguments_are_refused_before_the_kit_is_unpacked(self) -> None:
        kit = self.directory / "kit.tar.xz"
        kit.write_text("not an archive")
        for arguments, variables, message in (
            ([kit, "out"], {}, "three arguments"),
            ([kit, "out", "0"], {}, "SECONDS is 0"),
            ([kit, "out", "60", "opps"], {}, "invalid phase opps"),
            ([kit, "out", "60"], {"JOBS": "tcp3"}, "invalid JOBS: tcp3"),
            ([kit, "out", "60"], {"CASES": "2048"}, "invalid CASES: 2048"),
            ([kit, "out", "60"], {"MODEL": "none.json"}, "invalid MODEL"),
            ([kit, "out", "60"], {"PYTHON": "no-python"}, "PYTHON is no-python"),
            (["no-kit", "out", "60"], {}, "no-kit does not exist"),
        ):
            status, output = self.onsite(*arguments, **variables)
            self.assertEqual((status, message in output), (2, True), output)
            self.assertFalse((self.directory / "out").exists())
        (self.directory / "used").mkdir()
        (self.directory / "used/file").touch()
        status, output = self.onsite(kit, "used", "60")
        self.assertEqual((status, "used is not empty" in output), (2, True), output)

    def test_a_corrupt_kit_is_refused(self) -> None:
        archive = self.archive()
        content = archive.read_bytes()
        for data in (b"not an archive", content[: len(content) // 2]):
            archive.write_bytes(data)
            status, output = self.onsite(archive, "out", "60")
            self.assertEqual((status, "cannot be unpacked" in output), (1, True), output)
            self.assertNotIn("Traceback", output)
        self.program("kit/bin/lora-gpu", "changed")
        status, output = self.onsite(self.kit, "out", "60")
        self.assertEqual(status, 1)
        self.assertIn("invalid kit: bin/lora-gpu is not the file that was packed", output)
        status, output = self.onsite(self.directory, "out", "60")
        self.assertEqual((status, "is not a kit" in output), (1, True), output)

    def test_a_run_from_an_archive(self) -> None:
        status, output = self.onsite(self.archive(), "out", "60", "doctor")
        self.assertEqual(status, 0, output)
        result = self.result()
        self.assertEqual(
            [result["commit"], result["dirty"], result["prebuilt"]], ["0123456789abcdef", True, True]
        )
        self.assertEqual((result["phases"]["doctor"]["status"], result["changed_settings"]), ("ok", []))
        self.assertEqual(
            sorted(path.name for path in (self.directory / "out").iterdir()),
            ["doctor.txt", "env.txt", "result.json", "table.txt"],
        )
        self.assertEqual(list(self.directory.glob("tmp.*")), [])

    def test_a_copy_of_the_script_without_its_directory(self) -> None:
        script = shutil.copy(SCRIPTS / "onsite.sh", self.directory)
        status, output = self.onsite(self.kit, "out", "60", "opps", script=script)
        self.assertEqual((status, "invalid phase opps" in output), (2, True), output)

    def test_a_run_in_which_everything_is_skipped_fails(self) -> None:
        status, output = self.onsite(self.kit, "out", "60", "ncu")
        self.assertEqual((status, "ncu is not installed" in output), (1, True), output)
        status, output = self.onsite(self.kit, "out-env", "60", "env")
        self.assertEqual(status, 0, output)

    def test_relative_paths_start_at_the_current_directory(self) -> None:
        (self.directory / "venv").symlink_to(Path(sys.executable).parent)
        (self.directory / "tiny.json").write_text("{}")
        python = f"venv/{Path(sys.executable).name}"
        status, output = self.onsite(self.kit, "out", "60", "env", PYTHON=python, MODEL="tiny.json")
        self.assertEqual(status, 0, output)
        self.assertEqual(self.result()["settings"]["model"], str(self.directory / "tiny.json"))
        self.assertEqual(self.result()["phases"]["env"]["status"], "ok")

    def hanging(self) -> tuple[subprocess.Popen, str]:
        """Starts a run from an archive whose phase ops hangs after one check.

        Returns the process and the path of the unpacked kit.
        """
        self.program("kit/bin/lora-gpu", HANGING_CHECKS)
        self.pack()
        run = self.start(self.archive(), "out", "60", "ops", "doctor")
        self.addCleanup(run.stdout.close)
        log = self.directory / "out/ops.txt"
        wait_for(lambda: log.exists() and "rms_norm forward f32" in log.read_text(), "the first check")
        (work,) = self.directory.glob("tmp.*")
        return run, f"{work}/kit/"

    def assert_interrupted(self) -> None:
        """Fails unless the results have the check and the phase that was not run."""
        wait_for(lambda: (self.directory / "out/table.txt").exists(), "the table")
        found = self.result()["phases"]
        self.assertEqual(found["ops"]["status"], "stopped")
        self.assertEqual(list(found["ops"]["values"]["checks"]), ["rms_norm forward f32"])
        self.assertIn("the run was interrupted", found["ops"]["reason"])
        self.assertEqual(found["doctor"]["status"], "skipped")
        self.assertIn("ops       stopped", (self.directory / "out/table.txt").read_text())

    def test_an_interrupted_run_keeps_its_results(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            run, programs = self.hanging()
            run.send_signal(number)
            self.assertEqual(run.wait(timeout=30), 143)
            self.assert_interrupted()
            self.assert_ended(programs)
            self.assertEqual(list(self.directory.glob("tmp.*")), [])
            shutil.rmtree(self.directory / "out")

    def test_a_killed_run_leaves_no_program_and_keeps_its_results(self) -> None:
        run, programs = self.hanging()
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        self.assert_interrupted()
        self.assert_ended(programs)


# A stand-in for `loractl run FILE --workers N --worker PROGRAM --out DIR ...`, whose job succeeds.
JOB = """
out=$8; mkdir -p $out
echo ' "adapter_sha256": "aaaa",' >$out/receipt.json
for step in 1 2 3 4 5; do echo '{"loss":1.5}'; done >$out/metrics.jsonl
"""


class Selftest(InDirectory):
    def selftest(self, jobs: str, before: str, **variables: str) -> subprocess.Popen:
        """Starts selftest.sh. `before` runs in each job, whose name is $job."""
        self.program("bin/loractl", f"job=${{8##*/}}\n{before}\n{JOB}")
        self.program("bin/lora-worker", "exit 0")
        environment = {**os.environ, "JOBS": jobs, "TMPDIR": str(self.directory), **variables}
        return subprocess.Popen(
            ["bash", str(SCRIPTS / "selftest.sh"), str(self.directory / "bin")],
            stdout=subprocess.PIPE,
            # ldd reports on stderr that the stand-ins are not dynamic executables.
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def lines(self, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        run = self.selftest(*arguments, **variables)
        output, _ = run.communicate(timeout=60)
        return run.returncode, output.splitlines()

    def test_jobs_that_succeed(self) -> None:
        status, lines = self.lines("one tcp2 cpu", "")
        self.assertEqual((status, lines[-1]), (0, "all right"))
        self.assertEqual([line.split()[0] for line in lines[:-1]], ["ok"] * 3)

    def test_the_log_of_a_job_that_fails_is_shown(self) -> None:
        status, lines = self.lines("one tcp2", '[ $job = tcp2 ] && { seq -f "line %g" 500; exit 3; }')
        self.assertEqual(status, 1)
        (bad,) = [line for line in lines if line.startswith("WRONG")]
        self.assertRegex(bad, r"^WRONG   2 workers, TCP {30} exit code 3, adapter ''$")
        for shown in ("line 1", "line 20", "...", "line 461", "line 500"):
            self.assertIn(f"    {shown}", lines)
        self.assertNotIn("    line 21", lines)
        self.assertEqual(lines[-1], "1 of the lines above are not ok")

    def test_another_adapter_is_wrong(self) -> None:
        status, lines = self.lines("tcp2", "")
        self.assertEqual(status, 0)
        status, lines = self.lines(
            "tcp2", '[ $job = tcp2 ] && trap "sed -i s/aaaa/bbbb/ $8/receipt.json" EXIT'
        )
        self.assertEqual(status, 1)
        self.assertTrue(any(line.startswith("WRONG   2 workers, TCP") for line in lines))

    def test_a_job_at_its_limit_is_stopped_and_not_wrong(self) -> None:
        # The second job ignores SIGTERM and has to be killed.
        for job in ("exec sleep 600", "trap '' TERM; exec sleep 600"):
            status, lines = self.lines("one", f"echo begun; {job}", JOB_SECONDS="1")
            self.assertEqual(status, 1)
            self.assertRegex(lines[0], r"^stopped 1 worker {36} after 1 s$")
            self.assertIn("    begun", lines)

    def test_a_job_without_a_worker_to_kill_is_wrong_once(self) -> None:
        status, lines = self.lines("killed-tcp", "")
        self.assertEqual(status, 1)
        found = [line for line in lines if "one killed" in line]
        self.assertEqual(len(found), 1)
        self.assertRegex(found[0], r"^WRONG .* there was no worker to kill$")

    def test_a_selftest_that_is_stopped_shows_the_logs_and_ends_its_job(self) -> None:
        # killed-tcp starts its job in the background.
        for hanging in ("one", "killed-tcp"):
            run = self.selftest(hanging, f"echo begun $job; [ $job = {hanging} ] && exec sleep 600")
            wait_for(lambda job=hanging: self.begun(job), "the job's start")
            began = time.monotonic()
            run.send_signal(signal.SIGTERM)
            output, _ = run.communicate(timeout=30)
            self.assertLess(time.monotonic() - began, 2)
            self.assertEqual(run.returncode, 143)
            self.assertIn(f"    the log of {hanging}:\n    begun {hanging}\n", output)
            self.assert_ended(f"{self.directory}/bin/loractl")

    def begun(self, job: str) -> bool:
        return any("begun" in log.read_text() for log in self.directory.glob(f"tmp.*/{job}.log"))


class Libraries(InDirectory):
    def test_only_directories_with_missing_libraries_are_added(self) -> None:
        for name in (
            "nvidia/cu/lib/libcu.so.1",
            "nvidia/blas/lib/libblas.so.1",
            "nvidia/other/lib/libother.so",
        ):
            path = self.directory / name
            path.parent.mkdir(parents=True)
            path.touch()
        # libblas.so.1 is reported as missing only after libcu.so.1 is found.
        script = f"""
source {SCRIPTS}/libraries.sh
missing_libraries() {{
  case $LD_LIBRARY_PATH in
    *blas*) echo $never ;;
    */cu/*) echo libblas.so.1 $never ;;
    *) echo libcu.so.1 $never ;;
  esac
}}
status=0; find_libraries program {sys.executable} || status=$?
echo "$status $LD_LIBRARY_PATH"
"""
        packages = f"{self.directory}/nvidia"
        for never, status in (("", "0"), ("libnever.so", "1")):
            environment = {
                **os.environ,
                "PYTHONPATH": str(self.directory),
                "LD_LIBRARY_PATH": "/first",
                "never": never,
            }
            done = subprocess.run(
                ["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True
            )
            self.assertEqual(done.stdout, f"{status} /first:{packages}/cu/lib:{packages}/blas/lib\n")
            self.assertEqual(
                "needs libraries that are not installed: libnever.so" in done.stderr, bool(never)
            )


@unittest.skipUnless(all(map(shutil.which, ("git", "readelf", "strip", "xz"))), "pack.sh lacks a tool")
class Packs(InDirectory):
    def setUp(self) -> None:
        super().setUp()
        self.repository = self.directory / "repository"
        for name in ("tests/gpu/onsite", "benches/gpu", "crates"):
            (self.repository / name).mkdir(parents=True)
            (self.repository / name / "file").write_text("tracked")
        shutil.copy(SCRIPTS / "pack.sh", self.repository / "tests/gpu")
        (self.directory / "programs").mkdir()
        for name in ("lora-worker", "lora-gpu", "train_step", "loractl"):
            shutil.copy("/bin/true", self.directory / "programs" / name)
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git(
            "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message=first"
        )

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.repository, check=True)

    def manifest(self) -> dict:
        out = self.directory / "out"
        command = [
            "bash",
            "tests/gpu/pack.sh",
            "--programs",
            "../programs",
            "--without-python",
            "--level",
            "0",
            out,
        ]
        subprocess.run(command, cwd=self.repository, check=True, capture_output=True)
        return json.loads((out / "MANIFEST").read_text())

    def test_the_state_of_the_sources_is_in_the_manifest(self) -> None:
        manifest = self.manifest()
        self.assertEqual((manifest["dirty"], manifest["prebuilt"]), (False, True))
        (self.repository / "notes.txt").touch()
        self.assertFalse(self.manifest()["dirty"])
        for name in ("crates", "benches", "tests"):
            new = self.repository / name / "new.rs"
            new.touch()
            self.assertTrue(self.manifest()["dirty"], name)
            new.unlink()
        (self.repository / "crates/file").write_text("changed")
        self.assertTrue(self.manifest()["dirty"])


if __name__ == "__main__":
    unittest.main()
