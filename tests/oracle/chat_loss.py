"""Tokens and labels of conversations as TRL's `SFTTrainer` prepares them for training."""

import json
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import chat

IGNORE = -100
# Beside the templates of `chat.py`, templates in which the assistant's turns are hard to find.
TEMPLATES = {
    # Thinking in the generation prompt alone: the completion begins before the end of the prompt.
    "thinking-prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    # Every message is rendered otherwise once another one follows.
    "countdown": (
        "{% for m in messages %}{{ loop.revindex }}{{ m.content | upper }}{{ loop.length }}{% endfor %}"
    ),
}
TURNS = chat.CONVERSATIONS["system-and-turns"]
ROWS = {
    "turns": {"messages": TURNS},
    "whitespace-and-unicode": {"messages": chat.CONVERSATIONS["whitespace-and-unicode"]},
    "question-only": {"messages": chat.CONVERSATIONS["question-only"]},
    "assistant-first": {"messages": chat.CONVERSATIONS["assistant-first"]},
    "prompt": {"prompt": TURNS[:4], "completion": TURNS[4:]},
    "prompt-and-two-turns": {"prompt": TURNS[:2], "completion": TURNS[2:]},
}


def make_all(path: Path) -> None:
    """Writes the templates, the rows, and for each pair and setting `tokens` and `trained`."""
    tokenizer = chat.train_tokenizer()
    sources = {name: (chat.TEMPLATES / f"{name}.jinja").read_text() for name in ["chatml", "generation"]}
    sources |= TEMPLATES
    results = []
    for template, source in sources.items():
        tokenizer.chat_template = source
        for row, contents in ROWS.items():
            # With `assistant_only_loss` TRL takes the turns from {% generation %} blocks.
            for assistant_only in [False, True] if "{% generation %}" in source else [False]:
                for completion_only in [False, True] if "prompt" in contents else [True]:
                    result = {
                        "template": template,
                        "row": row,
                        "assistant_only_loss": assistant_only,
                        "completion_only_loss": completion_only,
                    }
                    prepared = prepare(tokenizer, contents, assistant_only, completion_only)
                    if prepared is not None:
                        results.append(result | prepared)
    contents = {"templates": sources, "rows": ROWS, "results": results}
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare(tokenizer, row: dict, assistant_only: bool, completion_only: bool) -> dict | None:
    """`tokens` and `trained` of a row; None if it has no turn, which TRL refuses."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        settings = SFTConfig(
            output_dir=directory, max_length=None, assistant_only_loss=assistant_only, use_cpu=True,
            bf16=False, report_to="none", disable_tqdm=True,
            completion_only_loss=completion_only if "prompt" in row else None,
        )  # fmt: skip
        try:
            trainer = SFTTrainer(
                model=LlamaForCausalLM(config), args=settings, processing_class=tokenizer,
                train_dataset=Dataset.from_list([row]),
            )  # fmt: skip
        except RuntimeError as error:
            assert "no assistant tokens" in str(error), error
            return None
    prepared = trainer.train_dataset[0]
    trained = [int(label != IGNORE) for label in prepared["labels"]]
    # No label is shifted to the first token.
    trained[0] = 0
    return {"tokens": prepared["input_ids"], "trained": trained}


if __name__ == "__main__":
    make_all(chat.TEMPLATES.parents[1] / "golden" / "chat" / "losses.json")
