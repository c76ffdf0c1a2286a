"""context.py DIR: copies to DIR what `docker build` would send from this repository: the files that .dockerignore lets through.

Of .dockerignore's language it knows what the file uses: `*` first, then `!PATH` for what is let through, then `**/NAME` for
what is left out again. The copies are new files, so that cargo looks at all of them.
"""

import shutil
import sys
from pathlib import Path


def main(target: Path) -> None:
    lines = [line for line in Path(".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    if lines[0] != "*":
        sys.exit(".dockerignore: the first line must be `*`")
    let_through, left_out = [], []
    for line in lines[1:]:
        if line.startswith("!") and not left_out and "*" not in line:
            let_through.append(line[1:])
        elif line.startswith("**/") and "*" not in line[3:]:
            left_out.append(line[3:])
        else:
            sys.exit(f".dockerignore: {line!r}: neither `!PATH` nor, after those, `**/NAME`")
    for path in let_through:
        source, copy = Path(path), target / path
        if source.is_dir():
            ignored = shutil.ignore_patterns(*left_out)
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
                    sys.exit(f"Dockerfile: `{line}`: .dockerignore leaves {source} out")


main(Path(sys.argv[1]))
