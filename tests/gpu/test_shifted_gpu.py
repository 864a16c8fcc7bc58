"""The kernels of shifted sparse attention on a CUDA device."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from heedful.attention import shifted_sparse_attention
from heedful.attention.shifted import triton

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


S2 = {"shift_ratio": 0.5, "num_sink_tokens": 0, "boundary": "wrap"}
# Batch, KV heads, query heads of each, T, D, dtype, G, options, padded.
CASES = {
    "SF, D 128": (1, 2, 4, 1500, 128, torch.bfloat16, 400, {}, False),
    "SF, D 128, padded": (2, 2, 4, 1300, 128, torch.bfloat16, 400, {}, True),
    "S2, D 64, padded": (2, 1, 2, 1100, 64, torch.float16, 300, S2, True),
    "odd, float32": (1, 1, 5, 701, 64, torch.float32, 251, {"shift_ratio": 0.5, "num_sink_tokens": 1}, False),
    "many sinks, padded": (
        2, 2, 1, 700, 64, torch.bfloat16, 40, {"shift_ratio": 1.0, "num_sink_tokens": 100, "boundary": "wrap"}, True,
    ),
    "dense, D 256": (1, 2, 2, 600, 256, torch.bfloat16, 600, {}, False),
    "D 32": (1, 2, 2, 500, 32, torch.float16, 130, {}, False),
    "D 16": (1, 2, 2, 500, 16, torch.bfloat16, 130, {}, False),
}  # fmt: skip


def run(case, impl):
    batch, kv_heads, groups, length, dim, dtype, size, options, padded = CASES[case]
    inputs, mask = tensors(batch, kv_heads, groups, length, dim, dtype), None
    if padded:
        mask = torch.ones(batch, length, dtype=torch.bool, device="cuda")
        mask[0, :77] = False
        mask[0, 200:210] = False
        mask[-1, -100:] = False
        for x in inputs[:3]:
            x.masked_fill_(~mask[:, None, :, None], torch.nan)
    if impl == "reference":
        inputs = [x.double() for x in inputs]
    return with_gradients(*inputs, size, attention_mask=mask, impl=impl, **options)


@pytest.fixture(scope="module")
def computed():
    """All cases by the kernels, which are compiled side by side."""
    with ThreadPoolExecutor(len(CASES)) as threads:
        return dict(zip(CASES, threads.map(lambda case: run(case, "triton"), CASES), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_error(case, computed):
    got, want = computed[case], run(case, "reference")
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) < BOUNDS[CASES[case][5]], errors


def test_the_same_bits_in_every_run():
    first, second = (run("SF, D 128", "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiles_whole_and_not_again_for_another_length():
    torch._dynamo.reset()
    step = torch.compile(lambda q, k, v: shifted_sparse_attention(q, k, v, 300, impl="triton").sin(), fullgraph=True)
    kernels = None
    for length in (1000, 1403, 1700):
        *inputs, d_output = tensors(1, 2, 4, length, 128, torch.bfloat16)
        leaves = [x.requires_grad_() for x in inputs]
        got = torch.autograd.grad(step(*leaves), leaves, d_output)
        want = torch.autograd.grad(shifted_sparse_attention(*leaves, 300, impl="triton").sin(), leaves, d_output)
        for a, b in zip(got, want, strict=True):
            assert error(a, b) < 1e-2
        compiled = [len(kernel.device_caches[0][0]) for kernel in (triton._forward, triton._backward_key)]
        assert kernels in (None, compiled)
        kernels = compiled


def test_offsets_past_two_to_the_31():
    """The last of 17 heads, whose last rows begin past 2^31 elements, against the last groups by themselves."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    length, heads = 2**20 + 128, 17
    query = torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert query.numel() > 2**31
    key, value = (
        torch.randn(1, 1, length, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)
    )
    options = {"group_size": 4096, "shift_ratio": 0.0, "num_sink_tokens": 0}
    output = shifted_sparse_attention(query, key, value, **options)
    d_output = torch.zeros_like(output)
    low = (length - 4096) // 4096 * 4096  # a group begins here, and a second one has the rest
    d_output[:, -1:, low:].normal_()
    got = [output[:, -1:, low:], *torch.autograd.grad(output, (query, key, value), d_output)]
    got[1] = got[1][:, -1:]
    wide = [x.detach()[:, -1:, low:].double().requires_grad_() for x in (query, key, value)]
    exact = shifted_sparse_attention(*wide, **options)
    want = [exact, *torch.autograd.grad(exact, wide, d_output[:, -1:, low:].double())]
    for a, b in zip(got, want, strict=True):
        assert error(a[:, :, -b.shape[2] :].detach(), b.detach()) < BOUNDS[torch.bfloat16]
