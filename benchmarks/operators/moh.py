"""Mixture-of-Head: the layer with skipped heads against all heads masked, and against plain multi-head attention.

32 heads, causal, batch 1; 75 % of heads active (16 shared, 8 of 16 routed) and 50 % (8 shared, 8 of 24). The routers have random
weights, so each routed head has about its share of the tokens, scattered: no tile is spared by luck. `mha` is the same layer's
weights with all heads and no gates, SDPA's fastest kernel. "training" is forward and the gradients of the input and all weights.
Times are those of CUDA graph replays, for all alike: the layer makes some forty small kernels more than plain attention.
The parts of a forward pass follow: what a chosen head costs, beside what all heads cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from triton.testing import do_bench_cudagraph

from heedful.attention import dispatch_heads, routed_attention, routed_output, routed_projection
from heedful.layers import MixtureOfHeads
from heedful.layers.moh import layer as layers

if TYPE_CHECKING:
    from attention import Bench

HEADS = 32
LENGTHS = (4096, 8192, 16384, 32768)
SHARES = {"75 %": (16, 8), "50 %": (8, 8)}


def plain(layer: MixtureOfHeads, x: Tensor) -> Tensor:
    query, key, value = (
        p(x).unflatten(-1, (HEADS, layer.head_dim)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


def replayed(run: Callable[[], Any]) -> float:
    """Milliseconds of a call in the replay of a CUDA graph."""
    return float(do_bench_cudagraph(run, rep=2, return_mode="median"))


def with_limit(limit: int, run: Any) -> Any:
    """The layer computes chosen heads alone (0) or all of them (a huge number)."""
    before, layers.SKIP_FROM = layers.SKIP_FROM, limit
    try:
        return run()
    finally:
        layers.SKIP_FROM = before


def measure_layer(bench: Bench, dim: int, share: str, length: int) -> None:
    torch.manual_seed(0)
    layer = MixtureOfHeads(dim, HEADS, *SHARES[share], causal=True).to("cuda", torch.bfloat16)
    x = torch.randn(1, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    want = None
    if length <= 4096:
        with torch.no_grad():
            want = with_limit(10**9, lambda: layer.float()(x.float()))
            layer.bfloat16()
    ways = {
        "skipped": lambda: with_limit(0, lambda: layer(x)),
        "masked": lambda: with_limit(10**9, lambda: layer(x)),
        "mha": lambda: plain(layer, x),
    }
    case, first = f"{share} dim {dim} T {length}", {}
    for way, run in ways.items():
        used = [x, *(p for p in layer.parameters() if way != "mha" or p.shape[0] == dim)]

        def both(run: Any = run, used: Any = used) -> Any:
            return torch.autograd.grad(run(), used, grad)

        with torch.no_grad():
            took = replayed(run)
            error = None if want is None or way == "mha" else bench.error(run(), want)
        first.setdefault("forward", took)
        bench.row(f"forward {case}", way, ms=took, error=error, length=length, over_ours=took / first["forward"])
        took = replayed(both)
        first.setdefault("both", took)
        bench.row(
            f"training {case}", way, ms=took, peak=bench.peak(both), length=length, over_ours=took / first["both"]
        )


@torch.no_grad()
def measure_parts(bench: Bench, dim: int, share: str, length: int) -> None:
    torch.manual_seed(0)
    shared, k = SHARES[share]
    routed, size = HEADS - shared, dim // HEADS
    layer = MixtureOfHeads(dim, HEADS, shared, k, causal=True).to("cuda", torch.bfloat16)
    x = torch.randn(1, length, dim, device="cuda", dtype=torch.bfloat16)
    query, key, value = (torch.randn(1, HEADS, length, size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    active = layer._gates(x, None, False)[0][..., shared:] > 0
    dispatch = dispatch_heads(active)
    weight = layer.q_proj.weight[shared * size :]
    heads = routed_attention(query[:, shared:], key[:, shared:], value[:, shared:], dispatch)
    rows = heads.transpose(1, 2)[0].contiguous()
    out = layer.o_proj.weight[:, shared * size :]
    by_head = out.T.unflatten(0, (routed, size))
    sdpa = functional.scaled_dot_product_attention
    parts = {
        "routers": lambda: layer._gates(x, None, False),
        "sorting": lambda: dispatch_heads(active),
        f"query: {routed} routed heads, chosen": lambda: routed_projection(x, weight.unflatten(0, (routed, size)).mT, dispatch),
        f"query: {routed} routed heads, all": lambda: functional.linear(x, weight),
        f"attention: {routed} routed heads, chosen": lambda: routed_attention(query[:, shared:], key[:, shared:], value[:, shared:], dispatch),
        f"attention: {routed} routed heads, all": lambda: sdpa(query[:, shared:], key[:, shared:], value[:, shared:], is_causal=True),
        f"attention: {shared} shared heads": lambda: sdpa(query[:, :shared], key[:, :shared], value[:, :shared], is_causal=True),
        f"output: {routed} routed heads, chosen": lambda: routed_output(rows[None], by_head, dispatch, most=k),
        f"output: {routed} routed heads, over zeros": lambda: functional.linear(rows.flatten(1), out),
        "key and value projections": lambda: (layer.k_proj(x), layer.v_proj(x)),
    }  # fmt: skip
    for part, run in parts.items():
        bench.row(f"part {share} dim {dim} T {length}", part, ms=replayed(run))


def measure(bench: Bench) -> None:
    lengths = LENGTHS[:2] if bench.quick else LENGTHS
    for dim in (4096, 2048):
        for share in SHARES:
            for length in lengths:
                measure_layer(bench, dim, share, length)
        for share in SHARES:
            measure_parts(bench, dim, share, 8192 if bench.quick else 16384)
