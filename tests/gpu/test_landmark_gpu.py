"""The kernels of landmark attention on a CUDA device."""

import pytest
import torch

from heedful.attention import landmark_attention
from heedful.layers import LandmarkAttention, LandmarkCache

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def draw(batch, heads, kv_heads, length, dim, dtype):
    shape = (batch, heads, length, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, dim)
    return [torch.randn(s, device="cuda", dtype=dtype) for s in shape]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "dim", "block"),
    [(4, 2, 1500, 128, 64), (4, 1, 1000, 64, 51), (2, 2, 700, 128, 0), (2, 1, 900, 128, 400), (2, 2, 500, 256, 30), (2, 1, 300, 16, 5)],
)  # fmt: skip
def test_error_and_gradients(dtype, heads, kv_heads, length, dim, block):
    """Against float64: solos, tiles of several blocks, long blocks, random ones with padding on both sides."""
    torch.manual_seed(0)
    tensors = draw(2, heads, kv_heads, length, dim, dtype)
    mask = None
    if block:
        marks = torch.arange(length, device="cuda") % block == block - 1
    else:
        marks = torch.rand(2, length, device="cuda") < 0.06
        mask = torch.ones(2, length, dtype=torch.bool, device="cuda")
        mask[0, :77], mask[1, 600:] = False, False
        for x in tensors:
            x.masked_fill_(~mask[:, None, :, None], torch.nan)
    weight = torch.randn_like(tensors[0]).nan_to_num()
    results = []
    for kind, impl in ((dtype, "triton"), (torch.float64, "reference")):
        leaves = [x.to(kind).requires_grad_() for x in tensors]
        out = landmark_attention(*leaves, marks, attention_mask=mask, impl=impl)
        results.append((out, *torch.autograd.grad((out * weight.to(kind)).sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        assert error(got, want) < BOUNDS[dtype] * (1 if got is results[0][0] else 2)


def test_blocks_far_below_the_others():
    """A block whose scores are some hundred below the others' in the tile still has its own softmax, and its gate."""
    torch.manual_seed(0)
    query, key, value = draw(1, 2, 2, 512, 64, torch.float32)
    marks = torch.arange(512, device="cuda") % 16 == 15
    key[..., 0] = 0
    query[..., 0] = 100.0
    key[:, :, 16:31, 0] = -20.0  # scores down by 250
    tensors = [x.bfloat16() for x in (query, key, value)]
    got = landmark_attention(*tensors, marks, impl="triton")
    want = landmark_attention(*(x.double() for x in tensors), marks, impl="reference")
    assert error(got, want) < 1.5e-2


@pytest.mark.parametrize("block", [64, 51, 16, 400])
def test_what_is_not_finite_stays_behind(block):
    torch.manual_seed(0)
    tensors = draw(1, 2, 1, 700, 128, torch.bfloat16)
    marks = torch.arange(700, device="cuda") % block == block - 1
    clean = landmark_attention(*tensors, marks, impl="triton")[0]
    for which in (1, 2):
        broken = [x.clone() for x in tensors]
        broken[which][0, 0, 300, 5] = torch.nan
        got = landmark_attention(*broken, marks, impl="triton")[0]
        assert torch.equal(got[:, :300], clean[:, :300])
        assert got[:, 300:].isnan().all()


def test_compiles_without_a_break_and_without_a_new_graph_for_a_length():
    tensors = draw(1, 4, 2, 300, 64, torch.bfloat16)
    marks = torch.arange(300, device="cuda") % 64 == 63
    run = torch.compile(landmark_attention, fullgraph=True, dynamic=True)
    for length in (300, 280, 130):
        part = [x[:, :, :length] for x in tensors]
        assert error(run(*part, marks[:length]), landmark_attention(*part, marks[:length])) < 1e-3


def test_offsets_beyond_32_bits():
    """2^31 elements and more in the query; the last head against a short call of it alone."""
    length, heads = 270_000, 64
    query = torch.empty(1, heads, length, 128, device="cuda", dtype=torch.bfloat16)
    query[:, -1].normal_()
    key, value = torch.randn(2, 1, 1, length, 128, device="cuda", dtype=torch.bfloat16)
    marks = torch.arange(length, device="cuda") % 64 == 63
    first = 2048  # rows do not see later ones
    few = landmark_attention(
        query[:, -1:, :first], key[:, :, :first], value[:, :, :first], marks[:first], impl="triton"
    )
    query[:, :-1] = 0
    from heedful.attention.landmark import triton

    whole = triton.landmark_attention(query, key, value, marks.expand(1, -1), None, 128**-0.5)
    assert error(whole[:, -1:, :first], few) < 1e-3
    assert torch.isfinite(whole[0, -1, -64:]).all()
    assert whole[0, -1, -64:].abs().max() > 0


@pytest.mark.parametrize("offload", [False, True])
def test_cache_is_the_grouped_softmax_of_the_whole(offload):
    torch.manual_seed(0)
    layer = LandmarkAttention(128, 4, num_kv_heads=2).cuda()
    x = torch.randn(2, 1000, 128, device="cuda")
    with torch.no_grad():
        want = layer(x, torch.arange(1000, device="cuda") % 64 == 63)
        cache = LandmarkCache(63, 100, offload=offload)
        parts = []
        for chunk in x.split([300, 1, 1, 498, 200], 1):
            step = cache.begin_slots(2, chunk.shape[1], x.device)
            parts.append(layer(chunk, cache=cache, step=step))
            cache.finish()
    assert error(torch.cat(parts, 1), want) < 1e-4
