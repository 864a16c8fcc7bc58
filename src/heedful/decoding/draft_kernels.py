"""The drafts of `heedful.decoding.on_device` on a GPU, where a draft of a few hundred numbers takes as long as its launches: few
kernels. Each function gives what the tensor operations give that it stands for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_CUT = 2048  # places of a text that a program compares
#: Nodes of a template that `read_template` takes: all are compared with all.
MOST_NODES = 128


@triton.jit
def _write_trees(tokens, parents, tokens_out, parents_out, ancestors_out, nodes, depth, N: tl.constexpr):
    row, node = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    inside, at = node < nodes, row * nodes + node
    parent = tl.load(parents + at, mask=inside, other=-1)
    token = tl.load(tokens + at, mask=inside, other=0)
    tl.store(tokens_out + at, tl.where(parent >= 0, token, tl.load(tokens + row * nodes)), mask=inside)
    tl.store(parents_out + at, parent, mask=inside)
    above, sees = parent, node[:, None] == node[None, :]
    for _ in range(depth):
        sees = sees | (above[:, None] == node[None, :])
        above = tl.load(parents + row * nodes + above, mask=above >= 0, other=-1)
    square = ancestors_out + at[:, None] * nodes + node[None, :]
    tl.store(square, sees, mask=inside[:, None] & inside[None, :])


def write_trees(
    tokens: Tensor, parents: Tensor, depth: int, tokens_out: Tensor, parents_out: Tensor, ancestors_out: Tensor
) -> None:
    """`Trees.write`: tokens and parents ``(B, n)`` into buffers of their shape, and `ancestors_of` into bool ``(B, n, n)``."""
    batch, nodes = parents.shape
    N = triton.next_power_of_2(nodes)
    _write_trees[(batch,)](
        tokens.contiguous(), parents.contiguous(), tokens_out, parents_out, ancestors_out, nodes, depth,
        N=N, num_warps=4 if N > 32 else 1,
    )  # fmt: skip


@triton.jit
def _write_path(text, tokens, path, counts, roots, lengths, nodes, length, capacity, M: tl.constexpr):
    row, order = tl.program_id(0).to(tl.int64), tl.arange(0, M) + 1
    count = tl.load(counts + row)
    node = tl.load(path + row * length + order, mask=order < length, other=0)
    token = tl.load(tokens + row * nodes + node)
    token = tl.where(order == count, tl.load(roots + row), token)
    place = tl.load(lengths + row) - count + order
    tl.store(text + row * (capacity + 1) + place, token, mask=(order <= count) & (place < capacity))


@triton.jit
def _longest_match(text, lengths, best, capacity, SIZES: tl.constexpr, CUT: tl.constexpr):
    row, cut = tl.program_id(0).to(tl.int64), tl.program_id(1)
    text += row * (capacity + 1)
    end, place = tl.load(lengths + row), cut * CUT + tl.arange(0, CUT)
    alike = place < end
    score = tl.zeros((CUT,), tl.int64)
    for size in tl.static_range(SIZES):
        wanted = tl.load(text + end - size, mask=end >= size, other=-1)
        found = tl.load(text + place - size, mask=alike & (place >= size), other=-2)
        alike = alike & (found == wanted) & (wanted >= 0)
        score += alike.to(tl.int64)
    rank = tl.where(place < end, score * capacity + place, -1)
    tl.store(best + row * tl.num_programs(1) + cut, tl.max(rank, 0))


@triton.jit
def _follow(
    text, lengths, best, tokens, parents, capacity, cuts, nodes, whole, few, CUTS: tl.constexpr, N: tl.constexpr
):
    row, step, cut = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.arange(0, CUTS)
    text += row * (capacity + 1)
    top = tl.max(tl.load(best + row * cuts + cut, mask=cut < cuts, other=-1), 0)
    end, at = tl.load(lengths + row), tl.maximum(top, 0) % capacity
    count = tl.minimum(end - at, tl.where(top >= whole * capacity, nodes - 1, few))
    count = tl.where(top < capacity, 0, count)
    place = tl.where(step == 0, end, tl.minimum(at + step, capacity - 1))
    token = tl.load(text + place, mask=step < nodes, other=0)
    tl.store(tokens + row * nodes + step, tl.maximum(token, 0), mask=step < nodes)
    tl.store(parents + row * nodes + step, tl.where(step > count, -1, step - 1).to(tl.int64), mask=step < nodes)


def look_up(
    text: Tensor, tokens: Tensor, path: Tensor, count: Tensor, roots: Tensor, lengths: Tensor,
    num_nodes: int, max_ngram_size: int, num_tokens_short: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A step of `LookupOnDevice`: writes the accepted path into ``text (B, capacity + 1)``, and reads the next chains."""
    batch, capacity = text.shape[0], text.shape[1] - 1
    length, cuts = path.shape[1], -(-capacity // _CUT)
    best = text.new_empty((batch, cuts))
    drafted, parents = text.new_empty((2, batch, num_nodes)).unbind()
    _write_path[(batch,)](
        text, tokens.contiguous(), path.contiguous(), count, roots, lengths, tokens.shape[1], length, capacity,
        M=triton.next_power_of_2(length), num_warps=1,
    )  # fmt: skip
    _longest_match[(batch, cuts)](text, lengths, best, capacity, SIZES=max_ngram_size, CUT=_CUT)
    _follow[(batch,)](
        text, lengths, best, drafted, parents, capacity, cuts, num_nodes, max_ngram_size, num_tokens_short,
        CUTS=triton.next_power_of_2(cuts), N=triton.next_power_of_2(num_nodes), num_warps=1,
    )  # fmt: skip
    return drafted, parents


@triton.jit
def _read_template(
    successors, shares, roots, paths, above, tokens, parents, vocabulary, k, template, nodes, DEPTH: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    row, node = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    root = tl.load(roots + row)
    token = tl.zeros((N,), tl.int64) + tl.minimum(root, vocabulary - 1)
    score = tl.where(node < template, 1.0, -1.0)
    for step in tl.static_range(DEPTH):  # each node goes down its own path
        rank = tl.load(paths + node * DEPTH + step, mask=node < template, other=-1)
        goes, at = rank >= 0, token * k + rank
        share = tl.load(shares + at, mask=goes & (token >= 0), other=0.0)
        token = tl.where(goes, tl.load(successors + at, mask=goes & (token >= 0), other=-1), token)
        score = tl.where(goes, score * share, score)
    # The best nodes, of equals the earlier: a node never scores above its parent, which comes before it.
    before = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & (node[None, :] < node[:, None]))
    chosen = (tl.sum(before.to(tl.int32), 1) < nodes) & (node < template)
    number = tl.cumsum(chosen.to(tl.int32), 0)  # from 1, in the template's order
    parent = tl.load(above + node, mask=node < template, other=-1)
    kept = tl.where(chosen, number, 0)
    parent = tl.sum(tl.where(node[None, :] == parent[:, None], kept[None, :], 0), 1) - 1
    parent = tl.where(score > 0, parent, -1)
    token = tl.where(node == 0, root, tl.maximum(token, 0))
    tl.store(tokens + row * nodes + number - 1, token, mask=chosen)
    tl.store(parents + row * nodes + number - 1, parent.to(tl.int64), mask=chosen)


def read_template(
    successors: Tensor, shares: Tensor, roots: Tensor, paths: Tensor, above: Tensor, num_nodes: int
) -> tuple[Tensor, Tensor]:
    """`RecyclingOnDevice.read`.

    Args:
        successors, shares: ``(V, k)``, the matrix.
        roots: ``(B,)``.
        paths: ``(n, depth)``, the template's nodes as ranks from the root, -1 behind a path's end; parents come first.
        above: ``(n,)``, their parents, -1 for the root.
        num_nodes: that are kept.
    """
    batch, (template, depth) = roots.shape[0], paths.shape
    tokens, parents = roots.new_empty((2, batch, num_nodes)).unbind()
    N = triton.next_power_of_2(template)
    _read_template[(batch,)](
        successors, shares, roots, paths, above, tokens, parents, *successors.shape, template, num_nodes,
        DEPTH=depth, N=N, num_warps=4 if N > 32 else 1,
    )  # fmt: skip
    return tokens, parents
