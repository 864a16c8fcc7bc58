"""Retrieval heads: the heads that point at, and copy, the token being generated from a known place of a long context.

Follows "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu, Wang, Xiao, Peng, Fu, arXiv 2404.15574).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from heedful.interp.answers import Answered, RowReader, answer_prompts
from heedful.interp.head_scores import HeadScores
from heedful.interp.needles import Needle, NeedlePrompt, choose_prompts
from heedful.seam import AttentionCall

MODES = ("set", "sum")


class TopKeys(RowReader):
    """Which token each head looks at most. Only these rows are materialised, and one number a head and row is kept.

    Columns are indices into the batch's padded token ids; the newest key that a row sees is the row's own token, and
    that tells which column a cache slot holds, also where a sliding window has dropped old tokens.

    Attributes:
        top: a list for each layer, one entry a call: ``(B, H, R)`` column of each head's arg-max key; the first of
            equals.
        first: likewise ``(B, R)``: the oldest column that the row sees.
    """

    def __init__(self, *, layers: Iterable[int] | None, rows: str | Tensor) -> None:
        super().__init__(layers=layers, rows=rows)
        self.top: dict[int, list[Tensor]] = {}
        self.first: dict[int, list[Tensor]] = {}

    def logits(self, call: AttentionCall, logits: Tensor) -> None:
        # Softmax keeps the order, so its arg-max needs no softmax. Hidden keys (padding too) are -inf and never win.
        sees = (logits[:, 0] > -torch.inf).to(torch.uint8)
        oldest = sees.argmax(-1)
        newest = sees.shape[-1] - 1 - sees.flip(-1).argmax(-1)
        rows = call.rows if call.rows is not None else torch.arange(logits.shape[2], device=logits.device)
        shift = self.column + rows - newest
        self.top.setdefault(call.layer, []).append((logits.argmax(-1) + shift[:, None]).cpu())
        self.first.setdefault(call.layer, []).append((oldest + shift).cpu())


def copy_paste_scores(
    top: Tensor,
    first: Tensor,
    emitted: Sequence[Tensor],
    prompts: Sequence[Tensor],
    needles: Sequence[Tensor],
    *,
    mode: str = "set",
) -> Tensor:
    """The paper's score of each head on each instance, from what the heads looked at while the model wrote.

    A head copies at a step if the key with its highest weight is a needle token and equals the token being emitted.
    "set": the share of the needle's tokens that it copied at least once, in [0, 1]. "sum" (the released code):
    1 / |needle| for each copying step, which passes 1 when a needle token is written twice.

    Args:
        top: ``(B, H, S)`` int64: index into the prompt of each head's arg-max key at each step.
        first: ``(B, S)`` int64: the oldest index that the layer sees at that step.
        emitted: B tensors ``(s,)``, s <= S: the arg-max token of each step; later steps do not count.
        prompts: B tensors ``(T,)`` of token ids. needles: B tensors ``(k,)``: indices of the needle's tokens in the
            prompt.

    Returns:
        ``(B, H)`` float32; nan where some needle token was out of the layer's sight at every step: such a head could
        not have copied it.
    """
    scores = torch.full(top.shape[:2], torch.nan)
    for index, (written, prompt, needle) in enumerate(zip(emitted, prompts, needles, strict=True)):
        if len(written) == 0 or len(needle) == 0:
            continue
        if first[index, : len(written)].min() > needle.min():
            continue
        looks_at = top[index, :, : len(written), None] == needle  # (H, s, k)
        copied = looks_at & (written[:, None] == prompt[needle])
        scores[index] = (copied.any(1) if mode == "set" else copied.sum(1)).sum(-1) / len(needle)
    return scores


def retrieval_scores(
    model: Any,
    tokenizer: Any,
    haystack: str | None = None,
    needles: Sequence[Needle] | None = None,
    *,
    prompts: Sequence[NeedlePrompt] | None = None,
    layers: Iterable[int] | None = None,
    mode: str = "set",
    variant: str = "decode",
    threshold: float = 0.1,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    prefill_chunk_size: int | None = None,
    cache_implementation: str = "dynamic",
    progress: Callable[[int, int], None] | None = None,
    **prompt_options: Any,
) -> HeadScores:
    """Finds a model's retrieval heads: scores every query head by how much of a hidden fact it copies while the model
    repeats it.

    A fact (the needle) is put into a long text, the model is asked for it at the end, and answers greedily. At each
    step, a head scores if the key with its highest attention weight is one of the needle's answer tokens and is the
    very token that the model emits. The score of a head is the share of the answer it copies so, averaged over the
    prompts that the model answers rightly; heads from 0.1 on are retrieval heads. Prompts that the model fails do not
    count: look at ``pass_rate``.

    Example:
        >>> import heedful
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> scores = heedful.interp.retrieval_scores(model, tokenizer, lengths=(512,))
        >>> print(scores)  # the best heads, and how many prompts passed
        >>> heads = scores.retrieval_heads()  # [(layer, head, score), ...]
        >>> with heedful.attach(model, heedful.interp.ablate_heads(heads[:3])):
        ...     print(heedful.interp.needle_recall(model, tokenizer, lengths=(512,)))

    Cost:
        One forward of each prompt by the model's own kernel, and for each answer token one row of attention logits a
        layer, ``(B, H, 1, T)`` float32 (4 MiB for 32 heads at 32k tokens), freed layer by layer; no ``T x T`` tensor.
        Ten prompts give the top 20 heads of a 7B model to 93 %, thirty to 97 % (from the released scores); the
        default is 20 prompts.

    When not to use:
        When the model fails most prompts: the few that pass are a biased sample. When the answer can be known without
        the needle, or stands in the haystack too. For heads that find without copying (the answer is a paraphrase): the
        score counts equal tokens only. Induction heads that copy anything repeated score high as well.

    Paper:
        "Retrieval Head Mechanistically Explains Long-Context Factuality", Wenhao Wu, Yizhong Wang, Guangxuan Xiao,
        Hao Peng, Yao Fu, arXiv 2404.15574. Unlike the released code, the needle is located by character offsets,
        "set" is the default, the answer (not the whole statement around it) is what must be copied, and success is
        ROUGE-1 recall without stemming.

    Args:
        model: a causal language model of transformers with an attention interface, in any dtype, on any device.
        tokenizer: its fast tokenizer.
        haystack: text to hide needles in. Default: the held-out prose that comes with the package.
        needles: the facts. Default: new names and numbers for each prompt.
        **prompt_options: ``lengths`` (512, 1024), ``depths`` (0.1, 0.3, 0.5, 0.7, 0.9), ``instances`` (2 a length and
            depth), ``seed`` (0), ``statement``, ``question``, ``prompt_format``: see :func:`needle_prompts`.
        prompts: ready prompts (:func:`needle_prompts`) instead of those arguments.
        layers: the layers to score; the others get nan. Default: all.
        mode: "set" (each needle token counts once, score in [0, 1]) or "sum" (the released code, can pass 1).
        variant: "decode" follows the paper, one row a step; "teacher-forced" feeds prompt and answer together and
            reads the answer's rows in one forward. They agree where greedy decoding gives the answer.
        threshold: kept in the result, for ``retrieval_heads``.
        batch_size, max_new_tokens, prefill_chunk_size, cache_implementation, progress: as in :func:`needle_recall`.

    Returns:
        A :class:`HeadScores`. A layer that cannot see the needle (sliding window) or has no softmax attention has nan.

    Raises:
        ValueError: an unknown mode or variant, a layer that does not exist, prompts that do not fit (see
            :func:`needle_prompts`).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    prompts = choose_prompts(tokenizer, prompts, haystack, needles, **prompt_options)
    layers = list(layers) if layers is not None else None

    found: dict[int, dict[int, Tensor]] = {}  # prompt -> layer -> (H,)
    for batch in answer_prompts(
        model, tokenizer, prompts, make_probe=lambda rows: TopKeys(layers=layers, rows=rows), variant=variant,
        batch_size=batch_size, max_new_tokens=max_new_tokens, prefill_chunk_size=prefill_chunk_size,
        cache_implementation=cache_implementation, progress=progress,
    ):  # fmt: skip
        for layer, scores in _score_batch(batch, mode).items():
            for place, index in enumerate(batch.indices):
                if batch.answers[place].passed:
                    found.setdefault(index, {})[layer] = scores[place]

    config = model.config.get_text_config()
    heads = max((len(row) for rows in found.values() for row in rows.values()), default=config.num_attention_heads)
    per_instance = torch.full((len(found), config.num_hidden_layers, heads), torch.nan)
    for place, index in enumerate(sorted(found)):
        for layer, row in found[index].items():
            per_instance[place, layer, : len(row)] = row
    if not found:
        warnings.warn(f"the model passed none of {len(prompts)} prompts, so no head has a score", stacklevel=2)
    return HeadScores(per_instance, attempted=len(prompts), threshold=threshold)


def _score_batch(batch: Answered, mode: str) -> dict[int, Tensor]:
    """``{layer: (B, H)}``: scores of one batch."""
    assert isinstance(batch.probe, TopKeys)
    pads = batch.pads.cpu()
    emitted = [answer.emitted for answer in batch.answers]
    prompts = [prompt.input_ids for prompt in batch.prompts]
    needles = [prompt.columns for prompt in batch.prompts]
    return {
        layer: copy_paste_scores(
            torch.cat(batch.probe.top[layer], -1) - pads[:, None, None],
            torch.cat(batch.probe.first[layer], -1) - pads[:, None],
            emitted, prompts, needles, mode=mode,
        )
        for layer in batch.probe.top
    }  # fmt: skip
