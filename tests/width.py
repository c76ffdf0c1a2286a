#!/usr/bin/env python3
"""Checks the width of lines: comments have at most 100 columns, code has at most 110.

    python3 tests/width.py

A line with a single word, such as an address, may be wider, because it cannot be broken.
"""

import re
import subprocess
import sys
from pathlib import Path

COMMENT, CODE = 100, 110
SLASHES = {".rs", ".proto", ".cu", ".cuh", ".cpp", ".h"}
HASHES = {".sh", ".py", ".toml", ".yaml", ".yml"}
ONE_WORD = re.compile(r"\s*(//[/!]?|#)?\s*\S+$")


def limit(suffix: str, line: str) -> int:
    """The number of columns that a line of a file with this suffix may have."""
    mark = "//" if suffix in SLASHES else "#"
    return COMMENT if line.lstrip().startswith(mark) else CODE


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    wide = 0
    for name in names.split("\0"):
        path = root / name
        if path.suffix not in SLASHES | HASHES or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            most = limit(path.suffix, line)
            if len(line) > most and not ONE_WORD.match(line):
                print(f"{name}:{number}: {len(line)} columns; the limit is {most}")
                wide += 1
    return 1 if wide else 0


if __name__ == "__main__":
    sys.exit(main())
