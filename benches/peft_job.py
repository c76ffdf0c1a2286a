"""PEFT's side of a whole job on a CPU: trains a job file's rows, or scores an adapter's answers.

    python benches/peft_job.py train examples/smollm2/job.yaml --out peft
    python benches/peft_job.py score examples/smollm2/job.yaml --adapter runs/smollm2

`train` takes one epoch in the order of the file (`shuffle: false`) and has the batches of
`loractl run`: the rows of a step are sorted by length and divided into micro-batches, and the loss
is the mean over the trained tokens of the step. Rows are messages that end with the assistant's
answer. `score` generates greedily for each evaluation row and counts the answers that are equal as
JSON. Both print a line of JSON.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from peft_step import DTYPES, peak_rss

IGNORE = -100
# Rows that generate together, and the largest number of tokens of an answer.
SCORED_TOGETHER, ANSWER_TOKENS = 25, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["train", "score"])
    parser.add_argument("job", type=Path, help="job file")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="data type of the base")
    parser.add_argument("--adapter", type=Path, help="adapter to score, or to start the training from")
    parser.add_argument("--out", type=Path, help="output directory for the adapter, or file for the answers")
    parser.add_argument("--steps", type=int, help="train only this many steps, and do not evaluate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    job = yaml.safe_load(args.job.read_text())
    torch.manual_seed(job["training"]["seed"])
    base = args.job.parent / job["model"]["base"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[args.dtype])
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=args.command == "train")
    print(json.dumps({"train": train, "score": score}[args.command](args, job, tokenizer, model)))


def read_rows(args: argparse.Namespace, job: dict, key: str) -> list[list[dict]]:
    lines = (args.job.parent / job["data"][key]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def train(args: argparse.Namespace, job: dict, tokenizer, model) -> dict:
    settings = job["training"]
    if job["data"]["shuffle"] or settings["num_train_epochs"] != 1:
        raise SystemExit("invalid job: must have shuffle: false and num_train_epochs: 1")
    if not args.adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **job["adapter"]))
    rows = [encode(tokenizer, row) for row in read_rows(args, job, "train")]
    held_out = [encode(tokenizer, row) for row in read_rows(args, job, "eval")]
    size, micro = settings["global_batch_size"], settings["micro_batch_size"]
    steps = math.ceil(len(rows) / size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    warmup = math.ceil(settings["warmup_steps"] * steps)
    scheduler = get_scheduler(settings["lr_scheduler_type"], optimizer, warmup, steps)
    model.train()
    losses, evaluations, tokens, started = [], {}, 0, time.perf_counter()
    for step in range(1, (args.steps or steps) + 1):
        batch = sorted(rows[(step - 1) * size : step * size], key=lambda row: len(row[0]))
        targets = trained_tokens(batch)
        total = 0.0
        for start in range(0, len(batch), micro):
            loss = loss_sum(model, batch[start : start + micro]) / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
        tokens += sum(len(row[0]) for row in batch)
        if not args.steps and (step % settings["eval_steps"] == 0 or step == steps):
            evaluations[step] = evaluate(model, held_out, micro)
    if args.out:
        model.save_pretrained(args.out)
    return {
        "dtype": args.dtype,
        "seconds": time.perf_counter() - started,
        "tokens": tokens,
        "losses": losses,
        "eval_losses": evaluations,
        "peak_memory_bytes": peak_rss(),
    }


def encode(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Returns the tokens of a row and its labels: those of the answer with its end-of-turn token."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    answer = messages[-1]["content"] + tokenizer.eos_token
    # The template ends with a new line, which is not trained.
    parts = [tokenizer(text, add_special_tokens=False).input_ids for text in [prompt, answer, "\n"]]
    labels = [IGNORE] * len(parts[0]) + parts[1] + [IGNORE] * len(parts[2])
    return sum(parts, []), labels


def trained_tokens(rows: list) -> int:
    return sum(label != IGNORE for _, labels in rows for label in labels)


def loss_sum(model, rows: list) -> torch.Tensor:
    """Returns the sum of the losses of the trained tokens of a micro-batch, padded on the right."""
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows])
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model, rows: list, micro: int) -> float:
    model.eval()
    total = sum(loss_sum(model, rows[i : i + micro]).item() for i in range(0, len(rows), micro))
    model.train()
    return total / trained_tokens(rows)


@torch.no_grad()
def score(args: argparse.Namespace, job: dict, tokenizer, model) -> dict:
    rows = read_rows(args, job, "eval")
    rows = sorted(rows, key=lambda messages: len(messages[-1]["content"]))
    tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(rows), SCORED_TOGETHER):
        prompts = [
            tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            for messages in rows[start : start + SCORED_TOGETHER]
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.eval().generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    pairs = [(messages[-2]["content"], messages[-1]["content"], a) for messages, a in zip(rows, answers)]
    if args.out:
        args.out.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    parsed = [(json.loads(expected), parse(answer)) for _, expected, answer in pairs]
    return {
        "rows": len(rows),
        "equal": sum(expected == answer for expected, answer in parsed),
        "fields": sum(len(expected) for expected, _ in parsed),
        "equal_fields": sum(answer.get(key) == value for row, answer in parsed for key, value in row.items()),
    }


def parse(text: str) -> dict:
    """Returns the JSON object of an answer, or an empty one if the answer is not an object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    main()
