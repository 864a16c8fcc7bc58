"""Keeps an accepted path: moves its rows of every layer's keys and values to right behind the text, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _move(addresses, sources, targets, heads, stride_b, stride_h, m,
          like, M: tl.constexpr, D: tl.constexpr, D_POWER: tl.constexpr):  # fmt: skip
    tensor, row, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    base = tl.load(addresses + tensor).to(tl.pointer_type(like.dtype.element_ty))
    base += row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    at, columns = tl.arange(0, M), tl.arange(0, D_POWER)
    inside = (at[:, None] < m) & (columns[None, :] < D)
    source = tl.load(sources + row * m + at, mask=at < m, other=0)
    target = tl.load(targets + row * m + at, mask=at < m, other=0)
    rows = tl.load(base + source[:, None] * D + columns[None, :], mask=inside)
    tl.debug_barrier()  # ranges overlap: no thread may write before all have read
    tl.store(base + target[:, None] * D + columns[None, :], rows, mask=inside)


class RowMover:
    """Moves rows in a fixed set of tensors ``(B, H, T, D)`` of the same shape, contiguous, on a CUDA device."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.like = tensors[0]
        if any(t.shape != self.like.shape or t.dtype != self.like.dtype or not t.is_contiguous() for t in tensors):
            raise ValueError("RowMover takes contiguous tensors of one shape and dtype")
        self.tensors = tensors  # keeps the addresses alive
        self.addresses = torch.tensor([t.data_ptr() for t in tensors], device=self.like.device)

    def __call__(self, sources: Tensor, targets: Tensor) -> None:
        """Row ``targets[b, i]`` becomes what row ``sources[b, i]`` was; both ``(B, m)`` int64."""
        batch, heads, _, width = self.like.shape
        m = sources.shape[1]
        _move[(len(self.tensors), batch * heads)](
            self.addresses, sources, targets, heads, self.like.stride(0), self.like.stride(1), m, self.like,
            M=triton.next_power_of_2(m), D=width, D_POWER=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
