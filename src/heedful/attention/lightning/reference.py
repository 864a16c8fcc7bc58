"""Lightning Attention-2 in plain PyTorch, to be read next to the paper (section 3.2); the oracle of the Triton kernels.

A sequence is cut into chunks of C tokens. With lambda = exp(-decay), rows a and columns b of a chunk counted from 0:

    O = ((Q K^T) * M) V + (Lambda Q) S      M_ab = lambda^(a - b) for a >= b, else 0;  Lambda_a = lambda^(a + 1)
    S <- lambda^r S + sum_b lambda^(r - 1 - b) k_b^T v_b      r: the chunk's tokens, C but for the last

S is the state as of the last token of the chunk before. Exponents are differences, and never positive.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def real_bounds(mask: Tensor) -> Tensor:
    """int64 `(B, 2)`: each row's first real token, and one past its last; 0, 0 for a row without any."""
    first = mask.int().argmax(1)
    end = mask.shape[1] - mask.flip(1).int().argmax(1)
    return torch.stack([first, torch.where(mask.any(1), end, 0)], 1)


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`(output, state)`, in the dtype of the sums."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, value, decay = (x.to(dtype) for x in (query, key, value, decay))
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        outputs, states = [], []
        for number, (start, end) in enumerate(itertools.pairwise(ends)):
            q, k, v = (x[:, :, start:end] for x in (query, key, value))
            state = None if initial is None else initial[number : number + 1]
            output, state = _sequence(q, k, v, decay, None, None, state, scale, chunk_size)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, 2), torch.cat(states)
    if mask is None:
        return _sequence(query, key, value, decay, None, None, initial, scale, chunk_size)
    bounds = real_bounds(mask)
    real = mask[:, None, :, None]
    query, key, value = (torch.where(real, x, 0.0) for x in (query, key, value))  # whatever was in the padding
    output, state = _sequence(query, key, value, decay, bounds[:, 0], bounds[:, 1], initial, scale, chunk_size)
    return torch.where(real, output, 0.0), state


def _sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Rows whose tokens are at `start <= i < end`; what lies outside is 0, and the state stands still there."""
    batch, heads, length, dim = query.shape
    kv_heads, columns = value.shape[1], value.shape[3]
    groups = heads // kv_heads
    # (B, Hkv, G, ...): keys and values are not repeated
    query = query.unflatten(1, (kv_heads, groups))
    key, value = key[:, :, None], value[:, :, None]
    rate = decay.view(kv_heads, groups, 1, 1)
    if state is None:
        state = query.new_zeros(batch, heads, dim, columns)
    state = state.unflatten(1, (kv_heads, groups))
    outputs = []
    for first in range(0, length, chunk_size):
        q, k, v = (x[..., first : first + chunk_size, :] for x in (query, key, value))
        at = torch.arange(q.shape[-2], device=query.device, dtype=query.dtype)
        # Tokens of the row up to and including each place of the chunk: its clock.
        clock = at + 1
        if start is not None and end is not None:
            place = torch.arange(first, first + q.shape[-2], device=query.device) + 1
            passed = torch.minimum(place, end[:, None]) - torch.maximum(start, start.new_tensor(first))[:, None]
            clock = passed.clamp(min=0).to(query.dtype)[:, None, None, :]
        total = clock[..., -1:]
        distance = clock[..., :, None] - clock[..., None, :]
        weights = torch.exp(-rate * distance.clamp(min=0)) * (at[:, None] >= at)
        within = ((q @ k.mT) * weights) @ v
        before = (q @ state) * torch.exp(-rate * clock[..., None])
        outputs.append(within + before)
        kept = torch.exp(-rate * (total - clock)[..., None])
        state = torch.exp(-rate * total[..., None]) * state + (k * kept).mT @ v
    output = torch.cat(outputs, -2) if outputs else query.new_zeros(*query.shape[:-1], columns)
    return (output * scale).flatten(1, 2), state.flatten(1, 2)
