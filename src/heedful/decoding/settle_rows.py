"""`heedful.decoding.device_walk.settle` on a GPU: one launch, a program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from heedful.decoding.device_walk import Settled


@triton.jit
def _at(values, index, place):
    """The number at a place of a vector."""
    return tl.sum(tl.where(index == place, values, 0), 0)


@triton.jit(do_not_specialize=["nodes", "length", "capacity"])
def _settle(
    tokens, parents, ancestors, choices, end_tokens, lengths, positions, remaining, finished,
    path, count_out, roots, sources, targets, report, nodes, length, capacity, ENDS: tl.constexpr, N: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    node, step = tl.arange(0, N), tl.arange(0, M)
    inside, in_path = node < nodes, step < length
    token = tl.load(tokens + row * nodes + node, mask=inside, other=-1)
    parent = tl.load(parents + row * nodes + node, mask=inside, other=-1)
    choice = tl.load(choices + row * nodes + node, mask=inside, other=-1)

    # Down the tree: of a node's children that carry the token chosen after it, the first.
    at, chosen, count = tl.full((), 0, tl.int64), _at(choice, node, 0), tl.full((), 1, tl.int64)
    walked, emitted = tl.zeros((M,), tl.int64), tl.zeros((M,), tl.int64) + chosen
    for depth in range(1, length):
        child = tl.min(tl.where((parent == at) & (token == chosen), node, N), 0).to(tl.int64)
        found = child < N
        at = tl.where(found, child, at)
        chosen = tl.where(found, _at(choice, node, child), chosen)
        count += found.to(tl.int64)
        walked, emitted = tl.where(step >= depth, at, walked), tl.where(step >= depth, chosen, emitted)

    # As far as the first end-of-sequence token, and the last token there is room for.
    left = tl.load(remaining + row)
    end = tl.load(end_tokens + tl.arange(0, ENDS))
    ends = (tl.max((emitted[:, None] == end[None, :]).to(tl.int32), 1) > 0) & (step < count)
    first_end = tl.min(tl.where(ends, step, length), 0).to(tl.int64)
    count = tl.minimum(tl.minimum(count, first_end + 1), left)
    ended = (first_end < count) | (count >= left)
    stopped = tl.load(finished + row) != 0
    count = tl.where(stopped, 0, count)

    begin = tl.load(lengths + row)
    last = tl.maximum(count, 1) - 1
    depths = tl.zeros((N,), tl.int64) - 1  # of a node: how many it sees, less itself
    for first in range(0, nodes, 16):
        other = first + tl.arange(0, 16)
        seen = ancestors + row.to(tl.int64) * nodes * nodes + node[:, None] * nodes + other[None, :]
        sees = tl.load(seen, mask=inside[:, None] & (other < nodes)[None, :], other=0)
        depths += tl.sum((sees != 0).to(tl.int64), 1)
    deepest = tl.maximum(tl.minimum(tl.max(tl.where(parent >= 0, depths, 0), 0), left - 1), 0)

    out = row * length + step
    tl.store(path + out, tl.where(step < count, walked, _at(walked, step, last)), mask=in_path)
    tl.store(sources + out, tl.minimum(begin + walked, capacity - 1), mask=in_path)
    tl.store(targets + out, tl.minimum(begin + step, capacity - 1), mask=in_path)
    tl.store(count_out + row, last + 1)
    tl.store(roots + row, _at(emitted, step, last))
    figures = report + row * (length + 3)
    tl.store(figures + step, emitted, mask=in_path)
    tl.store(figures + length, deepest)
    tl.store(figures + length + 1, count)
    tl.store(figures + length + 2, (stopped | ended).to(tl.int64))
    tl.store(lengths + row, begin + count)
    tl.store(positions + row, tl.load(positions + row) + count)
    tl.store(remaining + row, left - count)
    tl.store(finished + row, stopped | ended)


def settle_rows(
    tokens: Tensor, parents: Tensor, ancestors: Tensor, choices: Tensor, path_length: int, end_tokens: Tensor,
    lengths: Tensor, positions: Tensor, remaining: Tensor, finished: Tensor, capacity: int,
) -> Settled:  # fmt: skip
    """As `settle`, for CUDA tensors; all contiguous, the number of end tokens a power of 2."""
    batch, nodes = tokens.shape
    path, sources, targets = tokens.new_empty((3, batch, path_length)).unbind()
    count, roots = tokens.new_empty((2, batch)).unbind()
    report = tokens.new_empty((batch, path_length + 3))
    N = triton.next_power_of_2(nodes)
    _settle[(batch,)](
        tokens, parents, ancestors, choices, end_tokens, lengths, positions, remaining, finished,
        path, count, roots, sources, targets, report, nodes, path_length, capacity,
        ENDS=len(end_tokens), N=N, M=triton.next_power_of_2(path_length), num_warps=4 if N > 32 else 1,
    )  # fmt: skip
    return Settled(path, count, roots, sources, targets, report)
