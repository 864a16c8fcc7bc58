"""The arg-max of a few long rows, the logits of a step: many programs a row, where `torch.argmax` has one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST: tl.constexpr = tl.constexpr(-0x80000000)
_MOST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _order(x):
    """int32 that sort like the numbers: zeros alike, NaN above all, as `torch.argmax` has it."""
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, _MOST, bits ^ ((bits >> 31) & _MOST))


@triton.jit
def _best(order, index):
    """The largest, and the least index at which it stands."""
    top = tl.max(order, 0)
    return top, tl.min(tl.where(order == top, index, _MOST), 0)


@triton.jit
def _best_of_cut(x, tops, places, n, stride, CUT: tl.constexpr, BLOCK: tl.constexpr):
    row, cut = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    order = tl.full((BLOCK,), _LEAST, tl.int32)
    index = tl.full((BLOCK,), _MOST, tl.int32)
    for start in range(cut * CUT, cut * CUT + CUT, BLOCK):
        at = start + columns
        new = tl.where(at < n, _order(tl.load(x + row * stride + at, mask=at < n, other=0.0)), _LEAST)
        better = new > order  # of equals the first stays
        order, index = tl.where(better, new, order), tl.where(better, at, index)
    top, place = _best(order, index)
    tl.store(tops + row * tl.num_programs(1) + cut, top)
    tl.store(places + row * tl.num_programs(1) + cut, place)


@triton.jit
def _best_of_row(tops, places, out, cuts, CUTS: tl.constexpr):
    row, cut = tl.program_id(0), tl.arange(0, CUTS)
    top = tl.load(tops + row * cuts + cut, mask=cut < cuts, other=_LEAST)
    place = tl.load(places + row * cuts + cut, mask=cut < cuts, other=_MOST)
    tl.store(out + row, _best(top, place)[1].to(tl.int64))


def row_argmax(x: Tensor) -> Tensor:
    """`x.argmax(-1)` of a CUDA tensor: of equals the first, a NaN above all numbers."""
    rows, n = x.numel() // x.shape[-1], x.shape[-1]
    flat = x.reshape(rows, n)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    cut = 8192 if rows <= 16 else 32768  # numbers of a program
    cuts = -(-n // cut)
    tops, places = torch.empty((2, rows, cuts), dtype=torch.int32, device=x.device)
    out = torch.empty(x.shape[:-1], dtype=torch.long, device=x.device)
    _best_of_cut[(rows, cuts)](flat, tops, places, n, flat.stride(0), CUT=cut, BLOCK=4096, num_warps=8)
    _best_of_row[(rows,)](tops, places, out, cuts, CUTS=triton.next_power_of_2(cuts), num_warps=1)
    return out
