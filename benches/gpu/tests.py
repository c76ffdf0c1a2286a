"""Tests of the tables of RESULTS.md: python3 benches/gpu/tests.py"""

import contextlib
import copy
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path

import results
from sample_runs import CEILINGS, FIRST, PROFILE, SECOND, jobs, ops, outcome, result, row, step

PAGE = Path(__file__).with_name("RESULTS.md")
LABEL = "NVIDIA H100 80GB HBM3, 2026-12-01, 0123456"
OLD, NEW = "2026-11-30T10:00:00Z", "2026-12-01T10:00:00Z"
OLD_LABEL = LABEL.replace("2026-12-01", "2026-11-30")


class InDirectory(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.runs = self.directory / "results"
        self.page = self.directory / "RESULTS.md"
        self.page.write_text(PAGE.read_text())

    def call(self, *arguments: str) -> int:
        """Runs results.py on this directory and returns its exit status."""
        before, sys.argv = sys.argv, ["results.py", "--results", str(self.runs), "--page", str(self.page)]
        sys.argv += arguments
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                return results.main()
        finally:
            sys.argv = before

    def add(self, run: dict | str) -> None:
        path = self.directory / "result.json"
        path.write_text(run if isinstance(run, str) else json.dumps(run))
        self.assertEqual(self.call("--add", str(path)), 0)

    def tables(self, *runs: dict) -> str:
        """Adds these runs and returns the page."""
        for run in runs:
            self.add(run)
        return self.page.read_text()


class Pages(InDirectory):
    def test_the_page_shows_all_tables(self) -> None:
        text = self.tables(FIRST, SECOND)
        self.assertEqual(
            [path.name for path in sorted(self.runs.iterdir())],
            [
                "2026-12-01T100000Z-nvidia-h100-80gb-hbm3.json",
                "2026-12-01T101000Z-nvidia-h100-80gb-hbm3.json",
            ],
        )
        self.assertEqual(self.call("--check"), 0)
        for expected in (
            f"| RMSNorm, residual + norm | compiled; simulated | ok: {LABEL} |",
            f"| RoPE | compiled; simulated | WRONG (rope forward f32): {LABEL} |",
            f"| unlisted operation f32 | simulated | ok: {LABEL} |",
            "| embedding | compiled; simulated | never |",
            f"| llama-3.1-8b, bf16 | 2 x 2048 | 12,500 | 330.0 | 40.0 % | 40.0 GB | 44.0 GB | {LABEL} |",
            f"| llama-3.1-8b, bf16 | 4 x 2048 | out of memory |  |  |  |  | {LABEL} |",
            "| llama-3.1-8b, bf16 | 8 x 512 | never |  |  |  |  |  |",
            "| llama-3.1-8b, bf16 | 2 x 2048 | 12,500 | 10,000 | 1.25 | 40.0 GB | 40.0 GB | cudnn | "
            f"{LABEL} |",
            "| dequantize nf4 down | 0.100 | 1,500 | - | 50 % |",
            "| too large | out of memory |  |  |  |",
            "| product 4096x14336x4096 | 64 | 90.000 | 27.0 % | - | 650.0 | 82 % |",
            "| frozen products | 64 | 90.000 | 27.0 % | - | 650.0 | 82 % |",
        ):
            self.assertIn(f"\n{expected}\n", text)

    def test_a_changed_page_fails_the_check(self) -> None:
        self.add(FIRST)
        self.page.write_text(PAGE.read_text())
        self.assertEqual(self.call("--check"), 1)
        self.assertEqual((self.call(), self.call("--check")), (0, 0))

    def test_a_run_that_is_added_twice_is_shown_once(self) -> None:
        self.add(FIRST)
        text = self.tables(FIRST)
        self.assertEqual(text.count(f"| {FIRST['date']} |"), 1)
        self.assertEqual(self.call("--check"), 0)


class Verdicts(InDirectory):
    def item(self, name: str, *runs: dict) -> str:
        """Adds these runs and returns the result of an item on a GPU."""
        text = self.tables(*runs)
        return next(line.split(" | ")[-1] for line in text.splitlines() if line.startswith(f"| {name}"))

    def norm(self, *runs: dict) -> str:
        return self.item("RMSNorm", *runs).removesuffix(" |")

    def test_nccl_jobs_do_not_hide_selftest_jobs(self) -> None:
        run = result(
            NEW, selftest=jobs({"1 worker": "WRONG"}), nccl=jobs({"1 worker": "ok", "2 workers": "ok"})
        )
        self.assertEqual(self.item("`tests/gpu/selftest.sh`", run), f"WRONG (1 worker): {LABEL} |")

    def test_nccl_jobs_do_not_count_as_selftest_jobs(self) -> None:
        self.assertEqual(
            self.item("`tests/gpu/selftest.sh`", result(NEW, nccl=jobs({"1 worker": "ok"}))), "never |"
        )

    def test_incomplete_checks_are_not_ok(self) -> None:
        died = outcome(
            ops({"rms_norm forward f32": "ok"}, complete=False), "failed", "lora-gpu: exit status 139: "
        )
        self.assertEqual(self.norm(result(NEW, ops=died)), f"incomplete (ops failed; 1 ok): {LABEL}")
        stopped = outcome(
            jobs({"1 worker": "ok"}, complete=False), "stopped", "selftest.sh: stopped after 100 s"
        )
        self.assertEqual(
            self.item("`tests/gpu/selftest.sh`", result(NEW, selftest=stopped)),
            f"incomplete (selftest stopped; 1 ok): {LABEL} |",
        )

    def test_wrong_checks_of_other_rows_do_not_make_a_row_incomplete(self) -> None:
        run = result(NEW, ops=outcome(ops({"rms_norm forward f32": "ok", "rope f32": "WRONG"}), "failed"))
        self.assertEqual(self.norm(run), f"ok: {LABEL}")

    def test_runs_of_selected_checks_do_not_hide_older_runs(self) -> None:
        old = result(OLD, ops=ops({"rms_norm backward f32": "WRONG", "rms_norm forward f32": "ok"}))
        new = result(NEW, ("checks",), ops=ops({"rms_norm forward f32": "ok"}))
        self.assertEqual(self.norm(old, new), f"WRONG (rms_norm backward f32): {OLD_LABEL}")
        self.assertIn("ops ok; not the default: checks |", self.page.read_text())

    def test_runs_of_selected_jobs_do_not_hide_older_runs(self) -> None:
        old = result(OLD, selftest=jobs({"2 workers, TCP": "WRONG"}))
        new = result(NEW, ("jobs",), selftest=jobs({"1 worker": "ok"}))
        self.assertIn("WRONG (2 workers, TCP)", self.item("`tests/gpu/selftest.sh`", old, new))

    def test_only_incorrect_results_are_wrong(self) -> None:
        slow = "racecheck: attention: stopped after 30 s; not measured: 1 of 7 checks"
        memory = "int8 4x2048: out of memory"
        for name, phase, expected in (
            ("compute-sanitizer", {"sanitize": outcome({}, "stopped", slow)}, f"stopped ({slow})"),
            ("`train_step", {"steps": outcome({}, "failed", memory)}, f"failed ({memory})"),
            (
                "`train_step",
                {"steps": outcome({}, "failed", "none 1x2048: the loss is not finite", ["none 1x2048"])},
                "WRONG (none 1x2048)",
            ),
            (
                "`benches/peft_step.py`",
                {"peft": outcome({}, reason="not measured: nf4-double: Python has no bitsandbytes")},
                "incomplete (not measured: nf4-double: Python has no bitsandbytes)",
            ),
            ("reduction through NCCL", {"nccl": jobs({"1 worker": "ok"})}, "ok"),
        ):
            self.assertEqual(self.item(name, result(NEW, **phase)), f"{expected}: {LABEL} |")

    def test_the_table_of_runs_shows_what_was_not_measured(self) -> None:
        run = result(NEW, peft=outcome({}, reason="not measured: nf4-double: Python has no bitsandbytes"))
        run |= {"prebuilt": True, "dirty": True}
        text = self.tables(run)
        self.assertIn("peft ok (not measured: nf4-double: Python has no bitsandbytes) |", text)
        self.assertIn("| `0123456789ab` with changes, prebuilt programs |", text)


class Numbers(InDirectory):
    def rows(self, start: str, *runs: dict) -> list[str]:
        return [line for line in self.tables(*runs).splitlines() if line.startswith(f"| {start} |")]

    def test_runs_with_other_settings_are_only_in_the_table_of_runs(self) -> None:
        for changed in (("steps",), ("warmup",)):
            run = result(NEW, changed, ours={"cases": [step("ours", 99.0)]})
            self.assertNotIn("| 99 |", self.tables(run), changed)
        measured = {"ceilings": CEILINGS, "rows": [row("dequantize", 77.0, 1.0, None, percent=1.0)]}
        for changed in (("bench",), ("bench_scale",)):
            self.assertNotIn("| 77.000 |", self.tables(result(NEW, changed, bench=measured)), changed)
        profiles = {"cases": [], "profiles": [step("steps", 9_000.0, **PROFILE)]}
        for changed in (("model",), ("profile_cases",), ("bench_scale",), ("steps",)):
            self.assertNotIn("frozen products", self.tables(result(NEW, changed, steps=profiles)), changed)
        self.assertIn("frozen products", self.tables(result(NEW, steps=profiles)))

    def test_another_model_has_its_own_row(self) -> None:
        run = result(NEW, ("model",), ours={"cases": [step("ours", 99.0, model="qwen2.5-7b")]})
        self.assertEqual(len(self.rows("qwen2.5-7b, bf16 | 2 x 2048 | 99", run)), 1)
        self.assertEqual(len(self.rows("llama-3.1-8b, bf16 | 2 x 2048 | never", run)), 2)

    def test_a_failure_replaces_an_older_number(self) -> None:
        old = result(OLD, ours={"cases": [step("ours", 12_500.0)]})
        error = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, out of memory) at gemm.rs"
        new = result(NEW, ours=outcome({"cases": [step("ours", 0.0, error=error)]}, "failed"))
        (shown,) = self.rows("llama-3.1-8b, bf16 | 2 x 2048 | out of memory", old, new)
        self.assertIn(LABEL, shown)

    def test_a_failure_of_peft_is_shown(self) -> None:
        new = result(
            NEW,
            ours={"cases": [step("ours", 12_500.0)]},
            peft={"cases": [step("peft", 0.0, sdpa="flash", error="CUDA out of memory. Tried")]},
        )
        expected = "llama-3.1-8b, bf16 | 2 x 2048 | 12,500 | out of memory | - | 40.0 GB | - | -"
        self.assertEqual(len(self.rows(expected, SECOND | {"date": OLD}, new)), 1)

    def test_stopped_microbenchmarks_are_shown_as_incomplete(self) -> None:
        measured = {"ceilings": CEILINGS, "rows": []}
        run = result(NEW, bench=outcome(measured, "stopped", "lora-gpu --bench: stopped after 60 s"))
        self.assertIn(
            f"{LABEL}. Incomplete: bench stopped (lora-gpu --bench: stopped after 60 s).", self.tables(run)
        )

    def test_a_failed_profile_shows_its_error(self) -> None:
        run = result(NEW, steps={"cases": [], "profiles": [step("steps", 0.0, error="out of memory")]})
        self.assertIn(f"{LABEL}. No profile: out of memory", self.tables(run))


class Refusals(InDirectory):
    def refused(self, run: dict | str, message: str) -> None:
        page, before = self.page.read_text(), sorted(self.directory.rglob("*"))
        with self.assertRaisesRegex(SystemExit, f"result.json: .*{message}"):
            self.add(run)
        after = [path for path in sorted(self.directory.rglob("*")) if path.name != "result.json"]
        self.assertEqual((self.page.read_text(), after), (page, before))
        (self.directory / "result.json").unlink()

    def test_a_run_without_a_known_card_is_refused(self) -> None:
        for card, message in (("Simulated GPU", "simulated GPU"), (None, "the card is unknown")):
            run = copy.deepcopy(FIRST)
            run["phases"]["env"]["values"]["card"] = card
            self.refused(run, message)

    def test_an_invalid_result_is_refused_before_anything_is_written(self) -> None:
        for run, message in (
            ("{", "Expecting"),
            ("[]", "TypeError"),
            (FIRST | {"format": 2}, "format 2; it must be 1"),
            (FIRST | {"date": "../../yesterday"}, "date ../../yesterday"),
            ({"format": 1, "date": NEW}, "KeyError: 'phases'"),
            (result(NEW, bench={"rows": []}), "the tables cannot be made: KeyError: 'ceilings'"),
            (result(NEW, ours={"cases": [{"model": "x"}]}), "the tables cannot be made"),
        ):
            self.refused(run, message)

    def test_an_invalid_file_among_the_results_is_named(self) -> None:
        self.runs.mkdir()
        (self.runs / "odd.json").write_text("{")
        with self.assertRaisesRegex(SystemExit, "invalid .*odd.json"):
            self.call()


if __name__ == "__main__":
    unittest.main()
