"""context.py DIR: copies to DIR the files that `docker build` would send from this repository.

These are the files that .dockerignore includes. Only the syntax that .dockerignore uses is
supported: `*` in the first line, then `!PATH` for included paths, then `**/NAME` for excluded
names. The copies are new files, so that cargo checks all of them.
"""

import shutil
import sys
from pathlib import Path


def main(target: Path) -> None:
    lines = Path(".dockerignore").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    if lines[0] != "*":
        sys.exit(".dockerignore: the first line must be `*`")
    included, excluded = [], []
    for line in lines[1:]:
        if line.startswith("!") and not excluded and "*" not in line:
            included.append(line[1:])
        elif line.startswith("**/") and "*" not in line[3:]:
            excluded.append(line[3:])
        else:
            sys.exit(f".dockerignore: invalid line {line!r}; it must be `!PATH`, or after those `**/NAME`")
    for path in included:
        source, copy = Path(path), target / path
        if source.is_dir():
            ignored = shutil.ignore_patterns(*excluded)
            shutil.copytree(source, copy, ignore=ignored, copy_function=shutil.copy)
        elif source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
        else:
            sys.exit(f".dockerignore: {path} does not exist")
    for line in Path("deploy/docker/Dockerfile").read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and "--from" not in line:
            sources = [word for word in words[1:-1] if not word.startswith("--")]
            for source in sources:
                if not (target / source).exists():
                    sys.exit(f"Dockerfile: `{line}`: .dockerignore excludes {source}")


main(Path(sys.argv[1]))
