"""The exact search of decoding: one query looks at every key and takes the best blocks, in a few operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heedful.attention.hip import reference
from heedful.attention.hip.decode import HiPDecodeState


def without_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs a function of a query in the dtypes that it names: autocast would narrow its products."""

    @functools.wraps(function)
    def run(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return function(query, *args, **kwargs)

    return run


def due(state: HiPDecodeState, lengths: Tensor, refresh_interval: int) -> Tensor:
    """Which choices of a state are to be renewed at this length, bool `(B, S)`."""
    age = lengths[:, None] - state.chosen_at
    return (state.chosen_at < 0) | (age < 0) | (age >= refresh_interval)


def renew(state: HiPDecodeState, chosen: Tensor | None, due: Tensor, lengths: Tensor) -> None:
    """Takes the blocks `chosen (B, S, n)` where they are due, in place."""
    if chosen is not None:
        state.blocks.copy_(torch.where(due[..., None], chosen, state.blocks))
    state.chosen_at.copy_(torch.where(due, lengths[:, None].int(), state.chosen_at))
    state.refreshes.add_(due)


@without_autocast
def products(query: Tensor, key: Tensor) -> Tensor:
    """q.k of a few rows, `(B, Hq, R, T)` float32, without a wider copy of the keys where the device can do without."""
    batch, heads, rows, _ = query.shape
    grouped = query.to(key.dtype).reshape(batch * key.shape[1], -1, query.shape[3])
    flat = key.flatten(0, 1)
    if flat.is_cuda and flat.dtype in (torch.float16, torch.bfloat16):
        scores = torch.bmm(grouped, flat.mT, out_dtype=torch.float32)
    else:
        scores = torch.bmm(grouped.float(), flat.float().mT)
    return scores.view(batch, heads, rows, -1)


@torch.no_grad()
def best_blocks(query: Tensor, key: Tensor, lengths: Tensor, state: HiPDecodeState, first_real: Tensor) -> Tensor:
    """The best of all blocks that `hip_decode`'s tree searches: int32 `(B, S, n)`, ascending, -1 in empty places.

    query `(B, Hq, 1, D)`, key `(B, Hkv, T, D)`. Products and ranks are float32; no host synchronisation. The scores take
    `4 B Hq T` bytes.
    """
    heads, size = query.shape[1], state.block_size_k
    scores = products(query, key)[:, :, 0]
    origin = (first_real + state.num_sink_tokens)[:, None, None]
    slots = origin + torch.arange(-(-key.shape[2] // size) * size, device=key.device)  # blocks count from here
    hidden = slots >= (lengths - state.sliding_window)[:, None, None]
    slots = slots.clamp(max=key.shape[2] - 1).expand(-1, heads, -1)
    scores = scores.gather(-1, slots).masked_fill(hidden, -torch.inf)
    scores = scores.unflatten(-1, (-1, size))[..., :: state.block_stride_k].amax(-1)  # (B, Hq, blocks)
    scores = reference.by_group(scores, state.head_group_size)[:, :: state.head_group_size]
    best = scores.topk(min(state.nodes, scores.shape[-1]))
    chosen = torch.where(best.values > -torch.inf, best.indices, key.shape[2]).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, state.nodes - chosen.shape[-1]), value=key.shape[2])
    return torch.where(chosen < key.shape[2], chosen, -1).int()
