"""Mixture-of-Head: the layer with skipped heads against all heads masked, and against plain multi-head attention.

32 heads, causal, batch 1; 75 % of heads active (16 shared, 8 of 16 routed) and 50 % (8 shared, 8 of 24). The routers have random
weights, so each routed head has about its share of the tokens, scattered: no tile is spared by luck. `mha` is the same layer's
weights with all heads and no gates, SDPA's fastest kernel. Backward are the gradients of the input and all weights.
The parts of a forward pass follow: what a chosen head costs, beside what all heads cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from heedful.attention import dispatch_heads, routed_attention, routed_output, routed_projection
from heedful.layers import MixtureOfHeads
from heedful.layers.moh import layer as layers

if TYPE_CHECKING:
    from attention import Bench

HEADS = 32
LENGTHS = (2048, 4096, 8192, 16384, 32768)
SHARES = {"75 %": (16, 8), "50 %": (8, 8)}


def plain(layer: MixtureOfHeads, x: Tensor) -> Tensor:
    query, key, value = (
        p(x).unflatten(-1, (HEADS, layer.head_dim)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


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
    ways = {
        "skipped": lambda: with_limit(0, lambda: layer(x)),
        "masked": lambda: with_limit(10**9, lambda: layer(x)),
        "mha": lambda: plain(layer, x),
    }
    case, first = f"{share} dim {dim} T {length}", {}
    with torch.no_grad():
        want = with_limit(10**9, lambda: layer.float()(x.float())) if length <= 8192 else None
        layer.bfloat16()
    for way, run in ways.items():
        with torch.no_grad():
            took = bench.time(run)
            error = None if want is None or way == "mha" else bench.error(run(), want)
            peak = bench.peak(run)
        first.setdefault("forward", took)
        bench.row(
            f"forward {case}", way, ms=took, error=error, peak=peak, length=length, over_ours=took / first["forward"]
        )
        used = [x, *(p for p in layer.parameters() if way != "mha" or p.shape[0] == dim)]
        y = run()
        took = bench.time(lambda y=y, used=used: torch.autograd.grad(y, used, grad, retain_graph=True))  # type: ignore[misc]
        first.setdefault("backward", took)
        bench.row(f"backward {case}", way, ms=took, length=length, over_ours=took / first["backward"])
        del y


@torch.no_grad()
def measure_parts(bench: Bench, dim: int, share: str, length: int) -> None:
    torch.manual_seed(0)
    shared, k = SHARES[share]
    routed, size = HEADS - shared, dim // HEADS
    layer = MixtureOfHeads(dim, HEADS, shared, k, causal=True).to("cuda", torch.bfloat16)
    x = torch.randn(1, length, dim, device="cuda", dtype=torch.bfloat16)
    query, key, value = (torch.randn(1, HEADS, length, size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    active = layer._gates(x, None)[0][..., shared:] > 0
    dispatch = dispatch_heads(active)
    weight = layer.q_proj.weight[shared * size :]
    heads = routed_attention(query[:, shared:], key[:, shared:], value[:, shared:], dispatch)
    rows = heads.transpose(1, 2)[0].contiguous()
    out = layer.o_proj.weight[:, shared * size :]
    by_head = out.T.unflatten(0, (routed, size))
    sdpa = functional.scaled_dot_product_attention
    parts = {
        "routers": lambda: layer._gates(x, None),
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
        bench.row(f"part {share} dim {dim} T {length}", part, ms=bench.time(run))


def measure(bench: Bench) -> None:
    lengths = LENGTHS[1:3] if bench.quick else LENGTHS
    for dim in (4096, 2048):
        for share in SHARES:
            for length in lengths:
                measure_layer(bench, dim, share, length)
            measure_parts(bench, dim, share, lengths[-2])
