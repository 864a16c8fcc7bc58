"""The kernels of lightning attention on a CUDA device."""

import pytest
import torch

from heedful.attention import alibi_slopes, lightning_attention
from heedful.layers import LightningAttention, LightningCacheLayer

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
CASES = {
    "long, state": (torch.bfloat16, 1, 2, 1, 20000, 128, 128),
    "mask, groups": (torch.bfloat16, 2, 2, 2, 700, 64, 96),
    "packed": (torch.float16, 1, 2, 1, 3000, 128, 128),
    "packed, narrow": (torch.float32, 1, 2, 1, 2000, 40, 64),
}


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_error(case):
    """Outputs, states and gradients, relative to float64: no larger than what the dtype of the inputs allows."""
    torch.manual_seed(0)
    dtype, batch, kv_heads, groups, length, dim, columns = CASES[case]
    heads, sequences, options = kv_heads * groups, batch, {}
    inputs = [
        torch.randn(batch, h, length, d, device="cuda", dtype=dtype)
        for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, columns))
    ]
    if "mask" in case:
        mask = torch.ones(batch, length, dtype=torch.bool, device="cuda")
        mask[0, :37] = False
        mask[1, 501:] = False
        options["attention_mask"] = mask
    if "packed" in case:
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 1500, length], device="cuda")
        sequences = 4
    decay = alibi_slopes(heads).cuda()
    initial = torch.randn(sequences, heads, dim, columns, device="cuda")
    weights = torch.randn(batch, heads, length, columns, device="cuda"), torch.randn_like(initial)
    results = []
    for impl, kind, wide in (("triton", dtype, torch.float32), ("reference", torch.float64, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in inputs] + [initial.to(wide).requires_grad_()]
        outputs = lightning_attention(
            *leaves[:3], decay, initial_state=leaves[3], output_final_state=True, impl=impl, **options
        )
        total = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, leaves)])
    for name, got, want in zip(("o", "state", "dq", "dk", "dv", "d_state"), *results, strict=True):
        assert error(got, want) < BOUNDS[dtype], (name, error(got, want))


def test_offsets_beyond_two_to_the_31():
    """Queries, keys and values as views of one tensor, as a fused projection makes them."""
    torch.manual_seed(0)
    fused = torch.randn(1, 131072, 3, 43, 128, device="cuda", dtype=torch.bfloat16)
    assert fused.numel() > 2**31
    inputs = [x.transpose(1, 2) for x in fused.unbind(2)]
    tail = [x[:, -1:, -4096:].clone().requires_grad_() for x in inputs]
    decay = torch.full((43,), 0.1, device="cuda")  # what lies 4096 tokens back weighs nothing
    leaves = [x.requires_grad_() for x in inputs]
    output = lightning_attention(*leaves, decay)
    want = lightning_attention(*tail, decay[-1:])
    weight = torch.zeros_like(output)
    weight[:, -1:, -1024:] = torch.randn_like(want[:, :, -1024:])
    assert error(output[:, -1:, -2048:], want[:, :, -2048:]) < 5e-3
    ours = torch.autograd.grad(output, leaves, weight)
    theirs = torch.autograd.grad(want, tail, weight[:, -1:, -4096:])
    for a, b in zip(ours, theirs, strict=True):
        assert error(a[:, -1:, -2048:], b[:, :, -2048:]) < 5e-3


def test_a_captured_step_moves_the_state_on():
    torch.manual_seed(0)
    layer, tokens = LightningAttention(256, 4).cuda().bfloat16(), torch.randn(6, 2, 1, 256, device="cuda").bfloat16()
    with torch.no_grad():
        want, cache = [], LightningCacheLayer()
        for x in tokens:
            want.append(layer(x, cache=cache))
        cache, x = LightningCacheLayer(), tokens[0].clone()
        layer(x, cache=cache)  # warm, and the state has its place
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, cache=cache)
        cache.reset()
        for token, expected in zip(tokens, want, strict=True):
            x.copy_(token)
            graph.replay()
            assert error(y, expected) < 1e-2
    assert cache.state.dtype == torch.float32


def test_one_compilation_for_all_lengths():
    from heedful.attention.lightning import triton as kernels

    decay = alibi_slopes(2).cuda()
    counts = []
    for length in (100, 257, 1000, 4099):
        lightning_attention(
            *torch.randn(3, 1, 2, length, 64, device="cuda", dtype=torch.bfloat16), decay, impl="triton"
        )
        counts.append(len(kernels._outputs.device_caches[torch.cuda.current_device()][0]))
    # One for sequences of a single segment, one for several.
    assert counts[-1] - counts[0] <= 1


def test_compiled_whole_under_autocast():
    torch.manual_seed(0)
    layer, x = LightningAttention(128, 2).cuda(), torch.randn(2, 200, 128, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        want = torch.autograd.grad(layer(x).float().square().sum(), list(layer.parameters()))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(x).float().square().sum(), list(layer.parameters()))
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 2e-2
