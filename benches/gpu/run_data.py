"""Reads what one run of a kit measured: result.json of `tests/gpu/onsite.sh`."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

QUANTIZATIONS = {"none": "bf16", "nf4": "NF4", "nf4-double": "NF4 + double quantization", "int8": "int8"}


@dataclass
class Case:
    """Training steps of one shape: our results in order, PEFT's by attention kernel."""

    ours: list[dict] = field(default_factory=list)
    peft: dict[str, dict] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def fastest_peft(self) -> dict | None:
        """PEFT's result with the attention kernel that is the fastest."""
        return max(self.peft.values(), key=lambda line: line["tokens_per_s"], default=None)

    def ratio(self) -> float | None:
        """Our tokens a second divided by PEFT's; of ours, those that were measured last."""
        theirs = self.fastest_peft()
        return self.ours[-1]["tokens_per_s"] / theirs["tokens_per_s"] if self.ours and theirs else None


@dataclass
class Run:
    """A run; `phases` by name, each with `status`, `reason`, `seconds` and `values`."""

    date: str
    commit: str
    dirty: bool
    card: str
    driver: str
    phases: dict[str, dict]

    @classmethod
    def from_file(cls, path: Path) -> "Run":
        return cls.from_result(json.loads(path.read_text()))

    @classmethod
    def from_result(cls, result: dict) -> "Run":
        machine = result["phases"].get("env", {}).get("values", {})
        return cls(
            result["date"], result["commit"], result["dirty"], machine.get("card") or "unknown card",
            machine.get("driver") or "unknown", result["phases"],
        )  # fmt: skip

    def label(self) -> str:
        """Card, date and commit."""
        return f"{self.card}, {self.date[:10]}, {self.commit[:7]}{' with changes' if self.dirty else ''}"

    def values(self, phase: str) -> dict:
        return self.phases.get(phase, {}).get("values", {})

    def cases(self) -> dict[tuple[str, str, int, int], Case]:
        """By model, quantization, rows and positions."""
        cases: dict[tuple[str, str, int, int], Case] = {}
        for phase in ("steps", "ours", "peft"):
            for line in self.values(phase).get("cases", []):
                key = (model_name(line), line["quantization"], line["micro_batch"], line["sequence"])
                case = cases.setdefault(key, Case())
                if "error" in line:
                    case.errors.append(f"{phase}: {line['error']}")
                elif phase == "peft":
                    case.peft[line["sdpa"]] = line
                else:
                    case.ours.append(line)
        return cases


def model_name(line: dict) -> str:
    """The model of a case; of a configuration its file's name."""
    return Path(line["model"]).name.removesuffix(".json")


def step_ms(line: dict) -> float:
    """The median step of a case, in milliseconds."""
    return statistics.median(line["step_seconds"]) * 1e3
