"""Checks the phases and the settings of a run: python3 check.py [PHASES]"""

import sys

from phases import chosen
from settings import SETTINGS


def problem(words: list[str]) -> str | None:
    """Why the phases that the words name, or the settings, are invalid."""
    try:
        chosen(words)
    except ValueError as error:
        return str(error)
    return SETTINGS.problem()


if __name__ == "__main__":
    if found := problem(sys.argv[1:]):
        print(f"onsite.sh: {found}", file=sys.stderr)
        sys.exit(2)
