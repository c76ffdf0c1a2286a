"""Tests of the kit's scripts, without a GPU and without a kit: python3 tests/gpu/onsite/tests.py"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
import unittest
from pathlib import Path

import main
import phases
import process
import table
from phase import Phase, Session, Skipped, run_phase

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.append(str(REPOSITORY / "benches/gpu"))

import results  # noqa: E402
from run_data import Run  # noqa: E402

# A process that ignores SIGTERM, in a session of its own, whose parent has ended.
STUBBORN = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); "
    "print('begun', flush=True); time.sleep(600)"
)


class InDirectory(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        process.adopt_orphans()

    def phase(self, run, seconds: float = 20, limit: int = 20) -> dict:
        return run_phase(
            Phase("tested", 1, limit, run), self.directory, self.directory, self.directory, seconds
        )


class Processes(InDirectory):
    def test_a_command_at_its_limit_leaves_no_process(self) -> None:
        shell = f'{sys.executable} -c "{STUBBORN}" & echo started; wait'
        began = time.monotonic()
        finished = process.run(
            ["sh", "-c", shell], self.directory / "log", 1.5, dict(os.environ), self.directory
        )
        self.assertIsNone(finished.status)
        self.assertIn("started", finished.output)
        self.assertEqual(process.descendants(), [])
        self.assertLess(time.monotonic() - began, 1.5 + process.GRACE + 3)

    def test_a_command_that_ends_leaves_no_process(self) -> None:
        shell = f'mkfifo pipe; {sys.executable} -c "{STUBBORN}" >pipe & read line <pipe; echo $line; exit 3'
        finished = process.run(
            ["sh", "-c", shell], self.directory / "log", 60, dict(os.environ), self.directory
        )
        self.assertEqual((finished.status, finished.output), (3, "begun\n"))
        self.assertEqual(process.descendants(), [])


class Phases(InDirectory):
    def test_outcomes(self) -> None:
        def missing(_: Session) -> None:
            raise Skipped("no tool")

        def broken(session: Session) -> None:
            json.loads(session.command("echo", ["echo", "no json"]).output)

        def fails(session: Session) -> None:
            session.values["before"] = 1
            session.command("first", ["sh", "-c", "echo error: the reason; echo Usage; exit 4"])
            session.values["after"] = 2

        outcomes = {run.__name__: self.phase(run) for run in (missing, broken, fails)}
        self.assertEqual(
            {name: outcome["status"] for name, outcome in outcomes.items()},
            {"missing": "skipped", "broken": "failed", "fails": "failed"},
        )
        self.assertEqual(outcomes["missing"]["reason"], "no tool")
        self.assertEqual(outcomes["fails"]["reason"], "first: exit status 4: error: the reason")
        self.assertEqual(outcomes["fails"]["values"], {"before": 1, "after": 2})

    def test_a_phase_at_its_limit_keeps_what_was_measured(self) -> None:
        def slow(session: Session) -> None:
            finished = session.command(
                "steps", ["sh", "-c", "echo '{\"tokens_per_s\": 1}'; echo '{\"tok'; sleep 600"]
            )
            session.values["cases"] = phases.json_lines(finished.output)

        for seconds, limit in ((1, 20), (20, 1)):
            outcome = self.phase(slow, seconds, limit)
            self.assertEqual(
                (outcome["status"], outcome["values"]), ("stopped", {"cases": [{"tokens_per_s": 1}]})
            )
            self.assertRegex(outcome["reason"], r"^steps after \d+ s$")

    def test_a_long_text_is_shortened_in_its_middle(self) -> None:
        outcome = self.phase(
            lambda session: (
                session.command("long", ["sh", "-c", "echo first; yes | head -c 20000000; echo last"])
                and None
            )
        )
        text = (self.directory / "tested.txt").read_bytes()
        self.assertEqual(outcome["status"], "ok")
        self.assertLess(len(text), 16 << 20)
        self.assertTrue(b"first\n" in text[:200] and text.endswith(b"last\n"))

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
        found = re.findall(phases.NCU_METRIC, output, re.MULTILINE)
        self.assertEqual(
            [name for name, *_ in found], ["Memory Throughput", "Duration", "Compute (SM) Throughput"]
        )
        self.assertEqual(found[1], ("Duration", "us", "1,234.56"))

    def test_names(self) -> None:
        self.assertEqual(main.chosen(["first"]), phases.HALVES["first"])
        self.assertEqual(main.chosen(["ncu", "ops"]), ["env", "ncu", "ops"])
        self.assertIn("invalid phase opps", main.chosen(["opps"]))
        self.assertIn("at most 6", main.chosen(["first", "ncu"]))
        for half in phases.HALVES.values():
            self.assertLessEqual(len(half), main.MOST_PHASES)

    def test_a_phase_for_which_too_little_time_is_left_is_skipped(self) -> None:
        ran = []
        phase = Phase("tested", 10, 20, ran.append)
        args = argparse.Namespace(kit=self.directory, out=self.directory, work=self.directory)
        outcome = main.attempt(phase, args, time.monotonic() + 5)
        self.assertEqual((outcome["status"], ran), ("skipped", []))
        self.assertIn("10 s are the minimum", outcome["reason"])


def step(phase: str, tokens_per_s: float, **more: object) -> dict:
    line = {
        "model": "llama-3.1-8b", "quantization": "none", "micro_batch": 2, "sequence": 2048,
        "tokens_per_s": tokens_per_s, "step_seconds": [0.33, 0.32, 0.34], "peak_memory_bytes": 40_000_000_000,
        **more,
    }  # fmt: skip
    return line if phase == "peft" else {**line, "mfu": 0.4, "peak_reserved_memory_bytes": 44_000_000_000}


def result(date: str, **found: dict) -> dict:
    """What onsite.sh writes, with the values of phases."""
    env = {"card": "NVIDIA H100 80GB HBM3", "driver": "580.159.04"}
    outcome = {"status": "ok", "reason": "", "seconds": 3.0}
    values = {"env": env, **found}
    made = {name: {**outcome, "values": values[name]} for name in values}
    return {"format": 1, "date": date, "commit": "0123456789abcdef", "dirty": False, "phases": made}


def row(name: str, milliseconds: float, gb_s: float | None, tflop_s: float | None, **more: object) -> dict:
    return {"name": name, "milliseconds": milliseconds, "gb_s": gb_s, "tflop_s": tflop_s, **more}


SHARES = {"count": 64, "percent_of_step": 27.0, "percent_of_ceiling": 82.3}
PROFILE = {
    "profile": [row("product 4096x14336x4096", 90.0, None, 650.0, **SHARES)],
    "profile_classes": [row("frozen products", 90.0, None, 650.0, **SHARES)],
    "profiled_step_milliseconds": 333.0,
    "gap_milliseconds": 5.5,
}
FIRST = result(
    "2026-12-01T10:00:00Z",
    ops={
        "checks": {
            "rms_norm forward f32": {"status": "ok", "detail": "y 1e-7"},
            "rope forward f32": {"status": "WRONG", "detail": "y off"},
            "an operation of later f32": {"status": "ok", "detail": ""},
        }
    },
    bench={
        "ceilings": {"product_side": 8192, "tflop_s": 790.0, "copy_bytes": 4 << 30, "gb_s": 3000.0},
        "rows": [
            row("dequantize nf4 down", 0.1, 1500.0, None, percent=50.0),
            {"name": "broken", "error": "out of memory"},
        ],
    },
    steps={
        "cases": [step("steps", 12_000.0), {**step("steps", 0.0, micro_batch=4), "error": "out of memory"}],
        "profiles": [step("steps", 9_000.0, **PROFILE), {**step("steps", 0.0), "error": "out of memory"}],
    },
    selftest={"jobs": {"2 workers, TCP": {"status": "ok", "detail": "the same adapter"}}},
)
SECOND = result(
    "2026-12-01T10:10:00Z",
    ours={"cases": [step("ours", 12_500.0)]},
    peft={"cases": [step("peft", 9_000.0, sdpa="flash"), step("peft", 10_000.0, sdpa="cudnn")]},
    sanitize={"checks": {"racecheck: attention": "ok"}},
    ncu={"kernels": {"quant_": {"Duration": "10 us"}}},
)


class Tables(InDirectory):
    def test_the_table_of_a_run(self) -> None:
        first, second = "\n".join(table.lines(FIRST)), "\n".join(table.lines(SECOND))
        for text in (
            "WRONG  rope forward f32: y off",
            "12000   40.0   40.0     44.0",
            "out of memory",
            "790 TFLOP/s",
            "product 4096x14336x4096",
        ):
            self.assertIn(text, first)
        self.assertRegex(second, r"12500 .* 10000 .* 1\.25")
        self.assertIn("ncu quant_: Duration 10 us", second)

    def test_the_tables_of_the_page(self) -> None:
        runs = self.directory / "results"
        for run in (FIRST, SECOND):
            (self.directory / "result.json").write_text(json.dumps(run))
            results.add(self.directory / "result.json", runs)
        self.assertEqual(
            [path.name for path in sorted(runs.iterdir())],
            [
                "2026-12-01T100000Z-nvidia-h100-80gb-hbm3.json",
                "2026-12-01T101000Z-nvidia-h100-80gb-hbm3.json",
            ],
        )
        page = self.directory / "RESULTS.md"
        page.write_text((REPOSITORY / "benches/gpu/RESULTS.md").read_text())
        arguments = ["results.py", "--results", str(runs), "--page", str(page)]
        self.assertEqual(called(results.main, [*arguments, "--check"]), 1)
        self.assertEqual(called(results.main, arguments), 0)
        self.assertEqual(called(results.main, [*arguments, "--check"]), 0)
        text, label = page.read_text(), "NVIDIA H100 80GB HBM3, 2026-12-01, 0123456"
        for expected in (
            f"| RMSNorm, residual + norm | compiled; simulated | ok: {label} |",
            f"| RoPE | compiled; simulated | WRONG (rope forward f32): {label} |",
            f"| an operation of later f32 | simulated | ok: {label} |",
            "| embedding | compiled; simulated | never |",
            f"| llama-3.1-8b, bf16 | 2 x 2048 | 12,500 | 330.0 | 40.0 % | 40.0 GB | 44.0 GB | {label} |",
            "| llama-3.1-8b, bf16 | 4 x 2048 | never |  |  |  |  |  |",
            "| llama-3.1-8b, bf16 | 2 x 2048 | 12,500 | 10,000 | 1.25 | 40.0 GB | 40.0 GB | cudnn | "
            f"{label} |",
            "| dequantize nf4 down | 0.100 | 1,500 | - | 50 % |",
            "| product 4096x14336x4096 | 64 | 90.000 | 27.0 % | - | 650.0 | 82 % |",
            "| frozen products | 64 | 90.000 | 27.0 % | - | 650.0 | 82 % |",
        ):
            self.assertIn(f"\n{expected}\n", text)

    def test_a_simulated_run_is_refused(self) -> None:
        run = result("2026-12-01T10:00:00Z")
        run["phases"]["env"]["values"]["card"] = results.SIMULATED
        path = self.directory / "result.json"
        path.write_text(json.dumps(run))
        with self.assertRaisesRegex(SystemExit, "simulated"):
            results.add(path, self.directory)
        self.assertEqual(Run.from_file(path).card, results.SIMULATED)


def called(function, arguments: list[str]) -> int:
    """What a program's main function returns with these arguments; its messages are dropped."""
    before, sys.argv = (sys.argv, sys.stderr), arguments
    sys.stderr = open(os.devnull, "w")
    try:
        return function()
    finally:
        sys.stderr.close()
        sys.argv, sys.stderr = before


if __name__ == "__main__":
    unittest.main()
