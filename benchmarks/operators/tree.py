"""Tree attention: n nodes of a draft tree over a prefix of P keys, 32 query / 8 KV heads, D = 128, batch 1.

Peers: SDPA with a dense bool mask (what a tree takes without this operator), flash attention without any mask (which answers
another question, as fast as flash can), and reading K and V once, a plain reduction over both, measured. Times are those of
CUDA graph replays with K and V cold: below 16k keys the replays go round several caches, so that none stays in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench_cudagraph

from heedful.attention import merge_attention_states, tree_attention

if TYPE_CHECKING:
    from attention import Bench

BATCH, HEADS, KV_HEADS, DIM = 1, 32, 8, 128
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072, "512k": 524288}
NODES = (1, 8, 16, 32, 64)
#: Bytes that the caches a replay goes round take together: several times the L2 cache.
COLD = 3 * 2**27


def branching(nodes: int) -> Tensor:
    """The mask of a tree of which every node has three children."""
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        mask[node] |= mask[(node - 1) // 3]
    return mask.cuda()


def definition(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: int, block: int = 8192) -> Tensor:
    """The operator in float64, over blocks of the prefix that are merged by log-sum-exp, and the tree with a dense mask."""
    output, lse = None, None
    ends = [*range(block, prefix, block), prefix, prefix + mask.shape[0]]
    for start, end in zip([0, *ends], ends, strict=False):
        keys, values = (x[:, :, start:end].double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
        logits = query.double() @ keys.mT * DIM**-0.5
        if start == prefix:
            logits = logits.masked_fill(~mask, -torch.inf)
        part = logits.softmax(-1) @ values, logits.logsumexp(-1)
        output, lse = part if output is None or lse is None else merge_attention_states(output, lse, *part)
    assert output is not None
    return output


def cold(bench: Bench, run: Callable[[Tensor, Tensor], Any], caches: list[Tensor]) -> float:
    """Milliseconds of a call, each of a graph's calls with the next keys and values."""

    def round_trip() -> None:
        for key, value in caches:
            run(key, value)

    took = do_bench_cudagraph(round_trip, rep=10 if bench.quick else 20, return_mode="median")
    return float(took) / len(caches)


def measure_nodes(bench: Bench, nodes: int, label: str, prefix: int, caches: list[Tensor], reading: float) -> None:
    query = torch.randn(BATCH, HEADS, nodes, DIM, device="cuda", dtype=torch.bfloat16)
    mask = branching(nodes)
    length = torch.tensor([prefix], dtype=torch.int32, device="cuda")
    end = prefix + nodes
    dense_mask = torch.ones(1, 1, nodes, end, dtype=torch.bool, device="cuda")
    dense_mask[..., prefix:] = mask

    def ours(key: Tensor, value: Tensor) -> Tensor:
        return tree_attention(query, key, value, mask, length, impl="triton")

    def dense(key: Tensor, value: Tensor) -> Tensor:
        key, value = key[:, :, :end], value[:, :, :end]
        return scaled_dot_product_attention(query, key, value, attn_mask=dense_mask, enable_gqa=True)

    def flash(key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key[:, :, :end], value[:, :, :end], enable_gqa=True)

    key, value = caches[0]
    want = definition(query, key, value, mask, prefix)
    case, first = f"{nodes} nodes {label}", None
    for contestant, run in (("heedful tree_attention", ours), ("SDPA, dense mask", dense)):
        took = cold(bench, run, caches)
        first = first or took
        ratio = {"over_reading": took / reading, "over_ours": took / first}
        error = bench.error(run(key, value), want)
        peak = bench.peak(lambda run=run: run(key, value))  # type: ignore[misc]
        bench.row(case, contestant, ms=took, error=error, peak=peak, length=prefix, **ratio)
    took = cold(bench, flash, caches)
    ratio = {"over_reading": took / reading, "over_ours": took / first}
    bench.row(case, "flash, no mask: not the tree", ms=took, length=prefix, **ratio)


def measure(bench: Bench) -> None:
    """Times, errors, and two ratios: over reading once, and over ours."""
    for label, prefix in LENGTHS.items():
        if bench.quick and prefix > 32768:
            continue
        torch.manual_seed(0)
        shape = (2, BATCH, KV_HEADS, prefix + max(NODES), DIM)
        number = max(1, COLD // (2 * KV_HEADS * prefix * DIM * 2))
        caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(number)]
        # Of pairs of numbers as one float32: what comes out means nothing, the reading is what is timed.
        reading = cold(bench, lambda *cache: [x.view(torch.float32).reshape(4096, -1).sum(1) for x in cache], caches)
        rate = caches[0].nbytes / reading / 1e9
        bench.row(f"read {label}", "K and V read once", ms=reading, length=prefix, tb_per_s=rate)
        for nodes in NODES:
            measure_nodes(bench, nodes, label, prefix, caches, reading)
        del caches
        torch.cuda.empty_cache()
