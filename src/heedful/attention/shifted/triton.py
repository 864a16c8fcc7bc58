"""Shifted sparse attention in Triton, forward and backward.

In positions (counted from the row's first real token) everything a query sees is a run of keys, from the first of its
group to itself, and the few sinks before that run; "wrap" adds one more run for the first half group. So these are the
loops of causal flash attention with a lower end: `_forward` and `_backward_query` walk over the keys of a tile of
queries, `_backward_key` over the queries of a tile of keys. Blocks that all of a tile sees are read without a mask.
Each KV head sums over its own query heads, no atomics: the gradients are the same in every run.

A sink is seen by all later queries, too many for one tile of keys: `_backward_sinks` gives each program a share of the
queries, and `_backward_key` starts from their sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from heedful.attention.shifted.reference import Geometry, spans

_UNSPECIALISED = ["length", "group", "first_shifted", "sinks"]
SINK_BLOCK = 16  # sinks read at a time: what a matrix product has at least
_SINK_CHUNK = 512  # queries of a program of `_backward_sinks`, at least


@triton.jit
def _row(rows, batch, length, HAS_MASK: tl.constexpr):
    """The first real token of a row, the tokens from there to the last, and whether there are holes among them."""
    if HAS_MASK:
        start = tl.load(rows + batch * 3)
        count = tl.load(rows + batch * 3 + 1)
        holes = tl.load(rows + batch * 3 + 2)
    else:
        start = length * 0
        count = length
        holes = length * 0
    return start, count, holes


@triton.jit
def _low(position, shift, group):
    """The first position of a position's group."""
    back = tl.where(shift > 0, group - shift, 0)
    return tl.maximum((position + back) // group * group - back, 0)


@triton.jit
def _joined(count, shift, group):
    """From where on a row's keys are in one group with its first `shift` positions, under "wrap"."""
    return tl.cdiv(count, group) * group - group + shift


@triton.jit
def _sees(i, j, shift, group, count, sinks, WRAP: tl.constexpr):
    """Whether positions i see positions j, which broadcast against one another: the definition."""
    low = _low(i, shift, group)
    seen = ((j >= low) | (j < sinks)) & (j <= i)
    if WRAP:
        seen = seen | ((i < shift) & (j >= _joined(count, shift, group)))
    return seen & (i < count) & (j < count)


@triton.jit
def _real(mask, start, position, inside, HAS_MASK: tl.constexpr):
    """Which of the positions `inside` the row are real tokens."""
    if HAS_MASK:
        inside = inside & (tl.load(mask + start + position, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _load(blocks, batch, head, place, inside, SOME: tl.constexpr):
    """Rows of `(B, H, T, D)` from `place` on. Past the end there are zeros, and with `SOME` in all rows that are
    not `inside`: they may hold anything, NaN too."""
    x = blocks.load([batch, head, place, 0])
    x = tl.reshape(x, (x.shape[2], x.shape[3]))
    if SOME:
        x = tl.where(inside[:, None], x, 0.0)
    return x


@triton.jit
def _absorb(logits, v, top, total, acc, PRECISION: tl.constexpr):
    """One step of the online softmax; hidden logits are -inf, and so is `top` before a row has seen anything."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - finite_top[:, None])
    kept = tl.exp2(top - finite_top)
    total = total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _forward(
    query,
    key,
    value,
    sink_key,
    sink_value,
    mask,
    rows,
    output,
    lse,
    scale,
    length,
    group,
    first_shifted,
    sinks,
    HEADS: tl.constexpr,
    HEADS_A_KEY: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WRAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    batch = tl.program_id(2)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    start, count, holes = _row(rows, batch, length, HAS_MASK)
    if first >= count:
        return
    mask += batch.to(tl.int64) * length
    shift = tl.where((head >= first_shifted) & (count > group), group // 2, 0)
    end = tl.minimum(first + BLOCK_M, count)
    low = _low(first, shift, group)
    i = first + tl.arange(0, BLOCK_M)
    real = _real(mask, start, i, i < count, HAS_MASK)
    dims = tl.arange(0, D)
    columns = tl.arange(0, BLOCK_N)
    at = (start + i).to(tl.int64)
    kv_head = head // HEADS_A_KEY
    q = _load(query, batch, head, start + first, real, HAS_MASK)
    scale2 = scale * 1.4426950408889634

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the logits in base 2
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    if HAS_SINKS:
        for begin in tl.range(0, tl.minimum(sinks, low), BLOCK_S, num_stages=1):
            j = begin + tl.arange(0, BLOCK_S)
            inside = _real(mask, start, j, (j < sinks) & (j < low), HAS_MASK)
            k = _load(sink_key, batch, kv_head, start + begin, inside, True)
            v = _load(sink_value, batch, kv_head, start + begin, inside, True)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            logits = tl.where(inside[None, :] & real[:, None], logits, float("-inf"))
            top, total, acc = _absorb(logits, v, top, total, acc, PRECISION)

    # The whole blocks of keys that all rows of the tile see; none if it lies in two groups.
    whole = (first + 1 - low) // BLOCK_N
    whole = tl.where((_low(end - 1, shift, group) == low) & (holes == 0), whole, 0)
    for step in range(0, whole):
        begin = start + low + step * BLOCK_N
        k = _load(key, batch, kv_head, begin, columns, False)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1) * scale2)
        weights = tl.exp2(logits * scale2 - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        acc = acc * kept[:, None]
        v = _load(value, batch, kv_head, begin, columns, False)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top

    if WRAP:
        joined = _joined(count, shift, group)
        runs = tl.where(first < shift, 2, 1)
    else:
        joined = end
        runs = 1
    for run in range(0, runs):
        from_key = tl.where(run == 0, low + whole * BLOCK_N, tl.maximum(joined, end))
        to_key = tl.where(run == 0, end, count)
        for begin in tl.range(from_key, to_key, BLOCK_N, num_stages=1):
            j = begin + columns
            inside = _real(mask, start, j, j < to_key, HAS_MASK)
            k = _load(key, batch, kv_head, start + begin, inside, True)
            v = _load(value, batch, kv_head, start + begin, inside, True)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            seen = _sees(i[:, None], j[None, :], shift, group, count, sinks, WRAP)
            logits = tl.where(seen & inside[None, :] & real[:, None], logits, float("-inf"))
            top, total, acc = _absorb(logits, v, top, total, acc, PRECISION)

    empty = ~real  # a real row sees itself at least; 0 / 0, if all it sees is -inf, is NaN
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    # A row that sees nothing has no weights in the backward pass either: exp(x - inf) = 0.
    result_lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    place = ((batch.to(tl.int64) * length + at) * HEADS + head) * D
    tl.store(output + place[:, None] + dims[None, :], acc.to(output.dtype.element_ty), mask=(i < count)[:, None])
    tl.store(lse + (batch.to(tl.int64) * HEADS + head) * length + at, result_lse, mask=i < count)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_query(
    query,
    key,
    value,
    sink_key,
    sink_value,
    mask,
    rows,
    output,
    lse,
    d_output,
    d_query,
    delta,
    scale,
    length,
    group,
    first_shifted,
    sinks,
    HEADS: tl.constexpr,
    HEADS_A_KEY: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WRAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ, and delta = rowsum(dO * O) for the others: the loops of `_forward`."""
    head = tl.program_id(1)
    batch = tl.program_id(2)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    start, count, holes = _row(rows, batch, length, HAS_MASK)
    if first >= count:
        return
    mask += batch.to(tl.int64) * length
    shift = tl.where((head >= first_shifted) & (count > group), group // 2, 0)
    end = tl.minimum(first + BLOCK_M, count)
    low = _low(first, shift, group)
    i = first + tl.arange(0, BLOCK_M)
    real = _real(mask, start, i, i < count, HAS_MASK)
    dims = tl.arange(0, D)
    columns = tl.arange(0, BLOCK_N)
    at = (start + i).to(tl.int64)
    kv_head = head // HEADS_A_KEY
    q = _load(query, batch, head, start + first, real, HAS_MASK)
    d_out = _load(d_output, batch, head, start + first, real, HAS_MASK)
    place = ((batch.to(tl.int64) * length + at) * HEADS + head) * D
    out = tl.load(output + place[:, None] + dims[None, :], mask=real[:, None], other=0.0)
    row_delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    flat = (batch.to(tl.int64) * HEADS + head) * length + at
    tl.store(delta + flat, row_delta, mask=i < count)
    row_lse = tl.load(lse + flat, mask=real, other=float("inf"))
    scale2 = scale * 1.4426950408889634
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    if HAS_SINKS:
        for begin in tl.range(0, tl.minimum(sinks, low), BLOCK_S, num_stages=1):
            j = begin + tl.arange(0, BLOCK_S)
            inside = _real(mask, start, j, (j < sinks) & (j < low), HAS_MASK)
            k = _load(sink_key, batch, kv_head, start + begin, inside, True)
            v = _load(sink_value, batch, kv_head, start + begin, inside, True)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            weights = tl.where(inside[None, :], tl.exp2(logits - row_lse[:, None]), 0.0)
            d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            d_logits = weights * (d_weights - row_delta[:, None])
            acc = tl.dot(d_logits.to(k.dtype), k, acc, input_precision=PRECISION)

    whole = (first + 1 - low) // BLOCK_N
    whole = tl.where((_low(end - 1, shift, group) == low) & (holes == 0), whole, 0)
    for step in range(0, whole):
        begin = start + low + step * BLOCK_N
        k = _load(key, batch, kv_head, begin, columns, False)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.exp2(logits * scale2 - row_lse[:, None])
        v = _load(value, batch, kv_head, begin, columns, False)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_logits = weights * (d_weights - row_delta[:, None])
        acc = tl.dot(d_logits.to(k.dtype), k, acc, input_precision=PRECISION)

    if WRAP:
        joined = _joined(count, shift, group)
        runs = tl.where(first < shift, 2, 1)
    else:
        joined = end
        runs = 1
    for run in range(0, runs):
        from_key = tl.where(run == 0, low + whole * BLOCK_N, tl.maximum(joined, end))
        to_key = tl.where(run == 0, end, count)
        for begin in tl.range(from_key, to_key, BLOCK_N, num_stages=1):
            j = begin + columns
            inside = _real(mask, start, j, j < to_key, HAS_MASK)
            k = _load(key, batch, kv_head, start + begin, inside, True)
            v = _load(value, batch, kv_head, start + begin, inside, True)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            seen = _sees(i[:, None], j[None, :], shift, group, count, sinks, WRAP)
            weights = tl.where(seen & inside[None, :], tl.exp2(logits - row_lse[:, None]), 0.0)
            d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            d_logits = weights * (d_weights - row_delta[:, None])
            acc = tl.dot(d_logits.to(k.dtype), k, acc, input_precision=PRECISION)

    tl.store(
        d_query + place[:, None] + dims[None, :], (acc * scale).to(d_query.dtype.element_ty), mask=(i < count)[:, None]
    )


@triton.jit(do_not_specialize=["chunk", "chunks", *_UNSPECIALISED])
def _backward_sinks(
    query,
    key,
    value,
    mask,
    rows,
    lse,
    delta,
    d_output,
    d_key_sinks,
    d_value_sinks,
    scale,
    chunk,
    chunks,
    length,
    group,
    first_shifted,
    sinks,
    HEADS: tl.constexpr,
    HEADS_A_KEY: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A share of the queries: what they give to a block of sinks that lie outside their groups. fp32
    `(B, chunks, Hq, sinks, D)`."""
    share = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks
    head = tl.program_id(1)
    batch = tl.program_id(2)
    start, count, _ = _row(rows, batch, length, HAS_MASK)
    mask += batch.to(tl.int64) * length
    shift = tl.where((head >= first_shifted) & (count > group), group // 2, 0)
    dims = tl.arange(0, D)
    flat = (batch.to(tl.int64) * HEADS + head) * length + start
    lse += flat
    delta += flat
    j = block * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = _real(mask, start, j, (j < sinks) & (j < count), HAS_MASK)
    k = _load(key, batch, head // HEADS_A_KEY, start + block * BLOCK_S, inside, HAS_MASK)
    v = _load(value, batch, head // HEADS_A_KEY, start + block * BLOCK_S, inside, HAS_MASK)
    scale2 = scale * 1.4426950408889634
    acc_k = tl.zeros((BLOCK_S, D), tl.float32)
    acc_v = tl.zeros((BLOCK_S, D), tl.float32)
    for begin in range(share * chunk, tl.minimum((share + 1) * chunk, count), BLOCK_M):
        i = begin + tl.arange(0, BLOCK_M)
        real = _real(mask, start, i, i < count, HAS_MASK)
        q = _load(query, batch, head, start + begin, real, HAS_MASK)
        d_out = _load(d_output, batch, head, start + begin, real, HAS_MASK)
        row_lse = tl.load(lse + i, mask=real, other=float("inf"))
        row_delta = tl.load(delta + i, mask=real, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        seen = (j[:, None] < _low(i, shift, group)[None, :]) & inside[:, None]
        weights = tl.where(seen, tl.exp2(logits - row_lse[None, :]), 0.0)
        acc_v = tl.dot(weights.to(d_out.dtype), d_out, acc_v, input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_logits = weights * (d_weights - row_delta[None, :])
        acc_k = tl.dot(d_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)
    place = (((batch.to(tl.int64) * chunks + share) * HEADS + head) * sinks + j) * D
    tl.store(d_key_sinks + place[:, None] + dims[None, :], acc_k, mask=(j < sinks)[:, None])
    tl.store(d_value_sinks + place[:, None] + dims[None, :], acc_v, mask=(j < sinks)[:, None])


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_key(
    query,
    key,
    value,
    mask,
    rows,
    lse,
    delta,
    d_output,
    d_key_sinks,
    d_value_sinks,
    d_key,
    d_value,
    scale,
    length,
    group,
    first_shifted,
    sinks,
    HEADS: tl.constexpr,
    HEADS_A_KEY: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WRAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of a tile of keys: the queries of their groups, of all query heads of the KV head."""
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    first = tl.program_id(0) * BLOCK_N
    start, count, holes = _row(rows, batch, length, HAS_MASK)
    if first >= count:
        return
    mask += batch.to(tl.int64) * length
    KV_HEADS: tl.constexpr = HEADS // HEADS_A_KEY
    end = tl.minimum(first + BLOCK_N, count)
    j = first + tl.arange(0, BLOCK_N)
    inside = _real(mask, start, j, j < count, HAS_MASK)
    dims = tl.arange(0, D)
    lanes = tl.arange(0, BLOCK_M)
    k = _load(key, batch, kv_head, start + first, inside, HAS_MASK)
    v = _load(value, batch, kv_head, start + first, inside, HAS_MASK)
    scale2 = scale * 1.4426950408889634
    acc_k = tl.zeros((BLOCK_N, D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, D), tl.float32)
    if HAS_SINKS and first < sinks:
        place = ((batch.to(tl.int64) * KV_HEADS + kv_head) * sinks + j) * D
        sink = (j < sinks)[:, None]
        acc_k = tl.load(d_key_sinks + place[:, None] + dims[None, :], mask=sink, other=0.0)
        acc_v = tl.load(d_value_sinks + place[:, None] + dims[None, :], mask=sink, other=0.0)

    for member in range(0, HEADS_A_KEY):
        head = kv_head * HEADS_A_KEY + member
        shift = tl.where((head >= first_shifted) & (count > group), group // 2, 0)
        # Ends of the groups of the tile's first and last key: queries in between see some keys only.
        high = tl.minimum(_low(first, shift, group) + group, count)
        high = tl.where((shift > 0) & (first < shift), shift, high)
        last_high = tl.minimum(_low(end - 1, shift, group) + group, count)
        last_high = tl.where((shift > 0) & (end - 1 < shift), shift, last_high)
        flat = (batch.to(tl.int64) * HEADS + head) * length + start
        # The tile's own queries have a mask; then whole blocks that see every key of it; then the rest.
        after = tl.minimum(first + BLOCK_N, last_high)
        whole = tl.maximum(high - first - BLOCK_N, 0) // BLOCK_M
        whole = tl.where(holes == 0, whole, 0)
        for step in range(0, whole):
            begin = first + BLOCK_N + step * BLOCK_M
            q = _load(query, batch, head, start + begin, lanes, False)
            row_lse = tl.load(lse + flat + begin + lanes)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            weights = tl.exp2(logits * scale2 - row_lse[None, :])
            d_out = _load(d_output, batch, head, start + begin, lanes, False)
            acc_v = tl.dot(weights.to(d_out.dtype), d_out, acc_v, input_precision=PRECISION)
            row_delta = tl.load(delta + flat + begin + lanes)
            d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            d_logits = weights * (d_weights - row_delta[None, :])
            acc_k = tl.dot(d_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)

        if WRAP:
            wraps = (shift > 0) & (end > _joined(count, shift, group))
            runs = tl.where(wraps, 3, 2)
        else:
            runs = 2
        for run in range(0, runs):
            from_query = tl.where(run == 0, first, first + BLOCK_N + whole * BLOCK_M)
            to_query = tl.where(run == 0, after, last_high)
            if WRAP:
                from_query = tl.where(run == 2, 0, from_query)
                to_query = tl.where(run == 2, tl.minimum(shift, first), to_query)
            for begin in tl.range(from_query, to_query, BLOCK_M, num_stages=1):
                i = begin + lanes
                real = _real(mask, start, i, i < to_query, HAS_MASK)
                q = _load(query, batch, head, start + begin, real, True)
                d_out = _load(d_output, batch, head, start + begin, real, True)
                row_lse = tl.load(lse + flat + i, mask=real, other=float("inf"))
                row_delta = tl.load(delta + flat + i, mask=real, other=0.0)
                logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
                seen = _sees(i[None, :], j[:, None], shift, group, count, 0, WRAP)
                weights = tl.where(seen & inside[:, None], tl.exp2(logits - row_lse[None, :]), 0.0)
                acc_v = tl.dot(weights.to(d_out.dtype), d_out, acc_v, input_precision=PRECISION)
                d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                d_logits = weights * (d_weights - row_delta[None, :])
                acc_k = tl.dot(d_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)

    place = ((batch.to(tl.int64) * length + start + j) * KV_HEADS + kv_head) * D
    kept = (j < count)[:, None]
    tl.store(d_key + place[:, None] + dims[None, :], (acc_k * scale).to(d_key.dtype.element_ty), mask=kept)
    tl.store(d_value + place[:, None] + dims[None, :], acc_v.to(d_value.dtype.element_ty), mask=kept)


class _Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


class _Config(NamedTuple):
    forward: _Tile
    backward_query: _Tile
    backward_key: _Tile


def _config(dim: int, dtype: torch.dtype) -> _Config:
    if dtype == torch.float32:  # "ieee" products run on the plain units, out of registers
        tile = _Tile(32, 32, 4, 2) if dim <= 128 else _Tile(16, 16, 4, 2)
        return _Config(tile, tile, tile)
    if dim <= 64:
        return _Config(_Tile(128, 64, 4, 3), _Tile(128, 64, 4, 3), _Tile(64, 64, 4, 2))
    if dim <= 128:  # 64 queries a step would spill: two sums of 128 x 128 are half of the registers
        return _Config(_Tile(128, 128, 8, 3), _Tile(128, 64, 8, 3), _Tile(32, 128, 8, 3))
    return _Config(_Tile(128, 64, 8, 2), _Tile(64, 32, 8, 2), _Tile(32, 64, 8, 2))


def _prepare(attention_mask: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor]:
    """The mask in bytes and int32 `(B, 3)`: first real token, tokens from there to the last, holes among them."""
    if attention_mask is None:
        nothing = torch.empty(0, dtype=torch.int32, device=query.device)
        return nothing.view(torch.uint8), nothing
    start, count = spans(attention_mask)
    holes = attention_mask.sum(1) != count
    return attention_mask.contiguous().view(torch.uint8), torch.stack([start, count, holes], 1).int()


def _aligned(x: Tensor) -> Tensor:
    """A copy where the copy engine cannot read: a row's elements apart, rows that do not begin at 16 bytes, or shared."""
    sixteen = 16 // x.element_size()
    fine = x.stride(3) == 1 and all(step and step % sixteen == 0 for step in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def _blocks(x: Tensor, size: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, size, x.shape[3]])


def _launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    group: int,
    shifted: int,
    sinks: int,
    wrap: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = query.shape
    # Padding is not visited.
    new = torch.empty if attention_mask is None else torch.zeros
    output = new((batch, length, heads, dim), dtype=query.dtype, device=query.device)
    lse = new((batch, heads, length), dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    query, key, value = (_aligned(x) for x in (query, key, value))
    mask, rows = _prepare(attention_mask, query)
    tile = _config(dim, query.dtype).forward
    _forward[(triton.cdiv(length, tile.block_m), heads, batch)](
        _blocks(query, tile.block_m),
        _blocks(key, tile.block_n),
        _blocks(value, tile.block_n),
        _blocks(key, SINK_BLOCK),
        _blocks(value, SINK_BLOCK),
        mask,
        rows,
        output,
        lse,
        scale,
        length,
        group,
        heads - shifted,
        sinks,
        HEADS=heads,
        HEADS_A_KEY=heads // key.shape[1],
        D=dim,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_S=SINK_BLOCK,
        HAS_MASK=attention_mask is not None,
        HAS_SINKS=sinks > 0,
        WRAP=wrap,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return output, lse


def _launch_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
    group: int,
    shifted: int,
    sinks: int,
    wrap: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    new = torch.empty if attention_mask is None else torch.zeros
    d_query = new((batch, length, heads, dim), dtype=query.dtype, device=query.device)
    d_key, d_value = (new((batch, length, kv_heads, dim), dtype=key.dtype, device=key.device) for _ in range(2))
    if output.numel() == 0:
        return d_query, d_key, d_value
    query, key, value, d_output = (_aligned(x) for x in (query, key, value, d_output))
    mask, rows = _prepare(attention_mask, query)
    delta = torch.empty_like(lse)
    config = _config(dim, query.dtype)
    numbers = (length, group, heads - shifted, sinks)
    constants: dict[str, Any] = {
        "HEADS": heads,
        "HEADS_A_KEY": heads // kv_heads,
        "D": dim,
        "HAS_MASK": attention_mask is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    tile = config.backward_query
    _backward_query[(triton.cdiv(length, tile.block_m), heads, batch)](
        _blocks(query, tile.block_m),
        _blocks(key, tile.block_n),
        _blocks(value, tile.block_n),
        _blocks(key, SINK_BLOCK),
        _blocks(value, SINK_BLOCK),
        mask,
        rows,
        output,
        lse,
        _blocks(d_output, tile.block_m),
        d_query,
        delta,
        scale,
        *numbers,
        **constants,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_S=SINK_BLOCK,
        HAS_SINKS=sinks > 0,
        WRAP=wrap,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if sinks:
        # Few sinks: many shares of the queries, to fill the device; many: few, for the room that they take.
        chunks = max(1, min(triton.cdiv(length, _SINK_CHUNK), 1024 // sinks))
        chunk = triton.cdiv(triton.cdiv(length, chunks), 64) * 64
        queries = 64 if query.dtype != torch.float32 else 32
        parts = torch.empty((2, batch, chunks, heads, sinks, dim), dtype=torch.float32, device=query.device)
        _backward_sinks[(chunks * triton.cdiv(sinks, SINK_BLOCK), heads, batch)](
            _blocks(query, queries),
            _blocks(key, SINK_BLOCK),
            _blocks(value, SINK_BLOCK),
            mask,
            rows,
            lse,
            delta,
            _blocks(d_output, queries),
            parts[0],
            parts[1],
            scale,
            chunk,
            chunks,
            *numbers,
            **constants,
            BLOCK_M=queries,
            BLOCK_S=SINK_BLOCK,
            num_warps=4,
            num_stages=2,
        )
        d_sinks = parts.sum(2).unflatten(2, (kv_heads, -1)).sum(3)
    else:
        d_sinks = torch.empty((2, 0), dtype=torch.float32, device=query.device)
    tile = config.backward_key
    _backward_key[(triton.cdiv(length, tile.block_n), kv_heads, batch)](
        _blocks(query, tile.block_m),
        _blocks(key, tile.block_n),
        _blocks(value, tile.block_n),
        mask,
        rows,
        lse,
        delta,
        _blocks(d_output, tile.block_m),
        d_sinks[0],
        d_sinks[1],
        d_key,
        d_value,
        scale,
        *numbers,
        **constants,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        HAS_SINKS=sinks > 0,
        WRAP=wrap,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return d_query, d_key, d_value


@torch.library.custom_op("heedful::shifted_sparse_attention", mutates_args=())
def shifted_sparse_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    group: int,
    shifted: int,
    sinks: int,
    wrap: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `(B, T, Hq, D)` and, for the backward pass, the base-2 logarithm of the denominators `(B, Hq, T)`."""
    return _on_device(_launch_forward, query, key, value, attention_mask, group, shifted, sinks, wrap, scale)


@shifted_sparse_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    group: int,
    shifted: int,
    sinks: int,
    wrap: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = query.shape
    output = query.new_empty((batch, length, heads, dim))
    return output, query.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("heedful::shifted_sparse_attention_backward", mutates_args=())
def shifted_sparse_attention_backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
    group: int,
    shifted: int,
    sinks: int,
    wrap: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, `(B, T, H, D)` each; `d_output` is `(B, Hq, T, D)`."""
    return _on_device(
        _launch_backward, query, key, value, attention_mask, output, lse, d_output, group, shifted, sinks, wrap, scale
    )


@shifted_sparse_attention_backward_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
    group: int,
    shifted: int,
    sinks: int,
    wrap: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = query.shape
    like_key = key.new_empty((batch, length, key.shape[1], dim))
    return query.new_empty((batch, length, heads, dim)), like_key, torch.empty_like(like_key)


def _on_device(launch: Any, query: Tensor, *arguments: Any) -> Any:
    if not query.is_cuda:
        return launch(query, *arguments)
    with torch.cuda.device(query.device):
        return launch(query, *arguments)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attention_mask, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, attention_mask, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, attention_mask, output, lse = ctx.saved_tensors
    gradients = shifted_sparse_attention_backward_op(
        query, key, value, attention_mask, output, lse, d_output.transpose(1, 2), *ctx.numbers
    )
    return *(x.transpose(1, 2) for x in gradients), *[None] * 6


shifted_sparse_attention_op.register_autograd(_backward, setup_context=_keep)


def shifted_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, attention_mask: Tensor | None
) -> Tensor:
    output, _ = shifted_sparse_attention_op(query, key, value, attention_mask, *geometry)
    return output.transpose(1, 2)
