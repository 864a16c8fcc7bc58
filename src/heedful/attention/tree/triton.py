"""Tree attention in Triton: flash decoding whose tiles of rows hold all nodes and all query heads of a KV head.

`_attend` gives each program one tile of rows and one share of the keys, `_merge` merges the shares by log-sum-exp. Whole
blocks of the prefix come first and need no mask; what is left of the prefix, and then the tree, come in narrower blocks
with one, the tree's as a word of bits for each row. Grids depend on shapes alone; how many keys there are is read on the
device, and every program works out its share of them, so a captured CUDA graph serves every length.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Up to this many keys, and of rows that small tiles put on the device at once, small tiles are faster than large ones that
#: share the keys: merging would take longer.
SHORT, FEW = 1024, 4096


@triton.jit
def _keys_of_row(
    prefix_length, prefix_start, batch, nodes, capacity, window, HAS_START: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """P, and the first key that any node sees. Kept inside the tensor whatever the lengths say."""
    prefix = tl.load(prefix_length + batch).to(tl.int32)
    prefix = tl.maximum(tl.minimum(prefix, capacity - nodes), 0)
    start = prefix * 0
    if HAS_START:
        start = tl.minimum(tl.maximum(tl.load(prefix_start + batch).to(tl.int32), 0), prefix)
    if HAS_WINDOW:
        start = tl.maximum(start, tl.minimum(prefix - window + 1, prefix))
    return prefix, start


@triton.jit
def _blocks(prefix, start, nodes, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """How many blocks there are without a mask, of the prefix with one, and of the tree.

    With a window each row has its own first key, so all blocks have a mask.
    """
    whole = (prefix - start) // BLOCK_N
    if HAS_WINDOW:
        whole = prefix * 0
    return whole, tl.cdiv(prefix - start - whole * BLOCK_N, TAIL), tl.cdiv(nodes, TAIL)


@triton.jit
def _sees(tree_mask, node, other, nodes, stride_i, stride_j):
    """Whether each node sees each other, 0 where there is no such node."""
    inside = (node < nodes)[:, None] & (other < nodes)[None, :]
    return tl.load(tree_mask + node[:, None] * stride_i + other[None, :] * stride_j, mask=inside, other=0) != 0


@triton.jit
def _depth(tree_mask, node, nodes, stride_i, stride_j):
    """How many nodes each node sees, less itself: its depth."""
    seen = tl.zeros_like(node)
    for j in range(0, nodes, 16):
        seen += tl.sum(_sees(tree_mask, node, j + tl.arange(0, 16), nodes, stride_i, stride_j).to(tl.int32), 1)
    return tl.maximum(seen - 1, 0)


@triton.jit
def _bits(tree_mask, node, first, nodes, stride_i, stride_j, COUNT: tl.constexpr, BYTES: tl.constexpr):
    """A word for each node: bit j of COUNT is set if it sees node `first + j`. Rows by columns would not fit beside the sums.

    BYTES: eight neighbours are read at a time, one byte each, 0 or 1.
    """
    word = tl.zeros_like(node)
    if BYTES:
        eights = tree_mask.to(tl.pointer_type(tl.int64)) + node * (stride_i // 8) + first // 8
        for j in tl.static_range(0, COUNT, 8):
            eight = tl.load(eights + j // 8, mask=(node < nodes) & (first + j < nodes), other=0)
            # Byte i times the 2 ** (7 * (8 - i)) in the factor comes to bit 56 + i.
            word |= (((eight * 0x0102040810204080) >> 56) & 255).to(tl.int32) << j
    else:
        for j in tl.static_range(0, COUNT):
            inside = (node < nodes) & (first + j < nodes)
            sees = tl.load(tree_mask + node * stride_i + (first + j) * stride_j, mask=inside, other=0) != 0
            word |= sees.to(tl.int32) << j
    return word


@triton.jit
def _capped(logits, softcap):
    # tanh(x) = 1 - 2 / (exp(2 x) + 1); both ends are right when the exponential overflows or vanishes.
    return softcap - 2 * softcap / (tl.exp2(logits * (2.8853900817779268 / softcap)) + 1)


@triton.jit(
    do_not_specialize=[
        "nodes",
        "rows",
        "splits",
        "capacity",
        "window",
        "stride_tree_b",
        "stride_tree_i",
        "stride_tree_j",
    ]
)
def _attend(
    query,
    key,
    value,
    tree_mask,
    prefix_length,
    prefix_start,
    output,
    lse,
    scale,
    softcap,
    nodes,
    rows,
    splits,
    capacity,
    window,
    stride_query_b,
    stride_query_h,
    stride_query_t,
    stride_key_b,
    stride_key_h,
    stride_value_b,
    stride_value_h,
    stride_tree_b,
    stride_tree_i,
    stride_tree_j,
    stride_output_b,
    stride_output_h,
    stride_output_t,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    STRIDE_KEY_T: tl.constexpr,
    STRIDE_VALUE_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    SPAN: tl.constexpr,
    BYTES: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles come first in program order: those of one share run side by side, and all but one find it in the L2 cache.
    tile = tl.program_id(0)
    split = tl.program_id(1)
    batch = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(2) % KV_HEADS
    prefix, start = _keys_of_row(prefix_length, prefix_start, batch, nodes, capacity, window, HAS_START, HAS_WINDOW)
    end = prefix + nodes
    whole, rest, behind = _blocks(prefix, start, nodes, BLOCK_N, TAIL, HAS_WINDOW)
    share = tl.cdiv(whole + rest + behind, splits)
    first = split * share
    last = tl.minimum(first + share, whole + rest + behind)
    if first >= last:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + row // nodes
    node = row % nodes
    real = row < rows
    dims = tl.arange(0, D)
    columns = tl.arange(0, BLOCK_N)
    query += batch * stride_query_b
    at = head.to(tl.int64) * stride_query_h + node.to(tl.int64) * stride_query_t
    q = tl.load(query + at[:, None] + dims[None, :], mask=real[:, None], other=0.0)
    key += batch * stride_key_b + kv_head.to(tl.int64) * stride_key_h
    value += batch * stride_value_b + kv_head.to(tl.int64) * stride_value_h
    tree_mask += batch * stride_tree_b

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the logits in base 2
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    begin = (start + first * BLOCK_N).to(tl.int64)
    keys = key + begin * STRIDE_KEY_T + (columns[:, None] * STRIDE_KEY_T + dims[None, :])
    values = value + begin * STRIDE_VALUE_T + (columns[:, None] * STRIDE_VALUE_T + dims[None, :])
    for _ in range(first, tl.minimum(last, whole)):
        k = tl.load(keys)
        logits = tl.dot(q, k.T, input_precision=PRECISION)
        if HAS_SOFTCAP:
            logits = _capped(logits * scale, softcap) * 1.4426950408889634
            new_top = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(logits, 1) * (scale * 1.4426950408889634))
            weights = tl.exp2(logits * (scale * 1.4426950408889634) - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        acc = acc * kept[:, None]
        v = tl.load(values)
        keys += BLOCK_N * STRIDE_KEY_T
        values += BLOCK_N * STRIDE_VALUE_T
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top

    if HAS_WINDOW:
        oldest = prefix + _depth(tree_mask, node, nodes, stride_tree_i, stride_tree_j) - window
    places = tl.arange(0, TAIL)
    COUNT: tl.constexpr = SPAN if SPAN < 32 else 32
    # Two or three blocks without a window: buffers to read ahead would only take memory from the loop above.
    for block in tl.range(tl.maximum(first - whole, 0), last - whole, num_stages=2 if HAS_WINDOW else 1):
        in_tree = block >= rest
        other = (block - rest) * TAIL + places
        slot = tl.where(in_tree, prefix + other, start + whole * BLOCK_N + block * TAIL + places)
        inside = slot < tl.where(in_tree, end, prefix)
        offset = slot.to(tl.int64)
        k = tl.load(key + offset[:, None] * STRIDE_KEY_T + dims[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(value + offset[:, None] * STRIDE_VALUE_T + dims[None, :], mask=inside[:, None], other=0.0)
        logits = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            logits = _capped(logits, softcap)
        low = tl.full((BLOCK_M,), -1, tl.int32)
        high = low
        if in_tree:
            begun = (block - rest) * TAIL
            low = _bits(tree_mask, node, begun, nodes, stride_tree_i, stride_tree_j, COUNT, BYTES)
            if TAIL > 32 and SPAN > 32:
                high = _bits(tree_mask, node, begun + 32, nodes, stride_tree_i, stride_tree_j, 32, BYTES)
        word = tl.where(places[None, :] < 32, low[:, None], high[:, None]) >> (places[None, :] & 31)
        visible = inside[None, :] & ((word & 1) != 0)
        if HAS_WINDOW:
            position = slot
            if in_tree:
                position = prefix + _depth(tree_mask, other, nodes, stride_tree_i, stride_tree_j)
            visible = visible & (position[None, :] > oldest[:, None])
        logits = tl.where(visible, logits * 1.4426950408889634, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
        weights = tl.exp2(logits - finite_top[:, None])
        kept = tl.exp2(top - finite_top)
        total = total * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
        top = new_top

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    result_lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    at = batch * stride_output_b + head.to(tl.int64) * stride_output_h + node.to(tl.int64) * stride_output_t
    at += split * D
    tl.store(output + at[:, None] + dims[None, :], acc.to(output.dtype.element_ty), mask=real[:, None])
    at = (batch * KV_HEADS + kv_head) * rows + row
    tl.store(lse + at * splits + split, result_lse, mask=real)


@triton.jit(do_not_specialize=["nodes", "splits", "capacity", "window"])
def _merge(
    partial,
    lse,
    prefix_length,
    prefix_start,
    output,
    nodes,
    splits,
    capacity,
    window,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """One row of the output, `(B, n, Hq, D)` in memory, from its parts `(B, Hq, n, splits, D)`."""
    node = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    prefix, start = _keys_of_row(prefix_length, prefix_start, batch, nodes, capacity, window, HAS_START, HAS_WINDOW)
    whole, rest, behind = _blocks(prefix, start, nodes, BLOCK_N, TAIL, HAS_WINDOW)
    blocks = whole + rest + behind
    used = tl.cdiv(blocks, tl.cdiv(blocks, splits))  # the others had no keys and wrote nothing
    row = ((batch.to(tl.int64) * HEADS + head) * nodes + node) * splits
    dims = tl.arange(0, D)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    for at in range(0, used, BLOCK_S):
        split = at + tl.arange(0, BLOCK_S)
        inside = split < used
        part_lse = tl.load(lse + row + split, mask=inside, other=float("-inf"))
        part = tl.load(partial + (row + split)[:, None] * D + dims[None, :], mask=inside[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(part_lse - finite_top)
        kept = tl.exp2(top - finite_top)
        total = total * kept + tl.sum(weights, 0)
        acc = acc * kept + tl.sum(part * weights[:, None], 0)
        top = new_top
    acc = acc / tl.where(total == 0, 1.0, total)
    at = ((batch.to(tl.int64) * nodes + node) * HEADS + head) * D
    tl.store(output + at + dims, acc.to(output.dtype.element_ty))


class _Config(NamedTuple):
    block_m: int  # rows of a tile
    block_n: int  # keys of a step
    num_warps: int
    num_stages: int
    programs: int  # that one multiprocessor runs at a time: as many shares of the keys are made


def _config(rows: int, pairs: int, capacity: int, dim: int, dtype: torch.dtype) -> _Config:
    """For `rows` rows to each of `pairs` KV heads, all batch rows' together."""
    if dtype == torch.float32:  # "ieee" products run on the plain units, out of registers
        return _Config(16, 32, 4, 2, 2)
    wide = 2 if dim > 128 else 1
    if capacity <= SHORT and pairs * rows <= FEW:
        return _Config(16, 64, 4, 3, 1)
    if rows <= 16:
        return _Config(16, 128 // wide, 4, 3, 2 // wide)
    if rows <= 32:
        return _Config(32, 64, 4, 3, 2 // wide)
    if rows <= 128:
        return _Config(64, 64, 4, 3, 2 // wide)
    return _Config(128, 64, 8, 3 if wide == 1 else 2, 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 16  # the interpreter's: enough for several shares
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _splits(units: int, slots: int, most: int) -> int:
    """Shares of the keys for `units` tiles on `slots` places, `most` or fewer: whole rounds of programs, few parts to merge."""
    best, cost = 1, math.inf
    for splits in range(1, min(most, max(1, 4 * slots // units)) + 1):
        rounds = -(-units * splits // slots)
        this = rounds / splits * (1 + 0.02 * (rounds - 1)) + 0.0005 * splits / max(1, slots / units)
        if this < cost * 0.99:
            best, cost = splits, this
    return best


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_mask: Tensor,
    prefix_length: Tensor,
    prefix_start: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
    config: _Config | None = None,
) -> Tensor:
    """`(B, n, Hq, D)`. window 0: none; softcap 0: none; config: another than `_config` says, to try it."""
    batch, heads, nodes, dim = query.shape
    kv_heads, capacity = key.shape[1:3]
    # A copy where a row's elements are apart; a cache never is.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    group = heads // kv_heads
    rows = group * nodes
    config = config or _config(rows, batch * kv_heads, capacity, dim, query.dtype)
    tail = min(config.block_n, 64)
    tiles = -(-rows // config.block_m)
    slots = _multiprocessors(query.device) * config.programs
    splits = _splits(batch * kv_heads * tiles, slots, min(128, -(-capacity // config.block_n)))
    output = torch.empty((batch, nodes, heads, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, nodes, splits), dtype=torch.float32, device=query.device)
    if splits == 1:
        partial = output
        strides = (nodes * heads * dim, dim, heads * dim)
    else:
        partial = torch.empty((batch, heads, nodes, splits, dim), dtype=torch.float32, device=query.device)
        strides = (heads * nodes * splits * dim, nodes * splits * dim, splits * dim)
    tree = tree_mask.view(torch.uint8)
    flags = {"HAS_START": prefix_start is not None, "HAS_WINDOW": window > 0}
    starts = prefix_length if prefix_start is None else prefix_start
    _attend[(tiles, splits, batch * kv_heads)](
        query,
        key,
        value,
        tree,
        prefix_length,
        starts,
        partial,
        lse,
        scale,
        softcap,
        nodes,
        rows,
        splits,
        capacity,
        window,
        *query.stride()[:3],
        *key.stride()[:2],
        *value.stride()[:2],
        tree.stride(0) if tree.ndim == 3 else 0,
        tree.stride(-2),
        tree.stride(-1),
        *strides,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=dim,
        STRIDE_KEY_T=key.stride(2),
        STRIDE_VALUE_T=value.stride(2),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL=tail,
        SPAN=triton.next_power_of_2(nodes),
        BYTES=nodes % 8 == 0 and tree.is_contiguous() and tree.data_ptr() % 8 == 0,
        HAS_SOFTCAP=softcap > 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **flags,
    )
    if splits > 1:
        _merge[(nodes, heads, batch)](
            partial,
            lse,
            prefix_length,
            starts,
            output,
            nodes,
            splits,
            capacity,
            window,
            HEADS=heads,
            D=dim,
            BLOCK_N=config.block_n,
            TAIL=tail,
            BLOCK_S=16,
            num_warps=4 if dim >= 128 else 2,
            **flags,
        )
    return output


@torch.library.custom_op("heedful::tree_attention", mutates_args=())
def tree_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_mask: Tensor,
    prefix_length: Tensor,
    prefix_start: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    return _launch(query, key, value, tree_mask, prefix_length, prefix_start, window, softcap, scale)


@tree_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_mask: Tensor,
    prefix_length: Tensor,
    prefix_start: Tensor | None,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    batch, heads, nodes, dim = query.shape
    return query.new_empty((batch, nodes, heads, dim))


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_mask: Tensor,
    prefix_length: Tensor,
    *,
    prefix_start: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    arguments = (query, key, value, tree_mask, prefix_length, prefix_start, window or 0, softcap or 0.0, float(scale))
    if torch.compiler.is_compiling():
        return tree_attention_op(*arguments).transpose(1, 2)
    # The registered operator takes tens of microseconds more a call than the kernels of one decoded token.
    if not query.is_cuda:
        return _launch(*arguments).transpose(1, 2)
    with torch.cuda.device(query.device):
        return _launch(*arguments).transpose(1, 2)
