"""The reference of HiP attention on CUDA: the CPU's choices and results, in the dtypes that people serve models in."""

import pytest
import torch
from tiny_models import build

from heedful import HiPAttention, attach
from heedful.attention import hip_attention

pytestmark = pytest.mark.gpu
SIZES = {"top_k": 128, "sliding_window": 64, "num_sink_tokens": 4}


def tensors(queries=1500, dim=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, queries, dim, generator=generator) for heads in (4, 2, 2)]


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("sample_method", ["center", "first", "last", "oracle"])
def test_cuda_equals_cpu(sample_method):
    inputs = tensors()
    attention_mask = torch.arange(1500) >= torch.tensor([[0], [77]])
    options = {**SIZES, "sample_method": sample_method, "return_mask": True}
    expected, mask = hip_attention(*inputs, attention_mask=attention_mask, **options)
    output, cuda_mask = hip_attention(*(x.cuda() for x in inputs), attention_mask=attention_mask.cuda(), **options)
    # Products differ in their last bits, and so may a choice between two blocks that score alike.
    same = (mask.blocks == cuda_mask.blocks.cpu()).all(-1)
    assert same.float().mean() > 0.99
    rows = same.repeat_interleave(64, 2)[:, :, :1500]
    torch.testing.assert_close(output.cpu()[rows], expected[rows], atol=1e-4, rtol=1e-4)
    assert torch.equal(cuda_mask.keys_read(), cuda_mask.dense().sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_cuda(dtype):
    inputs = [x.to("cuda", dtype) for x in tensors()]
    output, mask = hip_attention(*inputs, return_mask=True, **SIZES)
    assert output.dtype == dtype
    exact = hip_attention(*(x.double() for x in inputs), mask=mask)
    torch.testing.assert_close(output.double(), exact, atol=2e-2, rtol=2e-2)
    whole = hip_attention(*inputs, top_k=1500).double()
    query, key, value = (x.double() for x in inputs)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(whole, dense, atol=2e-2, rtol=2e-2)


def test_memory_is_linear_on_cuda():
    def peak(tokens):
        inputs = [x.to("cuda", torch.bfloat16) for x in tensors(tokens)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hip_attention(*inputs, **SIZES)
        return torch.cuda.max_memory_allocated() - before

    short, long = peak(16384), peak(65536)
    assert long < 4.5 * short
    assert long < 65536**2 / 8  # a bit for each pair of one head would be 512 MiB


def test_gradients_on_cuda():
    inputs = [x.cuda().double().requires_grad_() for x in tensors(300, 16)]
    output, mask = hip_attention(*inputs, return_mask=True, **SIZES)
    output.square().sum().backward()
    query, key, value = inputs
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    logits = (query @ key.mT / 4).masked_fill(~mask.dense(), -torch.inf)
    expected = torch.autograd.grad((logits.softmax(-1) @ value).square().sum(), inputs)
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-9, rtol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_on_cuda(cache):
    model = build("llama").cuda()
    ids = torch.randint(5, 80, (2, 60), generator=torch.Generator().manual_seed(0)).cuda()
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    part = HiPAttention(top_k=12, block_size_q=8, sliding_window=8, num_sink_tokens=2, mask_refresh_interval=3)
    with attach(model, part):
        on_cuda = model.generate(ids, do_sample=False, max_new_tokens=8, **options)
    model = model.cpu()
    with attach(model, part):
        on_cpu = model.generate(ids.cpu(), do_sample=False, max_new_tokens=8, **options)
    assert torch.equal(on_cuda.cpu(), on_cpu)
