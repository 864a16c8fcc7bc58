"""Shifted sparse attention in plain PyTorch, to be read next to the paper; the oracle of the Triton kernels.

`visible` is the definition. A block of queries reads the keys that any of its heads may see: a few slices of the keys,
never all of them but for the last blocks of a dense row. The backward pass computes the weights again, block by block,
so memory is linear in the length in both directions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # queries of a step


class Geometry(NamedTuple):
    """Who sees whom, beside the lengths of the rows."""

    group_size: int
    num_shifted_heads: int  # the last of the query heads
    num_sink_tokens: int
    wrap: bool
    scale: float


def spans(real: Tensor) -> tuple[Tensor, Tensor]:
    """The first real token of each row, and the number of tokens from there to the last: `(B,)` both, 0 without any."""
    length = real.shape[1]
    first = real.int().argmax(1)
    last = length - 1 - real.flip(1).int().argmax(1)
    return first, torch.where(real.any(1), last - first + 1, 0)


def visible(i: Tensor, j: Tensor, count: Tensor, heads: int, geometry: Geometry) -> Tensor:
    """Whether position i sees position j: bool `(B, H, Q, K)` for i `(Q,)`, j `(K,)` and rows of `count (B,)` tokens."""
    size = geometry.group_size
    count = count[:, None, None, None]
    head = torch.arange(heads, device=i.device)[:, None, None]
    shifts = (head >= heads - geometry.num_shifted_heads) & (count > size)  # a row of one group is dense
    shift = torch.where(shifts, size // 2, 0)
    i, j = i[:, None], j[None, :]
    same = (i - shift) // size == (j - shift) // size
    seen = (same | (j < geometry.num_sink_tokens)) & (j <= i)
    if geometry.wrap:
        # Rolled by the shift, the end of the padded row comes before its beginning, in one group.
        end = (count + size - 1) // size * size
        seen = seen | ((i < shift) & (j >= end - size + shift))
    return seen & (i < count) & (j < count)


def shifted_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, attention_mask: Tensor | None
) -> Tensor:
    batch, _, length, _ = query.shape
    if attention_mask is None or length == 0:
        count = torch.full((batch,), length, device=query.device)
        output: Tensor = _Blocks.apply(query, key, value, None, count, geometry)
        return output
    # Positions count from the first real token: each row is turned until it is in front, and back in the end.
    start, count = spans(attention_mask)
    slots = torch.arange(length, device=query.device)
    there, back = (slots + start[:, None]) % length, (slots - start[:, None]) % length
    real = attention_mask.gather(1, there)
    query, key, value = (torch.where(real[:, None, :, None], _turn(x, there), 0) for x in (query, key, value))
    output = _Blocks.apply(query, key, value, real, count, geometry)
    return _turn(output, back)


def _turn(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, count: Tensor, geometry: Geometry
    ) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[3])
        lse = query.new_empty(query.shape[:3], dtype=_wide(query.dtype))
        for begin in range(0, query.shape[2], BLOCK):
            rows = slice(begin, begin + BLOCK)
            q, k, v, seen = _block(begin, query, key, value, real, count, geometry)
            logits = (q @ k[:, :, None].mT * geometry.scale).masked_fill(~seen, -torch.inf)
            top = logits.amax(-1, keepdim=True)
            top = torch.where(top == -torch.inf, 0, top)  # rows that see nothing: padding
            weights = torch.exp(logits - top)
            total = weights.sum(-1, keepdim=True)
            total = torch.where(seen.any(-1, keepdim=True), total, 1)  # 0 / 0, if all a row sees is -inf, stays NaN
            output[:, :, rows] = (weights @ v[:, :, None] / total).flatten(1, 2)
            lse[:, :, rows] = (top + total.log()).squeeze(-1).flatten(1, 2)
        ctx.save_for_backward(query, key, value, real, count, output, lse)
        ctx.geometry = geometry
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, real, count, output, lse = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        kv_heads = key.shape[1]
        d_query, d_key, d_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value))
        for begin in range(0, query.shape[2], BLOCK):
            rows = slice(begin, begin + BLOCK)
            q, k, v, seen = _block(begin, query, key, value, real, count, geometry)
            d_out = gradients[0][:, :, rows].to(lse.dtype).unflatten(1, (kv_heads, -1))
            out = output[:, :, rows].to(lse.dtype).unflatten(1, (kv_heads, -1))
            logits = (q @ k[:, :, None].mT * geometry.scale).masked_fill(~seen, -torch.inf)
            weights = torch.exp(logits - lse[:, :, rows].unflatten(1, (kv_heads, -1))[..., None])
            d_weights = d_out @ v[:, :, None].mT
            d_logits = weights * (d_weights - (d_out * out).sum(-1, keepdim=True)) * geometry.scale
            d_query[:, :, rows] = (d_logits @ k[:, :, None]).flatten(1, 2)
            d_k, d_v = (d_logits.mT @ q).sum(2), (weights.mT @ d_out).sum(2)
            at = 0
            for piece in _pieces(begin, query.shape[2], real is None, geometry):
                size = piece.stop - piece.start
                d_key[:, :, piece] += d_k[:, :, at : at + size]
                d_value[:, :, piece] += d_v[:, :, at : at + size]
                at += size
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pieces(begin: int, length: int, full: bool, geometry: Geometry) -> list[slice]:
    """The keys that a block of queries may see: sinks, groups, and what a wrapped group joins; apart from one another.

    full: Whether every row has `length` tokens. Else some may have one group only, or end earlier.
    """
    size, end = geometry.group_size, min(begin + BLOCK, length)
    shift = size // 2 if geometry.num_shifted_heads and length > size else 0
    low = begin // size * size
    if shift:
        low = min(low, max(0, (begin - shift) // size * size + shift))
        if not full and begin < size:
            low = 0
    pieces = [slice(0, min(geometry.num_sink_tokens, low)), slice(low, end)]
    if geometry.wrap and begin < shift:
        joined = -(-length // size) * size - size + shift if full else end
        pieces.append(slice(min(max(joined, end), length), length))
    return pieces


def _block(
    begin: int, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, count: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries `(B, Hkv, G, Q, D)`, keys and values `(B, Hkv, K, D)` of a block, and who sees whom `(B, Hkv, G, Q, K)`."""
    length, kv_heads = query.shape[2], key.shape[1]
    wide = _wide(query.dtype)
    pieces = _pieces(begin, length, real is None, geometry)
    j = torch.cat([torch.arange(piece.start, piece.stop, device=query.device) for piece in pieces])
    i = torch.arange(begin, min(begin + BLOCK, length), device=query.device)
    q = query[:, :, begin : begin + BLOCK].to(wide).unflatten(1, (kv_heads, -1))
    k, v = (torch.cat([x[:, :, piece] for piece in pieces], 2).to(wide) for x in (key, value))
    seen = visible(i, j, count, query.shape[1], geometry)
    if real is not None:
        seen = seen & real[:, None, i, None] & real[:, None, None, j]
    return q, k, v, seen.unflatten(1, (kv_heads, -1))
