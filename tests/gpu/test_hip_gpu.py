"""HiP attention on CUDA: the reference makes the CPU's choices, the kernels the reference's, in the usual dtypes."""

import pytest
import torch
from tiny_models import build

from heedful import HiPAttention, attach
from heedful.attention import hip_attention
from heedful.attention.hip.decode import HiPDecodeState, hip_decode

pytestmark = pytest.mark.gpu
SIZES = {"top_k": 128, "sliding_window": 64, "num_sink_tokens": 4}
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def tensors(queries=1500, dim=64, keys=None, batch=2, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    keys = queries if keys is None else keys
    shapes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(batch, *shape, dim, generator=generator) for shape in shapes]


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("sample_method", ["center", "first", "last", "oracle"])
def test_cuda_equals_cpu(sample_method):
    inputs = tensors()
    attention_mask = torch.arange(1500) >= torch.tensor([[0], [77]])
    options = {**SIZES, "sample_method": sample_method, "return_mask": True, "impl": "reference"}
    expected, mask = hip_attention(*inputs, attention_mask=attention_mask, **options)
    output, cuda_mask = hip_attention(*(x.cuda() for x in inputs), attention_mask=attention_mask.cuda(), **options)
    # Products differ in their last bits, and so may a choice between two blocks that score alike.
    same = (mask.blocks == cuda_mask.blocks.cpu()).all(-1)
    assert same.float().mean() > 0.99
    rows = same.repeat_interleave(64, 2)[:, :, :1500]
    torch.testing.assert_close(output.cpu()[rows], expected[rows], atol=1e-4, rtol=1e-4)
    assert torch.equal(cuda_mask.keys_read(), cuda_mask.dense().sum(-1))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_cuda(dtype, impl):
    inputs = [x.to("cuda", dtype) for x in tensors()]
    output, mask = hip_attention(*inputs, return_mask=True, impl=impl, **SIZES)
    assert output.dtype == dtype
    exact = hip_attention(*(x.double() for x in inputs), mask=mask)
    torch.testing.assert_close(output.double(), exact, atol=2e-2, rtol=2e-2)
    whole = hip_attention(*inputs, top_k=1500, impl=impl).double()
    query, key, value = (x.double() for x in inputs)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(whole, dense, atol=2e-2, rtol=2e-2)


PADDED = {"queries": 1000, "heads": 2}, {"block_size_q": 128, "block_stride_k": 2, "sample_method": "last", "pad": 1}
CALLS = [
    ({"queries": 3000}, {}),
    ({"queries": 1, "keys": 2500, "heads": 6}, {"block_size_q": 1, "block_stride_q": 1}),
    ({"queries": 777, "keys": 2000}, {"block_size_q": 48, "block_stride_q": 5, "block_size_k": 3, "softcap": 20.0}),
    PADDED,
]


@pytest.mark.parametrize(
    ("dtype", "dim", "shape", "options"),
    [(torch.bfloat16, 128, *call) for call in CALLS]
    + [(torch.bfloat16, dim, *CALLS[0]) for dim in (16, 64, 256)]
    + [(torch.float16, 128, *PADDED), (torch.float32, 64, *PADDED), (torch.float32, 128, *CALLS[0])],
)
def test_kernels_choose_and_attend_as_the_reference(dtype, dim, shape, options):
    options = {**SIZES, **options}
    inputs = [x.to("cuda", dtype) for x in tensors(dim=dim, **shape)]
    keys = inputs[1].shape[2]
    real = None
    if options.pop("pad", None):
        slot = torch.arange(keys, device="cuda")
        real = torch.stack([slot >= 77, slot < keys - 130])
        for x in inputs[1:]:
            x[~real[:, None].expand(x.shape[:3])] = torch.nan
    wide = [x.double() for x in inputs]
    output, mask = hip_attention(*inputs, attention_mask=real, return_mask=True, impl="triton", **options)
    _, expected = hip_attention(*wide, attention_mask=real, return_mask=True, impl="reference", **options)
    same = (mask.blocks == expected.blocks).all(-1).float().mean()
    assert same > 0.98, same
    assert torch.equal(mask.search_end, expected.search_end)
    attended = hip_attention(*wide, mask=mask, softcap=options.get("softcap"))
    assert output.isfinite().all()
    assert relative_error(output, attended) < BOUNDS[dtype]
    again, again_mask = hip_attention(*inputs, attention_mask=real, return_mask=True, impl="triton", **options)
    assert torch.equal(output, again)
    assert torch.equal(mask.blocks, again_mask.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_staged_scan_chooses_as_the_reference(dtype):
    inputs = [x.to("cuda", dtype) for x in tensors(4000, 128)]
    real = torch.arange(4000, device="cuda") >= torch.tensor([[0], [70]], device="cuda")
    stages = [(64, 4, 256, None), (64, 4, 32, 1024), (64, 1, 8, 512)]
    options = {"stages": stages, "top_k": 256, "sliding_window": 128, "return_mask": True, "attention_mask": real}
    output, mask = hip_attention(*inputs, impl="triton", **options)
    _, expected = hip_attention(*(x.double() for x in inputs), impl="reference", **options)
    # Means of queries are rounded to the keys' dtype: scores that are near alike may rank otherwise.
    sets = (mask.blocks[..., None] == expected.blocks[..., None, :]) & (mask.blocks >= 0)[..., None]
    assert sets.any(-1).sum() / (expected.blocks >= 0).sum() > (0.999 if dtype == torch.float32 else 0.97)
    attended = hip_attention(*(x.double() for x in inputs), mask=mask)
    assert relative_error(output, attended) < BOUNDS[dtype]


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 128)])
def test_decode_kernels_follow_the_reference(dtype, dim):
    torch.manual_seed(0)
    capacity, first = 3000, torch.tensor([0, 40], device="cuda")
    key, value = torch.randn(2, 2, 2, capacity, dim, device="cuda", dtype=dtype)
    states = [HiPDecodeState(2, 8, capacity, device="cuda", **SIZES) for _ in range(2)]
    options = {
        "refresh_interval": 4,
        "first_real": first,
        "softcap": 30.0,
        "sink_logits": torch.zeros(8, device="cuda"),
    }
    same = []
    for length in (60, 2000, 2001, 2002, 2003, 2004, 1500):
        query = torch.randn(2, 8, 1, dim, device="cuda", dtype=dtype)
        lengths = torch.tensor([length, length - 9], device="cuda")
        keys, values = key.clone(), value.clone()
        for x in (keys, values):
            x[:, :, length:] = torch.nan
            x[1, :, :40] = torch.nan
        got = hip_decode(query, keys, values, lengths, states[0], impl="triton", **options)
        want = hip_decode(
            *(x.double() for x in (query, keys, values)), lengths, states[1], impl="reference", **options
        )  # fmt: skip
        assert torch.equal(states[0].chosen_at, states[1].chosen_at)
        assert torch.equal(states[0].refreshes, states[1].refreshes)
        alike = (states[0].blocks == states[1].blocks).all(-1)
        same.append(alike.float().mean())
        assert relative_error(got[alike], want[alike]) < BOUNDS[dtype]
    assert torch.stack(same).mean() > 0.9


def test_a_captured_decode_step_follows_its_state():
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, 2, 4096, 128, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([3000], device="cuda")
    captured, eager = (HiPDecodeState(1, 8, 4096, device="cuda", **SIZES) for _ in range(2))
    hip_decode(query, key, value, lengths, captured, refresh_interval=3)
    captured.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = hip_decode(query, key, value, lengths, captured, refresh_interval=3)
    captured.reset()
    for length in range(3000, 3010):
        lengths.fill_(length)
        query.copy_(torch.randn_like(query))
        graph.replay()
        want = hip_decode(query, key, value, lengths, eager, refresh_interval=3)
        assert torch.equal(output, want)
    assert captured.refreshes.unique().tolist() == [4]
    captured.reset()  # a new sequence, shorter than the last choice
    lengths.fill_(500)
    graph.replay()
    eager.reset()
    assert torch.equal(output, hip_decode(query, key, value, lengths, eager, refresh_interval=3))


def test_offsets_beyond_31_bits():
    """A key tensor of 2.2e9 elements: the last heads lie past 2^31."""
    torch.manual_seed(0)
    keys = 131072
    key = torch.empty(2, 66, keys, 128, dtype=torch.bfloat16, device="cuda")
    few = torch.randn(2, 1, keys, 128, device="cuda", dtype=torch.bfloat16)
    key.copy_(few.expand_as(key))
    query = torch.randn(2, 66, 300, 128, device="cuda", dtype=torch.bfloat16)
    query.copy_(query[:, :1].expand_as(query).clone())
    output, mask = hip_attention(query, key, key, return_mask=True, impl="triton")
    for row in range(2):
        alone, mask_alone = hip_attention(
            query[row : row + 1, :1], few[row : row + 1], few[row : row + 1], return_mask=True, impl="triton"
        )
        assert torch.equal(output[row, -1], alone[0, 0])
        assert torch.equal(mask.blocks[row, -1], mask_alone.blocks[0, 0])
    state = HiPDecodeState(2, 66, keys, device="cuda")
    got = hip_decode(query[:, :, -1:], key, key, torch.full((2,), keys, device="cuda"), state, refresh_interval=8)
    assert torch.equal(got[:, -1], got[:, 0])


def test_a_bad_number_stays_where_it_is_attended():
    inputs = [x.cuda() for x in tensors(1500)]
    clean = hip_attention(*inputs, impl="triton", **SIZES)
    for which in range(3):
        for bad in (torch.nan, torch.inf):
            changed = [x.clone() for x in inputs]
            changed[which][1, 1, 700] = bad
            output, found = hip_attention(*changed, return_mask=True, impl="triton", **SIZES)
            assert torch.equal(output[0], clean[0])
            block = 700 // 64 * 64
            assert torch.equal(output[1, :, :block], clean[1, :, :block])
            assert found.blocks.max() < 1500
            assert found.blocks.min() >= -1
            assert not output[1, 1 if which == 0 else 2, 700].isfinite().all()


def test_memory_is_linear_on_cuda():
    def peak(tokens, impl):
        inputs = [x.to("cuda", torch.bfloat16) for x in tensors(tokens)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hip_attention(*inputs, impl=impl, **SIZES)
        return torch.cuda.max_memory_allocated() - before

    for impl in ("reference", "triton"):
        short, long = peak(16384, impl), peak(65536, impl)
        assert long < 4.5 * short
        assert long < 65536**2 / 8  # a bit for each pair of one head would be 512 MiB


def test_compiles_as_a_whole():
    inputs = [x.to("cuda", torch.bfloat16) for x in tensors(1000)]
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: hip_attention(q, k, v, impl="triton", **SIZES), fullgraph=True)
    assert torch.equal(compiled(*inputs), hip_attention(*inputs, impl="triton", **SIZES))


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
    with pytest.raises(ValueError, match="no backward"):
        hip_attention(*(x.float() for x in inputs), impl="triton", **SIZES)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "more", [{}, {"trained_length": 40}, {"trained_length": 40, "stages": [(8, 2, 8, None), (8, 1, 4, 24)]}]
)
def test_generate_on_cuda(cache, more):
    model = build("llama").cuda()
    g = torch.Generator().manual_seed(0)  # each token once: keys of one token tie where positions are bounded
    ids = torch.stack([5 + torch.randperm(80, generator=g)[:60] for _ in range(2)]).cuda()
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    sizes = {"top_k": 12, "block_size_q": 8, "sliding_window": 8, "num_sink_tokens": 2, "mask_refresh_interval": 3}
    part = HiPAttention(**sizes, **more)
    with attach(model, part):
        on_cuda = model.generate(ids, do_sample=False, max_new_tokens=8, **options)
    model = model.cpu()
    with attach(model, part):
        on_cpu = model.generate(ids.cpu(), do_sample=False, max_new_tokens=8, **options)
    assert torch.equal(on_cuda.cpu(), on_cpu)


def test_lengths_need_no_new_kernels():
    from heedful.attention.hip import triton as kernels

    def compiled(tokens):
        query, key, value = (x.to("cuda", torch.bfloat16) for x in tensors(tokens, 64))
        real = torch.ones(2, tokens, dtype=torch.bool, device="cuda")
        for attention_mask in (None, real):
            hip_attention(query, key, value, attention_mask=attention_mask, impl="triton", **SIZES)
        hip_attention(query, key, value, stages=[(64, 4, 64, None), (64, 1, 8, 512)], top_k=128, impl="triton")
        state = HiPDecodeState(2, 4, tokens, device="cuda", **SIZES)
        lengths = torch.full((2,), tokens, device="cuda")
        hip_decode(query[:, :, -1:], key, value, lengths, state, refresh_interval=8)
        names = ("_choose", "_attend", "_scan", "_keep", "_decode", "_merge")
        return {name: len(getattr(kernels, name).device_caches[0][0]) for name in names}

    first = compiled(1024)
    assert all(first.values())
    for tokens in (1025, 2000, 3072):
        assert compiled(tokens) == first
