"""HiP attention in Triton: the tree search, attention to what it chose, and both for one new token of a static cache.

The search runs as one program for each query block and head. A round gathers the representative keys of all children,
multiplies them with the sampled queries, and keeps the n best children by bisection on the bits of their scores. The
nodes go from round to round through the output, which the program alone writes; barriers order that. The matrix units
would take a tenth of the time: what binds is the gathering, out of the L2 cache as a rule, so programs run in the order
of their key head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from heedful.attention import inputs
from heedful.attention.hip.mask import HiPMask, Stage, layout
from heedful.attention.interpreter import INTERPRETED

if TYPE_CHECKING:
    from heedful.attention.hip.decode import HiPDecodeState

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-3.4028234663852886e38)  # the score of a block that no sampled row may see
MOST_NODES = 4096
HEAD_DIMS = (16, 32, 64, 128, 256)


@triton.jit
def _sortable(score):
    """int32 in the order of the float32 scores; NaN comes first, as in torch.sort."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _narrow(found, reached, unit, counts, count, FIELD: tl.constexpr):
    """Of `found` and the three candidates above it, the largest that at least `count` scores reach, and how many do."""
    first = (counts & ((1 << FIELD) - 1)).to(tl.int32)
    second = ((counts >> FIELD) & ((1 << FIELD) - 1)).to(tl.int32)
    third = (counts >> (2 * FIELD)).to(tl.int32)
    reached = tl.where(
        third >= count, third, tl.where(second >= count, second, tl.where(first >= count, first, reached))
    )
    steps = (first >= count).to(tl.int32) + (second >= count).to(tl.int32) + (third >= count).to(tl.int32)
    return found + unit * steps, reached


@triton.jit
def _best(score, count, WIDE: tl.constexpr):
    """Which of the sortable scores are the `count` largest (the first ones on a tie), and their places in order."""
    # A number that `count` scores reach, found two bits a step: three candidates are counted in the fields of one sum.
    FIELD: tl.constexpr = 20 if WIDE else 10
    found = tl.full((), 0, tl.int32)
    reached = tl.full((), -1, tl.int32)  # scores that are at least `found`
    shift = tl.full((), 30, tl.int32)
    while (shift >= 0) & (reached != count):
        unit = tl.full((), 1, tl.int32) << shift
        first = (found + unit) ^ -2147483648
        second = (found + unit + unit) ^ -2147483648
        third = (found + unit + unit + unit) ^ -2147483648
        if WIDE:
            fields = (score >= first).to(tl.int64)
            fields += (score >= second).to(tl.int64) << FIELD
            fields += (score >= third).to(tl.int64) << (2 * FIELD)
        else:
            fields = (score >= first).to(tl.int32)
            fields += (score >= second).to(tl.int32) << FIELD
            fields += (score >= third).to(tl.int32) << (2 * FIELD)
        found, reached = _narrow(found, reached, unit, tl.sum(fields, 0), count, FIELD)
        shift -= 2
    threshold = found ^ -2147483648
    above = (score > threshold).to(tl.int32)
    equal = (score == threshold).to(tl.int32)
    both = above + (equal << 16)
    before = tl.cumsum(both, 0) - both
    room = count - tl.sum(above, 0)
    equal_before = before >> 16
    kept = (above > 0) | ((equal > 0) & (equal_before < room))
    return kept, (before & 0xFFFF) + tl.minimum(equal_before, room)


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "nodes", "rows", "stride_rows", "samples", "window", "sinks", "refresh_interval",
        "stride_mask_b",
    ]
)  # fmt: skip
def _choose(
    query, key, attention_mask, first_slot, real_end, lengths, chosen_at, refreshes, blocks, num_queries, num_keys,
    nodes, rows, stride_rows, samples, window, sinks, refresh_interval, stride_query_b, stride_query_h, stride_query_t,
    stride_key_b, stride_key_h, stride_key_t, stride_mask_b, HEADS: tl.constexpr, GROUP: tl.constexpr,
    SHARED: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, STRIDE_K: tl.constexpr, PLACE: tl.constexpr,
    SAMPLES: tl.constexpr, CHILDREN: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_FIRST: tl.constexpr, DECODE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Sets of one key head run side by side: they find its keys in the L2 cache.
    pid = tl.program_id(0)
    SETS: tl.constexpr = GROUP // SHARED  # of one key head
    KV_HEADS: tl.constexpr = HEADS // GROUP
    block_count = tl.cdiv(num_queries, rows)
    part = pid % SETS
    block = (pid // SETS) % block_count
    outer = pid // (SETS * block_count)
    kv_head = outer % KV_HEADS
    batch = (outer // KV_HEADS).to(tl.int64)
    group = kv_head * SETS + part  # of heads that share a set

    first = tl.full((), 0, tl.int32)
    if HAS_FIRST:
        first = tl.load(first_slot + batch).to(tl.int32)
    if DECODE:
        length = tl.load(lengths + batch).to(tl.int32)
        then = tl.load(chosen_at + batch * (HEADS // SHARED) + group)
        if (then >= 0) & (length >= then) & (length - then < refresh_interval):
            return
        block_slot = length - 1
        real_rows = tl.full((), 1, tl.int32)
    else:
        block_slot = num_keys - num_queries + block * rows
        end = num_keys
        if HAS_MASK:
            end = tl.load(real_end + batch).to(tl.int32)
        real_rows = tl.minimum(tl.maximum(end - block_slot, 1), rows)

    origin = first + sinks
    available = tl.cdiv(tl.maximum(block_slot + real_rows - window - origin, 0), BLOCK_K)
    chosen = blocks + ((batch * (HEADS // SHARED) + group) * block_count + block).to(tl.int64) * nodes
    child = tl.arange(0, CHILDREN)
    if available <= nodes:
        tl.store(chosen + child, tl.where(child < available, child, -1), mask=child < nodes)
    else:
        # Sampled queries of the heads that share the set, in columns. A row that does not vote has limit -1.
        column = tl.arange(0, SAMPLES)
        sample = (column % samples) * stride_rows + tl.minimum(stride_rows, rows) - 1
        votes = (column < samples * SHARED) & ((sample < real_rows) | (column % samples == 0))
        sample = tl.minimum(sample, real_rows - 1)
        limit = tl.where(votes, block_slot + sample - window, -1)
        row = tl.minimum(block * rows + sample, num_queries - 1).to(tl.int64)
        head = (group * SHARED + tl.minimum(column // samples, SHARED - 1)).to(tl.int64)
        dims = tl.arange(0, D)
        at = batch * stride_query_b + head * stride_query_h + row * stride_query_t
        q = tl.load(query + at[None, :] + dims[:, None])  # (D, SAMPLES)
        keys = key + batch * stride_key_b + kv_head.to(tl.int64) * stride_key_h

        # A node is its first block and whether it is `size + 1` blocks long or `size`: 2 * start + longer.
        start = (child.to(tl.int64) * available // nodes).to(tl.int32)
        longer = ((child + 1).to(tl.int64) * available // nodes).to(tl.int32) - start - available // nodes
        tl.store(chosen + child, 2 * start + longer, mask=child < nodes)
        tl.debug_barrier()

        size = available // nodes
        rounds = tl.full((), 0, tl.int32)
        for bit in tl.static_range(30):
            rounds += (tl.cdiv(available, nodes) > (1 << bit)).to(tl.int32)
        KEYS: tl.constexpr = (BLOCK_K + STRIDE_K - 1) // STRIDE_K
        CHUNKS: tl.constexpr = CHILDREN // BLOCK_N
        chunk = tl.arange(0, CHUNKS)
        columns = tl.arange(0, BLOCK_N)
        for _ in range(rounds):
            best = tl.full((CHUNKS, BLOCK_N), float("-inf"), tl.float32)
            for step in tl.range(0, CHUNKS * KEYS, num_stages=STAGES):
                at_chunk = step // KEYS
                ours = at_chunk * BLOCK_N + columns
                node = tl.load(chosen + tl.minimum(ours // 2, nodes - 1))
                node_size = size + (node & 1)
                left = node_size // 2
                right_one = ours % 2
                begin = (node >> 1) + right_one * left
                child_size = tl.where(right_one == 1, node_size - left, left)
                if PLACE == 1:
                    begin += child_size // 2
                elif PLACE == 2:
                    begin += tl.maximum(child_size - 1, 0)
                slot = origin + begin * BLOCK_K + (step % KEYS) * STRIDE_K
                inside = tl.minimum(slot, num_keys - 1)
                k = tl.load(keys + inside.to(tl.int64)[:, None] * stride_key_t + dims[None, :])
                score = tl.dot(k, q, input_precision=PRECISION)  # (BLOCK_N, SAMPLES)
                hidden = slot[:, None] > limit[None, :]
                if HAS_MASK:
                    real = tl.load(attention_mask + batch * stride_mask_b + inside)
                    hidden = hidden | (real == 0)[:, None]
                score = tl.max(tl.where(hidden, HIDDEN, score), 1)
                best = tl.where((chunk == at_chunk)[:, None], tl.maximum(best, score[None, :]), best)
            node = tl.load(chosen + tl.minimum(child // 2, nodes - 1))
            node_size = size + (node & 1)
            left = node_size // 2
            size = size // 2
            right_one = child % 2
            child_size = tl.where(right_one == 1, node_size - left, left)
            begin = (node >> 1) + right_one * left
            rank = tl.reshape(_sortable(best), (CHILDREN,))
            rank = tl.where((child < 2 * nodes) & (child_size > 0), rank, -2147483648)
            kept, place = _best(rank, nodes, CHILDREN >= 1024)
            tl.debug_barrier()  # all have read the nodes
            tl.store(chosen + place, 2 * begin + child_size - size, mask=kept)
            tl.debug_barrier()
        node = tl.load(chosen + child, mask=child < nodes, other=0)
        tl.debug_barrier()
        tl.store(chosen + child, node >> 1, mask=child < nodes)
    if DECODE:
        tl.debug_barrier()  # `chosen_at` has been read by all
        tl.store(chosen_at + batch * (HEADS // SHARED) + group, length)
        count = refreshes + batch * (HEADS // SHARED) + group
        tl.store(count, tl.load(count) + 1)


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "first_block", "some", "chunks", "parents", "rows", "stride_rows", "runs", "window",
        "sinks", "pieces", "finer", "stride_mask_b",
    ]
)  # fmt: skip
def _scan(
    query, key, attention_mask, first_slot, real_end, starts, scores, num_queries, num_keys, first_block, some, chunks,
    parents, rows, stride_rows, runs, window, sinks, pieces, finer, stride_query_b, stride_query_h, stride_query_t,
    stride_key_b, stride_key_h, stride_key_t, stride_mask_b, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, RUNS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_C chunks for one query block and head, `(B, Hq, some, chunks)`; -inf for those without tokens.

    `starts (B, Hq, some / finer, parents)`: first tokens of the chunks that the last stage kept, -1 for none, each to
    be cut into `pieces`; without it, the chunks tile all tokens.
    """
    pid = tl.program_id(0)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    part = pid % GROUP
    at_block = (pid // GROUP) % some
    outer = pid // (GROUP * some)
    kv_head = outer % KV_HEADS
    batch = (outer // KV_HEADS).to(tl.int64)
    head = kv_head * GROUP + part
    block = first_block + at_block
    first = tl.full((), 0, tl.int32)
    last_real = num_keys
    if HAS_MASK:
        first = tl.load(first_slot + batch).to(tl.int32)
        last_real = tl.load(real_end + batch).to(tl.int32)
    block_slot = num_keys - num_queries + block * rows
    real_rows = tl.minimum(tl.maximum(last_real - block_slot, 1), rows)
    origin = first + sinks
    end = block_slot + real_rows - window - origin  # tokens that may be chosen, counted from `origin`

    chunk = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = chunk < chunks
    at = (batch * HEADS + head).to(tl.int64) * some + at_block
    scores += at * chunks
    if HAS_STARTS:
        kept_blocks = tl.cdiv(some, finer)
        at = (batch * HEADS + head).to(tl.int64) * kept_blocks + at_block // finer
        begin = tl.load(starts + at * parents + chunk // pieces, mask=inside, other=-1)
        left = tl.where(begin >= 0, begin + chunk % pieces * CHUNK, end)
    else:
        left = chunk * CHUNK
    right = tl.minimum(left + CHUNK, end)
    active = inside & (left < right)
    if tl.max(active.to(tl.int32), 0) == 0:
        tl.store(scores + chunk, float("-inf"), mask=inside)
    else:
        left = tl.where(active, left, 0)
        right = tl.where(active, right, 1)
        # Means of runs of rows; a run without a real row does not vote.
        run = tl.arange(0, RUNS)
        dims = tl.arange(0, D)
        query += batch * stride_query_b + head.to(tl.int64) * stride_query_h
        q = tl.zeros((RUNS, D), tl.float32)
        count = tl.zeros((RUNS,), tl.float32)
        for step in range(0, stride_rows):
            row = run * stride_rows + step
            real = (row < real_rows) & (run < runs)
            at_row = (block * rows + row).to(tl.int64)
            q += tl.load(query + at_row[:, None] * stride_query_t + dims[None, :], mask=real[:, None], other=0.0).to(
                tl.float32
            )
            count += real.to(tl.float32)
        q = tl.trans(q / tl.maximum(count, 1.0)[:, None]).to(key.dtype.element_ty)
        votes = count > 0
        key += batch * stride_key_b + kv_head.to(tl.int64) * stride_key_h
        best = tl.full((BLOCK_C,), float("-inf"), tl.float32)
        for _ in range(LEVELS):
            middle = (left + right) // 2
            of_left = _score_tokens(
                (left + middle) // 2, q, votes, key, attention_mask + batch * stride_mask_b, origin, num_keys,
                stride_key_t, D, HAS_MASK, PRECISION,
            )  # fmt: skip
            of_right = _score_tokens(
                (middle + right) // 2, q, votes, key, attention_mask + batch * stride_mask_b, origin, num_keys,
                stride_key_t, D, HAS_MASK, PRECISION,
            )  # fmt: skip
            better_right = of_right >= of_left
            best = tl.maximum(best, tl.where(better_right, of_right, of_left))
            left, right = tl.where(better_right, middle, left), tl.where(better_right, right, middle)
        tl.store(scores + chunk, tl.where(active, best, float("-inf")), mask=inside)


@triton.jit
def _score_tokens(
    token, q, votes, key, attention_mask, origin, num_keys, stride_key_t,
    D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest dot product of each token's key with the columns of q (D, RUNS) that vote."""
    slot = tl.minimum(origin + token, num_keys - 1)
    k = tl.load(key + slot.to(tl.int64)[:, None] * stride_key_t + tl.arange(0, D)[None, :])
    score = tl.dot(k, q, input_precision=PRECISION)
    score = tl.max(tl.where(votes[None, :], score, HIDDEN), 1)
    if HAS_MASK:
        score = tl.where(tl.load(attention_mask + slot) != 0, score, HIDDEN)
    return score


@triton.jit(do_not_specialize=["some", "chunks", "parents", "pieces", "finer", "kept", "chunk_size"])
def _keep(
    scores, starts, output, some, chunks, parents, pieces, finer, kept, chunk_size, HEADS: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """First tokens of the `kept` best chunks of each query block and head, in order, -1 for none: `(B, Hq, some, kept)`.

    As `_best`, for any number of chunks, a tile at a time. Heads that share their keys rank a chunk by their maximum.
    """
    pid = tl.program_id(0).to(tl.int64)  # (batch * HEADS + head) * some + block
    at_block = (pid % some).to(tl.int32)
    head = pid // some  # and batch
    scores += ((head // SHARED * SHARED) * some + at_block) * chunks
    starts += (head * tl.cdiv(some, finer) + at_block // finer) * parents
    output += pid * kept
    columns = tl.arange(0, BLOCK)
    FIELD: tl.constexpr = 20
    found = tl.full((), 0, tl.int32)
    reached = tl.full((), -1, tl.int32)
    shift = tl.full((), 30, tl.int32)
    while (shift >= 0) & (reached != kept):
        unit = tl.full((), 1, tl.int32) << shift
        first = (found + unit) ^ -2147483648
        second = (found + unit + unit) ^ -2147483648
        third = (found + unit + unit + unit) ^ -2147483648
        counts = tl.full((), 0, tl.int64)
        for begin in range(0, chunks, BLOCK):
            score = _ranks(scores, begin + columns, chunks, some, SHARED)
            fields = (score >= first).to(tl.int64)
            fields += (score >= second).to(tl.int64) << FIELD
            fields += (score >= third).to(tl.int64) << (2 * FIELD)
            counts += tl.sum(fields, 0)
        found, reached = _narrow(found, reached, unit, counts, kept, FIELD)
        shift -= 2
    threshold = found ^ -2147483648
    room = kept
    for begin in range(0, chunks, BLOCK):
        score = _ranks(scores, begin + columns, chunks, some, SHARED)
        room -= tl.sum((score > threshold).to(tl.int32), 0)
    above_before = tl.full((), 0, tl.int32)
    equal_before = tl.full((), 0, tl.int32)
    for begin in range(0, chunks, BLOCK):
        chunk = begin + columns
        score = _ranks(scores, chunk, chunks, some, SHARED)
        above = ((score > threshold) & (chunk < chunks)).to(tl.int32)
        equal = ((score == threshold) & (chunk < chunks)).to(tl.int32)
        before_above = above_before + tl.cumsum(above, 0) - above
        before_equal = equal_before + tl.cumsum(equal, 0) - equal
        chosen = (above > 0) | ((equal > 0) & (before_equal < room))
        start = chunk * chunk_size
        if HAS_STARTS:
            start = tl.load(starts + chunk // pieces, mask=chunk < chunks, other=-1) + chunk % pieces * chunk_size
        none = score <= -2139095041  # the rank of -inf
        place = before_above + tl.minimum(before_equal, room)
        tl.store(output + place, tl.where(none, -1, start), mask=chosen)
        above_before += tl.sum(above, 0)
        equal_before += tl.sum(equal, 0)


@triton.jit
def _ranks(scores, chunk, chunks, some, SHARED: tl.constexpr):
    best = tl.full(chunk.shape, -2147483648, tl.int32)
    for head in tl.static_range(SHARED):
        score = tl.load(scores + head * some.to(tl.int64) * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
        best = tl.maximum(best, _sortable(score))
    return tl.where(chunk < chunks, best, -2147483648)


@triton.jit
def _capped(logits, softcap):
    # tanh(x) = 1 - 2 / (exp(2 x) + 1); both ends are right when the exponential overflows or vanishes.
    return softcap - 2 * softcap / (tl.exp2(logits * (2 * LOG2E / softcap)) + 1)


@triton.jit
def _absorb(
    q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Online softmax: takes keys (D, N) and values (N, DV) into the sums of the rows of q. Base 2."""
    logits = tl.dot(q, k, input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        logits = _capped(logits, softcap)
    logits = tl.where(visible, logits * LOG2E, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
    weights = tl.exp2(logits - finite_top[:, None])
    kept = tl.exp2(top - finite_top)
    total = total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "nodes", "rows", "window", "sinks", "stride_blocks_b", "stride_blocks_h",
        "stride_blocks_n", "stride_end_b", "stride_end_n", "stride_mask_b",
    ]
)  # fmt: skip
def _attend(
    query, key, value, blocks, search_end, attention_mask, first_slot, sink_logits, output, scale, softcap, num_queries,
    num_keys, nodes, rows, window, sinks, stride_query_b, stride_query_h, stride_query_t, stride_key_b, stride_key_h,
    stride_key_t, stride_value_b, stride_value_h, stride_value_t, stride_blocks_b, stride_blocks_h, stride_blocks_n,
    stride_end_b, stride_end_n, stride_mask_b, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_MASK: tl.constexpr, EXTENDED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    tiles = tl.cdiv(rows, BLOCK_M)  # of one query block
    block_count = tl.cdiv(num_queries, rows)
    part = pid % GROUP
    tile = (pid // GROUP) % tiles
    block = (pid // (GROUP * tiles)) % block_count
    outer = pid // (GROUP * tiles * block_count)
    kv_head = outer % KV_HEADS
    batch = (outer // KV_HEADS).to(tl.int64)
    head = (kv_head * GROUP + part).to(tl.int64)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at_row = block * rows + row
    real_row = (row < rows) & (at_row < num_queries)
    row_slot = num_keys - num_queries + at_row
    window_start = row_slot + 1 - window
    if EXTENDED:
        end = tl.load(search_end + batch * stride_end_b + block.to(tl.int64) * stride_end_n).to(tl.int32)
        window_start = tl.minimum(window_start, end)
    first = tl.full((), 0, tl.int32)
    if HAS_MASK:
        first = tl.load(first_slot + batch).to(tl.int32)
    last = tl.minimum(num_keys - num_queries + tl.minimum((block + 1) * rows, num_queries), num_keys) - 1
    tile_slot = num_keys - num_queries + block * rows + tile * BLOCK_M
    tile_last = tl.minimum(last, tile_slot + BLOCK_M - 1)
    lowest = tile_slot + 1 - window  # window start of the tile's first row
    if EXTENDED:
        lowest = tl.minimum(lowest, end)
    lowest = tl.maximum(lowest, first)

    dims = tl.arange(0, D)
    value_dims = tl.arange(0, DV)
    query += batch * stride_query_b + head * stride_query_h
    q = tl.load(
        query + at_row.to(tl.int64)[:, None] * stride_query_t + dims[None, :], mask=real_row[:, None], other=0.0
    )
    key += batch * stride_key_b + kv_head.to(tl.int64) * stride_key_h
    value += batch * stride_value_b + kv_head.to(tl.int64) * stride_value_h
    attention_mask += batch * stride_mask_b

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINK:
        sink = tl.load(sink_logits + head).to(tl.float32)
        top = tl.zeros((BLOCK_M,), tl.float32) + sink * LOG2E
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    acc = tl.zeros((BLOCK_M, DV), tl.float32)

    columns = tl.arange(0, BLOCK_N)
    for begin in tl.range(lowest, tile_last + 1, BLOCK_N, num_stages=STAGES):
        slot = begin + columns
        inside = slot <= tile_last
        if HAS_MASK:
            inside = inside & (tl.load(attention_mask + slot, mask=inside, other=0) != 0)
        offset = slot.to(tl.int64)
        k = tl.load(key + offset[None, :] * stride_key_t + dims[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(value + offset[:, None] * stride_value_t + value_dims[None, :], mask=inside[:, None], other=0.0)
        visible = inside[None, :] & (slot[None, :] >= window_start[:, None]) & (slot[None, :] <= row_slot[:, None])
        top, total, acc = _absorb(q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP, PRECISION)

    oldest = tile_last + 1 - window  # window start of the last row: is there anything before it?
    if EXTENDED:
        oldest = tl.minimum(oldest, end)
    if oldest > first:
        sink_columns = tl.arange(0, BLOCK_S)
        for begin in range(0, sinks, BLOCK_S):
            slot = first + begin + sink_columns
            inside = (begin + sink_columns < sinks) & (slot <= tile_last)
            if HAS_MASK:
                inside = inside & (tl.load(attention_mask + slot, mask=inside, other=0) != 0)
            offset = slot.to(tl.int64)
            k = tl.load(key + offset[None, :] * stride_key_t + dims[:, None], mask=inside[None, :], other=0.0)
            v = tl.load(value + offset[:, None] * stride_value_t + value_dims[None, :], mask=inside[:, None], other=0.0)
            visible = inside[None, :] & (slot[None, :] < window_start[:, None])
            top, total, acc = _absorb(q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP, PRECISION)

        origin = first + sinks
        chosen = blocks + batch * stride_blocks_b + head * stride_blocks_h + block.to(tl.int64) * stride_blocks_n
        for begin in tl.range(0, nodes * BLOCK_K, BLOCK_N, num_stages=STAGES):
            place = begin + columns
            found = tl.load(chosen + place // BLOCK_K, mask=place < nodes * BLOCK_K, other=-1)
            slot = origin + found * BLOCK_K + place % BLOCK_K
            inside = (found >= 0) & (slot <= tile_last)
            if HAS_MASK:
                inside = inside & (tl.load(attention_mask + slot, mask=inside, other=0) != 0)
            offset = slot.to(tl.int64)
            k = tl.load(key + offset[None, :] * stride_key_t + dims[:, None], mask=inside[None, :], other=0.0)
            v = tl.load(value + offset[:, None] * stride_value_t + value_dims[None, :], mask=inside[:, None], other=0.0)
            visible = inside[None, :] & (slot[None, :] < window_start[:, None])
            top, total, acc = _absorb(q, k, v, visible, top, total, acc, scale, softcap, HAS_SOFTCAP, PRECISION)

    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    output += (batch * HEADS + head) * num_queries.to(tl.int64) * DV
    tl.store(
        output + at_row.to(tl.int64)[:, None] * DV + value_dims[None, :],
        acc.to(output.dtype.element_ty),
        mask=real_row[:, None],
    )


@triton.jit(do_not_specialize=["nodes", "window", "sinks", "reach", "share", "chosen_parts", "parts", "capacity"])
def _decode(
    query, key, value, lengths, first_slot, blocks, chosen_at, partial, lse, scale, softcap, capacity, nodes, window,
    sinks, reach, share, chosen_parts, parts, stride_query_b, stride_query_h, stride_key_b, stride_key_h, stride_key_t,
    stride_value_b, stride_value_h, stride_value_t, HEADS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the chosen keys of one set of heads, or of sinks and window, which all heads of a key head read."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    SETS: tl.constexpr = GROUP // SHARED
    pid = tl.program_id(0)
    kv_head = tl.program_id(1) % KV_HEADS
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    is_chosen = pid < SETS * chosen_parts
    a_part = tl.maximum(chosen_parts, 1)
    group = tl.where(is_chosen, pid // a_part, 0)
    part = tl.where(is_chosen, pid % a_part, pid - (SETS - 1) * chosen_parts)  # of a head's partial results
    begin = tl.where(is_chosen, part, part - chosen_parts) * share
    width = tl.where(is_chosen, nodes * BLOCK_K, sinks + reach)

    row = tl.arange(0, BLOCK_M)
    real_row = row < tl.where(is_chosen, SHARED, GROUP)
    head = (kv_head * GROUP + group * SHARED + tl.minimum(row, GROUP - 1)).to(tl.int64)
    length = tl.load(lengths + batch).to(tl.int32)
    first = tl.full((), 0, tl.int32)
    if HAS_FIRST:
        first = tl.load(first_slot + batch).to(tl.int32)
    a_set = (batch * KV_HEADS + kv_head) * SETS + group
    # The window reaches from where the search ended to the present.
    window_start = tl.maximum(tl.minimum(length, tl.load(chosen_at + a_set)) - window, first)

    dims = tl.arange(0, D)
    value_dims = tl.arange(0, DV)
    query += batch * stride_query_b
    q = tl.load(query + head[:, None] * stride_query_h + dims[None, :], mask=real_row[:, None], other=0.0)
    key += batch * stride_key_b + kv_head.to(tl.int64) * stride_key_h
    value += batch * stride_value_b + kv_head.to(tl.int64) * stride_value_h
    chosen = blocks + a_set * nodes
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    for step in tl.range(begin, tl.minimum(begin + share, width), BLOCK_N, num_stages=STAGES):
        place = step + tl.arange(0, BLOCK_N)
        inside = place < width
        found = tl.load(chosen + place // BLOCK_K, mask=inside & is_chosen, other=-1)
        of_choice = first + sinks + found * BLOCK_K + place % BLOCK_K
        of_window = length - reach + place - sinks
        is_sink = place < sinks
        slot = tl.where(is_chosen, of_choice, tl.where(is_sink, first + place, of_window))
        older = slot < window_start
        inside = inside & tl.where(is_chosen, (found >= 0) & older, tl.where(is_sink, older, older == 0))
        inside = inside & (slot >= first) & (slot < length) & (slot < capacity)
        offset = slot.to(tl.int64)
        k = tl.load(key + offset[None, :] * stride_key_t + dims[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(value + offset[:, None] * stride_value_t + value_dims[None, :], mask=inside[:, None], other=0.0)
        top, total, acc = _absorb(
            q, k, v, inside[None, :], top, total, acc, scale, softcap, HAS_SOFTCAP, PRECISION
        )  # fmt: skip
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    at = (batch * HEADS + head) * parts + part
    tl.store(lse + at, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total))), mask=real_row)
    tl.store(partial + at[:, None] * DV + value_dims[None, :], acc, mask=real_row[:, None])


@triton.jit(do_not_specialize=["parts"])
def _merge(
    partial, lse, sink_logits, output, parts, HEADS: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """One row of the output from its parts."""
    pid = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    dims = tl.arange(0, DV)
    part_lse = tl.load(lse + pid * parts + part, mask=part < parts, other=float("-inf"))
    rows = tl.load(
        partial + (pid * parts + part)[:, None] * DV + dims[None, :], mask=(part < parts)[:, None], other=0.0
    )
    top = tl.max(part_lse, 0)
    if HAS_SINK:
        sink = tl.load(sink_logits + pid % HEADS).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(part_lse - top)
    total = tl.sum(weights, 0)
    if HAS_SINK:
        total += tl.exp2(sink - top)
    acc = tl.sum(rows * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(output + pid * DV + dims, acc.to(output.dtype.element_ty))


_PLACES = {"first": 0, "center": 1, "last": 2}


class _Config(NamedTuple):
    block_n: int  # keys of a step
    num_warps: int
    num_stages: int
    registers: int | None = None  # at most so many a thread: for more programs at a time


def _choose_config(dim: int, dtype: torch.dtype, samples: int, decode: bool) -> _Config:
    if dtype == torch.float32:  # "ieee" products run on the plain units, out of registers
        return _Config(32, 4, 1)
    if decode:  # few programs: each needs much in flight
        return _Config(256 if dim <= 128 else 128, 8, 2)
    return _Config(128 if dim <= 128 and samples <= 32 else 64, 4, 2)


def _attend_config(dim: int, dtype: torch.dtype) -> _Config:
    if dtype == torch.float32:
        return _Config(32 if INTERPRETED else 16, 4, 1)
    return _Config(32, 4, 2, 128) if dim <= 128 else _Config(32, 8, 2)


def _decode_config(dim: int, dtype: torch.dtype) -> _Config:
    if dtype == torch.float32:
        return _Config(32 if INTERPRETED else 16, 4, 1)
    return _Config(64, 4, 1)


def _pow2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """A copy where a row's elements are apart; a cache never is."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _samples(rows: int, stride: int) -> int:
    return (rows - min(stride, rows)) // stride + 1


def _launch_choose(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, first_slot: Tensor | None, real_end: Tensor | None,
    nodes: int, rows: int, stride_rows: int, block_k: int, stride_k: int, window: int, sinks: int, shared: int,
    place: int,
) -> Tensor:  # fmt: skip
    query, key = _unit_stride(query, key)
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    count = -(-num_queries // rows)
    blocks = torch.empty((batch, heads // shared, count, nodes), dtype=torch.int32, device=query.device)
    samples = _samples(rows, stride_rows)
    columns = max(16, _pow2(samples * shared))
    config = _choose_config(dim, query.dtype, columns, False)
    real = None if attention_mask is None else attention_mask.view(torch.uint8)
    _choose[(batch * heads // shared * count,)](
        query, key, query if real is None else real, first_slot, real_end, None, None, None, blocks, num_queries,
        num_keys, nodes, rows, stride_rows, samples, window, sinks, 0, *query.stride()[:3], *key.stride()[:3],
        0 if real is None else real.stride(0), HEADS=heads, GROUP=heads // kv_heads, SHARED=shared, D=dim,
        BLOCK_K=block_k, STRIDE_K=stride_k, PLACE=place, SAMPLES=columns,
        CHILDREN=max(config.block_n, _pow2(2 * nodes)), BLOCK_N=config.block_n, HAS_MASK=real is not None,
        HAS_FIRST=first_slot is not None, DECODE=False, PRECISION=_precision(query.dtype), STAGES=config.num_stages,
        num_warps=config.num_warps, maxnreg=config.registers,
    )  # fmt: skip
    return blocks


def _launch_attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, search_end: Tensor, attention_mask: Tensor | None,
    first_slot: Tensor | None, sink_logits: Tensor | None, scale: float, softcap: float, rows: int, block_k: int,
    window: int, sinks: int, extended: bool,
) -> Tensor:  # fmt: skip
    query, key, value, blocks = _unit_stride(query, key, value, blocks)
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_keys, dim_v = key.shape[1], key.shape[2], value.shape[3]
    output = torch.empty((batch, heads, num_queries, dim_v), dtype=query.dtype, device=query.device)
    most_rows = 16 if query.dtype == torch.float32 and not INTERPRETED else 64
    block_m = min(most_rows, max(16, _pow2(rows)))
    config = _attend_config(max(dim, dim_v), query.dtype)
    real = None if attention_mask is None else attention_mask.view(torch.uint8)
    grid = (batch * heads * -(-num_queries // rows) * -(-rows // block_m),)
    _attend[grid](
        query, key, value, blocks, search_end, query if real is None else real, first_slot, sink_logits, output, scale,
        softcap, num_queries, num_keys, blocks.shape[3], rows, window, sinks, *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], *blocks.stride()[:3], *search_end.stride(), 0 if real is None else real.stride(0),
        HEADS=heads, GROUP=heads // kv_heads, D=dim, DV=dim_v, BLOCK_K=block_k, BLOCK_M=block_m, BLOCK_N=config.block_n,
        BLOCK_S=max(16, min(config.block_n, _pow2(sinks))), HAS_MASK=real is not None, EXTENDED=extended,
        HAS_SOFTCAP=softcap > 0, HAS_SINK=sink_logits is not None, PRECISION=_precision(query.dtype),
        STAGES=config.num_stages, num_warps=config.num_warps, maxnreg=config.registers,
    )  # fmt: skip
    return output


def _launch_refresh(
    query: Tensor, key: Tensor, lengths: Tensor, first_real: Tensor | None, blocks: Tensor, chosen_at: Tensor,
    refreshes: Tensor, refresh_interval: int, block_k: int, stride_k: int, window: int, sinks: int,
) -> None:  # fmt: skip
    """Renews the choices that are due, in place."""
    query, key = _unit_stride(query, key)
    batch, heads, _, dim = query.shape
    kv_heads, capacity = key.shape[1:3]
    sets, nodes = blocks.shape[1:]
    shared = heads // sets
    columns = max(16, _pow2(shared))
    config = _choose_config(dim, query.dtype, columns, True)
    _choose[(batch * sets,)](
        query, key, query, first_real, None, lengths, chosen_at, refreshes, blocks, 1, capacity, nodes, 1, 1, 1, window,
        sinks, refresh_interval, *query.stride()[:3], *key.stride()[:3], 0, HEADS=heads, GROUP=heads // kv_heads,
        SHARED=shared, D=dim, BLOCK_K=block_k, STRIDE_K=stride_k, PLACE=_PLACES["center"], SAMPLES=columns,
        CHILDREN=max(config.block_n, _pow2(2 * nodes)), BLOCK_N=config.block_n, HAS_MASK=False,
        HAS_FIRST=first_real is not None, DECODE=True, PRECISION=_precision(query.dtype), STAGES=config.num_stages,
        num_warps=config.num_warps, maxnreg=config.registers,
    )  # fmt: skip


def _launch_decode(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, first_real: Tensor | None, blocks: Tensor,
    chosen_at: Tensor, sink_logits: Tensor | None, scale: float, softcap: float, reach: int, block_k: int, window: int,
    sinks: int,
) -> Tensor:  # fmt: skip
    query, key, value = _unit_stride(query, key, value)
    batch, heads, _, dim = query.shape
    kv_heads, capacity, dim_v = key.shape[1], key.shape[2], value.shape[3]
    sets, nodes = blocks.shape[1:]
    group, shared = heads // kv_heads, heads // sets
    config = _decode_config(max(dim, dim_v), query.dtype)
    # Short shares fill the GPU at small batches; long ones leave less to merge at large ones.
    share = config.block_n
    while (
        batch * heads * -(-(nodes * block_k) // share) > 1024 or _parts(nodes * block_k, sinks + reach, share)[1] > 32
    ):
        share *= 2
    chosen_parts, parts = _parts(nodes * block_k, sinks + reach, share)
    partial = torch.empty((batch, heads, parts, dim_v), dtype=torch.float32, device=query.device)
    lse = torch.empty((batch, heads, parts), dtype=torch.float32, device=query.device)
    output = torch.empty((batch, heads, 1, dim_v), dtype=query.dtype, device=query.device)
    _decode[(group // shared * chosen_parts + parts - chosen_parts, batch * kv_heads)](
        query, key, value, lengths, first_real, blocks, chosen_at, partial, lse, scale, softcap, capacity, nodes,
        window, sinks, reach, share, chosen_parts, parts, *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        HEADS=heads, GROUP=group, SHARED=shared, D=dim, DV=dim_v, BLOCK_K=block_k, BLOCK_M=max(16, _pow2(group)),
        BLOCK_N=config.block_n, HAS_FIRST=first_real is not None, HAS_SOFTCAP=softcap > 0,
        PRECISION=_precision(query.dtype), STAGES=config.num_stages, num_warps=config.num_warps,
        maxnreg=config.registers,
    )  # fmt: skip
    _merge[(batch * heads,)](
        partial, lse, sink_logits, output, parts, HEADS=heads, DV=dim_v, PARTS=_pow2(parts),
        HAS_SINK=sink_logits is not None, num_warps=4,
    )  # fmt: skip
    return output


def _parts(chosen: int, dense: int, share: int) -> tuple[int, int]:
    """Into how many shares the chosen keys go, and these with sinks and window."""
    chosen_parts = -(-chosen // share)
    return chosen_parts, chosen_parts + -(-dense // share)


_SCAN_SCORES = 1 << 25  # scores of chunks that exist at a time


def _launch_scan(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, first_slot: Tensor | None, real_end: Tensor | None,
    stages: Sequence[int], top_k: int, nodes: int, window: int, sinks: int, shared: int,
) -> Tensor:  # fmt: skip
    """Chosen chunks of the last stage, `(B, Hq, N, n)`. `stages`: four numbers each, 0 for no budget."""
    query, key = _unit_stride(query, key)
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    steps = [tuple(stages[at : at + 4]) for at in range(0, len(stages), 4)]
    real = None if attention_mask is None else attention_mask.view(torch.uint8)
    coarse = steps[0][0]
    coarse_rows = min(coarse, num_queries)
    first_end = num_keys - window - sinks
    counts = [-(-max(0, first_end) // steps[0][2])]  # chunks that each stage scores
    keeps = []
    for number, (_, _, chunk, _) in enumerate(steps):
        budget = top_k if number == len(steps) - 1 else steps[number + 1][3]
        keeps.append(min(-(-budget // chunk), counts[-1]))
        if number < len(steps) - 1:
            counts.append(keeps[-1] * (chunk // steps[number + 1][2]))
    final = -(-num_queries // min(steps[-1][0], num_queries))
    blocks = torch.full((batch, heads, final, nodes), -1, dtype=torch.int32, device=query.device)
    finest = coarse // steps[-1][0]
    run = max(1, _SCAN_SCORES // (batch * heads * max(counts) * finest))
    for lo in range(0, -(-num_queries // coarse_rows), run):
        starts: Tensor | None = None
        for number, (block, stride, chunk, _) in enumerate(steps):
            rows = min(block, num_queries)
            finer = coarse // block
            begin = lo * finer
            some = min((lo + run) * finer, -(-num_queries // rows)) - begin
            chunks, kept = counts[number], keeps[number]
            runs = -(-rows // stride)
            scores = torch.empty((batch, heads, some, chunks), dtype=torch.float32, device=query.device)
            parents = 1 if starts is None else starts.shape[3]
            pieces = 1 if number == 0 else steps[number - 1][2] // chunk
            ratio = 1 if number == 0 else steps[number - 1][0] // block
            block_c = 64 if query.dtype != torch.float32 or INTERPRETED else 16
            _scan[(batch * heads * some, -(-chunks // block_c))](
                query,
                key,
                query if real is None else real,
                first_slot,
                real_end,
                starts,
                scores,
                num_queries,
                num_keys,
                begin,
                some,
                chunks,
                parents,
                rows,
                stride,
                runs,
                window,
                sinks,
                pieces,
                ratio,
                *query.stride()[:3],
                *key.stride()[:3],
                0 if real is None else real.stride(0),
                HEADS=heads,
                GROUP=heads // kv_heads,
                D=dim,
                CHUNK=chunk,
                LEVELS=max(1, chunk.bit_length() - 1),
                RUNS=max(16, _pow2(runs)),
                BLOCK_C=block_c,
                HAS_MASK=real is not None,
                HAS_STARTS=starts is not None,
                PRECISION=_precision(query.dtype),
                num_warps=4,
                num_stages=1,  # a level's keys depend on the last one's
            )
            output = torch.empty((batch, heads, some, kept), dtype=torch.int32, device=query.device)
            _keep[(batch * heads * some,)](
                scores, output if starts is None else starts, output, some, chunks, parents, pieces, ratio, kept, chunk,
                HEADS=heads, SHARED=shared, BLOCK=256 if INTERPRETED else 1024, HAS_STARTS=starts is not None,
                num_warps=4,
            )  # fmt: skip
            starts = output
        assert starts is not None
        chosen = torch.where(starts >= 0, starts // steps[-1][2], -1)[..., :nodes]
        blocks[:, :, begin : begin + some, : chosen.shape[3]] = chosen
    return blocks


def _run(op: Callable[..., Any], launch: Callable[..., Any], query: Tensor, *arguments: Any) -> Any:
    """The registered operator while a graph is traced; else the launch itself, which is tens of microseconds faster."""
    if torch.compiler.is_compiling():
        return op(query, *arguments)
    if not query.is_cuda:
        return launch(query, *arguments)
    with torch.cuda.device(query.device):
        return launch(query, *arguments)


choose_op = torch.library.custom_op("heedful::hip_choose", _launch_choose, mutates_args=())
attend_op = torch.library.custom_op("heedful::hip_attend", _launch_attend, mutates_args=())
refresh_op = torch.library.custom_op(
    "heedful::hip_refresh", _launch_refresh, mutates_args=("blocks", "chosen_at", "refreshes")
)
decode_op = torch.library.custom_op("heedful::hip_decode", _launch_decode, mutates_args=())


@choose_op.register_fake
def _(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, first_slot: Tensor | None, real_end: Tensor | None,
    nodes: int, rows: int, stride_rows: int, block_k: int, stride_k: int, window: int, sinks: int, shared: int,
    place: int,
) -> Tensor:  # fmt: skip
    batch, heads, num_queries, _ = query.shape
    return query.new_empty((batch, heads // shared, -(-num_queries // rows), nodes), dtype=torch.int32)


scan_op = torch.library.custom_op("heedful::hip_scan", _launch_scan, mutates_args=())


@scan_op.register_fake
def _(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, first_slot: Tensor | None, real_end: Tensor | None,
    stages: Sequence[int], top_k: int, nodes: int, window: int, sinks: int, shared: int,
) -> Tensor:  # fmt: skip
    batch, heads, num_queries, _ = query.shape
    count = -(-num_queries // min(stages[-4], num_queries))
    return query.new_empty((batch, heads, count, nodes), dtype=torch.int32)


@attend_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@decode_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def refuses(
    query: Tensor, key: Tensor, value: Tensor, nodes: int, rows: int, stride_rows: int, shared: int
) -> str | None:
    """Why the kernels cannot take these inputs, to follow "impl='triton'"; None if they can."""
    for name, dim in (("D", query.shape[-1]), ("Dv", value.shape[-1])):
        if dim not in HEAD_DIMS:
            return f"takes D and Dv of 16, 32, 64, 128 or 256, not {name} = {dim}"
    if nodes > MOST_NODES:
        return f"takes a top_k of at most {MOST_NODES} key blocks, not {nodes}"
    if _samples(rows, stride_rows) * shared > 256:
        return f"takes at most 256 sampled queries a set, not {_samples(rows, stride_rows) * shared}"
    if query.shape[1] // key.shape[1] % shared:
        return f"takes a head_group_size that divides the {query.shape[1] // key.shape[1]} query heads of a key head"
    return inputs.kernels_refuse(query)


def refuses_stages(stages: Sequence[Stage]) -> str | None:
    """Why the kernels cannot take these stages; None if they can."""
    for block_size_q, block_stride_q, _, _ in stages:
        if -(-block_size_q // block_stride_q) > 128:
            return f"takes at most 128 means of queries a block, not {-(-block_size_q // block_stride_q)}"
    return None


def choose_in_stages(
    query: Tensor, key: Tensor, *, stages: Sequence[Stage], top_k: int, sliding_window: int, num_sink_tokens: int,
    head_group_size: int, attention_mask: Tensor | None,
) -> HiPMask:  # fmt: skip
    """`reference.choose_in_stages`; the means of queries are rounded to the keys' dtype."""
    block_size_q, _, chunk_size, _ = stages[-1]
    window = max(sliding_window, stages[0][0] - 1)
    plan = layout(query, key, block_size_q, window, attention_mask)
    nodes = plan.nodes(top_k, chunk_size, num_sink_tokens)
    if nodes == 0:
        shape = (*query.shape[:2], plan.count, 0)
        blocks = torch.empty(shape, dtype=torch.int32, device=query.device)
    else:
        padded = attention_mask is not None
        flat = [0 if number is None else number for stage in stages for number in stage]
        blocks = _run(
            scan_op, _launch_scan, query, key, attention_mask, plan.first_slot if padded else None,
            plan.real_end if padded else None, flat, top_k, nodes, window, num_sink_tokens, head_group_size,
        )  # fmt: skip
    return HiPMask(
        blocks, plan.search_end, query.shape[2], key.shape[2], plan.rows, chunk_size, window, num_sink_tokens,
        attention_mask,
    )  # fmt: skip


def choose(
    query: Tensor, key: Tensor, *, top_k: int, block_size_q: int, block_stride_q: int, block_size_k: int,
    block_stride_k: int, sliding_window: int, num_sink_tokens: int, head_group_size: int, attention_mask: Tensor | None,
    sample_method: str, generator: torch.Generator | None = None,
) -> HiPMask:  # fmt: skip
    """The choice of `reference.choose`, for the sample methods "center", "first" and "last", which draw nothing."""
    plan = layout(query, key, block_size_q, sliding_window, attention_mask)
    nodes = plan.nodes(top_k, block_size_k, num_sink_tokens)
    if nodes == 0:
        shape = (query.shape[0], query.shape[1], plan.count, 0)
        blocks = torch.empty(shape, dtype=torch.int32, device=query.device)
    else:
        padded = attention_mask is not None
        blocks = _run(
            choose_op, _launch_choose, query, key, attention_mask, plan.first_slot if padded else None,
            plan.real_end if padded else None, nodes, plan.rows, block_stride_q, block_size_k, block_stride_k,
            plan.window, num_sink_tokens, head_group_size, _PLACES[sample_method],
        )  # fmt: skip
        blocks = blocks.repeat_interleave(head_group_size, 1) if head_group_size > 1 else blocks
    return HiPMask(
        blocks, plan.search_end, query.shape[2], key.shape[2], plan.rows, block_size_k, plan.window, num_sink_tokens,
        attention_mask,
    )  # fmt: skip


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: HiPMask, *, scale: float, softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`reference.attend`, forward only."""
    return _run(
        attend_op, _launch_attend, query, key, value, mask.blocks, mask.search_end, mask.attention_mask,
        None if mask.attention_mask is None else mask.first_slot, sink_logits, float(scale), softcap or 0.0,
        mask.block_size_q, mask.block_size_k, mask.sliding_window, mask.num_sink_tokens, mask.chosen_at is not None,
    )  # fmt: skip


def decode(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, state: HiPDecodeState, refresh_interval: int,
    first_real: Tensor | None, scale: float, softcap: float | None, sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """One decode step: refresh where due, then attention to the choice."""
    sizes = (state.block_size_k, state.block_stride_k, state.sliding_window, state.num_sink_tokens)
    reach = min(state.sliding_window + refresh_interval - 1, key.shape[2])
    _run(
        refresh_op, _launch_refresh, query, key, lengths, first_real, state.blocks, state.chosen_at, state.refreshes,
        refresh_interval, *sizes,
    )  # fmt: skip
    return _run(
        decode_op, _launch_decode, query, key, value, lengths, first_real, state.blocks, state.chosen_at, sink_logits,
        float(scale), softcap or 0.0, reach, state.block_size_k, state.sliding_window, state.num_sink_tokens,
    )  # fmt: skip
