"""Tests of the kit's phases, without a GPU and without a kit: python3 tests/gpu/onsite/tests.py"""

import argparse
import os
import re
import time
import unittest
import warnings
from dataclasses import replace
from unittest import mock

import environment
import jobs
import main
import operations
import phases
import process
import training
from phase import Phase, Session, Skipped, json_lines, message, run_phase
from settings import JOB_NAMES, Settings
from testing import REPOSITORY, InDirectory

import sample_runs  # isort: skip
import table  # isort: skip


class WithPhases(InDirectory):
    def phase(self, run, seconds: float = 20, limit: int = 20) -> dict:
        """Runs a phase with the test's directory as its kit; returns the outcome."""
        return run_phase(
            Phase("tested", 1, limit, run), self.directory, self.directory, self.directory, seconds
        )

    def text(self) -> str:
        return (self.directory / "tested.txt").read_text()


class Outcomes(WithPhases):
    def test_statuses(self) -> None:
        def missing(_: Session) -> None:
            raise Skipped("no tool")

        def fails(session: Session) -> None:
            session.values["before"] = 1
            session.command("first", ["sh", "-c", "echo error: the reason; echo Usage; exit 4"])
            session.values["after"] = 2

        def broken(session: Session) -> None:
            fails(session)
            session.command("second", ["sleep", "600"], 0.1)
            raise LookupError("unexpected output")

        outcomes = {run.__name__: self.phase(run) for run in (missing, broken, fails)}
        self.assertEqual(
            {name: outcome["status"] for name, outcome in outcomes.items()},
            {"missing": "skipped", "broken": "failed", "fails": "failed"},
        )
        self.assertEqual(outcomes["missing"]["reason"], "no tool")
        self.assertEqual(outcomes["fails"]["reason"], "first: exit status 4: error: the reason")
        self.assertEqual(
            outcomes["broken"]["reason"],
            "first: exit status 4: error: the reason; LookupError: unexpected output; "
            "second: stopped after 0 s",
        )
        for name in ("fails", "broken"):
            self.assertEqual(outcomes[name]["values"], {"before": 1, "after": 2})

    def test_a_phase_at_its_limit_keeps_what_was_measured(self) -> None:
        def slow(session: Session) -> None:
            finished = session.command(
                "steps", ["sh", "-c", "echo '{\"tokens_per_s\": 1}'; echo '{\"tok'; sleep 600"]
            )
            session.values["cases"] = json_lines(finished.output, "tokens_per_s")
            session.command("more", ["sh", "-c", "echo more"])

        for seconds, limit in ((1, 20), (20, 1)):
            outcome = self.phase(slow, seconds, limit)
            self.assertEqual(
                (outcome["status"], outcome["values"]), ("stopped", {"cases": [{"tokens_per_s": 1}]})
            )
            self.assertRegex(outcome["reason"], r"^steps: stopped after \d+ s; more: not started$")
        self.assertNotIn("echo more", self.text())

    def test_an_interrupted_phase_starts_no_more_commands(self) -> None:
        def run(session: Session) -> None:
            process.interrupt()
            session.command("first", ["sh", "-c", "echo first"])

        try:
            outcome = self.phase(run)
        finally:
            process.interrupted = False
        self.assertEqual(outcome["status"], "stopped")
        self.assertEqual(outcome["reason"], "first: not started; the run was interrupted")

    def test_the_reason_has_parts_that_were_not_measured(self) -> None:
        outcome = self.phase(lambda session: session.has_time(1000, "int8") and None)
        self.assertEqual((outcome["status"], outcome["reason"]), ("ok", "not measured: int8: no time"))

    def test_a_phase_is_skipped_if_less_than_its_minimum_is_left(self) -> None:
        ran = []
        phase = Phase("tested", 10, 20, ran.append)
        args = argparse.Namespace(kit=self.directory, out=self.directory, work=self.directory)
        outcome = main.attempt(phase, args, time.monotonic() + 5)
        self.assertEqual((outcome["status"], ran), ("skipped", []))
        self.assertIn("10 s are the minimum", outcome["reason"])

    def test_exit_statuses(self) -> None:
        for statuses, expected in (
            ({"env": "ok"}, 0),
            ({"env": "failed"}, 1),
            ({"env": "ok", "ops": "ok", "peft": "skipped"}, 0),
            ({"env": "ok", "ops": "stopped"}, 1),
            ({"env": "ok", "ops": "skipped", "peft": "skipped"}, 1),
        ):
            outcomes = {name: {"status": status} for name, status in statuses.items()}
            self.assertEqual(main.exit_status(outcomes), expected, statuses)


class Outputs(unittest.TestCase):
    def test_lines_that_are_not_objects_with_the_key_are_skipped(self) -> None:
        output = '{"a": 1}\n{odd}\n["a"]\n{"b": 2}\n{"a": NaN}\n{"a": '
        self.assertEqual(json_lines(output, "a"), [{"a": 1}, {"a": None}])

    def test_messages(self) -> None:
        for output, expected in (
            ("==ERROR== no permission\n==PROF== disconnected\n", "==ERROR== no permission"),
            ("torch.OutOfMemoryError: no memory\nUsage\n", "torch.OutOfMemoryError: no memory"),
            ("stopped 1 worker\n1 of the lines above are not ok", "stopped 1 worker"),
            ("first\nlast\n\n", "last"),
            ("", ""),
        ):
            self.assertEqual(message(output), expected)


class Names(unittest.TestCase):
    def test_phases(self) -> None:
        self.assertEqual(phases.chosen([]), phases.HALVES["first"])
        self.assertEqual(phases.chosen(["ncu", "ops"]), ["env", "ncu", "ops"])
        for words, why in ((["opps"], "invalid phase opps"), (["first", "ncu"], "at most 6")):
            with self.assertRaisesRegex(ValueError, why):
                phases.chosen(words)
        for half in phases.HALVES.values():
            self.assertLessEqual(len(half), phases.MOST_PHASES)

    def test_settings(self) -> None:
        self.assertIsNone(Settings().problem())
        self.assertEqual(Settings().changed(), [])
        self.assertEqual(Settings(jobs="one", steps="1").changed(), ["steps", "jobs"])
        for changed, why in (
            ({"cases": "1x2048,8"}, "invalid CASES: 1x2048,8"),
            ({"profile_cases": "0x8"}, "invalid PROFILE_CASES"),
            ({"steps": "0"}, "invalid STEPS: 0; it must be a whole number, at least 1"),
            ({"warmup": "-1"}, "invalid WARMUP"),
            ({"jobs": "one tcp3"}, "invalid JOBS: tcp3"),
            ({"jobs": " "}, "invalid JOBS"),
            ({"model": "llama"}, "invalid MODEL: llama; .* one of llama-3.1-8b,"),
        ):
            self.assertRegex(Settings(**changed).problem(), why)

    def test_the_scripts_have_the_same_names_and_numbers(self) -> None:
        selftest = (REPOSITORY / "tests/gpu/selftest.sh").read_text()
        self.assertIn(f'\nall="{" ".join(JOB_NAMES)}"\n', selftest)
        described = (REPOSITORY / "tests/gpu/onsite.sh").read_text()
        for half, names in phases.HALVES.items():
            self.assertRegex(described, rf"\n#   {half} +{' '.join(names)}\n")
        for phase in phases.PHASES.values():
            self.assertRegex(described, rf"\n#   {phase.name} +{phase.minimum} s +{phase.limit} s  \w")
        for name, default in Settings(threads="8").as_dict().items():
            if default:
                self.assertRegex(described, rf"{name.upper()}[ \n#]+\({re.escape(default)}[):,]", name)


class Machine(WithPhases):
    def env(self, program: str) -> dict:
        """Runs the phase env with a stand-in for Python; returns the outcome."""
        with mock.patch.object(phases, "PYTHON", self.program("python", program)):
            return self.phase(phases.env)

    def test_the_error_of_a_crash_is_in_the_reason(self) -> None:
        outcome = self.env("echo 'Traceback {'; echo 'FileNotFoundError: /proc/cpuinfo'; exit 1")
        self.assertEqual(outcome["status"], "failed")
        self.assertEqual(outcome["reason"], "environment.py: exit status 1: FileNotFoundError: /proc/cpuinfo")

    def test_the_document_is_found_among_other_lines(self) -> None:
        outcome = self.env('echo "a library {1}"; echo \'{"card": "H100"}\'; echo "} the end"')
        self.assertEqual((outcome["status"], outcome["values"]), ("ok", {"card": "H100"}))

    def test_the_real_program(self) -> None:
        outcome = self.phase(phases.env)
        self.assertEqual(outcome["status"], "ok", self.text())
        self.assertIn("processor", outcome["values"])

    def test_nvidia_smi_that_hangs_or_fails_is_reported(self) -> None:
        # Popen warns because nothing waits for the process.
        warnings.simplefilter("ignore", ResourceWarning)
        began = time.monotonic()
        for program, expected in (
            ("sleep 600", "no answer in 0.3 s"),
            ("echo bad; exit 9", "exit status 9: bad"),
        ):
            self.program("nvidia-smi", program)
            path = f"{self.directory}:{os.environ['PATH']}"
            with mock.patch.dict(os.environ, PATH=path), mock.patch.object(environment, "SMI_SECONDS", 0.3):
                self.assertEqual(environment.nvidia_smi(), {"error": expected})
        self.assertLess(time.monotonic() - began, 5)
        process.end_descendants(grace=0)
        outcome = self.env('echo \'{"card": "H100", "nvidia_smi": {"error": "no answer"}}\'')
        self.assertEqual(outcome["reason"], "not measured: nvidia-smi: no answer")


# A stand-in for train_step that prints a case for each of `--cases`.
TRAIN_STEP = """
quantization=$6 cases=$(echo "$8" | tr , ' ')
for case in $cases; do
  echo '{"model": "llama-3.1-8b", "quantization": "'$quantization'", "micro_batch": '${case%x*}',
    "sequence": '${case#*x}', "tokens_per_s": 5.0, "loss": '${loss:-1.5}'}' | tr -d '\\n'
  echo
done
"""


class TrainingSteps(WithPhases):
    def setUp(self) -> None:
        super().setUp()
        settings = replace(Settings(), cases="1x8,2x4", profile_cases="1x8")
        self.enterContext(mock.patch.object(training, "SETTINGS", settings))
        self.enterContext(mock.patch.object(training, "ANOTHER_BASE", 0))

    def train_step(self, before: str) -> None:
        # The flags --json --device cuda:0 come first; peft_step.py has the other flags too.
        self.program("bin/train_step", f"shift 3\n{before}\n{TRAIN_STEP}")

    def shapes(self, outcome: dict) -> list[tuple]:
        """The quantization, shape and error of each case."""
        return [
            (case["quantization"], f"{case['micro_batch']}x{case['sequence']}", case.get("error"))
            for case in outcome["values"]["cases"]
        ]

    def test_a_first_command_that_hangs_leaves_time_for_the_others(self) -> None:
        hang = "if [ ! -e hung ]; then touch hung; echo '{\"odd\": 1}'; exec sleep 600; fi"
        self.train_step(hang)
        outcome = self.phase(training.steps, 4, 4)
        self.assertEqual(outcome["status"], "stopped")
        self.assertEqual(
            self.shapes(outcome),
            [
                ("none", "1x8", "stopped after 2 s"),
                ("none", "2x4", "stopped after 2 s"),
                *(
                    (quantization, shape, None)
                    for quantization in ("nf4-double", "int8")
                    for shape in ("1x8", "2x4")
                ),
            ],
        )
        self.assertEqual(len(outcome["values"]["profiles"]), 1)

    def test_a_program_that_dies_leaves_an_error_in_each_case(self) -> None:
        self.train_step("kill -SEGV $$")
        outcome = self.phase(training.ours)
        self.assertEqual(outcome["status"], "failed")
        self.assertEqual({error for *_, error in self.shapes(outcome)}, {"killed by SIGSEGV"})

    def test_a_program_that_prints_nothing_fails(self) -> None:
        self.train_step("exit 0")
        outcome = self.phase(training.ours)
        self.assertEqual(outcome["status"], "failed")
        self.assertIn("none 1x8: no result", outcome["reason"])

    def test_a_loss_that_is_not_finite_is_wrong(self) -> None:
        for loss in ("null", "NaN"):
            self.train_step(f"[ $6 = none ] && loss={loss}")
            outcome = self.phase(training.ours)
            self.assertEqual((outcome["status"], outcome["wrong"]), ("failed", ["none 1x8", "none 2x4"]))
            self.assertIn("none 1x8: the loss is not finite", outcome["reason"])
            self.assertEqual(
                [error for *_, error in self.shapes(outcome)], 2 * ["the loss is not finite"] + 2 * [None]
            )
            # The profiled case is wrong, too.
            self.assertEqual(self.phase(training.steps)["wrong"], ["none 1x8", "none 2x4"])

    def peft(self, program: str) -> dict:
        """Runs the phase peft with a stand-in for peft_step.py; returns the outcome."""
        self.program("benches/peft_step.py", program)
        found = mock.patch.object(training.importlib.util, "find_spec", lambda _: "found")
        with found, mock.patch.object(training, "PYTHON", "sh"):
            return self.phase(training.peft)

    # A stand-in for peft_step.py, whose flags are
    # --device cuda:0 --sdpa KERNELS ... --quantization QUANTIZATION --cases CASES ...
    PEFT_STEP = """
kernels=$(echo $4 | tr , ' ')
while [ $1 != --quantization ]; do shift; done
for kernel in $kernels; do
  fast=5; [ $kernel = cudnn ] && fast=9
  case $broken in
    *" $kernel "*) result='"error": "no kernel"' ;;
    *) result='"loss": 1.5, "tokens_per_s": '$fast ;;
  esac
  for case in 1x8 2x4; do
    shape='"micro_batch": '${case%x*}', "sequence": '${case#*x}
    echo '{"model": "m", "sdpa": "'$kernel'", "quantization": "'$2'", '$shape', '$result'}'
  done
done
"""

    def kernels(self, outcome: dict) -> list[tuple]:
        cases = outcome["values"]["cases"]
        return list(dict.fromkeys((case["quantization"], case["sdpa"], case.get("error")) for case in cases))

    def test_peft_with_nf4_uses_the_fastest_kernel(self) -> None:
        outcome = self.peft(f"broken=' '\n{self.PEFT_STEP}")
        self.assertEqual((outcome["status"], outcome["reason"]), ("ok", ""))
        self.assertEqual(
            self.kernels(outcome),
            [("none", "flash", None), ("none", "cudnn", None), ("nf4-double", "cudnn", None)],
        )

    def test_peft_falls_back_to_any_kernel(self) -> None:
        outcome = self.peft(f"broken=' flash cudnn '\n{self.PEFT_STEP}")
        self.assertEqual(
            self.kernels(outcome),
            [
                ("none", "flash", "no kernel"),
                ("none", "cudnn", "no kernel"),
                ("none", "any", None),
                ("nf4-double", "any", None),
            ],
        )
        self.assertIn("not measured: flash none 1x8: no kernel", outcome["reason"])
        outcome = self.peft(f"broken=' any '; [ $4 = cudnn ] && broken=' cudnn any '\n{self.PEFT_STEP}")
        self.assertEqual(
            self.kernels(outcome)[2:],
            [("nf4-double", "cudnn", "no kernel"), ("nf4-double", "any", "no kernel")],
        )

    def test_peft_that_dies_leaves_an_error_in_each_case(self) -> None:
        outcome = self.peft("echo ImportError: no torch; exit 1")
        self.assertEqual(outcome["status"], "failed")
        self.assertIn(("none", "flash", "exit status 1"), self.kernels(outcome))

    def test_missing_bitsandbytes_is_in_the_reason(self) -> None:
        self.program("benches/peft_step.py", f"broken=' '\n{self.PEFT_STEP}")
        absent = lambda name: None if name == "bitsandbytes" else "found"  # noqa: E731
        with (
            mock.patch.object(training.importlib.util, "find_spec", absent),
            mock.patch.object(training, "PYTHON", "sh"),
        ):
            outcome = self.phase(training.peft)
        self.assertEqual(outcome["reason"], "not measured: nf4-double: Python has no bitsandbytes")


class Operations(WithPhases):
    def test_checks_are_complete_at_the_last_line(self) -> None:
        line = "echo 'ok    rms_norm forward f32                       0.02 s  y 1.4e-7'"
        for end, complete in (("echo '1 passed, 0 failed'", True), ("kill -SEGV $$", False)):
            self.program("bin/lora-gpu", f"{line}\n{end}")
            values = self.phase(operations.ops)["values"]
            self.assertEqual(values["complete"], complete)
            self.assertEqual(
                values["checks"], {"rms_norm forward f32": {"status": "ok", "detail": "y 1.4e-7"}}
            )

    def test_microbenchmarks_with_an_incomplete_file_fail(self) -> None:
        # The flags are --bench --bench-scale 1 --only '' --json FILE, so FILE is $7.
        self.program("bin/lora-gpu", "echo '{\"rows\": [' >$7; sleep 600")
        outcome = self.phase(operations.bench, 1)
        self.assertEqual((outcome["status"], outcome["values"]), ("failed", {}))
        self.assertIn("lora-gpu --bench: stopped after 1 s", outcome["reason"])

    def tool(self, text: str):
        """Replaces NVIDIA's tools by a script."""
        tool = self.program("tool", text)
        return mock.patch.object(environment, "tool", lambda _: str(tool))

    def test_only_errors_that_compute_sanitizer_finds_are_wrong(self) -> None:
        program = """
case "$*" in
  *racecheck*attention*) echo '========= ERROR SUMMARY: 1 error'; exit 86 ;;
  *memcheck*attention*) echo 'Error: out of memory'; exit 1 ;;
  *memcheck*adamw*) sleep 600 ;;
esac
"""
        with self.tool(program):
            outcome = self.phase(operations.sanitize, 8)
        self.assertEqual(outcome["wrong"], ["racecheck: attention forward and backward bf16"])
        self.assertEqual(
            list(outcome["values"]["checks"].values()), ["WRONG", "failed", "ok", "ok", "ok", "ok", "stopped"]
        )
        self.assertIn("not measured: 2 of 7 checks", outcome["reason"])

    def test_checks_that_compute_sanitizer_had_no_time_for_are_reported(self) -> None:
        with self.tool("sleep 600"), mock.patch.object(operations, "ONE_MORE", 1):
            outcome = self.phase(operations.sanitize, 3)
        self.assertEqual((outcome["status"], outcome["wrong"]), ("stopped", []))
        self.assertEqual(list(outcome["values"]["checks"].values())[-1], "no time")
        self.assertIn("not measured: 7 of 7 checks, ", outcome["reason"])
        self.assertIn("memcheck: adamw: no time", outcome["reason"])

    def test_ncu_that_measures_nothing_failed(self) -> None:
        with self.tool("echo '==WARNING== No kernels were profiled.'"):
            outcome = self.phase(operations.ncu)
        self.assertEqual(outcome["status"], "failed")
        self.assertIn(
            "ncu attention_forward: no metrics: ==WARNING== No kernels were profiled.", outcome["reason"]
        )

    def test_the_metrics_of_ncu(self) -> None:
        output = """
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Elapsed Cycles                cycle       12,345
    Memory Throughput                 %        61.52
    Duration                         us     1,234.56
    Compute (SM) Throughput           %        40.01
    ----------------------- ----------- ------------
"""
        with self.tool(f"cat <<'END'\n{output}\nEND"):
            outcome = self.phase(operations.ncu)
        self.assertEqual(outcome["status"], "ok")
        self.assertEqual(
            outcome["values"]["kernels"]["quant_"],
            {"Memory Throughput": "61.52 %", "Duration": "1,234.56 us", "Compute (SM) Throughput": "40.01 %"},
        )


class Jobs(WithPhases):
    def selftest(self, text: str) -> None:
        self.program("tests/gpu/selftest.sh", text)
        (self.directory / "bin").mkdir(exist_ok=True)

    def line(self, status: str, name: str, detail: str = "details") -> str:
        return f"printf '%-7s %-44s %s\\n' '{status}' '{name}' '{detail}'"

    def test_jobs_are_complete_at_the_last_line(self) -> None:
        for end, complete in (
            ("echo all right", True),
            ("echo 2 of the lines above are not ok; exit 1", True),
            ("exit 1", False),
        ):
            self.selftest(f"{self.line('ok', '1 worker')}\n{end}")
            outcome = self.phase(jobs.selftest)
            self.assertEqual(outcome["values"]["complete"], complete)
            self.assertEqual(outcome["values"]["jobs"], {"1 worker": {"status": "ok", "detail": "details"}})

    def test_a_slow_job_is_not_wrong(self) -> None:
        lines = (
            self.line("stopped", "1 worker"),
            "echo '    ok    a line of its log'",
            self.line("WRONG", "another"),
        )
        self.selftest("\n".join([*lines, "exit 1"]))
        outcome = self.phase(jobs.selftest)
        self.assertEqual((outcome["status"], outcome["wrong"]), ("failed", ["another"]))
        self.assertEqual(list(outcome["values"]["jobs"]), ["1 worker", "another"])

    def test_each_job_has_a_limit(self) -> None:
        self.selftest("echo $JOB_SECONDS of $STEPS steps: $JOBS")
        self.phase(jobs.selftest)
        self.assertIn("\n40 of 200 steps: one tcp2 killed-tcp cpu\n", self.text())

    def test_warnings_of_nccl_are_in_the_log_and_not_in_the_output(self) -> None:
        self.program(
            "bin/lora-worker",
            'echo "a warning" >$(echo $NCCL_DEBUG_FILE | sed "s/%h/host/; s/%p/$$/")\n'
            'echo "NCCL WARN"; echo \'{"through": "nccl"}\'',
        )
        self.selftest(f"{self.line('ok', '2 workers, NCCL')}; echo all right")
        outcome = self.phase(jobs.nccl)
        self.assertEqual((outcome["status"], outcome["reason"]), ("ok", ""))
        self.assertEqual(outcome["values"]["all_reduce"], {"through": "nccl"})
        self.assertRegex(self.text(), r"\$ cat nccl-host-\d+\.txt\na warning\n")
        self.assertRegex(self.text(), r"lora-worker probe .* --timeout \d+\n")

    def test_a_machine_that_cannot_run_nccl_fails_the_phase(self) -> None:
        self.program("bin/lora-worker", "echo no result")
        self.selftest(f"{self.line('--', '2 workers, NCCL', 'unavailable: collective nccl')}; echo all right")
        outcome = self.phase(jobs.nccl)
        self.assertEqual(
            outcome["reason"], "all-reduce: no result; 2 workers, NCCL: unavailable: collective nccl"
        )


class Tables(unittest.TestCase):
    def test_the_table_of_a_run(self) -> None:
        first, second = (
            "\n".join(table.lines(run))
            for run in (sample_runs.FIRST, sample_runs.SECOND | {"prebuilt": True})
        )
        for text in (
            "WRONG  rope forward f32: y off",
            "12000   40.0   40.0     44.0",
            "steps: out of memory",
            "790 TFLOP/s",
            "product 4096x14336x4096",
            "ok      2 workers, TCP: ",
        ):
            self.assertIn(text, first)
        self.assertRegex(second, r"12500 .* 10000 .* 1\.25")
        self.assertIn("commit 0123456789ab, prebuilt programs\n", second)
        self.assertIn("ok      nccl: 1 worker: ", second)
        self.assertIn("ncu quant_: Duration 10 us", second)


if __name__ == "__main__":
    unittest.main()
