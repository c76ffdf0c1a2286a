"""Pretrains `base/`, a Llama model of 2.2 million parameters, on the text of corpus.py.

    pip install "torch>=2.9" transformers
    python pretrain.py

The script takes about 20 minutes on 2 idle CPU cores (28 minutes of CPU time). It writes the model
in the Hugging Face layout and the training text to pretrain.jsonl.gz. The random generators are
seeded: the text and the tokenizer are reproducible. The weights can differ between versions of
torch and between machines.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corpus

SEED = 1582
DOCUMENTS = 50_000
VOCABULARY = 1024
SEQUENCE = 128
BATCH = 16
LEARNING_RATE = 5e-3
WARMUP_STEPS = 100
HERE = Path(__file__).parent

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL = [PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_text(path, documents):
    with gzip.GzipFile(path, "wb", compresslevel=9, mtime=0) as file:
        file.write("".join(json.dumps(document) + "\n" for document in documents).encode())


def train_tokenizer(documents):
    """Trains a byte-level BPE tokenizer in which every digit is a separate token."""
    texts = [part for document in documents for part in
             ([document["text"]] if "text" in document
              else [m["content"] for m in document["messages"]])]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512,
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def token_rows(tokenizer, documents):
    rendered = [f"{BOS}{document['text']}{EOS}" if "text" in document
                else tokenizer.apply_chat_template(document["messages"], tokenize=False)
                for document in documents]
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def batches(rows, generator):
    """Yields int64 token batches of shape [BATCH, SEQUENCE + 1] without end.

    Each epoch appends the documents in a new random order to one stream, which is cut into batches.
    """
    stream, size = [], BATCH * (SEQUENCE + 1)
    while True:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            stream += rows[index]
            if len(stream) >= size:
                yield torch.tensor(stream[:size]).view(BATCH, SEQUENCE + 1)
                stream = stream[size:]


def schedule(step, steps):
    """Returns the learning rate factor: a linear warm-up, then a linear decay to zero."""
    return min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))


def pretrain(model, rows, steps):
    """Trains the model with Muon for the matrices of the blocks, and AdamW for embedding and norms.

    Muon is the optimizer of Keller Jordan. It uses the learning rate of AdamW.
    """
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    source, started, smooth = batches(rows, torch.Generator().manual_seed(SEED)), time.time(), None
    for step in range(steps):
        batch = next(source)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            seconds = f"seconds {time.time() - started:.0f} cpu {time.process_time():.0f}"
            print(f"step {step + 1}/{steps} loss {smooth:.4f} {seconds}", flush=True)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=2600)
    arguments.add_argument("--out", type=Path, default=HERE / "base")
    arguments.add_argument("--text", type=Path, default=HERE / "pretrain.jsonl.gz")
    arguments.add_argument("--threads", type=int, default=2)
    arguments = arguments.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)

    documents = corpus.documents(SEED, DOCUMENTS)
    write_text(arguments.text, documents)
    tokenizer = train_tokenizer(documents)
    rows = token_rows(tokenizer, documents)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=512, tie_word_embeddings=True,
        max_position_embeddings=512, rms_norm_eps=1e-5, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters()} parameters, {sum(map(len, rows))} tokens of text", flush=True)
    pretrain(model, rows, arguments.steps)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
