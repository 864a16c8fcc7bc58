"""Runs needle prompts through a model, in batches: token by token, or with the answer already there."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StaticCache

from heedful.seam import Edit, Kernel, Probe, attach
from heedful.seam.discovery import sites_in

if TYPE_CHECKING:
    from heedful.interp.needles import NeedlePrompt

VARIANTS = ("decode", "teacher-forced")


class RowReader(Probe):
    """A probe of the rows that emit the answer. ``column``: the column of the batch's padded ids that the next call's
    first row stands for; whoever runs the model sets it, because slots of a cache are not columns."""

    column = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts padded on the left to one width: ``input_ids`` and ``mask`` (1 token, 0 padding) ``(B, T)`` int64."""

    input_ids: Tensor
    mask: Tensor
    answer_lengths: Tensor  # (B,) int64

    @classmethod
    def of(cls, prompts: Sequence[NeedlePrompt], *, with_answer: bool, pad: int, device: torch.device) -> Batch:
        """``with_answer`` appends all answer tokens but the last: the rows that emit an answer are then the last."""
        rows = [torch.cat([p.input_ids, p.answer_ids[:-1]]) if with_answer else p.input_ids for p in prompts]
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, width - len(row) :] = row
            mask[index, width - len(row) :] = 1
        lengths = torch.tensor([len(prompt.answer_ids) for prompt in prompts])
        return cls(input_ids.to(device), mask.to(device), lengths.to(device))

    @property
    def pads(self) -> Tensor:
        """``(B,)``: padding in front of each prompt."""
        return self.mask.shape[1] - self.mask.sum(1)

    @property
    def answer_rows(self) -> Tensor:
        """``(B, T)`` bool: the rows that emit the answer, in a batch that was made with it."""
        width = self.mask.shape[1]
        return torch.arange(width, device=self.mask.device) >= width - self.answer_lengths[:, None]


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model said to one prompt. ``emitted (n,)``: its arg-max tokens up to the end of the response."""

    emitted: Tensor
    response: str
    passed: bool


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def is_right(response: str, answer: str) -> bool:
    """ROUGE-1 recall of the answer's words in the response above 0.5 (lower case, not stemmed)."""
    wanted = _words(answer) or Counter([answer.strip()])
    found = _words(response) or Counter([response.strip()])
    return 2 * (wanted & found).total() > wanted.total()


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """No gradients, no dropout; the training mode comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Forward:
    """The model's forward, with the arguments that this model takes."""

    def __init__(self, model: Any) -> None:
        base = getattr(model, "_orig_mod", model)  # compiled
        base = base.get_base_model() if hasattr(base, "get_base_model") else base  # adapted by PEFT
        names = inspect.signature(base.forward).parameters
        self.model = model
        self.keeps_rows = "logits_to_keep" in names
        self.takes_positions = "position_ids" in names

    def __call__(self, input_ids: Tensor, mask: Tensor, keep: int, **kwargs: Any) -> Any:
        """``input_ids (B, t)``: the last t columns of ``mask``. Logits of the last ``keep`` rows, if the model can."""
        if self.keeps_rows:
            kwargs["logits_to_keep"] = keep
        if self.takes_positions:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return self.model(input_ids=input_ids, attention_mask=mask, **kwargs)


def _decode(
    model: Any,
    batch: Batch,
    steps: int,
    probe: RowReader | None,
    prefill_chunk_size: int | None,
    cache_implementation: str,
) -> Tensor:
    """Greedy tokens ``(B, steps)``. The last prompt token is not part of the prefill: its row emits the first token,
    as a decode step, so that a probe of the answer sees single rows only and an edit of decode steps acts on the
    whole answer."""
    forward = Forward(model)
    width = batch.input_ids.shape[1]
    cache = None
    if cache_implementation == "static":
        cache = StaticCache(config=model.config, max_cache_len=width + steps)
    for start in range(0, width - 1, prefill_chunk_size or width):
        end = min(start + (prefill_chunk_size or width), width - 1)
        outputs = forward(batch.input_ids[:, start:end], batch.mask[:, :end], 1, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values

    token, mask, emitted = batch.input_ids[:, -1:], batch.mask, []
    with attach(model, *([probe] if probe else [])):
        for step in range(steps):
            if probe:
                probe.column = width - 1 + step
            outputs = forward(token, mask, 1, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            token = outputs.logits[:, -1:].float().argmax(-1)
            emitted.append(token)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.cat(emitted, dim=1)


def _force(model: Any, batch: Batch, steps: int, probe: RowReader | None) -> Tensor:
    """Arg-max tokens ``(B, steps)`` of the rows that emit each answer, from one forward; -1 where it is shorter."""
    with attach(model, *([probe] if probe else [])):
        logits = Forward(model)(batch.input_ids, batch.mask, steps, use_cache=False).logits
    best = logits[:, -steps:].float().argmax(-1)
    step = torch.arange(steps, device=best.device)
    row = step + steps - batch.answer_lengths[:, None]  # a shorter answer begins later: its rows are the last ones too
    return torch.where(row < steps, best.gather(1, row.clamp(max=steps - 1)), -1)


@dataclass(frozen=True, eq=False)
class Answered:
    """A batch that was run: which prompts, their answers, and the probe that watched.

    Args:
        indices: places of the batch's prompts in the list that was given. prompts, answers: in the order of
            ``indices``.
        pads: ``(B,)`` padding in front of each prompt. probe: what ``make_probe`` made for this batch.
    """

    indices: list[int]
    prompts: list[NeedlePrompt]
    answers: list[Answer]
    pads: Tensor
    probe: RowReader | None


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[NeedlePrompt],
    *,
    parts: Sequence[Kernel | Edit | Probe] = (),
    make_probe: Callable[[str | Tensor], RowReader] | None = None,
    variant: str = "decode",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    prefill_chunk_size: int | None = None,
    cache_implementation: str = "dynamic",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Answered]:
    """Runs the prompts in batches of like length. The arguments are those of :func:`~heedful.interp.needle_recall`;
    ``make_probe(rows)`` gives each batch a probe of the rows that emit its answers ("last", or a mask ``(B, T)``).

    Raises:
        ValueError: an unknown variant or cache, no prompts, a prompt longer than the model's context.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if cache_implementation not in ("dynamic", "static"):
        raise ValueError(f"cache_implementation must be 'dynamic' or 'static', got {cache_implementation!r}")
    if variant == "teacher-forced" and (max_new_tokens or prefill_chunk_size or cache_implementation != "dynamic"):
        raise ValueError("max_new_tokens, prefill_chunk_size and cache_implementation belong to variant='decode'")
    if not prompts:
        raise ValueError("there are no prompts")
    if any(size is not None and size < 1 for size in (batch_size, max_new_tokens, prefill_chunk_size)):
        raise ValueError("batch_size, max_new_tokens and prefill_chunk_size must be at least 1")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} predicts no tokens; load it with AutoModelForCausalLM")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt.input_ids) + (max_new_tokens or len(prompt.answer_ids)) for prompt in prompts)
    if context is not None and longest > context and not _extended(model):
        raise ValueError(
            f"prompt and answer take {longest} tokens, the model's context is {context}; lower lengths, or attach a kernel "
            "that extends it, as HiPAttention(trained_length=...) does"
        )

    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))  # so that little is padded
    forced = variant == "teacher-forced"
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        group = [prompts[index] for index in indices]
        batch = Batch.of(group, with_answer=forced, pad=pad, device=model.device)
        steps = max_new_tokens or int(batch.answer_lengths.max())
        probe = make_probe(batch.answer_rows if forced else "last") if make_probe else None
        with inference(model), attach(model, *parts):
            if forced:
                emitted = _force(model, batch, steps, probe)
            else:
                emitted = _decode(model, batch, steps, probe, prefill_chunk_size, cache_implementation)
        answers = [
            _forced(tokenizer, row[: len(prompt.answer_ids)], prompt)
            if forced
            else _decoded(tokenizer, row[: max_new_tokens or len(prompt.answer_ids)], prompt, ends)
            for row, prompt in zip(emitted.cpu(), group, strict=True)
        ]
        yield Answered(indices, group, answers, batch.pads, probe)
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))


def _extended(model: torch.nn.Module) -> bool:
    parts = [selected.part for site in sites_in(model) for selected in site.selected()]
    return any(isinstance(part, Kernel) and part.extends_context for part in parts)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in [*ends, tokenizer.eos_token_id] if token is not None}


def _forced(tokenizer: Any, emitted: Tensor, prompt: NeedlePrompt) -> Answer:
    """Right if every token is: that is when greedy decoding would have given the answer."""
    return Answer(emitted, tokenizer.decode(emitted.tolist()), torch.equal(emitted, prompt.answer_ids))


def _decoded(tokenizer: Any, emitted: Tensor, prompt: NeedlePrompt, ends: set[int]) -> Answer:
    for size, token in enumerate(emitted.tolist()):
        if token in ends or ("\n" in tokenizer.decode([token]) and "\n" not in prompt.needle.answer):
            emitted = emitted[:size]
            break
    response = tokenizer.decode(emitted.tolist())
    return Answer(emitted, response, is_right(response, prompt.needle.answer))
