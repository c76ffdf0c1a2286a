"""Reads the results of one run of a kit: result.json of `tests/gpu/onsite.sh`."""

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

QUANTIZATIONS = {"none": "bf16", "nf4": "NF4", "nf4-double": "NF4 + double quantization", "int8": "int8"}
FORMAT = 1
DATE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
UNKNOWN_CARD = "unknown card"
# The settings that determine what a phase measures. The row of a training step contains its shape
# and model, so results with other shapes are comparable.
STEP_SETTINGS = {"warmup", "steps"}
SETTINGS = {
    "ops": {"checks"},
    "bench": {"bench", "bench_scale"},
    "steps": {"model", "cases", "profile_cases", "bench_scale"} | STEP_SETTINGS,
    "selftest": {"jobs", "job_steps"},
    "peft": {"model", "cases"} | STEP_SETTINGS,
    "ours": {"model", "cases"} | STEP_SETTINGS,
    "nccl": {"job_steps"},
    "sanitize": {"checks"},
    "ncu": {"bench_scale"},
}


@dataclass
class Case:
    """Training steps of one shape.

    It has our results in order, PEFT's results by attention kernel, and the errors of both by phase
    and kernel.
    """

    ours: list[dict] = field(default_factory=list)
    peft: dict[str, dict] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def fastest_peft(self) -> dict | None:
        """Returns PEFT's result with the fastest attention kernel."""
        return max(self.peft.values(), key=lambda line: line["tokens_per_s"], default=None)

    def ratio(self) -> float | None:
        """Returns our last measured tokens per second divided by PEFT's."""
        theirs = self.fastest_peft()
        return self.ours[-1]["tokens_per_s"] / theirs["tokens_per_s"] if self.ours and theirs else None

    def error(self, side: str) -> str | None:
        """Returns the last error of `ours` or `peft`."""
        found = [error for name, error in self.errors.items() if name.startswith("peft") == (side == "peft")]
        return found[-1] if found else None


@dataclass
class Run:
    """A run.

    `phases` has `status`, `reason`, `seconds`, `wrong` and `values` of each phase by name.
    """

    date: str
    commit: str
    dirty: bool
    prebuilt: bool
    card: str
    driver: str
    changed_settings: set[str]
    phases: dict[str, dict]

    @classmethod
    def from_file(cls, path: Path) -> "Run":
        """Reads a run.

        Raises OSError if the file cannot be read, and ValueError if it is not the result of a run.
        """
        result = json.loads(path.read_text())
        try:
            return cls.from_result(result)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    @classmethod
    def from_result(cls, result: dict) -> "Run":
        if result["format"] != FORMAT:
            raise ValueError(f"format {result['format']}; it must be {FORMAT}")
        if not re.fullmatch(DATE, result["date"]):
            raise ValueError(f"date {result['date']}; it must be like 2026-01-31T10:00:00Z")
        machine = result["phases"].get("env", {}).get("values", {})
        return cls(
            date=result["date"],
            commit=result["commit"],
            dirty=result["dirty"],
            prebuilt=result["prebuilt"],
            card=machine.get("card") or UNKNOWN_CARD,
            driver=machine.get("driver") or "unknown",
            changed_settings=set(result["changed_settings"]),
            phases=result["phases"],
        )

    def source(self) -> str:
        """Returns how the programs differ from a build of their commit."""
        return (" with changes" if self.dirty else "") + (", prebuilt programs" if self.prebuilt else "")

    def label(self) -> str:
        """Returns card, date and commit."""
        return f"{self.card}, {self.date[:10]}, {self.commit[:7]}{self.source()}"

    def values(self, phase: str) -> dict:
        return self.phases.get(phase, {}).get("values", {})

    def attempted(self, phase: str) -> bool:
        """Returns whether the phase ran with the default settings."""
        status = self.phases.get(phase, {}).get("status", "skipped")
        return status != "skipped" and not self.changed_settings & SETTINGS.get(phase, set())

    def cases(self) -> dict[tuple[str, str, int, int], Case]:
        """Returns the cases by model, quantization, rows and positions."""
        cases: dict[tuple[str, str, int, int], Case] = {}
        for phase in ("steps", "ours", "peft"):
            for line in self.values(phase).get("cases", []):
                key = (model_name(line), line["quantization"], line["micro_batch"], line["sequence"])
                case = cases.setdefault(key, Case())
                name = f"{phase} {line['sdpa']}" if phase == "peft" else phase
                if "error" in line:
                    case.errors[name] = short(line["error"])
                elif phase == "peft":
                    case.peft[line["sdpa"]] = line
                else:
                    case.ours.append(line)
        return cases


def short(error: str) -> str:
    """Returns an error, shortened."""
    if re.search(r"out.of.memory", error, re.IGNORECASE):
        return "out of memory"
    return error if len(error) <= 60 else error[:57] + "..."


def model_name(line: dict) -> str:
    """Returns the name of a case's model. If the model is a path, this is the name of the file."""
    return Path(line["model"]).name.removesuffix(".json")


def step_ms(line: dict) -> float:
    """Returns the median time of a step of a case, in milliseconds."""
    return statistics.median(line["step_seconds"]) * 1e3
