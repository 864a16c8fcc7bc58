"""Prompt lookup: what followed the last few tokens the last time they occurred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import LongTensor
from transformers import PreTrainedModel

from heedful.decoding.drafter import DeviceDrafter, Drafter
from heedful.decoding.support import model_device
from heedful.decoding.tree import DraftTree


class PromptLookup(Drafter):
    """Drafts by copying: the tokens that followed the latest earlier occurrence of the longest matching n-gram.

    The n-grams end with the last token chosen; ``max_ngram_size`` is tried first, then shorter ones down to a single token.
    A shorter match says less (with ``classics-20m`` its first token is right in one case of three, against five of six), so less
    is drafted after it. Nothing is learned or kept: each row looks into its own prompt and output.

    Example:
        >>> import heedful
        >>> from heedful.decoding import PromptLookup
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> ids = tokenizer("one two three four, one two three", return_tensors="pt").input_ids
        >>> result = heedful.generate(model, ids, PromptLookup(), max_new_tokens=32, do_sample=False)

    Args:
        num_tokens: the most tokens drafted a step. Default 10.
        max_ngram_size: the longest n-gram looked for. Default 3.
        num_tokens_short: the most tokens drafted after a match that is shorter than that. Default 4: less than what `Sequence`
            asks of a drafter before it turns to the next one.

    Cost:
        One pass over the row's tokens a step, microseconds at thousands of tokens; no memory. A step verifies up to
        ``num_tokens + 1`` rows.

    When not to use:
        Where the output does not repeat the input or itself: it then drafts what is rarely right (`TokenRecycling` learns
        from what the model computes). It shines in summaries, edits and code.

    Paper:
        Prompt Lookup Decoding, Apoorv Saxena, 2023 (no arXiv paper); the same idea is LLMA in "Inference with Reference:
        Lossless Acceleration of Large Language Models", Yang, Ge, Wang, Jiao, Jiang, Yang, Majumder, Wei, arXiv 2304.04487.
    """

    def __init__(self, num_tokens: int = 10, max_ngram_size: int = 3, num_tokens_short: int = 4) -> None:
        if min(num_tokens, max_ngram_size, num_tokens_short) < 1:
            raise ValueError(
                f"num_tokens, max_ngram_size and num_tokens_short must be at least 1, got {num_tokens}, {max_ngram_size} and "
                f"{num_tokens_short}"
            )
        self.num_tokens, self.max_ngram_size = num_tokens, max_ngram_size
        self.num_tokens_short = min(num_tokens_short, num_tokens)

    def propose(self, roots: LongTensor, committed: list[LongTensor]) -> Sequence[DraftTree | None]:
        return [self._lookup(int(root), row.numpy()) for root, row in zip(roots, committed, strict=True)]

    def on_device(self, model: PreTrainedModel, batch_size: int, capacity: int) -> DeviceDrafter:
        from heedful.decoding.on_device import LookupOnDevice

        return LookupOnDevice(
            batch_size, capacity, self.num_tokens, self.max_ngram_size, self.num_tokens_short, model_device(model)
        )

    def _lookup(self, root: int, tokens: np.ndarray) -> DraftTree | None:
        ends = np.flatnonzero(tokens == root)  # earlier occurrences of the 1-gram
        matched = 1
        for size in range(1, self.max_ngram_size):  # keep those whose `size` tokens before match as well
            if size > len(tokens):
                break
            longer = ends[ends >= size]
            longer = longer[tokens[longer - size] == tokens[len(tokens) - size]]
            if len(longer) == 0:
                break
            ends, matched = longer, size + 1
        if len(ends) == 0:
            return None
        after = ends[-1] + 1
        count = self.num_tokens if matched == self.max_ngram_size else self.num_tokens_short
        continuation = tokens[after : after + count].tolist()
        if len(continuation) < count and after <= len(tokens):
            continuation.append(root)  # the text goes on with the root itself
        return DraftTree.chain(torch.tensor([root, *continuation]))  # type: ignore[arg-type]
