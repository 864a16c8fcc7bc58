"""New keys and values go to their rows of a cache in one launch, wherever in each row of the batch they belong."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy(new, old, batch, head, at, place, new_b, new_h, new_t, old_b, old_h, old_t, D: tl.constexpr, POWER: tl.constexpr):  # fmt: skip
    columns = tl.arange(0, POWER)
    source = new + batch * new_b + head * new_h + at * new_t + columns
    target = old + batch * old_b + head * old_h + place * old_t + columns
    tl.store(target, tl.load(source, mask=columns < D).to(old.dtype.element_ty), mask=columns < D)


@triton.jit
def _write(
    new_keys, new_values, keys, values, places, rows, places_b,
    nk_b, nk_h, nk_t, nv_b, nv_h, nv_t, k_b, k_h, k_t, v_b, v_h, v_t,
    DK: tl.constexpr, DV: tl.constexpr, DK_POWER: tl.constexpr, DV_POWER: tl.constexpr,
):  # fmt: skip
    batch, at, head = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows, tl.program_id(1).to(tl.int64)
    place = tl.load(places + batch * places_b + at)
    _copy(new_keys, keys, batch, head, at, place, nk_b, nk_h, nk_t, k_b, k_h, k_t, DK, DK_POWER)
    _copy(new_values, values, batch, head, at, place, nv_b, nv_h, nv_t, v_b, v_h, v_t, DV, DV_POWER)


def write_rows(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, places: Tensor) -> None:
    """Row ``places[b, i]`` of ``keys[b]`` and ``values[b]`` ``(B, H, T, D)`` becomes row i of the new ones ``(B, H, n, D)``.

    Values may have another D than keys. Of equal places any one stays. ``places``: ``(B, n)`` int64, its last stride 1.
    """
    new_keys, new_values = (x if x.stride(3) == 1 else x.contiguous() for x in (new_keys, new_values))
    batch, heads, rows, width = new_keys.shape
    tensors = (new_keys, new_values, keys, values)
    _write[(batch * rows, heads)](
        *tensors, places, rows, places.stride(0), *(stride for x in tensors for stride in x.stride()[:3]),
        DK=width, DV=new_values.shape[3],
        DK_POWER=triton.next_power_of_2(width), DV_POWER=triton.next_power_of_2(new_values.shape[3]), num_warps=1,
    )  # fmt: skip
