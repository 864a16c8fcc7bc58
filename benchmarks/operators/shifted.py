"""Shifted sparse attention beside dense causal attention, groups of a quarter of the row: `ms` is forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heedful.attention import shifted_sparse_attention

HEADS, KV_HEADS = 32, 8


def tensors(length: int, dim: int) -> list[Tensor]:
    """Query, key, value and the output's gradient, (B, T, H, D) in memory."""
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(1, length, n, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in heads]


def sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def flex(mask: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Any = _compiled_flex()(query, key, value, block_mask=mask, enable_gqa=True)
    return out  # type: ignore[no-any-return]


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_mask(length: int, size: int) -> Any:
    """The same visible set as a BlockMask: the peer that a user would write."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shift = torch.where(h >= HEADS - HEADS // 4, size // 2, 0)
        # Not divided below zero: the first half group is number 0.
        same = (i + size - shift) // size == (j + size - shift) // size
        return (same | (j < 4)) & (j <= i)

    return create_block_mask(seen, 1, HEADS, length, length, device="cuda", _compile=True)


def error_of_gradients(run: Any, inputs: list[Tensor], size: int) -> float:
    """The largest relative error of output and gradients against the definition in float64, on the first heads."""
    query, key, value, d_output = inputs
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = run(*leaves)
    got = [output, *torch.autograd.grad(output, leaves, d_output)]
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    exact = shifted_sparse_attention(*wide, size, impl="reference")
    want = [exact, *torch.autograd.grad(exact, wide, d_output.double())]
    return max(
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(got, want, strict=True)
    )


def measure(bench: Any) -> None:
    """An interrupt (Ctrl-C) ends it; what was measured until then is kept."""
    lengths = (32768,) if bench.quick else (32768, 8192, 131072, 65536)
    try:
        for dim, length in [*((128, length) for length in lengths), (64, 32768)]:
            size = length // 4
            contestants: dict[str, Any] = {
                "heedful, SF-Attn": functools.partial(shifted_sparse_attention, group_size=size, impl="triton"),
                "heedful, S2-Attn": functools.partial(
                    shifted_sparse_attention,
                    group_size=size,
                    shift_ratio=0.5,
                    num_sink_tokens=0,
                    boundary="wrap",
                    impl="triton",
                ),
            }
            if length <= 65536:
                contestants["SDPA, cuDNN"] = functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION)
            if length <= 32768:
                contestants["SDPA, flash"] = functools.partial(sdpa, SDPBackend.FLASH_ATTENTION)
            for name, run in contestants.items():
                compare(bench, name, run, dim, length)
        if not bench.quick:
            compare(bench, "FlexAttention, the same mask", functools.partial(flex, flex_mask(32768, 8192)), 128, 32768)
    except KeyboardInterrupt:
        print("interrupted")


def compare(bench: Any, name: str, run: Any, dim: int, length: int) -> None:
    query, key, value, d_output = tensors(length, dim)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]

    def both() -> None:
        torch.autograd.grad(run(*leaves), leaves, d_output)

    error = None
    if name == "heedful, SF-Attn":  # at a length whose definition in float64 takes no time
        short = functools.partial(shifted_sparse_attention, group_size=1024, impl="triton")
        error = error_of_gradients(short, tensors(4096, dim), 1024)
    with torch.no_grad():
        forward = bench.time(functools.partial(run, query, key, value))
    bench.row(
        f"D={dim} T={length // 1024}k", name, ms=bench.time(both), error=error, peak=bench.peak(both), length=length,
        forward_ms=forward,
    )  # fmt: skip
