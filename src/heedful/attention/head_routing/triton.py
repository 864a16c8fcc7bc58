"""Attention and projections of the chosen (token, head) pairs alone, in Triton, forward and backward.

A head's chosen tokens are listed in ascending order (`HeadDispatch.rows`), so a tile of a head's list is a tile of queries
whose positions ascend with gaps: a causal tile reads the keys up to its last position, unmasked up to its first. How many
tokens a head has is known on the device alone: grids are as large as if all were chosen, and tiles past the end return at
once. `before` counts a head's tokens ahead of any position, which gives a tile of keys its first query without a search.

Each KV head sums over its own query heads and each token over its own heads, no atomics: every run gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_UNSPECIALISED = ["tokens", "length", "keys", "window"]


@triton.jit
def _non_finite(x):
    return (x != x) | (tl.abs(x) == float("inf"))


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _forward(
    query,
    key,
    value,
    mask,
    rows,
    before,
    output,
    lse,
    scale,
    tokens,
    length,
    keys,
    window,
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
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    batch = tl.program_id(2)
    before += head.to(tl.int64) * (tokens + 1) + batch * length
    rows += head.to(tl.int64) * tokens
    first = tl.load(before)
    count = tl.load(before + length) - first
    tile = tl.cdiv(count, BLOCK_M) - 1 - tl.program_id(0)  # the longest rows first
    if tile < 0:
        return
    rows += first + tile * BLOCK_M
    count -= tile * BLOCK_M
    at = tl.arange(0, BLOCK_M)
    real = at < count
    token = tl.load(rows + at, mask=real, other=0) - batch * length
    ahead = keys - length
    position = token + ahead
    lowest = tl.load(rows) - batch * length + ahead
    highest = tl.load(rows + tl.minimum(count, BLOCK_M) - 1) - batch * length + ahead

    dims = tl.arange(0, D)
    columns = tl.arange(0, BLOCK_N)
    batch = batch.to(tl.int64)
    query += batch * stride_query_b + head.to(tl.int64) * stride_query_h
    q = tl.load(query + token.to(tl.int64)[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0)
    key += batch * stride_key_b + (head // GROUP).to(tl.int64) * stride_key_h
    value += batch * stride_value_b + (head // GROUP).to(tl.int64) * stride_value_h
    mask += batch * keys
    scale2 = scale * 1.4426950408889634

    end = keys
    whole = keys // BLOCK_N * BLOCK_N  # up to here no block needs a mask
    begin = end * 0
    if CAUSAL:
        end = highest + 1
        whole = (lowest + 1) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        begin = tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N
    if HAS_WINDOW or HAS_MASK:
        whole = begin

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the logits in base 2
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    poisoned = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(begin, whole, BLOCK_N):
        offset = start + tl.zeros((), tl.int64)
        k = tl.load(key + offset * stride_key_t + (columns[None, :] * stride_key_t + dims[:, None]))
        logits = tl.dot(q, k, input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1) * scale2)
        weights = tl.exp2(logits * scale2 - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        acc = acc * kept[:, None]
        v = tl.load(value + offset * stride_value_t + (columns[:, None] * stride_value_t + dims[None, :]))
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    for start in tl.range(whole, end, BLOCK_N, num_stages=2):
        j = start + columns
        inside = j < keys
        if HAS_MASK:
            inside = inside & (tl.load(mask + j, mask=inside, other=0) != 0)
        offset = start + tl.zeros((), tl.int64)
        k = tl.load(
            key + offset * stride_key_t + (columns[None, :] * stride_key_t + dims[:, None]),
            mask=inside[None, :],
            other=0.0,
        )
        v = tl.load(
            value + offset * stride_value_t + (columns[:, None] * stride_value_t + dims[None, :]),
            mask=inside[:, None],
            other=0.0,
        )
        seen = inside[None, :] & real[:, None]
        if CAUSAL:
            seen = seen & (j[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (j[None, :] > position[:, None] - window)
        # A weight of 0 times a NaN is a NaN: what is not finite is taken out, and the rows that see it are marked.
        bad = tl.max(_non_finite(v.to(tl.float32)).to(tl.int32), 1)
        v = tl.where(bad[:, None] != 0, 0.0, v)
        poisoned = tl.maximum(poisoned, tl.max(tl.where(seen, bad[None, :], 0), 1))
        logits = tl.dot(q, k, input_precision=PRECISION) * scale2
        logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
        weights = tl.exp2(logits - finite_top[:, None])
        kept = tl.exp2(top - finite_top)
        total = total * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
        top = new_top

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    acc = tl.where(poisoned[:, None] != 0, float("nan"), acc)
    # +inf where nothing is seen: then all weights are 0 in the backward pass.
    row_lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    at = batch * length + token
    output += at * (HEADS * D) + head * D
    tl.store(output[:, None] + dims[None, :], acc.to(output.dtype.element_ty), mask=real[:, None])
    tl.store(lse + (batch * HEADS + head) * length + token, row_lse, mask=real)


@triton.jit
def _query_step(
    dq,
    q,
    do,
    row_lse,
    delta,
    position,
    key,
    value,
    mask,
    start,
    scale2,
    keys,
    window,
    stride_key_t,
    stride_value_t,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dims = tl.arange(0, D)
    columns = tl.arange(0, BLOCK_N)
    offset = start + tl.zeros((), tl.int64)
    keys_at = key + offset * stride_key_t + (columns[None, :] * stride_key_t + dims[:, None])
    values_at = value + offset * stride_value_t + (columns[None, :] * stride_value_t + dims[:, None])
    if MASKED:
        j = start + columns
        inside = j < keys
        if HAS_MASK:
            inside = inside & (tl.load(mask + j, mask=inside, other=0) != 0)
        k = tl.load(keys_at, mask=inside[None, :], other=0.0)
        v = tl.load(values_at, mask=inside[None, :], other=0.0)
    else:
        k = tl.load(keys_at)
        v = tl.load(values_at)
    weights = tl.exp2(tl.dot(q, k, input_precision=PRECISION) * scale2 - row_lse[:, None])
    if MASKED:
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (j[None, :] > position[:, None] - window)
        weights = tl.where(seen, weights, 0.0)
    ds = weights * (tl.dot(do, v, input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_query(
    query,
    key,
    value,
    mask,
    rows,
    before,
    output,
    grad,
    lse,
    deltas,
    grad_query,
    scale,
    tokens,
    length,
    keys,
    window,
    stride_query_b,
    stride_query_h,
    stride_query_t,
    stride_key_b,
    stride_key_h,
    stride_key_t,
    stride_value_b,
    stride_value_h,
    stride_value_t,
    stride_grad_b,
    stride_grad_h,
    stride_grad_t,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of a tile of queries, and each row's `delta` = dO . O, which `_backward_key` needs as well."""
    head = tl.program_id(1)
    batch = tl.program_id(2)
    before += head.to(tl.int64) * (tokens + 1) + batch * length
    rows += head.to(tl.int64) * tokens
    first = tl.load(before)
    count = tl.load(before + length) - first
    tile = tl.cdiv(count, BLOCK_M) - 1 - tl.program_id(0)
    if tile < 0:
        return
    rows += first + tile * BLOCK_M
    count -= tile * BLOCK_M
    at = tl.arange(0, BLOCK_M)
    real = at < count
    token = tl.load(rows + at, mask=real, other=0) - batch * length
    ahead = keys - length
    position = token + ahead
    lowest = tl.load(rows) - batch * length + ahead
    highest = tl.load(rows + tl.minimum(count, BLOCK_M) - 1) - batch * length + ahead

    dims = tl.arange(0, D)
    batch = batch.to(tl.int64)
    token64 = token.to(tl.int64)
    query += batch * stride_query_b + head.to(tl.int64) * stride_query_h
    q = tl.load(query + token64[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0)
    grad += batch * stride_grad_b + head.to(tl.int64) * stride_grad_h
    do = tl.load(grad + token64[:, None] * stride_grad_t + dims[None, :], mask=real[:, None], other=0.0)
    place = ((batch * length + token64) * HEADS + head) * D
    o = tl.load(output + place[:, None] + dims[None, :], mask=real[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    of_row = (batch * HEADS + head) * length + token
    tl.store(deltas + of_row, delta, mask=real)
    row_lse = tl.load(lse + of_row, mask=real, other=float("inf"))
    key += batch * stride_key_b + (head // GROUP).to(tl.int64) * stride_key_h
    value += batch * stride_value_b + (head // GROUP).to(tl.int64) * stride_value_h
    mask += batch * keys
    scale2 = scale * 1.4426950408889634

    end = keys
    whole = keys // BLOCK_N * BLOCK_N
    begin = end * 0
    if CAUSAL:
        end = highest + 1
        whole = (lowest + 1) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        begin = tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N
    if HAS_WINDOW or HAS_MASK:
        whole = begin
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(begin, whole, BLOCK_N):
        dq = _query_step(
            dq, q, do, row_lse, delta, position, key, value, mask, start, scale2, keys, window, stride_key_t,
            stride_value_t, D, BLOCK_N, False, CAUSAL, HAS_MASK, HAS_WINDOW, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, end, BLOCK_N, num_stages=2):
        dq = _query_step(
            dq, q, do, row_lse, delta, position, key, value, mask, start, scale2, keys, window, stride_key_t,
            stride_value_t, D, BLOCK_N, True, CAUSAL, HAS_MASK, HAS_WINDOW, PRECISION,
        )  # fmt: skip
    dq = dq * scale
    tl.store(grad_query + place[:, None] + dims[None, :], dq.to(grad_query.dtype.element_ty), mask=real[:, None])


@triton.jit
def _key_step(
    dk,
    dv,
    k,
    v,
    j,
    query,
    grad,
    rows,
    lse,
    deltas,
    row,
    end,
    base,
    ahead,
    scale2,
    window,
    stride_query_t,
    stride_grad_t,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dims = tl.arange(0, D)
    at = row + tl.arange(0, BLOCK_M)
    real = at < end
    token = tl.load(rows + at, mask=real, other=base) - base
    token64 = token.to(tl.int64)
    q = tl.load(query + token64[None, :] * stride_query_t + dims[:, None], mask=real[None, :], other=0.0)
    do = tl.load(grad + token64[:, None] * stride_grad_t + dims[None, :], mask=real[:, None], other=0.0)
    row_lse = tl.load(lse + token, mask=real, other=float("inf"))
    delta = tl.load(deltas + token, mask=real, other=0.0)
    weights = tl.exp2(tl.dot(k, q, input_precision=PRECISION) * scale2 - row_lse[None, :])
    if MASKED:
        position = token + ahead
        seen = real[None, :]
        if CAUSAL:
            seen = seen & (j[:, None] <= position[None, :])
        if HAS_WINDOW:
            seen = seen & (j[:, None] > position[None, :] - window)
        weights = tl.where(seen, weights, 0.0)
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), tl.trans(q), dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_key(
    query,
    key,
    value,
    mask,
    rows,
    before,
    grad,
    lse,
    deltas,
    grad_key,
    grad_value,
    scale,
    tokens,
    length,
    keys,
    window,
    stride_query_b,
    stride_query_h,
    stride_query_t,
    stride_key_b,
    stride_key_h,
    stride_key_t,
    stride_value_b,
    stride_value_h,
    stride_value_t,
    stride_grad_b,
    stride_grad_h,
    stride_grad_t,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of a tile of keys, over all query heads of the KV head."""
    start = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    base = tl.program_id(2) * length
    batch = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, D)
    j = start + tl.arange(0, BLOCK_N)
    inside = j < keys
    if HAS_MASK:
        inside = inside & (tl.load(mask + batch * keys + j, mask=inside, other=0) != 0)
    key += batch * stride_key_b + kv_head.to(tl.int64) * stride_key_h
    value += batch * stride_value_b + kv_head.to(tl.int64) * stride_value_h
    j64 = j.to(tl.int64)
    k = tl.load(key + j64[:, None] * stride_key_t + dims[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(value + j64[:, None] * stride_value_t + dims[None, :], mask=inside[:, None], other=0.0)
    query += batch * stride_query_b
    grad += batch * stride_grad_b
    scale2 = scale * 1.4426950408889634
    ahead = keys - length
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for member in range(GROUP):
        head = (kv_head * GROUP + member).to(tl.int64)
        counted = before + head * (tokens + 1) + base
        first = tl.load(counted)
        end = tl.load(counted + length)
        whole = first  # from here on every query sees every key of the tile
        if CAUSAL:
            first = tl.load(counted + tl.minimum(tl.maximum(start - ahead, 0), length))
            whole = tl.load(counted + tl.minimum(tl.maximum(start + BLOCK_N - 1 - ahead, 0), length))
        if HAS_WINDOW:
            end = tl.load(counted + tl.minimum(tl.maximum(start + BLOCK_N - 1 + window - ahead, 0), length))
            whole = end
        of_head = (batch * HEADS + head) * length
        for row in tl.range(first, whole, BLOCK_M, num_stages=2):
            dk, dv = _key_step(
                dk, dv, k, v, j, query + head * stride_query_h, grad + head * stride_grad_h, rows + head * tokens,
                lse + of_head, deltas + of_head, row, whole, base, ahead, scale2, window, stride_query_t,
                stride_grad_t, D, BLOCK_M, True, CAUSAL, HAS_WINDOW, PRECISION,
            )  # fmt: skip
        for row in range(whole, end, BLOCK_M):
            dk, dv = _key_step(
                dk, dv, k, v, j, query + head * stride_query_h, grad + head * stride_grad_h, rows + head * tokens,
                lse + of_head, deltas + of_head, row, end, base, ahead, scale2, window, stride_query_t,
                stride_grad_t, D, BLOCK_M, False, CAUSAL, HAS_WINDOW, PRECISION,
            )  # fmt: skip
    # A hidden key has a row of its own in the products above, which is left out here.
    dk = tl.where(inside[:, None], dk * scale, 0.0)
    dv = tl.where(inside[:, None], dv, 0.0)
    at = ((batch * tl.num_programs(1) + kv_head) * keys + j64) * D
    tl.store(grad_key + at[:, None] + dims[None, :], dk.to(grad_key.dtype.element_ty), mask=(j < keys)[:, None])
    tl.store(grad_value + at[:, None] + dims[None, :], dv.to(grad_value.dtype.element_ty), mask=(j < keys)[:, None])


@triton.jit(do_not_specialize=["tokens", "slots"])
def _project(
    x,
    weight,
    bias,
    rows,
    before,
    slot,
    output,
    tokens,
    slots,
    stride_x_n,
    stride_x_h,
    stride_weight_h,
    stride_weight_k,
    stride_weight_d,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TO_SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[n (, h)] @ weight[h] for the chosen pairs, `(N, HEADS, D)`, or by the head's rank among the token's, `(N, slots, D)`."""
    head = tl.program_id(0) % HEADS  # side by side, the heads find the rows of x in the L2 cache
    tile = tl.program_id(0) // HEADS
    count = tl.load(before + head.to(tl.int64) * (tokens + 1) + tokens)
    if tile * BLOCK_M >= count:
        return
    at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = at < count
    token = tl.load(rows + head.to(tl.int64) * tokens + at, mask=real, other=0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < D
    part = tl.arange(0, BLOCK_K)
    left = x + token[:, None] * stride_x_n + head.to(tl.int64) * stride_x_h + part[None, :]
    weight += head.to(tl.int64) * stride_weight_h
    right = weight + part[:, None].to(tl.int64) * stride_weight_k + column[None, :].to(tl.int64) * stride_weight_d
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0 and D % BLOCK_N == 0:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=(part < K - start)[None, :], other=0.0)
            b = tl.load(right, mask=(part < K - start)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K * stride_weight_k
    if HAS_BIAS:
        acc += tl.load(bias + head * D + column, mask=inside, other=0.0)[None, :].to(tl.float32)
    if TO_SLOTS:
        place = token * slots + tl.load(slot + token * HEADS + head, mask=real, other=0)
    else:
        place = token * HEADS + head
    kept = real[:, None] & inside[None, :]
    tl.store(output + place[:, None] * D + column[None, :], acc.to(output.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["slots"])
def _combine(parts, used, output, slots, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """One token's sum over its heads."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.load(used + token)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for slot in range(count):
        acc += tl.load(parts + (token * slots + slot) * C + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(output + token * C + column, acc.to(output.dtype.element_ty), mask=column < C)


INTERPRETED = not isinstance(_forward, triton.JITFunction)
DIMS = (16, 32, 64, 128, 256)


class _Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By head size up to 64, 128 and 256, in half precision. Tiles of rows and keys, warps, stages.
_TABLE = {
    "forward": (_Config(128, 128, 8, 3), _Config(128, 64, 8, 3), _Config(64, 64, 4, 2)),
    "query": (_Config(128, 64, 8, 3), _Config(128, 64, 8, 2), _Config(64, 32, 4, 2)),
    "key": (_Config(64, 128, 8, 2), _Config(64, 128, 8, 2), _Config(32, 64, 4, 2)),
}
# Tiles of rows, columns and reduction, warps, stages.
_PROJECT = {64: (128, 64, 64, 4, 4), 128: (128, 128, 64, 8, 4)}


def _config(kernel: str, dim: int, dtype: torch.dtype) -> _Config:
    if dtype == torch.float32:  # "ieee" products run on the plain units, out of registers
        return _Config(16, 32, 4, 1) if dim > 128 else _Config(32, 32, 4, 2)
    return _TABLE[kernel][0 if dim <= 64 else 1 if dim <= 128 else 2]


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bytes(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask.contiguous().view(torch.uint8)


def _arguments(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(i) for x in (query, key, value) for i in range(3))


@torch.library.custom_op("heedful::routed_attention", mutates_args=())
def routed_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    before: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output as `(B, T, H, D)`, and the base-2 log-sum-exp `(B, H, T)` of the chosen rows."""
    query, key, value = _unit(query), _unit(key), _unit(value)
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    output = torch.zeros((batch, length, heads, dim), dtype=query.dtype, device=query.device)
    lse = torch.full((batch, heads, length), torch.inf, dtype=torch.float32, device=query.device)
    config = _config("forward", dim, query.dtype)
    _forward[(triton.cdiv(length, config.block_m), heads, batch)](
        query, key, value, _bytes(mask, rows), rows, before, output, lse, scale, batch * length, length, keys, window,
        *_arguments(query, key, value), HEADS=heads, GROUP=heads // kv_heads, D=dim, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, CAUSAL=causal, HAS_MASK=mask is not None, HAS_WINDOW=window > 0,
        PRECISION=_precision(query.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return output, lse


@routed_attention_op.register_fake
def _(query, key, value, mask, rows, before, causal, window, scale):
    batch, heads, length, dim = query.shape
    return query.new_empty((batch, length, heads, dim)), query.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("heedful::routed_attention_backward", mutates_args=())
def routed_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    before: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the query as `(B, T, H, D)`, of key and value."""
    query, key, value = _unit(query), _unit(key), _unit(value)
    grad = _unit(grad)
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    grad_query = torch.zeros_like(output)
    grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    deltas = torch.empty_like(lse)
    strides = (*_arguments(query, key, value), grad.stride(0), grad.stride(2), grad.stride(1))
    sizes = (batch * length, length, keys, window)
    shared = {
        "HEADS": heads, "GROUP": heads // kv_heads, "D": dim, "CAUSAL": causal, "HAS_MASK": mask is not None,
        "HAS_WINDOW": window > 0, "PRECISION": _precision(query.dtype),
    }  # fmt: skip
    config = _config("query", dim, query.dtype)
    _backward_query[(triton.cdiv(length, config.block_m), heads, batch)](
        query, key, value, _bytes(mask, rows), rows, before, output, grad, lse, deltas, grad_query, scale, *sizes,
        *strides, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
        num_stages=config.num_stages, **shared,
    )  # fmt: skip
    config = _config("key", dim, query.dtype)
    _backward_key[(triton.cdiv(keys, config.block_n), kv_heads, batch)](
        query, key, value, _bytes(mask, rows), rows, before, grad, lse, deltas, grad_key, grad_value, scale, *sizes,
        *strides, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
        num_stages=config.num_stages, **shared,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


@routed_attention_backward_op.register_fake
def _(grad, query, key, value, mask, rows, before, output, lse, causal, window, scale):
    return torch.empty_like(output), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_attention(ctx, inputs, output):
    query, key, value, mask, rows, before, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, mask, rows, before, *output)


def _attention_gradients(ctx, grad, _):
    grad_query, grad_key, grad_value = routed_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return grad_query.transpose(1, 2), grad_key, grad_value, None, None, None, None, None, None


routed_attention_op.register_autograd(_attention_gradients, setup_context=_keep_attention)


@torch.library.custom_op("heedful::routed_projection", mutates_args=())
def routed_projection_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, rows: Tensor, before: Tensor
) -> Tensor:
    """`x (N, C)` times `weight (H, C, D)` for the chosen pairs `active (N, H)`, 0 for the others: `(N, H, D)`."""
    x = _unit(x)
    heads, _reduction, dim = weight.shape
    output = torch.zeros((x.shape[0], heads, dim), dtype=x.dtype, device=x.device)
    _launch_project(x, weight, bias, rows, before, None, output)
    return output


def _launch_project(x, weight, bias, rows, before, slot, output):
    heads, reduction, dim = weight.shape
    if x.dtype == torch.float32:
        block_m, block_n, block_k, warps, stages = 32, 32, 32, 4, 2
    else:
        block_m, block_n, block_k, warps, stages = _PROJECT[64 if dim <= 64 else 128]
    block_n = min(block_n, max(16, triton.next_power_of_2(dim)))
    _project[(triton.cdiv(x.shape[0], block_m) * heads, triton.cdiv(dim, block_n))](
        x, weight, rows if bias is None else bias, rows, before, rows if slot is None else slot, output, x.shape[0],
        output.shape[1], x.stride(0), x.stride(1) if x.ndim == 3 else 0, *weight.stride()[:2], weight.stride(2),
        HEADS=heads, K=reduction, D=dim, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, HAS_BIAS=bias is not None,
        TO_SLOTS=slot is not None, PRECISION=_precision(x.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip


@routed_projection_op.register_fake
def _(x, weight, bias, active, rows, before):
    return x.new_empty((x.shape[0], weight.shape[0], weight.shape[2]))


def _keep_projection(ctx, inputs, output):
    x, weight, bias, active, _, _ = inputs
    ctx.save_for_backward(x, weight, active)
    ctx.has_bias = bias is not None


def _projection_gradients(ctx, grad):
    x, weight, active = ctx.saved_tensors
    grad = grad.masked_fill(~active[..., None], 0)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.flatten(1) @ weight.transpose(1, 2).flatten(0, 1)
    if ctx.needs_input_grad[1]:
        grad_weight = (x.mT @ grad.flatten(1)).unflatten(1, grad.shape[1:]).transpose(0, 1)
    return grad_x, grad_weight, grad.sum(0) if ctx.has_bias else None, None, None, None


routed_projection_op.register_autograd(_projection_gradients, setup_context=_keep_projection)


def grouped_output(x: Tensor, weight: Tensor, rows: Tensor, before: Tensor, active: Tensor, slots: int) -> Tensor:
    """`sum_h x[n, h] @ weight[h]` over the chosen heads alone: each head's rows by themselves, then each token's sum."""
    tokens, _heads, _ = x.shape
    slot = active.cumsum(1, dtype=torch.int32)
    parts = torch.empty((tokens, slots, weight.shape[2]), dtype=x.dtype, device=x.device)
    _launch_project(x, weight, None, rows, before, slot - 1, parts)
    output = torch.empty((tokens, weight.shape[2]), dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(weight.shape[2]))
    _combine[(tokens, triton.cdiv(weight.shape[2], block))](
        parts, slot[:, -1].contiguous(), output, slots, C=weight.shape[2], BLOCK_C=block, num_warps=4
    )
    return output
