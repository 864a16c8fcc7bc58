"""Attention and projections of the chosen (token, head) pairs alone, in Triton, forward and backward.

A head's chosen tokens are listed in ascending order (`HeadDispatch.rows`), so a tile of a head's list is a tile of queries
whose positions ascend with gaps: a causal tile reads the keys up to its last position, unmasked up to its first. How many
tokens a head has is known on the device alone: grids are as large as if all were chosen, and tiles past the end return at
once. `before` counts a head's tokens ahead of any position, which gives a tile of keys its first query without a search.

Blocks of keys and values come by the copy engine; the backward pass first writes the chosen queries in the order of the lists, so
that theirs do too. Each KV head sums over its own query heads and each token over its own heads, no atomics: every run gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_UNSPECIALISED = ["tokens", "length", "keys", "window"]


@triton.jit
def _non_finite(x):
    x = x.to(tl.float32)
    return ((x - x) != 0).to(tl.int32)  # inf - inf is NaN


@triton.jit
def _load(descriptor, batch, head, start, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rows `start` and following of a head, by the copy engine; 0 past the end."""
    return descriptor.load([batch, head, start, 0]).reshape(BLOCK, D)


@triton.jit
def _tile(rows, before, tokens, length, keys, BLOCK_M: tl.constexpr):
    """A tile of a head's list in one batch row, the last one first, since it has most keys.

    Returns where it begins in the list and how many rows are left there (none: nothing to do), the rows' tokens, which of them
    are real, and the lowest and highest position.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2)
    before += head * (tokens + 1) + batch * length
    first = tl.load(before)
    count = tl.load(before + length) - first
    tile = tl.cdiv(count, BLOCK_M) - 1 - tl.program_id(0)
    first += tile * BLOCK_M
    count -= tile * BLOCK_M
    if tile < 0:
        count = 0
        first = 0
    rows += head * tokens + first
    real = tl.arange(0, BLOCK_M) < count
    token = tl.load(rows + tl.arange(0, BLOCK_M), mask=real, other=0) - batch * length
    ahead = keys - length - batch * length
    lowest = tl.load(rows, mask=count > 0, other=0) + ahead
    highest = tl.load(rows + tl.minimum(count, BLOCK_M) - 1, mask=count > 0, other=0) + ahead
    return first, count, token, real, lowest, highest


@triton.jit
def _key_range(
    lowest,
    highest,
    keys,
    window,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The keys of a tile of queries, `begin` to `end`; those before `whole` are blocks that every row sees."""
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
    return begin, whole, end


@triton.jit
def _seen(
    j, position, real, mask, keys, window, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Which keys `j` are there, and which rows see them `(rows, keys)`."""
    inside = j < keys
    if HAS_MASK:
        inside = inside & (tl.load(mask + j, mask=inside, other=0) != 0)
    seen = inside[None, :] & real[:, None]
    if CAUSAL:
        seen = seen & (j[None, :] <= position[:, None])
    if HAS_WINDOW:
        seen = seen & (j[None, :] > position[:, None] - window)
    return inside, seen


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
    before,
    output,
    lse,
    poisoned_tiles,
    scale,
    tokens,
    length,
    keys,
    window,
    stride_query_b,
    stride_query_h,
    stride_query_t,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """A weight of 0 times a NaN is a NaN, which would reach rows that do not see it. Tiles in which anything is not finite are
    marked, and done `AGAIN`: what is not finite is taken out of the values, and the rows that see it are set to NaN. All blocks go
    through the masked loop then, which a GPU rounds otherwise (in the plain one the scale is fused into the exponent)."""
    _first, count, token, real, lowest, highest = _tile(rows, before, tokens, length, keys, BLOCK_M)
    if count == 0:
        return
    head = tl.program_id(1)
    batch = tl.program_id(2)
    poisoned_tiles += (batch * HEADS + head) * tl.num_programs(0) + tl.program_id(0)
    if AGAIN:  # noqa: SIM102 (a compile-time and a run-time condition)
        if tl.load(poisoned_tiles) == 0:
            return
    position = token + (keys - length)
    kv_head = head // GROUP
    batch64 = batch.to(tl.int64)
    dims = tl.arange(0, D)
    query += batch64 * stride_query_b + head.to(tl.int64) * stride_query_h
    q = tl.load(query + token.to(tl.int64)[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0)
    mask += batch64 * keys
    scale2 = scale * 1.4426950408889634
    begin, whole, end = _key_range(lowest, highest, keys, window, BLOCK_N, CAUSAL, HAS_MASK, HAS_WINDOW)
    if AGAIN:
        whole = begin

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the logits in base 2
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    poisoned = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(begin, whole, BLOCK_N):
        k = _load(key, batch, kv_head, start, BLOCK_N, D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1) * scale2)
        weights = tl.exp2(logits * scale2 - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        acc = acc * kept[:, None]
        v = _load(value, batch, kv_head, start, BLOCK_N, D)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    for start in tl.range(whole, end, BLOCK_N, num_stages=2):
        k = _load(key, batch, kv_head, start, BLOCK_N, D)
        v = _load(value, batch, kv_head, start, BLOCK_N, D)
        _inside, seen = _seen(
            start + tl.arange(0, BLOCK_N), position, real, mask, keys, window, CAUSAL, HAS_MASK, HAS_WINDOW
        )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if AGAIN:
            bad = tl.max(_non_finite(v), 1)
            poisoned = tl.maximum(poisoned, tl.max(tl.where(seen, bad[None, :], 0), 1))
            v = tl.where(bad[:, None] != 0, 0.0, v)
        top, total, acc = _absorb(tl.where(seen, logits, float("-inf")), v, top, total, acc, PRECISION)
    empty = ~real  # without a mask a row sees a key at least; 0 / 0, if all it sees is -inf, is NaN
    if HAS_MASK:
        empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if AGAIN:
        acc = tl.where(poisoned[:, None] != 0, float("nan"), acc)
    else:
        tl.store(poisoned_tiles, tl.max(tl.max(_non_finite(acc), 1), 0))
    # +inf where nothing is seen: then all weights are 0 in the backward pass.
    row_lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    output += (batch64 * length + token) * (HEADS * D) + head * D
    tl.store(output[:, None] + dims[None, :], acc.to(output.dtype.element_ty), mask=real[:, None])
    tl.store(lse + (batch64 * HEADS + head) * length + token, row_lse, mask=real)


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
    grad_query,
    list_query,
    list_grad,
    list_lse,
    list_delta,
    scale,
    tokens,
    length,
    keys,
    window,
    stride_query_b,
    stride_query_h,
    stride_query_t,
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
    """dQ of a tile of queries. Writes what `_backward_key` reads of a row in the order of the list: Q, dO, and dO . O."""
    first, count, token, real, lowest, highest = _tile(rows, before, tokens, length, keys, BLOCK_M)
    if count == 0:
        return
    position = token + (keys - length)
    head = tl.program_id(1)
    kv_head = head // GROUP
    batch = tl.program_id(2)
    batch64 = batch.to(tl.int64)
    token64 = token.to(tl.int64)
    dims = tl.arange(0, D)
    query += batch64 * stride_query_b + head.to(tl.int64) * stride_query_h
    q = tl.load(query + token64[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0)
    grad += batch64 * stride_grad_b + head.to(tl.int64) * stride_grad_h
    do = tl.load(grad + token64[:, None] * stride_grad_t + dims[None, :], mask=real[:, None], other=0.0)
    place = ((batch64 * length + token64) * HEADS + head) * D
    o = tl.load(output + place[:, None] + dims[None, :], mask=real[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row_lse = tl.load(lse + (batch64 * HEADS + head) * length + token, mask=real, other=float("inf"))
    at = head.to(tl.int64) * tokens + first + tl.arange(0, BLOCK_M)
    tl.store(list_query + at[:, None] * D + dims[None, :], q, mask=real[:, None])
    tl.store(list_grad + at[:, None] * D + dims[None, :], do, mask=real[:, None])
    tl.store(list_lse + at, row_lse, mask=real)
    tl.store(list_delta + at, delta, mask=real)
    mask += batch64 * keys
    scale2 = scale * 1.4426950408889634
    begin, whole, end = _key_range(lowest, highest, keys, window, BLOCK_N, CAUSAL, HAS_MASK, HAS_WINDOW)

    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(begin, whole, BLOCK_N):
        k = _load(key, batch, kv_head, start, BLOCK_N, D)
        v = _load(value, batch, kv_head, start, BLOCK_N, D)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - row_lse[:, None])
        ds = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    for start in tl.range(whole, end, BLOCK_N, num_stages=2):
        k = _load(key, batch, kv_head, start, BLOCK_N, D)
        v = _load(value, batch, kv_head, start, BLOCK_N, D)
        j = start + tl.arange(0, BLOCK_N)
        inside, seen = _seen(j, position, real, mask, keys, window, CAUSAL, HAS_MASK, HAS_WINDOW)
        if HAS_MASK:  # what is hidden may be anything
            k = tl.where(inside[:, None], k, 0.0)
            v = tl.where(inside[:, None], v, 0.0)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - row_lse[:, None])
        weights = tl.where(seen, weights, 0.0)
        ds = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
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
    delta,
    row,
    end,
    ahead,
    scale2,
    window,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds rows `row` and following of a head's list to dK and dV; `query` and `grad` are blocks of the lists of all heads."""
    at = row + tl.arange(0, BLOCK_M)
    real = at < end
    q = query.load([row, 0])
    do = grad.load([row, 0])
    row_lse = tl.load(lse + at, mask=real, other=float("inf"))  # past the end all weights are 0
    row_delta = tl.load(delta + at, mask=real, other=0.0)
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - row_lse[None, :])
    if MASKED:
        position = tl.load(rows + at, mask=real, other=0) + ahead
        seen = real[None, :]
        if CAUSAL:
            seen = seen & (j[:, None] <= position[None, :])
        if HAS_WINDOW:
            seen = seen & (j[:, None] > position[None, :] - window)
        weights = tl.where(seen, weights, 0.0)
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - row_delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
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
    delta,
    grad_key,
    grad_value,
    scale,
    tokens,
    length,
    keys,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of a tile of keys, over all query heads of the KV head. `query`, `grad`, `lse`, `delta` in the order of the lists."""
    start = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    base = batch * length
    dims = tl.arange(0, D)
    j = start + tl.arange(0, BLOCK_N)
    k = _load(key, batch, kv_head, start, BLOCK_N, D)
    v = _load(value, batch, kv_head, start, BLOCK_N, D)
    scale2 = scale * 1.4426950408889634
    ahead = keys - length
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        counted = before + head.to(tl.int64) * (tokens + 1) + base
        first = tl.load(counted)
        end = tl.load(counted + length)
        whole = first  # from here on every query sees every key of the tile
        if CAUSAL:
            first = tl.load(counted + tl.minimum(tl.maximum(start - ahead, 0), length))
            whole = tl.load(counted + tl.minimum(tl.maximum(start + BLOCK_N - 1 - ahead, 0), length))
        if HAS_WINDOW:
            end = tl.load(counted + tl.minimum(tl.maximum(start + BLOCK_N - 1 + window - ahead, 0), length))
            whole = end
        shift = head * tokens  # rows of all heads in one list, at most 2^31 - 1
        for row in tl.range(first, whole, BLOCK_M, num_stages=2):
            dk, dv = _key_step(
                dk, dv, k, v, j, query, grad, rows, lse, delta, shift + row, shift + whole, ahead - base, scale2, window,
                D, BLOCK_M, True, CAUSAL, HAS_WINDOW, PRECISION,
            )  # fmt: skip
        for row in range(whole, end, BLOCK_M):
            dk, dv = _key_step(
                dk, dv, k, v, j, query, grad, rows, lse, delta, shift + row, shift + end, ahead - base, scale2, window,
                D, BLOCK_M, False, CAUSAL, HAS_WINDOW, PRECISION,
            )  # fmt: skip
    # A hidden key has a row of its own in the products above, which is left out here.
    inside = j < keys
    if HAS_MASK:
        inside = inside & (tl.load(mask + batch.to(tl.int64) * keys + j, mask=inside, other=0) != 0)
    dk = tl.where(inside[:, None], dk * scale, 0.0)
    dv = tl.where(inside[:, None], dv, 0.0)
    at = ((batch.to(tl.int64) * tl.num_programs(1) + kv_head) * keys + j) * D
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


@triton.jit(do_not_specialize=["tokens", "k"])
def _choose(scores, chosen, tokens, k, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """The k highest of E scores of each token, of equal ones the lower index: those that fewer than k others beat."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.arange(0, BLOCK_E)
    real = token < tokens
    inside = real[:, None] & (head < E)[None, :]
    score = tl.load(scores + token[:, None] * E + head[None, :], mask=inside, other=float("-inf"))
    score = tl.where(score != score, float("inf"), score)  # a NaN comes first, as in a descending sort
    beaten = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for other in range(E):
        rival = tl.load(scores + token * E + other, mask=real, other=float("-inf"))
        rival = tl.where(rival != rival, float("inf"), rival)
        beaten += ((rival[:, None] > score) | ((rival[:, None] == score) & (other < head)[None, :])).to(tl.int32)
    tl.store(chosen + token[:, None] * E + head[None, :], beaten < k, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _list(active, before, rows, tokens, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes each chosen token to its place in the head's list."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(active + token.to(tl.int64) * HEADS + head, mask=token < tokens, other=0) != 0
    place = tl.load(before + head.to(tl.int64) * (tokens + 1) + token, mask=chosen, other=0)
    tl.store(rows + head.to(tl.int64) * tokens + place, token, mask=chosen)


DIMS = (16, 32, 64, 128, 256)


class _Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By head size up to 64, 128 and 256, in half precision. Tiles of rows and keys, warps, stages.
_TABLE = {
    "forward": (_Config(64, 128, 4, 3), _Config(64, 64, 4, 3), _Config(128, 64, 8, 2)),
    "query": (_Config(64, 64, 4, 3), _Config(128, 64, 8, 3), _Config(64, 32, 8, 2)),
    "key": (_Config(128, 64, 4, 2), _Config(64, 64, 4, 2), _Config(32, 64, 8, 2)),
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


def _aligned(x: Tensor) -> Tensor:
    """Keys or values as the copy engine takes them: rows of whole 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    fine = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step % 16 == 0 and step > 0 for step in steps)
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def _blocks(x: Tensor, size: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1] * (x.ndim - 2) + [size, x.shape[-1]])


def _bytes(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask.contiguous().view(torch.uint8)


@torch.library.custom_op("heedful::choose_heads", mutates_args=())
def choose_heads_op(scores: Tensor, k: int) -> Tensor:
    scores = scores.contiguous()
    chosen = torch.empty_like(scores, dtype=torch.bool)
    heads = scores.shape[-1]
    tokens = scores.numel() // heads
    block = max(1, 1024 // triton.next_power_of_2(heads))
    _choose[(triton.cdiv(tokens, block),)](
        scores,
        chosen.view(torch.uint8),
        tokens,
        k,
        E=heads,
        BLOCK_E=triton.next_power_of_2(heads),
        BLOCK_T=block,
        num_warps=4,
    )
    return chosen


@choose_heads_op.register_fake
def _(scores, k):
    return torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)


@torch.library.custom_op("heedful::dispatch_heads", mutates_args=())
def dispatch_heads_op(active: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` and `before` of a HeadDispatch."""
    flat = active.flatten(0, 1).contiguous()
    tokens, heads = flat.shape
    before = torch.nn.functional.pad(flat.T.cumsum(1, dtype=torch.int32), (1, 0))
    rows = torch.empty(heads, tokens, dtype=torch.int32, device=active.device)
    _list[(triton.cdiv(tokens, 512), heads)](
        flat.view(torch.uint8), before, rows, tokens, HEADS=heads, BLOCK=512, num_warps=4
    )
    return rows, before


@dispatch_heads_op.register_fake
def _(active):
    batch, length, heads = active.shape
    rows = active.new_empty((heads, batch * length), dtype=torch.int32)
    return rows, active.new_empty((heads, batch * length + 1), dtype=torch.int32)


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
    query, key, value = _unit(query), _aligned(key), _aligned(value)
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    output = torch.zeros((batch, length, heads, dim), dtype=query.dtype, device=query.device)
    lse = torch.full((batch, heads, length), torch.inf, dtype=torch.float32, device=query.device)
    config = _config("forward", dim, query.dtype)
    grid = (triton.cdiv(length, config.block_m), heads, batch)
    poisoned = torch.empty(grid[0] * heads * batch, dtype=torch.int32, device=query.device)
    for again in (False, True):
        _forward[grid](
            query, _blocks(key, config.block_n), _blocks(value, config.block_n), _bytes(mask, rows), rows, before, output, lse,
            poisoned, scale, batch * length, length, keys, window, *query.stride()[:3], HEADS=heads, GROUP=heads // kv_heads,
            D=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, CAUSAL=causal, HAS_MASK=mask is not None,
            HAS_WINDOW=window > 0, PRECISION=_precision(query.dtype), AGAIN=again, num_warps=config.num_warps,
            num_stages=1 if again else config.num_stages,
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
    query, grad, key, value = _unit(query), _unit(grad), _aligned(key), _aligned(value)
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    tokens = batch * length
    grad_query = torch.zeros_like(output)
    grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    # Rows of the lists; zeros, since a block reads past the end of a list and 0 times what lies there has to be 0.
    list_query, list_grad = (
        torch.zeros((heads * tokens, dim), dtype=query.dtype, device=query.device) for _ in range(2)
    )
    list_lse, list_delta = (torch.empty(heads * tokens, dtype=torch.float32, device=query.device) for _ in range(2))
    sizes = (tokens, length, keys, window)
    shared = {
        "GROUP": heads // kv_heads, "D": dim, "CAUSAL": causal, "HAS_MASK": mask is not None, "HAS_WINDOW": window > 0,
        "PRECISION": _precision(query.dtype),
    }  # fmt: skip
    config = _config("query", dim, query.dtype)
    _backward_query[(triton.cdiv(length, config.block_m), heads, batch)](
        query, _blocks(key, config.block_n), _blocks(value, config.block_n), _bytes(mask, rows), rows, before, output, grad,
        lse, grad_query, list_query, list_grad, list_lse, list_delta, scale, *sizes, *query.stride()[:3], grad.stride(0),
        grad.stride(2), grad.stride(1), HEADS=heads, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, **shared,
    )  # fmt: skip
    config = _config("key", dim, query.dtype)
    _backward_key[(triton.cdiv(keys, config.block_n), kv_heads, batch)](
        _blocks(list_query, config.block_m), _blocks(key, config.block_n), _blocks(value, config.block_n), _bytes(mask, rows),
        rows, before, _blocks(list_grad, config.block_m), list_lse, list_delta, grad_key, grad_value, scale, *sizes,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages, **shared,
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


@torch.library.custom_op("heedful::routed_output", mutates_args=())
def routed_output_op(heads: Tensor, weight: Tensor, active: Tensor, rows: Tensor, before: Tensor, most: int) -> Tensor:
    """`sum_h heads[n, h] @ weight[h]` over the chosen heads, `(N, C)`: each head's rows by themselves, then each token's sum."""
    heads = _unit(heads)
    tokens, width = heads.shape[0], weight.shape[2]
    rank = active.cumsum(1, dtype=torch.int32)  # of a head among the token's, from 1
    parts = torch.empty((tokens, most, width), dtype=heads.dtype, device=heads.device)
    _launch_project(heads, weight, None, rows, before, rank - 1, parts)
    output = torch.empty((tokens, width), dtype=heads.dtype, device=heads.device)
    block = min(1024, triton.next_power_of_2(width))
    _combine[(tokens, triton.cdiv(width, block))](
        parts, rank[:, -1].contiguous(), output, most, C=width, BLOCK_C=block, num_warps=4
    )
    return output


@routed_output_op.register_fake
def _(heads, weight, active, rows, before, most):
    return heads.new_empty((heads.shape[0], weight.shape[2]))


def _keep_output(ctx, inputs, output):
    heads, weight, active, rows, before, _ = inputs
    ctx.save_for_backward(heads, weight, active, rows, before)


def _output_gradients(ctx, grad):
    heads, weight, active, rows, before = ctx.saved_tensors
    grad_heads = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_heads = routed_projection_op(grad, weight.mT, None, active, rows, before)
    if ctx.needs_input_grad[1]:
        chosen = heads.masked_fill(~active[..., None], 0)
        grad_weight = (chosen.flatten(1).mT @ grad).unflatten(0, heads.shape[1:])
    return grad_heads, grad_weight, None, None, None, None


routed_output_op.register_autograd(_output_gradients, setup_context=_keep_output)
