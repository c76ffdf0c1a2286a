"""The settings of a run, from the environment; `onsite.sh --help` describes them."""

import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

MODELS = Path(__file__).resolve().parents[3] / "benches/models"
# The names of the checks of selftest.sh.
JOB_NAMES = ["doctor", "ops", "one", "tcp2", "nccl2", "tcp4", "nccl4", "killed-tcp", "killed-nccl", "cpu"]


@dataclass(frozen=True)
class Settings:
    """The environment variables of the same names in upper case, with their defaults."""

    model: str = "llama-3.1-8b"
    # The case that needs the most memory is last.
    cases: str = "1x2048,2x2048,8x512,4x2048"
    profile_cases: str = "2x2048"
    warmup: str = "2"
    steps: str = "8"
    threads: str = str(min(8, os.cpu_count() or 1))
    checks: str = ""
    bench: str = ""
    bench_scale: str = "1"
    jobs: str = "one tcp2 killed-tcp cpu"
    job_steps: str = "200"

    @classmethod
    def from_environment(cls) -> "Settings":
        names = [field.name for field in fields(cls)]
        return cls(**{name: value for name in names if (value := os.environ.get(name.upper()))})

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def changed(self) -> list[str]:
        """The names of the settings that do not have their defaults."""
        return [name for name, value in self.as_dict().items() if value != getattr(Settings(), name)]

    def problem(self) -> str | None:
        """Why the settings are invalid."""
        for name in ("cases", "profile_cases"):
            value = getattr(self, name)
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", value):
                return f"invalid {name.upper()}: {value}; it must be ROWSxPOSITIONS,... such as 1x2048,8x512"
        for name in ("warmup", "steps", "threads", "bench_scale", "job_steps"):
            least, value = int(name != "warmup"), getattr(self, name)
            if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < least:
                return f"invalid {name.upper()}: {value}; it must be a whole number, at least {least}"
        unknown = [name for name in self.jobs.split() if name not in JOB_NAMES]
        if unknown or not self.jobs.split():
            return f"invalid JOBS: {' '.join(unknown)}; it must have names of {', '.join(JOB_NAMES)}"
        if not (MODELS / f"{self.model}.json").is_file() and not Path(self.model).is_file():
            known = ", ".join(sorted(path.stem for path in MODELS.glob("*.json")))
            return f"invalid MODEL: {self.model}; it must be the file of a configuration or one of {known}"
        return None


SETTINGS = Settings.from_environment()
PYTHON = os.environ.get("PYTHON") or "python3"
