"""Lightning attention: 32 heads, D = E = 128, the slopes of ALiBi, beside flash-linear-attention and softmax attention.

Peers: `chunk_simple_gla` of flash-linear-attention (what its `chunk_lightning_attn` calls) with the same slopes, where it is
installed, with inputs in its own layout; SDPA flash, which computes another function, exactly as long a past. Backward times
are those of `torch.autograd.grad`. Errors are relative to float64, of two heads. The last rows keep batch x length at 524,288
tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heedful.attention import alibi_slopes, lightning_attention

if TYPE_CHECKING:
    from attention import Bench

HEADS, DIM = 32, 128
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072}
TOKENS = 524288
CONSTANT = {"2k": 2048, "8k": 8192, "32k": 32768, "128k": 131072, "512k": 524288}
CHECKED = (3, 30)  # heads whose error is measured: a fast and a slow one
try:
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
except ImportError:  # an optional peer
    chunk_simple_gla = None


def draw(batch: int, length: int) -> list[Tensor]:
    return [torch.randn(batch, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def ours(inputs: list[Tensor], decay: Tensor) -> Tensor:
    output = lightning_attention(*inputs, decay, 1.0, impl="triton")
    assert isinstance(output, Tensor)
    return output


def theirs(inputs: list[Tensor], decay: Tensor) -> Tensor:
    """Inputs and output `(B, T, H, D)`."""
    return chunk_simple_gla(*inputs, g_gamma=-decay, scale=1.0)[0]


def exact(inputs: list[Tensor], decay: Tensor, weight: Tensor) -> list[Tensor]:
    """Output and gradients of the checked heads in float64."""
    leaves = [x[:, CHECKED].double().requires_grad_() for x in inputs]
    output = lightning_attention(*leaves, decay[list(CHECKED)], 1.0, impl="reference", chunk_size=256)
    assert isinstance(output, Tensor)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight[:, CHECKED].double())]


def measure_length(bench: Bench, label: str, length: int) -> None:
    *inputs, weight = draw(1, length)
    decay = alibi_slopes(HEADS).cuda()
    want = exact(inputs, decay, weight) if length <= 32768 or not bench.quick else None
    contestants: list[tuple[str, Any, Any]] = [("heedful lightning_attention", ours, lambda x: x)]
    if chunk_simple_gla is not None:
        contestants.append(("flash-linear-attention", theirs, lambda x: x.transpose(1, 2)))
    first: dict[str, float] = {}
    for name, run, turned in contestants:
        leaves = [turned(x).contiguous().requires_grad_() for x in inputs]
        cotangent = turned(weight).contiguous()
        with torch.no_grad():
            took = bench.time(lambda: run(leaves, decay))  # noqa: B023
            peak = bench.peak(lambda: run(leaves, decay))  # noqa: B023
            output = turned(run(leaves, decay))
            error = None if want is None else bench.error(output[:, CHECKED], want[0])
        ratio = took / first.setdefault("forward", took)
        bench.row(f"forward {label}", name, ms=took, error=error, peak=peak, length=length, over_ours=ratio)
        output = run(leaves, decay)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, leaves, cotangent, retain_graph=True)  # noqa: B023

        took, peak = bench.time(backward), bench.peak(backward)
        error = None
        if want is not None:
            pairs = zip(backward(), want[1:], strict=True)
            error = max(bench.error(turned(got)[:, CHECKED], exactly) for got, exactly in pairs)
        ratio = took / first.setdefault("backward", took)
        bench.row(f"backward {label}", name, ms=took, error=error, peak=peak, length=length, over_ours=ratio)
    if not (bench.quick and length > 32768):
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            took = bench.time(lambda: scaled_dot_product_attention(*inputs, is_causal=True))
        ratio = took / first["forward"]
        bench.row(f"forward {label}", "SDPA flash: another function", ms=took, length=length, over_ours=ratio)


def measure_both(bench: Bench, inputs: list[Tensor], decay: Tensor) -> dict[str, float]:
    *leaves, weight = inputs
    with torch.no_grad():
        forward = bench.time(lambda: ours(leaves, decay))
    leaves = [x.requires_grad_() for x in leaves]
    output = ours(leaves, decay)
    return {
        "forward": forward,
        "backward": bench.time(lambda: torch.autograd.grad(output, leaves, weight, retain_graph=True)),
    }


def measure_constant_tokens(bench: Bench) -> None:
    """Tokens a second of forward and backward, at one number of tokens."""
    decay = alibi_slopes(HEADS).cuda()
    rates: dict[str, list[float]] = {"forward": [], "backward": []}
    for label, length in CONSTANT.items():
        for name, took in measure_both(bench, draw(TOKENS // length, length), decay).items():
            rates[name].append(TOKENS / took / 1e3)
            bench.row(
                f"constant tokens, {name} {label}",
                "heedful lightning_attention",
                ms=took,
                million_tokens_a_s=rates[name][-1],
            )
        torch.cuda.empty_cache()
    for name, figures in rates.items():
        print(f"{name}: slowest over fastest {min(figures) / max(figures):.3f}")


def measure_step(bench: Bench, batch: int) -> None:
    """One token of decoding, in a CUDA graph."""
    decay = alibi_slopes(HEADS).cuda()
    inputs = draw(batch, 1)[:3]
    state = torch.randn(batch, HEADS, DIM, DIM, device="cuda")
    options: dict[str, Any] = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    with torch.no_grad():
        took = bench.time(lambda: lightning_attention(*inputs, decay, **options), graph=True)
        bench.row(f"step, batch {batch}", "heedful lightning_attention", ms=took, state_mib=state.nbytes / 2**20)
        if chunk_simple_gla is not None:
            turned = [x.transpose(1, 2).contiguous() for x in inputs]
            took = bench.time(lambda: fused_recurrent_simple_gla(*turned, g_gamma=-decay, **options), graph=True)
            bench.row(f"step, batch {batch}", "flash-linear-attention", ms=took)


def measure(bench: Bench) -> None:
    torch.manual_seed(0)
    for label, length in LENGTHS.items():
        measure_length(bench, label, length)
        torch.cuda.empty_cache()
    measure_constant_tokens(bench)
    for batch in (1, 16):
        measure_step(bench, batch)
