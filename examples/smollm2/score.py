"""Counts the answers of `loractl generate` to held-out addresses that are right.

    python score.py --adapter runs/smollm2
    python score.py

Without an adapter the base answers. An answer is right if it is the same JSON object as the row's.
"""

import argparse
import json
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
# The longest right answer has fewer tokens.
MAX_NEW_TOKENS = 128


def generate(program, adapter, messages):
    command = [program, "generate", "--base", HERE / "base", "--chat", "--system", messages[0]["content"],
               "--prompt", messages[1]["content"], "--max-new-tokens", str(MAX_NEW_TOKENS)]
    if adapter:
        command += ["--adapter", adapter]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def parse(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", type=Path, help="directory of the adapter")
    parser.add_argument("--rows", type=int, default=20, help="number of rows of eval.jsonl")
    parser.add_argument("--loractl", default="loractl", help="path of the program")
    args = parser.parse_args()
    lines = (HERE / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:args.rows]
    right = 0
    for line in lines:
        messages = json.loads(line)["messages"]
        answer = generate(args.loractl, args.adapter, messages)
        is_right = parse(answer) == json.loads(messages[-1]["content"])
        right += is_right
        print(f"{'right' if is_right else 'wrong'}  {messages[1]['content']}\n       {answer}")
    print(f"{right} of {len(lines)} answers are right")


if __name__ == "__main__":
    main()
