"""The reference as registered operators: what a traced graph calls, since its chunks are planned in Python.

The backward pass attends once more, to the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heedful.attention.hip import reference
from heedful.attention.hip.mask import HiPMask, Stage, layout


@torch.library.custom_op("heedful::hip_reference_choose", mutates_args=())
def choose_op(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, sizes: Sequence[int], sample_method: str
) -> Tensor:
    options = dict(zip(_SIZES, sizes, strict=True))
    return reference.choose(
        query, key, attention_mask=attention_mask, sample_method=sample_method, generator=None, **options
    ).blocks  # fmt: skip


_SIZES = (
    "top_k", "block_size_q", "block_stride_q", "block_size_k", "block_stride_k", "sliding_window", "num_sink_tokens",
    "head_group_size",
)  # fmt: skip


@choose_op.register_fake
def _(query: Tensor, key: Tensor, attention_mask: Tensor | None, sizes: Sequence[int], sample_method: str) -> Tensor:
    top_k, block_size_q, _, block_size_k, _, window, sinks, _ = sizes
    return _empty_blocks(query, key, top_k, block_size_q, block_size_k, max(window, block_size_q - 1), sinks)


@torch.library.custom_op("heedful::hip_reference_scan", mutates_args=())
def scan_op(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, stages: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    steps: list[Stage] = [(*stages[at : at + 3], stages[at + 3] or None) for at in range(0, len(stages), 4)]  # type: ignore[misc]
    top_k, window, sinks, head_group_size = sizes
    return reference.choose_in_stages(
        query,
        key,
        stages=steps,
        top_k=top_k,
        sliding_window=window,
        num_sink_tokens=sinks,
        head_group_size=head_group_size,
        attention_mask=attention_mask,
    ).blocks


@scan_op.register_fake
def _(query: Tensor, key: Tensor, attention_mask: Tensor | None, stages: Sequence[int], sizes: Sequence[int]) -> Tensor:
    top_k, window, sinks, _ = sizes
    return _empty_blocks(query, key, top_k, stages[-4], stages[-2], max(window, stages[0] - 1), sinks)


def _empty_blocks(
    query: Tensor, key: Tensor, top_k: int, block_size_q: int, block_size_k: int, window: int, sinks: int
) -> Tensor:
    batch, heads, num_queries, _ = query.shape
    rows = min(block_size_q, num_queries)
    nodes = min(-(-top_k // block_size_k), -(-max(0, key.shape[2] - window - sinks) // block_size_k))
    return query.new_empty((batch, heads, -(-num_queries // rows), nodes), dtype=torch.int32)


@torch.library.custom_op("heedful::hip_reference_attend", mutates_args=())
def attend_op(
    query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | None, blocks: Tensor, search_end: Tensor,
    attention_mask: Tensor | None, sizes: Sequence[int], scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    mask = _mask(query, key, blocks, search_end, attention_mask, sizes)
    return reference.attend(query, key, value, mask, scale=scale, softcap=softcap or None, sink_logits=sink_logits)


@attend_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.custom_op("heedful::hip_reference_attend_backward", mutates_args=())
def attend_backward_op(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | None, blocks: Tensor,
    search_end: Tensor, attention_mask: Tensor | None, sizes: Sequence[int], scale: float, softcap: float,
) -> list[Tensor]:  # fmt: skip
    mask = _mask(query, key, blocks, search_end, attention_mask, sizes)

    def attend(query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        sink = sinks[0] if sinks else None
        return reference.attend(query, key, value, mask, scale=scale, softcap=softcap or None, sink_logits=sink)

    inputs = [x for x in (query, key, value, sink_logits) if x is not None]
    product = torch.func.vjp(attend, *inputs)[1]  # autograd itself is out of reach inside an operator
    return [x.contiguous() for x in product(gradient)]


@attend_backward_op.register_fake
def _(gradient: Tensor, *arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments[:4] if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attend_backward_op(gradient, *ctx.saved_tensors, *ctx.options)
    sinks = gradients[3] if len(gradients) > 3 else None
    return (*gradients[:3], sinks, None, None, None, None, None, None)


attend_op.register_autograd(_backward, setup_context=_save)


def _mask(
    query: Tensor, key: Tensor, blocks: Tensor, search_end: Tensor, attention_mask: Tensor | None, sizes: Sequence[int]
) -> HiPMask:
    rows, block_size_k, window, sinks, chosen_at = sizes
    return HiPMask(
        blocks, search_end, query.shape[2], key.shape[2], rows, block_size_k, window, sinks, attention_mask,
        chosen_at if chosen_at >= 0 else None,
    )  # fmt: skip


def choose(
    query: Tensor, key: Tensor, *, attention_mask: Tensor | None, sample_method: str, generator: torch.Generator | None,
    **sizes: int,
) -> HiPMask:  # fmt: skip
    """`reference.choose` in a graph."""
    if generator is not None:
        raise ValueError("a compiled call cannot take a generator; leave it out, or call outside torch.compile")
    blocks = choose_op(query, key, attention_mask, [sizes[name] for name in _SIZES], sample_method)
    plan = layout(query, key, sizes["block_size_q"], sizes["sliding_window"], attention_mask)
    shape = (plan.rows, sizes["block_size_k"], plan.window, sizes["num_sink_tokens"], -1)
    return _mask(query, key, blocks, plan.search_end, attention_mask, shape)


def choose_in_stages(
    query: Tensor, key: Tensor, *, stages: Sequence[Stage], top_k: int, sliding_window: int, num_sink_tokens: int,
    head_group_size: int, attention_mask: Tensor | None,
) -> HiPMask:  # fmt: skip
    """`reference.choose_in_stages` in a graph."""
    flat = [0 if number is None else number for stage in stages for number in stage]
    sizes = [top_k, sliding_window, num_sink_tokens, head_group_size]
    blocks = scan_op(query, key, attention_mask, flat, sizes)
    plan = layout(query, key, stages[-1][0], max(sliding_window, stages[0][0] - 1), attention_mask)
    shape = (plan.rows, stages[-1][2], plan.window, num_sink_tokens, -1)
    return _mask(query, key, blocks, plan.search_end, attention_mask, shape)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: HiPMask, *, scale: float, softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """`reference.attend` in a graph."""
    chosen_at = -1 if mask.chosen_at is None else mask.chosen_at
    sizes = [mask.block_size_q, mask.block_size_k, mask.sliding_window, mask.num_sink_tokens, chosen_at]
    arguments = (mask.blocks, mask.search_end, mask.attention_mask, sizes, scale, softcap or 0.0)
    return attend_op(query, key, value, sink_logits, *arguments)
