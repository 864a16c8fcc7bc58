"""Landmark attention: causal, 32 query / 8 KV heads, D = 128, blocks of 63 tokens and a landmark, others beside them.

Peers: SDPA with flash and with cuDNN, causal over the same rows. They compute plain attention, another function: what counts is
how much the two levels cost. FlexAttention cannot express them (a gate comes after a softmax). Backward by `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heedful.attention import landmark_attention

if TYPE_CHECKING:
    from attention import Bench

HEADS, KV_HEADS, DIM = 32, 8, 128


def draw(length: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(1, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return query, key, value


def both_ways(bench: Bench, run: Callable[..., Tensor], tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    with torch.no_grad():
        forward = bench.time(lambda: run(*tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = run(*leaves)
    weight = torch.randn_like(output)
    backward = bench.time(lambda: torch.autograd.grad(output, leaves, weight, retain_graph=True))
    return forward, backward


def measure_error(bench: Bench) -> dict[int, float]:
    """Relative error at 4k, against the reference in float64."""
    errors = {}
    tensors = draw(4096)
    for positions in (64, 51, 1024):
        marks = torch.arange(4096, device="cuda") % positions == positions - 1
        want = landmark_attention(*(x[:, :1].double() for x in tensors), marks, impl="reference")
        one = tuple(x[:, :1] for x in tensors)
        errors[positions] = bench.error(landmark_attention(*one, marks, impl="triton"), want)
    return errors


def measure(bench: Bench) -> None:
    """Times of forward and backward, peak memory; `over_flash`: the ratio to SDPA's flash attention in the same run."""
    torch.manual_seed(0)
    errors = measure_error(bench)
    for label, length in {"32k": 32768, "8k": 8192}.items():
        if bench.quick and length > 8192:
            continue
        tensors = draw(length)

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        contestants: list[tuple[str, Callable[..., Tensor], float | None]] = [
            ("SDPA flash: no landmarks", flash, None),
            ("SDPA cuDNN: no landmarks", cudnn, None),
        ]
        for positions in (64, 51, 1024):
            marks = torch.arange(length, device="cuda") % positions == positions - 1

            def ours(q: Tensor, k: Tensor, v: Tensor, marks: Tensor = marks) -> Tensor:
                return landmark_attention(q, k, v, marks, impl="triton")

            contestants.append((f"heedful, blocks of {positions}", ours, errors[positions]))
        base = None
        for name, run, error in contestants:
            forward, backward = both_ways(bench, run, tensors)
            base = base or (forward, backward)
            peak = bench.peak(lambda run=run, tensors=tensors: run(*tensors))  # type: ignore[misc]
            bench.row(
                f"forward {label}",
                name,
                ms=forward,
                error=error,
                peak=peak,
                length=length,
                over_flash=forward / base[0],
            )
            bench.row(f"backward {label}", name, ms=backward, length=length, over_flash=backward / base[1])
