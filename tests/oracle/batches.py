"""Ragged token batches, padded on the right, with Transformers' labels (-100: no loss; not shifted)."""

import torch

PAD = 0
IGNORE = -100


def ragged(vocab: int, lengths: list[int], prompts: list[int], seed: int) -> dict[str, torch.Tensor]:
    """`tokens`, `attention_mask` and `labels`, each [rows, max(lengths)] i64; row i has its first `prompts[i]` labels off.

    Each token follows from the one before by a fixed rule, with some noise, so that there is something to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    tokens = torch.full(shape, PAD)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        token = int(torch.randint(3, vocab, (), generator=generator))
        for position in range(length):
            tokens[row, position] = token
            noise = torch.rand((), generator=generator) < 0.2
            token = int(torch.randint(3, vocab, (), generator=generator)) if noise else 3 + (7 * token + 5) % (vocab - 3)
        mask[row, :length] = 1
        labels[row, prompt:length] = tokens[row, prompt:length]
    return {"tokens": tokens, "attention_mask": mask, "labels": labels}
