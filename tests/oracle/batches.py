"""Ragged token batches, padded on the right, with labels as in Transformers.

Labels are not shifted, and -100 means no loss.
"""

import torch

PAD = 0
IGNORE = -100


def ragged(vocab: int, lengths: list[int], prompts: list[int], seed: int) -> dict[str, torch.Tensor]:
    """`tokens`, `attention_mask` and `labels`, each [rows, max(lengths)] i64.

    The first `prompts[i]` labels of row i are masked. Each token follows from the previous one by a
    fixed rule, with some noise, so that a model can learn the rule.
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
            if noise:
                token = int(torch.randint(3, vocab, (), generator=generator))
            else:
                token = 3 + (7 * token + 5) % (vocab - 3)
        mask[row, :length] = 1
        labels[row, prompt:length] = tokens[row, prompt:length]
    return {"tokens": tokens, "attention_mask": mask, "labels": labels}
