"""Routed attention, routed projections and MixtureOfHeads on a CUDA device, against their masked forms in float64."""

import pytest
import torch

from heedful.attention import dispatch_heads, routed_attention, routed_projection
from heedful.attention.head_routing import triton as kernels
from heedful.layers import MixtureOfHeads, convert_to_moh
from heedful.layers.moh import layer as layers

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("dtype", "heads", "shared", "k", "options"),
    [
        (torch.float32, 8, 2, 3, {"causal": True}),
        (torch.float32, 8, 3, 2, {"num_kv_heads": 2, "bias": True}),
        (torch.bfloat16, 8, 0, 4, {"causal": True, "num_kv_heads": 4}),
    ],
)
def test_skipping_equals_masking(monkeypatch, dtype, heads, shared, k, options):
    """Forward and backward, 1e-5 in float32; also with padding."""
    torch.manual_seed(0)
    layer = MixtureOfHeads(512, heads, shared, k, **options).to("cuda", dtype)
    x = torch.randn(2, 600, 512, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    calls = []
    original = layers.MixtureOfHeads._chosen_heads
    monkeypatch.setattr(layers.MixtureOfHeads, "_chosen_heads", lambda *a: calls.append(1) or original(*a))
    for mask in (None, torch.arange(600, device="cuda") >= torch.tensor([[0], [37]], device="cuda")):
        results = []
        for limit, share in ((0, 8), (0, 1), (10**9, 8)):  # output projection dense, of chosen heads; all heads masked
            monkeypatch.setattr(layers, "SKIP_FROM", limit)
            monkeypatch.setattr(layers, "OUTPUT_SHARE", share)
            y, (_, loss) = layer(x, return_routing=True, attention_mask=mask)
            y = y if mask is None else y.masked_fill(~mask[..., None], 0)
            names, parameters = zip(*layer.named_parameters(), strict=True)
            grads = torch.autograd.grad([y, loss], [x, *parameters], [grad, torch.ones_like(loss)])
            results.append({"y": y, "x": grads[0]} | dict(zip(names, grads[1:], strict=True)))
        for name in results[2].keys() - {"k_proj.bias"}:  # whose gradient is 0: a constant on all logits of a row
            for skipped in results[:2]:
                assert relative(skipped[name], results[2][name]) < (1e-5 if dtype == torch.float32 else 2e-2), name
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("dtype", "dim", "heads", "kv_heads", "length", "keys", "options"),
    [
        (torch.bfloat16, 64, 4, 2, 1000, 1000, {}),
        (torch.bfloat16, 128, 4, 1, 333, 900, {}),
        (torch.bfloat16, 64, 4, 2, 500, 700, {"causal": False}),
        (torch.bfloat16, 128, 4, 1, 900, 900, {"window": 200}),
        (torch.bfloat16, 64, 4, 2, 600, 600, {"padded": True}),
        (torch.bfloat16, 64, 4, 2, 1, 777, {}),
        (torch.float16, 256, 2, 1, 300, 300, {}),
        (torch.float32, 64, 4, 2, 500, 500, {}),
        (torch.float32, 128, 2, 2, 333, 400, {"padded": True}),
    ],
)
def test_error(dtype, dim, heads, kv_heads, length, keys, options):
    torch.manual_seed(0)
    options = dict(options)
    query = torch.randn(2, heads, length, dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, 2, kv_heads, keys, dim, device="cuda", dtype=dtype)
    active = torch.rand(2, length, heads, device="cuda") < (0.5 if length > 1 else 2.0)
    grad = torch.randn(2, length, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
    if options.pop("padded", False):
        mask = torch.rand(2, keys, device="cuda") < 0.8
        mask[0, :100] = False
        key, value = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (key, value))
        options["attention_mask"] = mask
    leaves = [x.requires_grad_() for x in (query, key, value)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got = routed_attention(*leaves, active, impl="triton", **options)
    want = routed_attention(*wide, active, impl="reference", **options)
    assert (got.transpose(1, 2)[~active] == 0).all()
    grads = torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, wide, grad.double())
    for a, b in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        assert relative(a, b) < BOUNDS[dtype]
    again = routed_attention(*leaves, active, impl="triton", **options)
    repeated = torch.autograd.grad(again, leaves, grad)
    assert torch.equal(again, got)
    assert all(torch.equal(a, b) for a, b in zip(repeated, grads[0], strict=True))  # no atomics


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(which, bad):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 1000, 64, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 1000, 64, device="cuda", dtype=torch.bfloat16)
    active = torch.rand(2, 1000, 4, device="cuda") < 0.5
    active[0, 500] = True
    # Of the sign with which an infinite key makes the largest logit, not the smallest, whose weight is 0.
    query[0, :2, 500, 3] = 1.0
    clean = routed_attention(query, key, value, active, impl="triton")
    (query, key, value)[which][0, 0, 500, 3] = bad
    got = routed_attention(query, key, value, active, impl="triton")
    assert torch.equal(got[1], clean[1])
    others = slice(1 if which == 0 else 2, None)  # heads that read other queries, or other keys and values
    assert torch.equal(got[0, others], clean[0, others])
    assert torch.equal(got[0, :, :300], clean[0, :, :300])  # tiles of 64 chosen rows that end before
    # The tile itself is done again, all of it in the masked loop: same order, but no product fused into the exponent.
    close = {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(got[0, :, :500], clean[0, :, :500], **close)
    rows = ~got[0, 0].isfinite().all(-1)
    assert bool(rows[500])
    if which == 0:
        torch.testing.assert_close(got[0, 0, 501:], clean[0, 0, 501:], **close)
    if which == 2:
        assert torch.equal(rows[500:], active[0, 500:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 700, 520, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(6, 520, 64, device="cuda", dtype=dtype) / 20).requires_grad_()
    bias = torch.randn(6, 64, device="cuda", dtype=dtype, requires_grad=True)
    active = torch.rand(2, 700, 6, device="cuda") < 0.5
    leaves, grad = (x, weight, bias), torch.randn(2, 700, 6, 64, device="cuda", dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got = routed_projection(x, weight, active, bias, impl="triton")
    want = routed_projection(*wide[:2], active, wide[2], impl="reference")
    grads = torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, wide, grad.double())
    for a, b in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        assert relative(a, b) < BOUNDS[dtype]


def test_no_host_synchronisation_and_a_captured_graph_follows_the_routing():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    active = torch.rand(2, 500, 4, device="cuda") < 0.5

    def run():
        return routed_attention(query, key, value, dispatch_heads(active), impl="triton")

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for share in (0.0, 0.2, 1.0):
        active.copy_(torch.rand(2, 500, 4, device="cuda") < share)
        graph.replay()
        assert torch.equal(out, run())


def test_compiles_and_is_not_recompiled_for_another_length(monkeypatch):
    monkeypatch.setattr(layers, "SKIP_FROM", 0)
    layer = MixtureOfHeads(512, 8, 2, 3, causal=True).cuda().bfloat16()
    x = torch.randn(1, 1024, 512, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), layer(x)) < 1e-2

        def variants():
            return sum(len(cache[0]) for cache in kernels._forward.device_caches.values())

        layer(x)
        before = variants()
        for more in (1, 16, 77, 256):
            layer(torch.randn(1, 1024 + more, 512, device="cuda", dtype=torch.bfloat16))
        assert variants() == before


def test_offsets_beyond_2_to_31():
    heads, length, dim = 16, 1_100_000, 128  # 2.25e9 elements
    active = torch.zeros(1, length, heads, dtype=torch.bool, device="cuda")
    active[:, -70:, -1] = True
    query = torch.empty(1, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    query[:, -1, -70:] = torch.randn(1, 70, dim, device="cuda")
    key, value = (torch.randn(1, 1, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    got = routed_attention(query, key, value, active, impl="triton")
    rows = query[:, -1:, -70:].double()
    want = routed_attention(rows, key.double(), value.double(), window=None, impl="reference")
    assert relative(got[:, -1:, -70:], want) < 1.5e-2
    assert not got[0, -1, :-70].any()
    assert not got[0, :2].any()
    assert not got[0, -2].any()


def test_a_converted_model_skips_heads():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda().eval()
    ids = torch.randint(100, (2, 300), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    with torch.no_grad():
        want = convert_to_moh(model, 0.75, 0.25)(ids, attention_mask=mask).logits
        got = convert_to_moh(model, 0.75, 0.25, attention="routed")(ids, attention_mask=mask).logits
        assert relative(got[mask.bool()], want[mask.bool()]) < 1e-3
        tokens = model.generate(ids[1:], max_new_tokens=5, do_sample=False)
        convert_to_moh(model, 0.75, 0.25, attention="sdpa")
        assert torch.equal(model.generate(ids[1:], max_new_tokens=5, do_sample=False), tokens)
