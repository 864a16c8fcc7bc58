"""The kernels of shifted sparse attention on a CUDA device."""

import pytest
import torch

from heedful.attention import shifted_sparse_attention

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def tensors(batch, kv_heads, groups, length, dim, dtype, seed=0):
    """Query, key, value in the layout of a model, (B, T, H, D) in memory, and the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads = (kv_heads * groups, kv_heads, kv_heads, kv_heads * groups)
    made = [torch.randn(batch, length, n, dim, device="cuda", generator=generator) for n in heads]
    return [x.to(dtype).transpose(1, 2) for x in made]


def with_gradients(query, key, value, d_output, *args, **options):
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = shifted_sparse_attention(*leaves, *args, **options)
    return output.detach(), *torch.autograd.grad(output, leaves, d_output)


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


CASES = {
    "default": (2, 2, 4, 1500, 400, {}),
    "odd": (1, 1, 5, 1001, 251, {"shift_ratio": 0.5, "num_sink_tokens": 1}),
    "wrap": (2, 1, 2, 1100, 300, {"shift_ratio": 0.5, "num_sink_tokens": 0, "boundary": "wrap"}),
    "small groups, many sinks": (1, 2, 1, 700, 40, {"shift_ratio": 1.0, "num_sink_tokens": 100, "boundary": "wrap"}),
    "dense": (1, 2, 2, 600, 600, {}),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(128, torch.bfloat16), (64, torch.bfloat16), (64, torch.float16), (64, torch.float32), (256, torch.bfloat16)],
)
def test_error(dim, dtype, case, padded):
    batch, kv_heads, groups, length, size, options = CASES[case]
    inputs = tensors(batch, kv_heads, groups, length, dim, dtype)
    mask = None
    if padded:
        mask = torch.ones(batch, length, dtype=torch.bool, device="cuda")
        mask[0, :77] = False
        mask[0, 200:210] = False
        mask[-1, -100:] = False
        for x in inputs[:3]:
            x.masked_fill_(~mask[:, None, :, None], torch.nan)
    got = with_gradients(*inputs, size, attention_mask=mask, impl="triton", **options)
    wide = [x.double() for x in inputs]
    want = with_gradients(*wide, size, attention_mask=mask, impl="reference", **options)
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) < BOUNDS[dtype], errors


@pytest.mark.parametrize("dim", [16, 32])
def test_small_heads(dim):
    inputs = tensors(1, 2, 2, 500, dim, torch.float16)
    got = with_gradients(*inputs, 130, impl="triton")
    want = with_gradients(*(x.double() for x in inputs), 130, impl="reference")
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < BOUNDS[torch.float16]


def test_the_same_bits_in_every_run():
    inputs = tensors(1, 2, 4, 3000, 128, torch.bfloat16)
    first, second = (with_gradients(*inputs, 700, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiles_whole_and_not_again_for_another_length():
    torch._dynamo.reset()
    step = torch.compile(lambda q, k, v: shifted_sparse_attention(q, k, v, 300, impl="triton") * 2, fullgraph=True)
    for length in (1000, 1400, 1700):
        query, key, value, _ = tensors(1, 2, 2, length, 64, torch.bfloat16)
        want = shifted_sparse_attention(query, key, value, 300, impl="triton") * 2
        assert torch.equal(step(query, key, value), want)


def test_offsets_past_two_to_the_31():
    """A batch of which the last rows begin past 2^31 elements."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    length, heads = 2**20 + 128, 17
    query = torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16)
    assert query.numel() > 2**31
    last = query[:, -1:, -4096:].clone()
    output = shifted_sparse_attention(query, query[:, -1:], query[:, -1:], 4096, shift_ratio=0.0, num_sink_tokens=0)
    low = (length - 4096) // 4096 * 4096  # the last group begins here, and one more has the rest
    tail = query[:, -1:, low:]
    want = shifted_sparse_attention(*(x.double() for x in (tail, tail, tail)), 4096, shift_ratio=0.0, num_sink_tokens=0)
    assert error(output[:, -1:, -4096:], want[:, :, -4096:]) < BOUNDS[torch.bfloat16]
    assert torch.equal(last, query[:, -1:, -4096:])
    grad = torch.autograd.grad
    leaf = query.detach().requires_grad_()
    out = shifted_sparse_attention(leaf, leaf[:, -1:], leaf[:, -1:], 4096, shift_ratio=0.0, num_sink_tokens=0)
    (gradient,) = grad(out[:, -1, -1].float().sum(), leaf)
    assert torch.isfinite(gradient[:, -1, -4096:]).all()
    assert gradient[:, -1, -128:].abs().sum() > 0
