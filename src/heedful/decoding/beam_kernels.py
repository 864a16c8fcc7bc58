"""A level of `LongSpec`'s beam tree on a GPU, in few launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(x, cos, sin, out, heads, rows, x_b, x_h, x_t, turn_b, turn_t, HEADS: tl.constexpr, D: tl.constexpr):
    batch, row = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    head, column = tl.arange(0, HEADS), tl.arange(0, D)
    inside = (head < heads)[:, None] & (column >= 0)[None, :]
    source = x + batch * x_b + row * x_t + head[:, None] * x_h
    turn = batch * turn_b + row * turn_t + column
    half = tl.load(source + ((column + D // 2) % D)[None, :], mask=inside).to(tl.float32)
    whole = tl.load(source + column[None, :], mask=inside).to(tl.float32)
    turned = whole * tl.load(cos + turn)[None, :] + half * tl.load(sin + turn)[None, :]
    target = out + ((batch * rows + row) * heads + head[:, None]) * D + column[None, :]
    tl.store(target, turned.to(out.dtype.element_ty), mask=inside)


def takes(x: Tensor) -> bool:
    """Whether `rotate` takes states ``(B, heads, T, D)``: without gradients, D a power of two, not float64."""
    width = x.shape[3]
    return x.is_cuda and x.dtype != torch.float64 and width & (width - 1) == 0 and not torch.is_grad_enabled()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` ``(B, heads, T, D)``, of any strides, turned by float32 ``(B or 1, T or 1, D)``: `longspec._rotate`."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, rows, width = x.shape
    cos, sin = (turn.contiguous().expand(batch, rows, width) for turn in (cos, sin))
    out = torch.empty((batch, rows, heads, width), dtype=x.dtype, device=x.device)
    _rotate[(batch * rows,)](
        x, cos, sin, out, heads, rows, *x.stride()[:3], *cos.stride()[:2],
        HEADS=triton.next_power_of_2(heads), D=width, num_warps=2,
    )  # fmt: skip
    return out.transpose(1, 2)


@triton.jit
def _best_of_cut(logits, values, places, tops, sums, n, stride, width, CUT: tl.constexpr):
    row, cut = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, CUT)
    at = cut * CUT + column
    x = tl.load(logits + row * stride + at, mask=at < n, other=float("-inf")).to(tl.float32)
    own = row * tl.num_programs(1) + cut
    top = tl.max(x, 0)
    tl.store(tops + own, top)
    tl.store(sums + own, tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)), 0))
    for k in range(width):
        best, place = tl.max(x, 0, return_indices=True)
        tl.store(values + own * width + k, best)
        tl.store(places + own * width + k, tl.minimum(cut * CUT + place, n - 1))
        x = tl.where(column == place, float("-inf"), x)


@triton.jit
def _best_of_level(
    values, places, tops, sums, scores, scores_out, tokens, parents, seen,
    level, cuts, width, begin, nodes, inner,
    LEVEL: tl.constexpr, CUTS: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    batch, row, cut, each = tl.program_id(0).to(tl.int64), tl.arange(0, LEVEL), tl.arange(0, CUTS), tl.arange(0, EACH)
    at = (batch * level + row)[:, None] * cuts + cut[None, :]
    inside = (row < level)[:, None] & (cut < cuts)[None, :]
    top = tl.load(tops + at, mask=inside, other=float("-inf"))
    whole = tl.max(top, 1)
    whole = tl.where(whole == float("-inf"), 0.0, whole)
    total = tl.sum(tl.load(sums + at, mask=inside, other=0.0) * tl.exp(top - whole[:, None]), 1)
    score = tl.load(scores + batch * level + row, mask=row < level, other=0.0) - whole - tl.log(total)
    inside = (row < level)[:, None] & (each < cuts * width)[None, :]
    x = tl.load(
        values + (batch * level + row)[:, None] * (cuts * width) + each[None, :], mask=inside, other=float("-inf")
    )
    x = tl.reshape(tl.where(inside, x + score[:, None], float("-inf")), (LEVEL * EACH,))
    number, new = tl.arange(0, LEVEL * EACH), tl.arange(0, WIDTH)
    chosen = tl.zeros((WIDTH,), tl.int32)
    reached = tl.zeros((WIDTH,), tl.float32)
    for k in range(width):
        best, place = tl.max(x, 0, return_indices=True)
        chosen, reached = tl.where(new == k, place, chosen), tl.where(new == k, best, reached)
        x = tl.where(number == place, float("-inf"), x)
    kept, end = new < width, begin + level
    above, candidate = chosen // EACH, chosen % EACH
    token = tl.load(places + (batch * level + above) * (cuts * width) + candidate, mask=kept, other=0)
    tl.store(scores_out + batch * width + new, reached, mask=kept)
    tl.store(tokens + batch * nodes + end + new, token.to(tl.int64), mask=kept)
    tl.store(parents + batch * nodes + end + new, (begin + above).to(tl.int64), mask=kept)
    # A node sees what its parent sees, and itself.
    node = tl.arange(0, INNER)
    square = (kept & (end + new < inner))[:, None] & (node < inner)[None, :]
    seen += batch * inner * inner
    sees = tl.load(seen + (begin + above)[:, None] * inner + node[None, :], mask=square, other=0) != 0
    sees = sees | (node[None, :] == (end + new)[:, None])
    tl.store(seen + (end + new)[:, None] * inner + node[None, :], sees, mask=square)


def grow(
    logits: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, seen: Tensor, begin: int, width: int
) -> Tensor:
    """`longspec._grow`: the best ``width`` of all nodes' best, found in parts of the vocabulary."""
    batch, level, vocabulary = logits.shape
    flat = logits if logits.stride(2) == 1 and logits.stride(0) == level * logits.stride(1) else logits.contiguous()
    # So many parts that one program can go through what is best in each.
    cut = max(1024, triton.next_power_of_2(-(-vocabulary // 32)))
    cuts = -(-vocabulary // cut)
    values, tops, sums = (logits.new_empty(batch * level * cuts * n, dtype=torch.float32) for n in (width, 1, 1))
    places = torch.empty_like(values, dtype=torch.int32)
    reached = scores.new_empty(batch, width)
    _best_of_cut[(batch * level, cuts)](
        flat, values, places, tops, sums, vocabulary, flat.stride(1), width, CUT=cut, num_warps=max(1, cut // 1024)
    )
    rows, each = triton.next_power_of_2(level), triton.next_power_of_2(cuts * width)
    _best_of_level[(batch,)](
        values, places, tops, sums, scores.contiguous(), reached, tokens, parents, seen,
        level, cuts, width, begin, tokens.shape[1], seen.shape[1],
        LEVEL=rows, CUTS=triton.next_power_of_2(cuts), EACH=each, WIDTH=triton.next_power_of_2(width),
        INNER=triton.next_power_of_2(seen.shape[1]), num_warps=min(8, max(1, rows * each // 512)),
    )  # fmt: skip
    return reached
