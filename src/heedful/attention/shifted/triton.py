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

from heedful.attention.shifted.reference import Geometry, spans

_UNSPECIALISED = ["length", "group", "first_shifted", "sinks"]
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
    mask,
    rows,
    output,
    lse,
    scale,
    length,
    group,
    first_shifted,
    sinks,
    stride_query_b,
    stride_query_h,
    stride_query_t,
    stride_key_b,
    stride_key_h,
    stride_key_t,
    stride_value_b,
    stride_value_h,
    stride_value_t,
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
    batch = tl.program_id(2).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    start, count, holes = _row(rows, batch, length, HAS_MASK)
    if first >= count:
        return
    mask += batch * length
    shift = tl.where((head >= first_shifted) & (count > group), group // 2, 0)
    end = tl.minimum(first + BLOCK_M, count)
    low = _low(first, shift, group)
    i = first + tl.arange(0, BLOCK_M)
    real = _real(mask, start, i, i < count, HAS_MASK)
    dims = tl.arange(0, D)
    columns = tl.arange(0, BLOCK_N)
    at = (start + i).to(tl.int64)
    query += batch * stride_query_b + head.to(tl.int64) * stride_query_h
    q = tl.load(query + at[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0)
    start64 = start.to(tl.int64)
    key += batch * stride_key_b + (head // HEADS_A_KEY).to(tl.int64) * stride_key_h + start64 * stride_key_t
    value += batch * stride_value_b + (head // HEADS_A_KEY).to(tl.int64) * stride_value_h + start64 * stride_value_t
    scale2 = scale * 1.4426950408889634

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the logits in base 2
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    if HAS_SINKS:
        for begin in tl.range(0, tl.minimum(sinks, low), BLOCK_S, num_stages=1):
            j = begin + tl.arange(0, BLOCK_S)
            inside = _real(mask, start, j, (j < sinks) & (j < low), HAS_MASK)
            offset = j.to(tl.int64)
            k = tl.load(key + offset[None, :] * stride_key_t + dims[:, None], mask=inside[None, :], other=0.0)
            v = tl.load(value + offset[:, None] * stride_value_t + dims[None, :], mask=inside[:, None], other=0.0)
            logits = tl.dot(q, k, input_precision=PRECISION) * scale2
            logits = tl.where(inside[None, :] & real[:, None], logits, float("-inf"))
            top, total, acc = _absorb(logits, v, top, total, acc, PRECISION)

    # The whole blocks of keys that all rows of the tile see; none if it lies in two groups.
    whole = (first + 1 - low) // BLOCK_N
    whole = tl.where((_low(end - 1, shift, group) == low) & (holes == 0), whole, 0)
    begin64 = low.to(tl.int64)
    keys = key + begin64 * stride_key_t + (columns[None, :].to(tl.int64) * stride_key_t + dims[:, None])
    values = value + begin64 * stride_value_t + (columns[:, None].to(tl.int64) * stride_value_t + dims[None, :])
    for _ in range(0, whole):
        k = tl.load(keys)
        logits = tl.dot(q, k, input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1) * scale2)
        weights = tl.exp2(logits * scale2 - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        acc = acc * kept[:, None]
        v = tl.load(values)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
        keys += BLOCK_N * stride_key_t
        values += BLOCK_N * stride_value_t

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
            offset = j.to(tl.int64)
            k = tl.load(key + offset[None, :] * stride_key_t + dims[:, None], mask=inside[None, :], other=0.0)
            v = tl.load(value + offset[:, None] * stride_value_t + dims[None, :], mask=inside[:, None], other=0.0)
            logits = tl.dot(q, k, input_precision=PRECISION) * scale2
            seen = _sees(i[:, None], j[None, :], shift, group, count, sinks, WRAP)
            logits = tl.where(seen & inside[None, :] & real[:, None], logits, float("-inf"))
            top, total, acc = _absorb(logits, v, top, total, acc, PRECISION)

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    # A row that sees nothing has no weights in the backward pass either: exp(x - inf) = 0.
    result_lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    place = ((batch * length + at) * HEADS + head) * D
    tl.store(output + place[:, None] + dims[None, :], acc.to(output.dtype.element_ty), mask=(i < count)[:, None])
    tl.store(lse + (batch * HEADS + head) * length + at, result_lse, mask=i < count)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_query(
    query,
    key,
    value,
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
    stride_query_b,
    stride_query_h,
    stride_query_t,
    stride_key_b,
    stride_key_h,
    stride_key_t,
    stride_value_b,
    stride_value_h,
    stride_value_t,
    stride_d_output_b,
    stride_d_output_h,
    stride_d_output_t,
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
    batch = tl.program_id(2).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    start, count, holes = _row(rows, batch, length, HAS_MASK)
    if first >= count:
        return
    mask += batch * length
    shift = tl.where((head >= first_shifted) & (count > group), group // 2, 0)
    end = tl.minimum(first + BLOCK_M, count)
    low = _low(first, shift, group)
    i = first + tl.arange(0, BLOCK_M)
    real = _real(mask, start, i, i < count, HAS_MASK)
    dims = tl.arange(0, D)
    columns = tl.arange(0, BLOCK_N)
    at = (start + i).to(tl.int64)
    query += batch * stride_query_b + head.to(tl.int64) * stride_query_h
    q = tl.load(query + at[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0)
    d_output += batch * stride_d_output_b + head.to(tl.int64) * stride_d_output_h
    d_out = tl.load(d_output + at[:, None] * stride_d_output_t + dims[None, :], mask=real[:, None], other=0.0)
    place = ((batch * length + at) * HEADS + head) * D
    out = tl.load(output + place[:, None] + dims[None, :], mask=real[:, None], other=0.0)
    row_delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    flat = (batch * HEADS + head) * length + at
    tl.store(delta + flat, row_delta, mask=i < count)
    row_lse = tl.load(lse + flat, mask=real, other=float("inf"))
    start64 = start.to(tl.int64)
    key += batch * stride_key_b + (head // HEADS_A_KEY).to(tl.int64) * stride_key_h + start64 * stride_key_t
    value += batch * stride_value_b + (head // HEADS_A_KEY).to(tl.int64) * stride_value_h + start64 * stride_value_t
    scale2 = scale * 1.4426950408889634
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    if HAS_SINKS:
        for begin in tl.range(0, tl.minimum(sinks, low), BLOCK_S, num_stages=1):
            j = begin + tl.arange(0, BLOCK_S)
            inside = _real(mask, start, j, (j < sinks) & (j < low), HAS_MASK)
            offset = j.to(tl.int64)
            k = tl.load(key + offset[None, :] * stride_key_t + dims[:, None], mask=inside[None, :], other=0.0)
            v = tl.load(value + offset[None, :] * stride_value_t + dims[:, None], mask=inside[None, :], other=0.0)
            logits = tl.dot(q, k, input_precision=PRECISION) * scale2
            weights = tl.where(inside[None, :], tl.exp2(logits - row_lse[:, None]), 0.0)
            d_weights = tl.dot(d_out, v, input_precision=PRECISION)
            d_logits = weights * (d_weights - row_delta[:, None])
            acc = tl.dot(d_logits.to(k.dtype), tl.trans(k), acc, input_precision=PRECISION)

    whole = (first + 1 - low) // BLOCK_N
    whole = tl.where((_low(end - 1, shift, group) == low) & (holes == 0), whole, 0)
    begin64 = low.to(tl.int64)
    keys = key + begin64 * stride_key_t + (columns[None, :].to(tl.int64) * stride_key_t + dims[:, None])
    values = value + begin64 * stride_value_t + (columns[None, :].to(tl.int64) * stride_value_t + dims[:, None])
    for _ in range(0, whole):
        k = tl.load(keys)
        logits = tl.dot(q, k, input_precision=PRECISION)
        weights = tl.exp2(logits * scale2 - row_lse[:, None])
        v = tl.load(values)
        d_weights = tl.dot(d_out, v, input_precision=PRECISION)
        d_logits = weights * (d_weights - row_delta[:, None])
        acc = tl.dot(d_logits.to(k.dtype), tl.trans(k), acc, input_precision=PRECISION)
        keys += BLOCK_N * stride_key_t
        values += BLOCK_N * stride_value_t

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
            offset = j.to(tl.int64)
            k = tl.load(key + offset[None, :] * stride_key_t + dims[:, None], mask=inside[None, :], other=0.0)
            v = tl.load(value + offset[None, :] * stride_value_t + dims[:, None], mask=inside[None, :], other=0.0)
            logits = tl.dot(q, k, input_precision=PRECISION) * scale2
            seen = _sees(i[:, None], j[None, :], shift, group, count, sinks, WRAP)
            weights = tl.where(seen & inside[None, :], tl.exp2(logits - row_lse[:, None]), 0.0)
            d_weights = tl.dot(d_out, v, input_precision=PRECISION)
            d_logits = weights * (d_weights - row_delta[:, None])
            acc = tl.dot(d_logits.to(k.dtype), tl.trans(k), acc, input_precision=PRECISION)

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
    stride_query_b,
    stride_query_h,
    stride_query_t,
    stride_key_b,
    stride_key_h,
    stride_key_t,
    stride_value_b,
    stride_value_h,
    stride_value_t,
    stride_d_output_b,
    stride_d_output_h,
    stride_d_output_t,
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
    batch = tl.program_id(2).to(tl.int64)
    start, count, _ = _row(rows, batch, length, HAS_MASK)
    mask += batch * length
    shift = tl.where((head >= first_shifted) & (count > group), group // 2, 0)
    dims = tl.arange(0, D)
    start64 = start.to(tl.int64)
    query += batch * stride_query_b + head.to(tl.int64) * stride_query_h + start64 * stride_query_t
    d_output += batch * stride_d_output_b + head.to(tl.int64) * stride_d_output_h + start64 * stride_d_output_t
    key += batch * stride_key_b + (head // HEADS_A_KEY).to(tl.int64) * stride_key_h + start64 * stride_key_t
    value += batch * stride_value_b + (head // HEADS_A_KEY).to(tl.int64) * stride_value_h + start64 * stride_value_t
    flat = (batch * HEADS + head) * length + start
    lse += flat
    delta += flat
    j = block * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = _real(mask, start, j, (j < sinks) & (j < count), HAS_MASK)
    offset = j.to(tl.int64)
    k = tl.load(key + offset[:, None] * stride_key_t + dims[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(value + offset[:, None] * stride_value_t + dims[None, :], mask=inside[:, None], other=0.0)
    scale2 = scale * 1.4426950408889634
    acc_k = tl.zeros((BLOCK_S, D), tl.float32)
    acc_v = tl.zeros((BLOCK_S, D), tl.float32)
    for begin in range(share * chunk, tl.minimum((share + 1) * chunk, count), BLOCK_M):
        i = begin + tl.arange(0, BLOCK_M)
        real = _real(mask, start, i, i < count, HAS_MASK)
        at = i.to(tl.int64)
        q = tl.load(query + at[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0)
        d_out = tl.load(d_output + at[:, None] * stride_d_output_t + dims[None, :], mask=real[:, None], other=0.0)
        row_lse = tl.load(lse + i, mask=real, other=float("inf"))
        row_delta = tl.load(delta + i, mask=real, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        seen = (j[:, None] < _low(i, shift, group)[None, :]) & inside[:, None]
        weights = tl.where(seen, tl.exp2(logits - row_lse[None, :]), 0.0)
        acc_v = tl.dot(weights.to(d_out.dtype), d_out, acc_v, input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_logits = weights * (d_weights - row_delta[None, :])
        acc_k = tl.dot(d_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)
    place = (((batch * chunks + share) * HEADS + head) * sinks + j) * D
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
    stride_query_b,
    stride_query_h,
    stride_query_t,
    stride_key_b,
    stride_key_h,
    stride_key_t,
    stride_value_b,
    stride_value_h,
    stride_value_t,
    stride_d_output_b,
    stride_d_output_h,
    stride_d_output_t,
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
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    start, count, holes = _row(rows, batch, length, HAS_MASK)
    if first >= count:
        return
    mask += batch * length
    KV_HEADS: tl.constexpr = HEADS // HEADS_A_KEY
    end = tl.minimum(first + BLOCK_N, count)
    j = first + tl.arange(0, BLOCK_N)
    inside = _real(mask, start, j, j < count, HAS_MASK)
    dims = tl.arange(0, D)
    lanes = tl.arange(0, BLOCK_M)
    start64 = start.to(tl.int64)
    at = j.to(tl.int64) + start64
    key += batch * stride_key_b + kv_head.to(tl.int64) * stride_key_h
    value += batch * stride_value_b + kv_head.to(tl.int64) * stride_value_h
    k = tl.load(key + at[:, None] * stride_key_t + dims[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(value + at[:, None] * stride_value_t + dims[None, :], mask=inside[:, None], other=0.0)
    scale2 = scale * 1.4426950408889634
    acc_k = tl.zeros((BLOCK_N, D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, D), tl.float32)
    if HAS_SINKS:
        if first < sinks:
            place = ((batch * KV_HEADS + kv_head) * sinks + j) * D
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
        flat = (batch * HEADS + head) * length + start
        queries = query + batch * stride_query_b + head.to(tl.int64) * stride_query_h + start64 * stride_query_t
        d_outputs = (
            d_output + batch * stride_d_output_b + head.to(tl.int64) * stride_d_output_h + start64 * stride_d_output_t
        )
        # The tile's own queries have a mask; then whole blocks that see every key of it; then the rest.
        after = tl.minimum(first + BLOCK_N, last_high)
        whole = tl.maximum(high - first - BLOCK_N, 0) // BLOCK_M
        whole = tl.where(holes == 0, whole, 0)
        begin64 = (first + BLOCK_N).to(tl.int64)
        q_at = queries + begin64 * stride_query_t + (lanes[:, None].to(tl.int64) * stride_query_t + dims[None, :])
        d_out_at = d_outputs + begin64 * stride_d_output_t
        d_out_at += lanes[:, None].to(tl.int64) * stride_d_output_t + dims[None, :]
        i_at = flat + begin64 + lanes
        for _ in range(0, whole):
            q = tl.load(q_at)
            row_lse = tl.load(lse + i_at)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            weights = tl.exp2(logits * scale2 - row_lse[None, :])
            d_out = tl.load(d_out_at)
            acc_v = tl.dot(weights.to(d_out.dtype), d_out, acc_v, input_precision=PRECISION)
            row_delta = tl.load(delta + i_at)
            d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            d_logits = weights * (d_weights - row_delta[None, :])
            acc_k = tl.dot(d_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)
            q_at += BLOCK_M * stride_query_t
            d_out_at += BLOCK_M * stride_d_output_t
            i_at += BLOCK_M

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
                offset = i.to(tl.int64)
                q = tl.load(queries + offset[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0)
                d_out = tl.load(
                    d_outputs + offset[:, None] * stride_d_output_t + dims[None, :], mask=real[:, None], other=0.0
                )
                row_lse = tl.load(lse + flat + i, mask=real, other=float("inf"))
                row_delta = tl.load(delta + flat + i, mask=real, other=0.0)
                logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
                seen = _sees(i[None, :], j[:, None], shift, group, count, 0, WRAP)
                weights = tl.where(seen & inside[:, None], tl.exp2(logits - row_lse[None, :]), 0.0)
                acc_v = tl.dot(weights.to(d_out.dtype), d_out, acc_v, input_precision=PRECISION)
                d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                d_logits = weights * (d_weights - row_delta[None, :])
                acc_k = tl.dot(d_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)

    place = ((batch * length + at) * KV_HEADS + kv_head) * D
    kept = (j < count)[:, None]
    tl.store(d_key + place[:, None] + dims[None, :], (acc_k * scale).to(d_key.dtype.element_ty), mask=kept)
    tl.store(d_value + place[:, None] + dims[None, :], acc_v.to(d_value.dtype.element_ty), mask=kept)


INTERPRETED = not isinstance(_forward, triton.JITFunction)


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
        return _Config(_Tile(128, 64, 4, 3), _Tile(128, 64, 4, 3), _Tile(64, 128, 4, 3))
    if dim <= 128:
        return _Config(_Tile(128, 128, 8, 3), _Tile(128, 64, 8, 3), _Tile(64, 128, 8, 2))
    return _Config(_Tile(128, 64, 8, 2), _Tile(64, 32, 4, 2), _Tile(32, 64, 8, 2))


def _prepare(attention_mask: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor]:
    """The mask in bytes and int32 `(B, 3)`: first real token, tokens from there to the last, holes among them."""
    if attention_mask is None:
        nothing = torch.empty(0, dtype=torch.int32, device=query.device)
        return nothing.view(torch.uint8), nothing
    start, count = spans(attention_mask)
    holes = attention_mask.sum(1) != count
    return attention_mask.contiguous().view(torch.uint8), torch.stack([start, count, holes], 1).int()


def _rows_of(x: Tensor) -> Tensor:
    """A copy where a row's elements are apart."""
    return x if x.stride(3) == 1 else x.contiguous()


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
    # Rows of padding are not visited.
    new = torch.empty if attention_mask is None else torch.zeros
    output = new((batch, length, heads, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    query, key, value = (_rows_of(x) for x in (query, key, value))
    mask, rows = _prepare(attention_mask, query)
    tile = _config(dim, query.dtype).forward
    _forward[(triton.cdiv(length, tile.block_m), heads, batch)](
        query,
        key,
        value,
        mask,
        rows,
        output,
        lse,
        scale,
        length,
        group,
        heads - shifted,
        sinks,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        HEADS=heads,
        HEADS_A_KEY=heads // key.shape[1],
        D=dim,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_S=16,
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
    query, key, value, d_output = (_rows_of(x) for x in (query, key, value, d_output))
    mask, rows = _prepare(attention_mask, query)
    delta = torch.empty_like(lse)
    config = _config(dim, query.dtype)
    numbers = (length, group, heads - shifted, sinks)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *d_output.stride()[:3])
    constants: dict[str, Any] = {
        "HEADS": heads,
        "HEADS_A_KEY": heads // kv_heads,
        "D": dim,
        "HAS_MASK": attention_mask is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    tile = config.backward_query
    _backward_query[(triton.cdiv(length, tile.block_m), heads, batch)](
        query,
        key,
        value,
        mask,
        rows,
        output,
        lse,
        d_output,
        d_query,
        delta,
        scale,
        *numbers,
        *strides,
        **constants,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_S=16,
        HAS_SINKS=sinks > 0,
        WRAP=wrap,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if sinks:
        # Few sinks: many shares of the queries, to fill the device; many: few, for the room that they take.
        chunks = max(1, min(triton.cdiv(length, _SINK_CHUNK), 1024 // sinks))
        chunk = triton.cdiv(triton.cdiv(length, chunks), 64) * 64
        parts = torch.empty((2, batch, chunks, heads, sinks, dim), dtype=torch.float32, device=query.device)
        _backward_sinks[(chunks * triton.cdiv(sinks, 16), heads, batch)](
            query,
            key,
            value,
            mask,
            rows,
            lse,
            delta,
            d_output,
            parts[0],
            parts[1],
            scale,
            chunk,
            chunks,
            *numbers,
            *strides,
            **constants,
            BLOCK_M=64 if query.dtype != torch.float32 else 32,
            BLOCK_S=16,
            num_warps=4,
            num_stages=2,
        )
        d_sinks = parts.sum(2).unflatten(2, (kv_heads, -1)).sum(3)
    else:
        d_sinks = torch.empty((2, 0), dtype=torch.float32, device=query.device)
    tile = config.backward_key
    _backward_key[(triton.cdiv(length, tile.block_n), kv_heads, batch)](
        query,
        key,
        value,
        mask,
        rows,
        lse,
        delta,
        d_output,
        d_sinks[0],
        d_sinks[1],
        d_key,
        d_value,
        scale,
        *numbers,
        *strides,
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
