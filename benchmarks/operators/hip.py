"""HiP attention beside dense SDPA: prefill, the staged scan, and decode steps in a CUDA graph; with errors.

32 query and 8 key heads of 128, bf16. Inputs drift over time (AR(1), coefficient 0.99; logits have deviation 3), as the
method assumes of its inputs. "error" is the distance to dense attention over the second half of the rows; beside it
stand the reference's at its default sizes on the same inputs (of the first key head) and the ratio of the two, since the kernels
are timed with `block_stride_k=2`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from heedful.attention import hip_attention
from heedful.attention.hip.decode import HiPDecodeState, hip_decode

HEADS, KV_HEADS, DIM = 32, 8, 128
SIZES: dict[str, Any] = {"top_k": 512, "sliding_window": 256, "num_sink_tokens": 16, "block_stride_k": 2}
STAGES = [(64, 4, 256, None), (64, 4, 32, 32768), (64, 1, 8, 8192)]
DENSE = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def drift(coefficient: float, heads: int, length: int, dim: int, seed: int) -> Tensor:
    """`(1, heads, length, dim)` of unit variance: each step is `coefficient` times the last and fresh noise."""
    state = torch.randn(1, heads, length, dim, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    state[:, :, 1:] *= (1 - coefficient**2) ** 0.5
    step = 1
    while step < length and coefficient**step > 1e-7:  # sums over 1, 2, 4, ... steps
        later = state.clone()
        later[:, :, step:] += coefficient**step * state[:, :, :-step]
        state, step = later, 2 * step
    return state.bfloat16()


def dense(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend, scale: float, causal: bool = True) -> Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=True
        )


def distance(got: Tensor, want: Tensor) -> float:
    half = slice(want.shape[2] // 2, None)
    return float((got[:, :, half].float() - want[:, :, half].float()).norm() / want[:, :, half].float().norm())


def errors(query: Tensor, key: Tensor, value: Tensor, output: Tensor, exact: Tensor, scale: float) -> dict[str, float]:
    """Error of the kernels, of the reference at its defaults, and their ratio, on the heads of one key head."""
    some = slice(0, query.shape[1] // key.shape[1])
    default = hip_attention(query[:, some], key[:, :1], value[:, :1], scale=scale, impl="reference")
    assert isinstance(default, Tensor)
    ours, theirs = distance(output[:, some], exact[:, some]), distance(default, exact[:, some])
    return {"reference_error": theirs, "ratio": ours / theirs}


def small(bench: Any) -> None:
    """a = 0.9 at T = 4096 and heads of 64: the harder of the two processes."""
    scale = 3 * 64**-0.5
    query, key, value = (drift(0.9, heads, 4096, 64, seed) for seed, heads in enumerate((8, 2, 2)))
    exact = dense(query, key, value, SDPBackend.FLASH_ATTENTION, scale)
    run = lambda: hip_attention(query, key, value, scale=scale, impl="triton", **SIZES)  # noqa: E731
    output = run()
    bench.row(
        "a=0.9 4k, 8 heads of 64",
        "HiP",
        ms=bench.time(run),
        error=distance(output, exact),
        **errors(query, key, value, output, exact, scale),
    )


def prefill(bench: Any, length: int, before: dict[str, float]) -> None:
    """One length. `before`: times of the last one, half as long."""
    scale = 3 * DIM**-0.5
    case = f"prefill {length // 1024}k"
    query, key, value = (
        drift(0.99, heads, length, DIM, seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    exact = dense(query, key, value, SDPBackend.FLASH_ATTENTION, scale)

    def staged() -> Any:
        sizes = {"stages": STAGES, "top_k": 2048, "sliding_window": 1024, "num_sink_tokens": 256}
        return hip_attention(query, key, value, scale=scale, impl="triton", **sizes)

    contestants: dict[str, Callable[[], Any]] = {
        name: functools.partial(dense, query, key, value, backend, scale) for name, backend in DENSE.items()
    }
    contestants["HiP"] = lambda: hip_attention(query, key, value, scale=scale, impl="triton", **SIZES)
    contestants["HiP, in stages"] = staged
    fastest = float("inf")
    for name, run in contestants.items():
        output = run()
        ms = bench.time(run)
        more = errors(query, key, value, output, exact, scale) if name == "HiP" else {}
        if name.startswith("HiP"):
            more["speedup"] = fastest / ms
        else:
            fastest = min(fastest, ms)
        if name in before:
            more["growth"] = ms / before[name]
        before[name] = ms
        bench.row(case, name, ms=ms, error=distance(output, exact), peak=bench.peak(run), length=length, **more)
        del output


def flex_attention(bench: Any, length: int) -> None:
    """FlexAttention, compiled, with a dense causal mask: what a user of masks would run."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    scale = 3 * DIM**-0.5
    query, key, value = (
        drift(0.99, heads, length, DIM, seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    run = lambda: compiled(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)  # noqa: E731
    error = distance(run(), dense(query, key, value, SDPBackend.FLASH_ATTENTION, scale))
    bench.row(
        f"prefill {length // 1024}k",
        "FlexAttention, dense causal",
        ms=bench.time(run),
        error=error,
        peak=bench.peak(run),
        length=length,
    )


def decoding(bench: Any, length: int) -> None:
    """Milliseconds a step: eight steps in one CUDA graph, the first of which chooses anew, or all of them.

    "error" is the last step's distance to the reference with the same choice; `from_dense` that to dense attention.
    """
    steps, scale = 8, 3 * DIM**-0.5
    case = f"decode {length // 1024}k"
    key, value = (drift(0.99, KV_HEADS, length, DIM, seed) for seed in (1, 2))
    query = drift(0.99, HEADS, steps, DIM, 0)
    exact = dense(query[:, :, -1:], key, value, SDPBackend.FLASH_ATTENTION, scale, causal=False)
    fastest = float("inf")
    for name, backend in DENSE.items():
        ms = bench.time(functools.partial(dense, query[:, :, -1:], key, value, backend, scale, False), graph=True)
        fastest = min(fastest, ms)
        bench.row(case, name, ms=ms, length=length)
    state = HiPDecodeState(1, HEADS, length, device="cuda", **SIZES)
    lengths = torch.arange(length - steps + 1, length + 1, device="cuda")

    def step(number: int, refresh_interval: int, impl: str) -> Tensor:
        row, now = query[:, :, number : number + 1], lengths[number : number + 1]
        return hip_decode(row, key, value, now, state, refresh_interval=refresh_interval, scale=scale, impl=impl)

    def run(refresh_interval: int) -> Tensor:
        state.chosen_at.fill_(-1)  # as the step of a refresh finds it
        return [step(number, refresh_interval, "triton") for number in range(steps)][-1]

    for interval, name in ((steps, "HiP, a choice for 8 steps"), (1, "HiP, a choice each step")):
        output = run(interval)
        error = bench.error(output, step(steps - 1, steps, "reference"))  # nothing is due: the choice is the same
        ms = bench.time(functools.partial(run, interval), graph=True) / steps
        from_dense = bench.error(output, exact)
        bench.row(case, name, ms=ms, error=error, length=length, speedup=fastest / ms, from_dense=from_dense)


def measure(bench: Any) -> None:
    small(bench)
    for length in (131072,) if bench.quick else (32768, 131072, 524288):
        decoding(bench, length)
    before: dict[str, float] = {}
    for length in (16384, 32768) if bench.quick else (4096, 8192, 16384, 32768, 65536, 131072):
        prefill(bench, length, before)
    flex_attention(bench, 32768)
