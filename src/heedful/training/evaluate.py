"""What a zoo language model is judged by: bits per byte of held-out books, and recall of needles it never saw the like of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.training.corpus import sentence_marks
from heedful.training.recall import RecallPrompt, held_out_prompts


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    context: int = 4096,
    batch_size: int = 8,
    limit_bytes: int | None = None,
) -> float:
    """Bits per UTF-8 byte over ``texts``, each cut into windows of ``context`` tokens without overlap, BOS before each window.

    ``limit_bytes`` keeps the first so many bytes of each text, for a quick look on a CPU.
    """
    nats, size = 0.0, 0
    device = next(model.parameters()).device
    for text in texts:
        if limit_bytes is not None:
            text = text.encode()[:limit_bytes].decode(errors="ignore")
        size += len(text.encode())
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows = [
            [tokenizer.bos_token_id, *ids[start : start + context - 1]] for start in range(0, len(ids), context - 1)
        ]
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            width = max(map(len, batch))
            rows = torch.full((len(batch), width), -100, dtype=torch.long, device=device)
            for row, window in zip(rows, batch, strict=True):
                row[: len(window)] = torch.tensor(window)
            logits = model(
                input_ids=rows.clamp_min(0), use_cache=False
            ).logits  # right padding: causal rows never see it
            for row_logits, row in zip(logits[:, :-1], rows[:, 1:], strict=True):
                nats += float(nn.functional.cross_entropy(row_logits.float(), row, ignore_index=-100, reduction="sum"))
    return nats / math.log(2) / size


@torch.no_grad()
def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[RecallPrompt], *, batch_size: int = 10
) -> float:
    """Share of prompts whose whole answer is the greedy continuation (teacher-forced: equal to decoding it greedily).

    All prompts must have about the same length; shorter ones are padded on the right, behind the answer.
    """
    device = next(model.parameters()).device
    correct = 0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers = [tokenizer(prompt.answer, add_special_tokens=False)["input_ids"] for prompt in batch]
        rows = [
            [tokenizer.bos_token_id, *prompt.tokens, *answer] for prompt, answer in zip(batch, answers, strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.bos_token_id] * (width - len(row)) for row in rows], device=device)
        guesses = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for row, answer, guess in zip(rows, answers, guesses, strict=True):
            correct += guess[len(row) - len(answer) - 1 : len(row) - 1].tolist() == answer
    return correct / len(prompts)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, books: Sequence[str], *, lengths: Sequence[int] = (512, 2048, 4096),
    count: int = 200, seed: int = 0, limit_bytes: int | None = None, batch_size: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Bits per byte over ``books``, and recall of held-out needles in them at ``lengths`` tokens, answer included: asked in
    the statement's own words (``recall_<length>``) and in others (``recall_paraphrased_<length>``)."""
    ends, begins = sentence_marks(tokenizer.backend_tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    prose = np.array(encode("\n\n".join(book[:200_000] for book in books)))
    figures: dict[str, Any] = {
        "bits_per_byte": bits_per_byte(model, tokenizer, books, batch_size=batch_size, limit_bytes=limit_bytes)
    }
    for length in lengths:  # BOS and at most eight tokens of answer fit into the context too
        for name, paraphrase in (("recall", False), ("recall_paraphrased", True)):
            prompts = held_out_prompts(
                prose, encode, ends, begins, length=length - 9, count=count, paraphrase=paraphrase, seed=seed
            )
            figures[f"{name}_{length}"] = recall(model, tokenizer, prompts, batch_size=batch_size)
    return figures
