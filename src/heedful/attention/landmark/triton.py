"""Landmark Attention in Triton: flash attention over tokens whose scores are moved, block by block.

The weight of token j of an earlier block b is softmax-like in e_ij = s_ij - L_ib + m_ib: its score, less the logarithm of the sum of
its block's exponentials, plus the score of the block's landmark. A tile of keys holds whole blocks, as many as fit, so that L_ib
is found inside the tile: in sums over it where it holds one block and its landmark (a solo), else for several blocks at once by
products with the 0/1 matrix of tokens and blocks. Blocks longer than a tile are read twice: for L_ib, then for the output.

The same holds backwards: where softmax has ds_ij = p_ij (dp_ij - delta_i), a token of an earlier block has the mean of dp over its
block in place of delta_i, and the landmark g_ib (that mean - delta_i), with g_ib the weight of the block.

`_plan` numbers the blocks that have tokens and `_pack` lays them into tiles, both on the device, for each row of the batch;
`_prepare` copies keys, values and landmarks' keys with zeros in the place of what is not read.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from heedful.attention.interpreter import INTERPRETED

#: Blocks of a tile at most: the columns of the smallest matrix product.
SLOTS = tl.constexpr(16)
# A block whose largest exponential is below this (against the row's largest in the tile) gets a reference of its own.
_SMALL = tl.constexpr(2.0**-60)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["length", "stride_marks"])
def _plan(
    marks, real, token_block, row_block, gate_of, gate_at, block_first, block_end, counts, length, stride_marks,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers the blocks that have tokens: 0, 1, ... For each position the block of a token (else -1), how many such blocks
    ended before it, the block that it is the landmark of (else -1); for each block its first token, end and landmark."""
    batch = tl.program_id(0).to(tl.int64)
    marks += batch * stride_marks
    flat = batch * length
    tokens = 0  # so far
    gates = 0
    since = 0  # tokens up to the last landmark
    closed = 0
    last = 0
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < length
        before_it = inside & (at > 0)
        mark = tl.load(marks + at, mask=inside, other=0) != 0
        previous = tl.load(marks + at - 1, mask=before_it, other=0) != 0
        is_real = inside
        if HAS_MASK:
            is_real = tl.load(real + flat + at, mask=inside, other=0) != 0
            previous = previous & (tl.load(real + flat + at - 1, mask=before_it, other=0) != 0)
        mark = mark & is_real
        token = (is_real & (mark == 0)).to(tl.int32)
        count = tokens + tl.cumsum(token, 0)
        at_mark = tl.associative_scan(tl.where(previous, count - token, since), 0, _larger)
        gate = (mark & (count > at_mark)).to(tl.int32)
        block = gates + tl.cumsum(gate, 0) - gate
        tl.store(token_block + flat + at, tl.where(token > 0, block, -1), mask=inside)
        tl.store(row_block + flat + at, block, mask=inside)
        tl.store(gate_of + flat + at, tl.where(gate > 0, block, -1), mask=inside)
        tl.store(gate_at + flat + block, at, mask=inside & (gate > 0))
        of_batch = batch * (length + 1)
        tl.store(block_end + of_batch + block, at, mask=inside & (gate > 0))
        tl.store(block_first + of_batch + block, at, mask=inside & (token > 0) & (count - token == at_mark))
        closed = tl.maximum(closed, tl.max(tl.where(mark, count, 0), 0))
        tokens += tl.sum(token, 0)
        gates += tl.sum(gate, 0)
        since = tl.max(at_mark, 0)
        last = tl.maximum(last, tl.max(tl.where(token > 0, at + 1, 0), 0))
    is_open = (tokens > closed) * 1
    tl.store(block_end + batch * (length + 1) + gates, last, mask=is_open > 0)
    tl.store(counts + batch * 2, gates + is_open)  # blocks
    tl.store(counts + batch * 2 + 1, gates)  # of which have their landmark


@triton.jit(do_not_specialize=["length"])
def _pack(
    block_first, block_end, gate_at, counts, tile_first, tile_count, solo, multi, long_block, tiles_before, solos_before,
    longs_before, packed, length,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles of whole blocks, as many as fit; which of them are solos (by their block) and which not (by their number); the list
    of blocks that are longer; for each block how many of each are before it."""
    batch = tl.program_id(0).to(tl.int64)
    flat = batch * (length + 1)
    blocks = tl.load(counts + batch * 2)
    gates = tl.load(counts + batch * 2 + 1)
    slots = tl.arange(0, SLOTS)
    block = 0
    tiles = 0
    solos = 0
    longs = 0
    while block < blocks:
        start = tl.load(block_first + flat + block)
        there = block + slots < blocks
        end = tl.load(block_end + flat + block + slots, mask=there, other=0)
        fit = tl.sum((there & (end - start <= BLOCK_N)).to(tl.int32), 0)
        is_long = fit == 0
        gate = tl.load(gate_at + batch * length + block, mask=block < gates, other=2147483647)
        is_solo = (fit == 1) & (gate < start + BLOCK_N)
        is_multi = (fit > 0) & (is_solo == 0)
        mine = slots < tl.maximum(fit, 1)
        tl.store(tiles_before + flat + block + slots, tiles + slots * 0, mask=mine)
        tl.store(solos_before + flat + block + slots, solos + slots * 0, mask=mine)
        tl.store(longs_before + flat + block + slots, longs + slots * 0, mask=mine)
        tl.store(solo + flat + solos, block, mask=is_solo)
        tl.store(multi + flat + tiles - solos, tiles, mask=is_multi)
        tl.store(long_block + flat + longs, block, mask=is_long)
        tl.store(tile_first + flat + tiles, block, mask=fit > 0)
        tl.store(tile_count + flat + tiles, fit, mask=fit > 0)
        tiles += (fit > 0).to(tl.int32)
        solos += is_solo.to(tl.int32)
        longs += is_long.to(tl.int32)
        block += tl.maximum(fit, 1)
    tl.store(tiles_before + flat + blocks, tiles)
    tl.store(solos_before + flat + blocks, solos)
    tl.store(longs_before + flat + blocks, longs)
    tl.store(packed + batch * 2, tiles)
    tl.store(packed + batch * 2 + 1, longs)


@triton.jit(do_not_specialize=["length", "capacity"])
def _prepare(
    key, value, token_block, gate_of, keys, values, gate_keys, first_bad, length, capacity,
    stride_key_b, stride_key_h, stride_key_t, stride_value_b, stride_value_h, stride_value_t,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The copies; also the first token whose value is not finite, which is copied as zeros: all rows from there on are NaN, and
    no earlier one, whose weight of 0 would make a NaN of it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    dims = tl.arange(0, D)
    inside = at < length
    token = tl.load(token_block + batch * length + at, mask=inside, other=-1) >= 0
    gate = tl.load(gate_of + batch * length + at, mask=inside, other=-1)
    wide = at.to(tl.int64)
    read = (token | (gate >= 0))[:, None]
    k = tl.load(
        key + batch * stride_key_b + head * stride_key_h + wide[:, None] * stride_key_t + dims, mask=read, other=0.0
    )
    place = value + batch * stride_value_b + head * stride_value_h + wide[:, None] * stride_value_t + dims
    v = tl.load(place, mask=token[:, None], other=0.0)
    row = tl.program_id(1).to(tl.int64)
    bad = tl.max((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1) > 0
    first = tl.min(tl.where(bad, at, 2147483647), 0)
    if first < 2147483647:
        tl.atomic_min(first_bad + row, first, sem="relaxed")
    place = (row * length + wide)[:, None] * D + dims
    tl.store(keys + place, k, mask=inside[:, None])
    tl.store(values + place, tl.where(bad[:, None], 0.0, v), mask=inside[:, None])
    tl.store(gate_keys + (row * capacity + gate)[:, None] * D + dims, k, mask=(gate >= 0)[:, None])


@triton.jit
def _slots_of(token_block, at, length, first, count):
    """The place of each key's block in its tile; -1 for what is no token of it."""
    slot = tl.load(token_block + at, mask=at < length, other=-1) - first
    return tl.where((slot >= 0) & (slot < count), slot, -1)


@triton.jit
def _sum_blocks(x, member, AUX: tl.constexpr, PRECISION: tl.constexpr):
    """(M, N), (N, SLOTS) -> (M, SLOTS): sums over the tokens of each block."""
    return tl.dot(x.to(AUX), member, input_precision=PRECISION)


@triton.jit
def _spread(x, member, AUX: tl.constexpr, PRECISION: tl.constexpr):
    """(M, SLOTS), (N, SLOTS) -> (M, N): what belongs to a block, for each of its tokens. In two parts, so that nothing is lost."""
    member = tl.trans(member)
    high = x.to(AUX)
    result = tl.dot(high, member, input_precision=PRECISION)
    if x.dtype != AUX:
        result = tl.dot((x - high.to(tl.float32)).to(AUX), member, result, input_precision=PRECISION)
    return result


@triton.jit
def _inner_softmax(logits, slot, count, member, APART: tl.constexpr, AUX: tl.constexpr, PRECISION: tl.constexpr):
    """Exponentials (M, N) of the scores against a reference of their block (M, SLOTS), and their sums (M, SLOTS).

    One reference for all blocks of a row as a rule, exact whatever it is as long as nothing vanishes; else, and where rows do
    not see the whole tile (`APART`), the largest score of each block.
    """
    slots = tl.arange(0, SLOTS)
    reference = tl.max(logits, 1)
    reference = tl.where(reference == float("-inf"), 0.0, reference)
    references = tl.zeros_like(reference)[:, None] + tl.zeros((1, SLOTS), tl.float32)
    if APART:
        of_token = tl.zeros_like(logits)
        for g in range(0, count):
            mine = (slot == g)[None, :]
            top = tl.max(tl.where(mine, logits, float("-inf")), 1)
            top = tl.where(top == float("-inf"), 0.0, top)
            of_token = tl.where(mine, top[:, None], of_token)
            references = tl.where((slots == g)[None, :], top[:, None], references)
        weights = tl.exp2(logits - of_token)
        sums = _sum_blocks(weights, member, AUX, PRECISION)
    else:
        references = references + reference[:, None]
        weights = tl.exp2(logits - reference[:, None])
        sums = _sum_blocks(weights, member, AUX, PRECISION)
        if tl.min(tl.min(tl.where((slots < count)[None, :], sums, 1.0), 1), 0) < _SMALL:
            of_token = tl.zeros_like(logits)
            for g in range(0, count):
                mine = (slot == g)[None, :]
                top = tl.max(tl.where(mine, logits, float("-inf")), 1)
                top = tl.where(top == float("-inf"), 0.0, top)
                of_token = tl.where(mine, top[:, None], of_token)
                references = tl.where((slots == g)[None, :], top[:, None], references)
            weights = tl.exp2(logits - of_token)
            sums = _sum_blocks(weights, member, AUX, PRECISION)
    return weights, references, sums


@triton.jit
def _load_tile(descriptor, batch, head, start, D: tl.constexpr, BLOCK: tl.constexpr):
    return descriptor.load([batch, head, start, 0]).reshape(BLOCK, D)


@triton.jit
def _range_of_tile(
    tile, row_block, tiles_before, solos_before, longs_before, packed, length, batch, BLOCK_M: tl.constexpr
):
    """For a tile of rows: tiles of keys that all its rows see whole, solos among them, tiles of which some row sees some key,
    and long blocks of which some row does."""
    last_row = tl.minimum(tile * BLOCK_M + BLOCK_M, length) - 1
    low = tl.load(row_block + batch * length + tile * BLOCK_M)
    high = tl.load(row_block + batch * length + last_row)
    flat = batch * (length + 1)
    whole = tl.load(tiles_before + flat + low)
    solos = tl.load(solos_before + flat + low)
    until = tl.minimum(tl.load(tiles_before + flat + high) + 1, tl.load(packed + batch * 2))
    longs = tl.minimum(tl.load(longs_before + flat + high) + 1, tl.load(packed + batch * 2 + 1))
    return whole, solos, until, longs, last_row


@triton.jit(do_not_specialize=["length", "capacity"])
def _forward(
    query, keys, values, gate_keys, first_bad, real, token_block, row_block, block_first, block_end, gate_at, tile_first, tile_count,
    solo, multi, long_block, tiles_before, solos_before, longs_before, packed, output, lse, scale, length, capacity,
    stride_query_b, stride_query_h, stride_query_t,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, AUX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    kv_head = head // GROUP
    batch_i = tl.program_id(2)
    batch = batch_i.to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    slots = tl.arange(0, SLOTS)
    lanes = tl.arange(0, BLOCK_N)
    there = rows < length
    is_real = there
    if HAS_MASK:
        is_real = tl.load(real + batch * length + rows, mask=there, other=0) != 0
    query += batch * stride_query_b + head.to(tl.int64) * stride_query_h
    q = tl.load(query + rows.to(tl.int64)[:, None] * stride_query_t + dims[None, :], mask=is_real[:, None], other=0.0)
    whole, solos, until, longs, last_row = _range_of_tile(
        tile, row_block, tiles_before, solos_before, longs_before, packed, length, batch, BLOCK_M
    )
    of_row = tl.load(row_block + batch * length + rows, mask=there, other=0)
    token_block += batch * length
    flat = batch * (length + 1)
    scale2 = scale * _LOG2E

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the moved scores, in base 2
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    for n in range(0, solos):
        block = tl.load(solo + flat + n)
        start = tl.load(block_first + flat + block)
        gate_lane = tl.load(gate_at + batch * length + block) - start
        k = _load_tile(keys, batch_i, kv_head, start, D, BLOCK_N)
        token = tl.load(token_block + start + lanes, mask=start + lanes < length, other=-1) == block
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        gate = tl.sum(tl.where((lanes == gate_lane)[None, :], logits, 0.0), 1) * scale2
        logits = tl.where(token[None, :], logits, float("-inf"))
        weights = tl.exp2(logits * scale2 - (tl.max(logits, 1) * scale2)[:, None])
        new_top = tl.maximum(top, gate)
        share = tl.exp2(gate - new_top)
        kept = tl.exp2(top - new_top)
        total = total * kept + share
        weights = weights * (share / tl.sum(weights, 1))[:, None]
        v = _load_tile(values, batch_i, kv_head, start, D, BLOCK_N)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
        top = new_top

    for m in range(0, whole - solos):
        n = tl.load(multi + flat + m)
        first = tl.load(tile_first + flat + n)
        count = tl.load(tile_count + flat + n)
        start = tl.load(block_first + flat + first)
        k = _load_tile(keys, batch_i, kv_head, start, D, BLOCK_N)
        gate_k = _load_tile(gate_keys, batch_i, kv_head, first, D, SLOTS)
        slot = _slots_of(token_block, start + lanes, length, first, count)
        member = (slot[:, None] == slots[None, :]).to(AUX)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        logits = tl.where((slot >= 0)[None, :], logits, float("-inf"))
        gate = tl.dot(q, tl.trans(gate_k), input_precision=PRECISION) * scale2
        gate = tl.where((slots < count)[None, :], gate, float("-inf"))
        weights, _, sums = _inner_softmax(logits, slot, count, member, False, AUX, PRECISION)
        new_top = tl.maximum(top, tl.max(gate, 1))
        share = tl.exp2(gate - new_top[:, None])
        factor = share / tl.where((slots < count)[None, :], sums, 1.0)
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(share, 1)
        weights = weights * _spread(factor, member, AUX, PRECISION)
        v = _load_tile(values, batch_i, kv_head, start, D, BLOCK_N)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
        top = new_top

    for n in tl.range(whole, until, num_stages=1):
        first = tl.load(tile_first + flat + n)
        count = tl.load(tile_count + flat + n)
        start = tl.load(block_first + flat + first)
        k = _load_tile(keys, batch_i, kv_head, start, D, BLOCK_N)
        gate_k = _load_tile(gate_keys, batch_i, kv_head, first, D, SLOTS)
        slot = _slots_of(token_block, start + lanes, length, first, count)
        member = (slot[:, None] == slots[None, :]).to(AUX)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        visible = (slot >= 0)[None, :] & (start + lanes[None, :] <= rows[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        gate = tl.dot(q, tl.trans(gate_k), input_precision=PRECISION) * scale2
        weights, references, sums = _inner_softmax(logits, slot, count, member, True, AUX, PRECISION)
        in_tile = (slots < count)[None, :] & (sums != 0)
        earlier = in_tile & ((first + slots)[None, :] < of_row[:, None])
        own = in_tile & ((first + slots)[None, :] == of_row[:, None])
        outer = tl.where(earlier, gate, tl.where(own, references, float("-inf")))
        new_top = tl.maximum(top, tl.max(outer, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        share = tl.exp2(outer - finite[:, None])
        factor = tl.where(earlier, share / tl.where(in_tile, sums, 1.0), share)
        kept = tl.exp2(top - finite)
        total = total * kept + tl.sum(tl.where(own, share * sums, share), 1)
        weights = weights * _spread(factor, member, AUX, PRECISION)
        v = _load_tile(values, batch_i, kv_head, start, D, BLOCK_N)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
        top = new_top

    for n in tl.range(0, longs, num_stages=1):
        block = tl.load(long_block + flat + n)
        start = tl.load(block_first + flat + block)
        end = tl.load(block_end + flat + block)
        shift = _long_shift(
            q,
            keys,
            gate_keys,
            token_block,
            batch_i,
            kv_head,
            block,
            start,
            end,
            of_row,
            length,
            scale2,
            D,
            BLOCK_M,
            BLOCK_N,
            PRECISION,
        )
        for begin in tl.range(start, tl.minimum(end, last_row + 1), BLOCK_N, num_stages=2):
            logits = _long_logits(
                q, keys, token_block, batch_i, kv_head, block, begin, rows, shift, length, scale2, D, BLOCK_N, PRECISION
            )
            new_top = tl.maximum(top, tl.max(logits, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(logits - finite[:, None])
            kept = tl.exp2(top - finite)
            total = total * kept + tl.sum(weights, 1)
            v = _load_tile(values, batch_i, kv_head, begin, D, BLOCK_N)
            acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
            top = new_top

    empty = (total == 0) | (is_real == 0)
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    poisoned = rows >= tl.load(first_bad + batch * (HEADS // GROUP) + kv_head)
    acc = tl.where(empty[:, None], 0.0, tl.where(poisoned[:, None], float("nan"), acc))
    row_lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))  # nothing has a weight
    place = ((batch * length + rows) * HEADS + head) * D
    tl.store(output + place[:, None] + dims[None, :], acc.to(output.dtype.element_ty), mask=there[:, None])
    tl.store(lse + (batch * HEADS + head) * length + rows, row_lse, mask=there)


@triton.jit
def _long_shift(
    q, keys, gate_keys, token_block, batch, kv_head, block, start, end, of_row, length, scale2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What moves the scores of a block longer than a tile: m - L for rows behind it, 0 for its own, -inf for rows before."""
    slots = tl.arange(0, SLOTS)
    lanes = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    until = tl.where(tl.max(of_row, 0) > block, end, start)  # no row behind it: nothing to read
    for begin in tl.range(start, until, BLOCK_N, num_stages=2):
        k = _load_tile(keys, batch, kv_head, begin, D, BLOCK_N)
        mine = tl.load(token_block + begin + lanes, mask=begin + lanes < length, other=-1) == block
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        logits = tl.where(mine[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
        top = new_top
    gate_k = _load_tile(gate_keys, batch, kv_head, block, D, SLOTS)
    gate = tl.dot(q, tl.trans(gate_k), input_precision=PRECISION) * scale2
    gate = tl.sum(tl.where((slots == 0)[None, :], gate, 0.0), 1)
    moved = gate - top - tl.log2(total)
    return tl.where(of_row > block, moved, tl.where(of_row == block, 0.0, float("-inf")))


@triton.jit
def _long_logits(
    q, keys, token_block, batch, kv_head, block, begin, rows, shift, length, scale2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    at = begin + tl.arange(0, BLOCK_N)
    k = _load_tile(keys, batch, kv_head, begin, D, BLOCK_N)
    mine = tl.load(token_block + at, mask=at < length, other=-1) == block
    visible = mine[None, :] & (at[None, :] <= rows[:, None]) & (shift != float("-inf"))[:, None]  # a NaN shows
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    return tl.where(visible, logits + shift[:, None], float("-inf"))


@triton.jit
def _gradient_tile(
    q, d_out, k, v, gate_k, slot, visible, first, count, of_row, row_lse, delta, scale2,
    APART: tl.constexpr, AUX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a tile of rows and one of keys: the weights, the gradient of the scores, and that of the landmarks' scores."""
    slots = tl.arange(0, SLOTS)
    member = (slot[:, None] == slots[None, :]).to(AUX)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    logits = tl.where(visible, logits, float("-inf"))
    gate = tl.dot(q, tl.trans(gate_k), input_precision=PRECISION) * scale2
    weights, references, sums = _inner_softmax(logits, slot, count, member, APART, AUX, PRECISION)
    in_tile = (slots < count)[None, :] & (sums != 0)
    earlier = in_tile & ((first + slots)[None, :] < of_row[:, None])
    own = in_tile & ((first + slots)[None, :] == of_row[:, None])
    outer = tl.where(earlier, gate, tl.where(own, references, float("-inf")))
    share = tl.exp2(outer - row_lse[:, None])
    sums = tl.where(in_tile, sums, 1.0)
    factor = tl.where(earlier, share / sums, share)
    d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    mean = tl.where(earlier, _sum_blocks(weights * d_weights, member, AUX, PRECISION) / sums, delta[:, None])
    weights = weights * _spread(factor, member, AUX, PRECISION)
    d_logits = weights * (d_weights - _spread(tl.where(in_tile, mean, 0.0), member, AUX, PRECISION))
    d_gate = tl.where(earlier, share * (mean - delta[:, None]), 0.0)
    return weights, d_logits, d_gate


@triton.jit
def _gradient_solo(q, d_out, k, v, token, gate, row_lse, delta, scale2, PRECISION: tl.constexpr):
    """The same where the tile is one block and its landmark, and all rows are behind it; the landmark's is among the scores'."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    share = tl.exp2(tl.sum(tl.where(gate[None, :], logits, 0.0), 1) * scale2 - row_lse)
    logits = tl.where(token[None, :], logits, float("-inf"))
    weights = tl.exp2(logits * scale2 - (tl.max(logits, 1) * scale2)[:, None])
    total = tl.sum(weights, 1)
    d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    mean = tl.sum(weights * d_weights, 1) / total
    weights = weights * (share / total)[:, None]
    d_logits = weights * (d_weights - mean[:, None])
    return weights, tl.where(gate[None, :], (share * (mean - delta))[:, None], d_logits)


@triton.jit(do_not_specialize=["length", "capacity"])
def _backward_rows(
    query, keys, values, gate_keys, output, d_output, lse, delta, real, token_block, row_block, block_first, block_end, gate_at,
    tile_first, tile_count, solo, multi, long_block, tiles_before, solos_before, longs_before, packed, d_query, d_key, d_value, scale, length, capacity,
    stride_query_b, stride_query_h, stride_query_t,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, AUX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of rows, and what these rows give to dK and dV of blocks longer than a tile."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP
    batch_i = tl.program_id(2)
    batch = batch_i.to(tl.int64)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    slots = tl.arange(0, SLOTS)
    lanes = tl.arange(0, BLOCK_N)
    there = rows < length
    is_real = there
    if HAS_MASK:
        is_real = tl.load(real + batch * length + rows, mask=there, other=0) != 0
    query += batch * stride_query_b + head.to(tl.int64) * stride_query_h
    q = tl.load(query + rows.to(tl.int64)[:, None] * stride_query_t + dims[None, :], mask=is_real[:, None], other=0.0)
    place = ((batch * length + rows) * HEADS + head)[:, None] * D + dims[None, :]
    d_out = tl.load(d_output + place, mask=is_real[:, None], other=0.0)
    out = tl.load(output + place, mask=is_real[:, None], other=0.0)
    row_delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    of_head = (batch * HEADS + head) * length
    tl.store(delta + of_head + rows, row_delta, mask=there)
    row_lse = tl.load(lse + of_head + rows, mask=there, other=float("inf"))
    whole, solos, until, longs, last_row = _range_of_tile(
        tile, row_block, tiles_before, solos_before, longs_before, packed, length, batch, BLOCK_M
    )
    of_row = tl.load(row_block + batch * length + rows, mask=there, other=0)
    token_block += batch * length
    flat = batch * (length + 1)
    scale2 = scale * _LOG2E
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    for n in range(0, solos):
        block = tl.load(solo + flat + n)
        start = tl.load(block_first + flat + block)
        gate_lane = tl.load(gate_at + batch * length + block) - start
        k = _load_tile(keys, batch_i, kv_head, start, D, BLOCK_N)
        v = _load_tile(values, batch_i, kv_head, start, D, BLOCK_N)
        token = tl.load(token_block + start + lanes, mask=start + lanes < length, other=-1) == block
        _, d_logits = _gradient_solo(q, d_out, k, v, token, lanes == gate_lane, row_lse, row_delta, scale2, PRECISION)
        acc = tl.dot(d_logits.to(k.dtype), k, acc, input_precision=PRECISION)

    for m in range(0, whole - solos):
        n = tl.load(multi + flat + m)
        first = tl.load(tile_first + flat + n)
        count = tl.load(tile_count + flat + n)
        start = tl.load(block_first + flat + first)
        k = _load_tile(keys, batch_i, kv_head, start, D, BLOCK_N)
        v = _load_tile(values, batch_i, kv_head, start, D, BLOCK_N)
        gate_k = _load_tile(gate_keys, batch_i, kv_head, first, D, SLOTS)
        slot = _slots_of(token_block, start + lanes, length, first, count)
        _, d_logits, d_gate = _gradient_tile(
            q,
            d_out,
            k,
            v,
            gate_k,
            slot,
            (slot >= 0)[None, :],
            first,
            count,
            of_row,
            row_lse,
            row_delta,
            scale2,
            False,
            AUX,
            PRECISION,
        )
        acc = tl.dot(d_logits.to(k.dtype), k, acc, input_precision=PRECISION)
        acc = tl.dot(d_gate.to(k.dtype), gate_k, acc, input_precision=PRECISION)

    for n in tl.range(whole, until, num_stages=1):
        first = tl.load(tile_first + flat + n)
        count = tl.load(tile_count + flat + n)
        start = tl.load(block_first + flat + first)
        k = _load_tile(keys, batch_i, kv_head, start, D, BLOCK_N)
        v = _load_tile(values, batch_i, kv_head, start, D, BLOCK_N)
        gate_k = _load_tile(gate_keys, batch_i, kv_head, first, D, SLOTS)
        slot = _slots_of(token_block, start + lanes, length, first, count)
        visible = (slot >= 0)[None, :] & (start + lanes[None, :] <= rows[:, None])
        _, d_logits, d_gate = _gradient_tile(
            q,
            d_out,
            k,
            v,
            gate_k,
            slot,
            visible,
            first,
            count,
            of_row,
            row_lse,
            row_delta,
            scale2,
            True,
            AUX,
            PRECISION,
        )
        acc = tl.dot(d_logits.to(k.dtype), k, acc, input_precision=PRECISION)
        acc = tl.dot(d_gate.to(k.dtype), gate_k, acc, input_precision=PRECISION)

    of_kv = (batch * KV_HEADS + kv_head) * length
    for n in tl.range(0, longs, num_stages=1):
        block = tl.load(long_block + flat + n)
        start = tl.load(block_first + flat + block)
        end = tl.load(block_end + flat + block)
        stop = tl.minimum(end, last_row + 1)
        earlier = of_row > block
        shift = _long_shift(
            q,
            keys,
            gate_keys,
            token_block,
            batch_i,
            kv_head,
            block,
            start,
            end,
            of_row,
            length,
            scale2,
            D,
            BLOCK_M,
            BLOCK_N,
            PRECISION,
        )
        mass = tl.zeros((BLOCK_M,), tl.float32)
        moment = tl.zeros((BLOCK_M,), tl.float32)
        behind = tl.max(of_row, 0) > block
        for begin in tl.range(start, tl.where(behind, end, start), BLOCK_N, num_stages=2):
            logits = _long_logits(
                q, keys, token_block, batch_i, kv_head, block, begin, rows, shift, length, scale2, D, BLOCK_N, PRECISION
            )
            weights = tl.exp2(logits - row_lse[:, None])
            v = _load_tile(values, batch_i, kv_head, begin, D, BLOCK_N)
            d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            mass += tl.sum(weights, 1)
            moment += tl.sum(weights * d_weights, 1)
        mean = tl.where(earlier & (mass > 0), moment / tl.where(mass > 0, mass, 1.0), row_delta)
        for begin in tl.range(start, stop, BLOCK_N, num_stages=1):
            logits = _long_logits(
                q, keys, token_block, batch_i, kv_head, block, begin, rows, shift, length, scale2, D, BLOCK_N, PRECISION
            )
            weights = tl.exp2(logits - row_lse[:, None])
            k = _load_tile(keys, batch_i, kv_head, begin, D, BLOCK_N)
            v = _load_tile(values, batch_i, kv_head, begin, D, BLOCK_N)
            d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            d_logits = weights * (d_weights - mean[:, None])
            acc = tl.dot(d_logits.to(k.dtype), k, acc, input_precision=PRECISION)
            at = begin + lanes
            of_key = (of_kv + at)[:, None] * D + dims[None, :]
            mine = (tl.load(token_block + at, mask=at < length, other=-1) == block)[:, None]
            d_v = tl.dot(tl.trans(weights.to(v.dtype)), d_out, input_precision=PRECISION)
            d_k = tl.dot(tl.trans(d_logits.to(k.dtype)), q, input_precision=PRECISION) * scale
            tl.atomic_add(d_value + of_key, d_v, mask=mine, sem="relaxed")
            tl.atomic_add(d_key + of_key, d_k, mask=mine, sem="relaxed")
        if behind:
            d_gate = tl.where(earlier, mass * (mean - row_delta), 0.0)
            gate_k = _load_tile(gate_keys, batch_i, kv_head, block, D, SLOTS)
            gate_k = tl.sum(tl.where((slots == 0)[:, None], gate_k.to(tl.float32), 0.0), 0)
            acc += d_gate[:, None] * gate_k[None, :]
            at = tl.load(gate_at + batch * length + block)
            d_gate_k = tl.sum(d_gate[:, None] * q.to(tl.float32), 0) * scale
            tl.atomic_add(d_key + (of_kv + at) * D + dims, d_gate_k, sem="relaxed")

    place = ((batch * length + rows) * HEADS + head)[:, None] * D + dims[None, :]
    tl.store(d_query + place, (acc * scale).to(d_query.dtype.element_ty), mask=there[:, None])


@triton.jit(do_not_specialize=["length", "capacity"])
def _backward_keys(
    query, keys, values, gate_keys, d_output, lse, delta, real, token_block, row_block, block_first, gate_at,
    counts, tile_first, tile_count, packed, d_key, d_value, scale, length, capacity,
    stride_query_b, stride_query_h, stride_query_t,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, AUX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys and of its landmarks, from all rows of all query heads of the KV head."""
    n = tl.program_id(0)
    kv_head = tl.program_id(1)
    batch_i = tl.program_id(2)
    batch = batch_i.to(tl.int64)
    if n >= tl.load(packed + batch * 2):
        return
    KV_HEADS: tl.constexpr = HEADS // GROUP
    flat = batch * (length + 1)
    dims = tl.arange(0, D)
    slots = tl.arange(0, SLOTS)
    lanes = tl.arange(0, BLOCK_N)
    row_lanes = tl.arange(0, BLOCK_M)
    first = tl.load(tile_first + flat + n)
    count = tl.load(tile_count + flat + n)
    start = tl.load(block_first + flat + first)
    gates = tl.load(counts + batch * 2 + 1)
    token_block += batch * length
    slot = _slots_of(token_block, start + lanes, length, first, count)
    k = _load_tile(keys, batch_i, kv_head, start, D, BLOCK_N)
    v = _load_tile(values, batch_i, kv_head, start, D, BLOCK_N)
    gate_k = _load_tile(gate_keys, batch_i, kv_head, first, D, SLOTS)
    # Behind the landmark of its last block the tile is seen whole; a block without one is seen by its own rows alone.
    last = first + count - 1
    end = tl.load(gate_at + batch * length + last, mask=last < gates, other=0)
    begin = start // BLOCK_M * BLOCK_M
    whole = tl.where(last < gates, (end + BLOCK_M) // BLOCK_M * BLOCK_M, length)
    is_solo = (count == 1) & (last < gates) & (end < start + BLOCK_N)
    token = slot >= 0
    gate = is_solo & (start + lanes == end)
    scale2 = scale * _LOG2E
    acc_k = tl.zeros((BLOCK_N, D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, D), tl.float32)
    acc_gate = tl.zeros((SLOTS, D), tl.float32)

    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        of_head = (batch * HEADS + head) * length
        q_head = query + batch * stride_query_b + head.to(tl.int64) * stride_query_h
        for row in tl.range(begin, tl.minimum(whole, length), BLOCK_M, num_stages=1):
            rows = row + row_lanes
            there = rows < length
            is_real = there
            if HAS_MASK:
                is_real = tl.load(real + batch * length + rows, mask=there, other=0) != 0
            q = tl.load(
                q_head + rows.to(tl.int64)[:, None] * stride_query_t + dims[None, :], mask=is_real[:, None], other=0.0
            )
            place = ((batch * length + rows) * HEADS + head)[:, None] * D + dims[None, :]
            d_out = tl.load(d_output + place, mask=is_real[:, None], other=0.0)
            row_lse = tl.load(lse + of_head + rows, mask=there, other=float("inf"))
            row_delta = tl.load(delta + of_head + rows, mask=there, other=0.0)
            of_row = tl.load(row_block + batch * length + rows, mask=there, other=-1)
            visible = (slot >= 0)[None, :] & (start + lanes[None, :] <= rows[:, None])
            weights, d_logits, d_gate = _gradient_tile(
                q,
                d_out,
                k,
                v,
                gate_k,
                slot,
                visible,
                first,
                count,
                of_row,
                row_lse,
                row_delta,
                scale2,
                True,
                AUX,
                PRECISION,
            )
            acc_v = tl.dot(tl.trans(weights.to(v.dtype)), d_out, acc_v, input_precision=PRECISION)
            acc_k = tl.dot(tl.trans(d_logits.to(k.dtype)), q, acc_k, input_precision=PRECISION)
            acc_gate = tl.dot(tl.trans(d_gate.to(k.dtype)), q, acc_gate, input_precision=PRECISION)
        for row in range(tl.where(is_solo, whole, length), length, BLOCK_M):
            rows = row + row_lanes
            there = rows < length
            is_real = there
            if HAS_MASK:
                is_real = tl.load(real + batch * length + rows, mask=there, other=0) != 0
            q = tl.load(
                q_head + rows.to(tl.int64)[:, None] * stride_query_t + dims[None, :], mask=is_real[:, None], other=0.0
            )
            place = ((batch * length + rows) * HEADS + head)[:, None] * D + dims[None, :]
            d_out = tl.load(d_output + place, mask=is_real[:, None], other=0.0)
            row_lse = tl.load(lse + of_head + rows, mask=there, other=float("inf"))
            row_delta = tl.load(delta + of_head + rows, mask=there, other=0.0)
            weights, d_logits = _gradient_solo(q, d_out, k, v, token, gate, row_lse, row_delta, scale2, PRECISION)
            acc_v = tl.dot(tl.trans(weights.to(v.dtype)), d_out, acc_v, input_precision=PRECISION)
            acc_k = tl.dot(tl.trans(d_logits.to(k.dtype)), q, acc_k, input_precision=PRECISION)
        for row in range(tl.where(is_solo, length, whole), length, BLOCK_M):
            rows = row + row_lanes
            there = rows < length
            is_real = there
            if HAS_MASK:
                is_real = tl.load(real + batch * length + rows, mask=there, other=0) != 0
            q = tl.load(
                q_head + rows.to(tl.int64)[:, None] * stride_query_t + dims[None, :], mask=is_real[:, None], other=0.0
            )
            place = ((batch * length + rows) * HEADS + head)[:, None] * D + dims[None, :]
            d_out = tl.load(d_output + place, mask=is_real[:, None], other=0.0)
            row_lse = tl.load(lse + of_head + rows, mask=there, other=float("inf"))
            row_delta = tl.load(delta + of_head + rows, mask=there, other=0.0)
            of_row = tl.full((BLOCK_M,), 2147483647, tl.int32)
            weights, d_logits, d_gate = _gradient_tile(
                q,
                d_out,
                k,
                v,
                gate_k,
                slot,
                (slot >= 0)[None, :],
                first,
                count,
                of_row,
                row_lse,
                row_delta,
                scale2,
                False,
                AUX,
                PRECISION,
            )
            acc_v = tl.dot(tl.trans(weights.to(v.dtype)), d_out, acc_v, input_precision=PRECISION)
            acc_k = tl.dot(tl.trans(d_logits.to(k.dtype)), q, acc_k, input_precision=PRECISION)
            acc_gate = tl.dot(tl.trans(d_gate.to(k.dtype)), q, acc_gate, input_precision=PRECISION)

    acc_gate += tl.where((slots == 0)[:, None], tl.sum(tl.where(gate[:, None], acc_k, 0.0), 0)[None, :], 0.0)
    of_kv = (batch * KV_HEADS + kv_head) * length
    place = (of_kv + start + lanes)[:, None] * D + dims[None, :]
    tl.store(d_key + place, acc_k * scale, mask=(slot >= 0)[:, None])
    tl.store(d_value + place, acc_v, mask=(slot >= 0)[:, None])
    has_gate = (slots < count) & (first + slots < gates)
    at = tl.load(gate_at + batch * length + first + slots, mask=has_gate, other=0)
    tl.store(d_key + (of_kv + at)[:, None] * D + dims[None, :], acc_gate * scale, mask=has_gate[:, None])


class _Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys; blocks up to this length are read once
    num_warps: int
    num_stages: int


class _Config(NamedTuple):
    forward: _Tile
    backward_rows: _Tile
    backward_keys: _Tile  # block_n is that of the rows


def _config(dim: int, dtype: torch.dtype) -> _Config:
    if dtype == torch.float32:  # "ieee" products run on the plain units, out of registers
        # Each thread holds whole rows: with larger tiles they spill, by kilobytes a thread, for which the driver sets memory aside.
        tile = _Tile(32, 32, 8, 1) if dim <= 64 else _Tile(16, 16, 8, 1)
        return _Config(tile, tile, tile)
    if dim <= 128:
        return _Config(_Tile(64, 64, 4, 3), _Tile(64, 64, 4, 2), _Tile(128, 64, 8, 1))
    return _Config(_Tile(64, 64, 8, 2), _Tile(64, 32, 8, 1), _Tile(64, 32, 8, 1))


class _Plan(NamedTuple):
    """See `_plan` and `_pack`. int32, a row of the batch each."""

    token_block: Tensor
    row_block: Tensor
    gate_of: Tensor
    gate_at: Tensor
    block_first: Tensor
    block_end: Tensor
    counts: Tensor
    tile_first: Tensor
    tile_count: Tensor
    solo: Tensor
    multi: Tensor
    long_block: Tensor
    tiles_before: Tensor
    solos_before: Tensor
    longs_before: Tensor
    packed: Tensor


def _make_plan(is_landmark: Tensor, real: Tensor | None, block_n: int) -> _Plan:
    batch, length = is_landmark.shape
    new = functools.partial(torch.empty, dtype=torch.int32, device=is_landmark.device)
    by_position = new((4, batch, length))
    by_block = new((10, batch, length + 1))
    counts, packed = new((2, batch, 2))
    token_block, row_block, gate_of, gate_at = by_position
    block_first, block_end, *lists = by_block
    marks = is_landmark if is_landmark.stride(1) == 1 else is_landmark.contiguous()
    marks = marks.view(torch.uint8)
    _plan[(batch,)](
        marks, marks if real is None else real, token_block, row_block, gate_of, gate_at, block_first, block_end, counts, length,
        marks.stride(0), HAS_MASK=real is not None, BLOCK=64 if INTERPRETED else 1024, num_warps=8,
    )  # fmt: skip
    _pack[(batch,)](block_first, block_end, gate_at, counts, *lists, packed, length, BLOCK_N=block_n, num_warps=1)
    return _Plan._make([*by_position, block_first, block_end, counts, *lists, packed])


def _make_copies(key: Tensor, value: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values with zeros where they are not read, the landmarks' keys by block, and the first token whose value is not
    finite, int32 `(B, Hkv)`."""
    batch, kv_heads, length, dim = key.shape
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    keys, values = (torch.empty((batch, kv_heads, length, dim), dtype=x.dtype, device=x.device) for x in (key, value))
    capacity = (length + 1) // 2  # a block has a token and a landmark at least
    gate_keys = torch.zeros((batch, kv_heads, capacity, dim), dtype=key.dtype, device=key.device)
    first_bad = torch.full((batch, kv_heads), 2**31 - 1, dtype=torch.int32, device=key.device)
    block = min(64, 8192 // dim)
    _prepare[(triton.cdiv(length, block), batch * kv_heads)](
        key, value, plan.token_block, plan.gate_of, keys, values, gate_keys, first_bad, length, capacity, *key.stride()[:3],
        *value.stride()[:3], KV_HEADS=kv_heads, D=dim, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return keys, values, gate_keys, first_bad


def _blocks(x: Tensor, size: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, size, x.shape[3]])


def _options(query: Tensor, kv_heads: int, attention_mask: Tensor | None, tile: _Tile) -> dict[str, object]:
    exact = query.dtype == torch.float32 or INTERPRETED  # the interpreter's bfloat16 is wrong
    return {
        "HEADS": query.shape[1],
        "GROUP": query.shape[1] // kv_heads,
        "D": query.shape[3],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "HAS_MASK": attention_mask is not None,
        "AUX": tl.float32 if exact else tl.bfloat16,  # float16 has too few small numbers for a block's exponentials
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@torch.library.custom_op("heedful::landmark_attention", mutates_args=())
def landmark_attention_op(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, attention_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(B, T, Hq, D)` and the logarithm (base 2) of each row's sum, `(B, Hq, T)`."""
    batch, heads, length, dim = query.shape
    output = torch.empty((batch, length, heads, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    query = query if query.stride(3) == 1 else query.contiguous()
    real = None if attention_mask is None else attention_mask.contiguous().view(torch.uint8)
    tile = _config(dim, query.dtype).forward
    plan = _make_plan(is_landmark, real, tile.block_n)
    keys, values, gate_keys, first_bad = _make_copies(key, value, plan)
    _forward[(triton.cdiv(length, tile.block_m), heads, batch)](
        query, _blocks(keys, tile.block_n), _blocks(values, tile.block_n), _blocks(gate_keys, SLOTS.value), first_bad,
        plan.token_block if real is None else real, plan.token_block, plan.row_block, plan.block_first, plan.block_end,
        plan.gate_at, plan.tile_first, plan.tile_count, plan.solo, plan.multi, plan.long_block, plan.tiles_before, plan.solos_before,
        plan.longs_before, plan.packed, output, lse, scale, length, gate_keys.shape[2], *query.stride()[:3], **_options(query, key.shape[1], attention_mask, tile),
    )  # fmt: skip
    return output, lse


@landmark_attention_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, attention_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = query.shape
    return query.new_empty((batch, length, heads, dim)), query.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("heedful::landmark_attention_backward", mutates_args=())
def landmark_attention_backward_op(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, attention_mask: Tensor | None, scale: float,
    output: Tensor, lse: Tensor, d_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    d_query = torch.empty((batch, length, heads, dim), dtype=query.dtype, device=query.device)
    d_key, d_value = torch.zeros((2, batch, kv_heads, length, dim), dtype=torch.float32, device=query.device)
    if output.numel() > 0:
        query = query if query.stride(3) == 1 else query.contiguous()
        output, d_output = output.contiguous(), d_output.contiguous()
        real = None if attention_mask is None else attention_mask.contiguous().view(torch.uint8)
        config = _config(dim, query.dtype)
        tile = config.backward_rows
        plan = _make_plan(is_landmark, real, tile.block_n)
        keys, values, gate_keys, _ = _make_copies(key, value, plan)
        capacity = gate_keys.shape[2]
        descriptors = _blocks(keys, tile.block_n), _blocks(values, tile.block_n), _blocks(gate_keys, SLOTS.value)
        delta = torch.empty_like(lse)
        mask = plan.token_block if real is None else real
        _backward_rows[(triton.cdiv(length, tile.block_m), heads, batch)](
            query, *descriptors, output, d_output, lse, delta, mask, plan.token_block, plan.row_block, plan.block_first,
            plan.block_end, plan.gate_at, plan.tile_first, plan.tile_count, plan.solo, plan.multi, plan.long_block,
            plan.tiles_before, plan.solos_before, plan.longs_before, plan.packed, d_query, d_key, d_value, scale, length, capacity, *query.stride()[:3],
            **_options(query, kv_heads, attention_mask, tile),
        )  # fmt: skip
        # Two tiles in a row hold more than block_n positions, or one of them 16 blocks; long blocks in between are longer.
        tiles = min(length, 2 * triton.cdiv(length, min(tile.block_n, 2 * SLOTS.value)) + 1)
        tile = config.backward_keys
        _backward_keys[(tiles, kv_heads, batch)](
            query, *descriptors, d_output, lse, delta, mask, plan.token_block, plan.row_block, plan.block_first, plan.gate_at,
            plan.counts, plan.tile_first, plan.tile_count, plan.packed, d_key, d_value, scale, length, capacity,
            *query.stride()[:3], **_options(query, kv_heads, attention_mask, tile),
        )  # fmt: skip
    return d_query.transpose(1, 2).clone(), d_key.to(key.dtype, copy=True), d_value.to(value.dtype, copy=True)


@landmark_attention_backward_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, attention_mask: Tensor | None, scale: float,
    output: Tensor, lse: Tensor, d_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, length, dim = query.shape
    d_query = query.new_empty((batch, length, heads, dim)).transpose(1, 2).clone()
    return d_query, key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, is_landmark, attention_mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, is_landmark, attention_mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_output, _d_lse):  # type: ignore[no-untyped-def]
    query, key, value, is_landmark, attention_mask, output, lse = ctx.saved_tensors
    if d_output is None:
        return None, None, None, None, None, None
    gradients = landmark_attention_backward_op(
        query, key, value, is_landmark, attention_mask, ctx.scale, output, lse, d_output
    )
    return *gradients, None, None, None


landmark_attention_op.register_autograd(_backward, setup_context=_setup)


def landmark_attention(
    query: Tensor, key: Tensor, value: Tensor, is_landmark: Tensor, attention_mask: Tensor | None, scale: float
) -> Tensor:
    return landmark_attention_op(query, key, value, is_landmark, attention_mask, scale)[0].transpose(1, 2)
