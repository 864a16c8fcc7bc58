"""Shifted sparse attention, forward and with the backward pass, beside dense causal attention; groups of a quarter of the row."""

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
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def measure(bench: Any) -> None:
    for dim in (128, 64):
        for length in (8192, 16384, 32768) if bench.quick else (8192, 16384, 32768, 65536, 131072):
            if dim == 64 and length != 32768:
                continue
            size = length // 4
            inputs = tensors(length, dim)
            leaves = [x.detach().requires_grad_() for x in inputs[:3]]
            contestants: dict[str, Any] = {
                "heedful, SF-Attn": lambda q, k, v, size=size: shifted_sparse_attention(q, k, v, size, impl="triton"),
                "heedful, S2-Attn": lambda q, k, v, size=size: shifted_sparse_attention(
                    q, k, v, size, shift_ratio=0.5, num_sink_tokens=0, boundary="wrap", impl="triton"
                ),
                "SDPA, cuDNN": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
                "SDPA, flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
            }
            if length == 32768 and not bench.quick:
                contestants["FlexAttention, the same mask"] = functools.partial(flex, flex_mask(length, size))
            short = tensors(4096, dim)
            for name, run in contestants.items():
                try:
                    error = None
                    if name == "heedful, SF-Attn":  # at a length whose float64 definition fits
                        error = error_of_gradients(lambda q, k, v: shifted_sparse_attention(q, k, v, 1024), short, 1024)

                    def both(run: Any = run, leaves: Any = leaves, d_output: Tensor = inputs[3]) -> None:
                        torch.autograd.grad(run(*leaves), leaves, d_output)

                    with torch.no_grad():
                        forward = bench.time(functools.partial(run, *inputs[:3]))
                    ms = bench.time(both)
                    bench.row(
                        f"D={dim} T={length // 1024}k forward+backward", name, ms=ms, error=error, peak=bench.peak(both),
                        length=length, forward_ms=forward, group=size,
                    )  # fmt: skip
                except (RuntimeError, torch.OutOfMemoryError) as problem:
                    print(f"{name} at {length}: {str(problem)[:120]}")
