"""Attention and projections of chosen (token, head) pairs against their masked definitions; the kernels under the interpreter."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from heedful.attention import choose_heads, dispatch_heads, routed_attention, routed_output, routed_projection
from heedful.attention.head_routing import reference


def masked(query, key, value, active, causal=True, window=None, attention_mask=None, scale=None):
    """All heads under one dense mask, then zeros: the definition."""
    groups, length, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    i, j = torch.arange(length)[:, None] + keys - length, torch.arange(keys)
    seen = j <= i if causal else torch.ones(length, keys, dtype=torch.bool)
    seen = seen & (j > i - window) if window else seen
    seen = seen if attention_mask is None else seen & attention_mask[:, None, None]
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0)
    return torch.where(active.transpose(1, 2)[..., None], weights @ value, 0)


def tensors(batch, kv_heads, groups, length, keys, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * groups, length, dim, dtype=dtype, generator=generator)
    key, value = torch.randn(2, batch, kv_heads, keys, dim, dtype=dtype, generator=generator)
    return query, key, value, torch.rand(batch, length, kv_heads * groups, generator=generator) < 0.5


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), groups=st.sampled_from([1, 3]), length=st.integers(1, 20),
    more=st.integers(0, 9), dim=st.sampled_from([1, 5, 8]), data=st.data(),
)  # fmt: skip
def test_reference_is_the_masked_form(batch, kv_heads, groups, length, more, dim, data):
    query, key, value, active = tensors(
        batch, kv_heads, groups, length, length + more, dim, data.draw(st.integers(0, 99))
    )
    causal = data.draw(st.booleans())
    window = data.draw(st.sampled_from([None, 1, 4])) if causal else None
    mask = torch.rand(batch, length + more) < 0.7 if data.draw(st.booleans()) else None
    scale = data.draw(st.sampled_from([None, 0.3]))
    want = masked(query, key, value, active, causal, window, mask, scale)
    if mask is not None:  # what is hidden may be anything
        key, value = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (key, value))
    chunk, reference.CHUNK = reference.CHUNK, data.draw(st.sampled_from([3, 256]))
    try:
        got = routed_attention(
            query, key, value, active, causal=causal, window=window, attention_mask=mask, scale=scale
        )
    finally:
        reference.CHUNK = chunk
    assert torch.allclose(got, want, atol=1e-10)


def test_all_heads_are_plain_attention():
    query, key, value, _ = tensors(2, 2, 2, 9, 9, 8)
    want = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.allclose(routed_attention(query, key, value), want, atol=1e-10)
    assert torch.allclose(routed_attention(query, key, value, torch.ones(2, 9, 4, dtype=torch.bool)), want, atol=1e-10)


def test_dispatch_lists_each_heads_tokens_in_order():
    active = torch.rand(3, 17, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    _, rows, before = dispatch_heads(active)
    for head in range(5):
        tokens = active[..., head].flatten().nonzero().squeeze(1)
        assert rows[head, : len(tokens)].tolist() == tokens.tolist()
        assert before[head].tolist() == [0, *active[..., head].flatten().cumsum(0).tolist()]


def test_choice_of_heads():
    scores = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose_heads(scores, 3).nonzero()[:, 2].view(3, 4, 3), scores.topk(3).indices.sort().values)
    assert choose_heads(torch.tensor([1.0, 2, 2, 2, 0]), 2).int().tolist() == [0, 1, 1, 0, 0]  # ties: the lower index
    assert choose_heads(scores, 0).sum() == 0
    assert choose_heads(scores, 7).all()
    with pytest.raises(ValueError, match="k must be"):
        choose_heads(scores, 8)


def test_gradcheck_in_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 3)
    query, key, value, active = tensors(2, 1, 2, 7, 9, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 1], [1] * 9]).bool()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(
        lambda *x: routed_attention(*x, active, window=4, attention_mask=mask), leaves, atol=1e-7
    )
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 7, 4), (2, 4, 3), (2, 3)))
    assert torch.autograd.gradcheck(lambda x, w, b: routed_projection(x, w, active, b), (x, weight, bias))
    heads, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 7, 2, 3), (2, 3, 4)))
    assert torch.autograd.gradcheck(lambda h, w: routed_output(h, w, active, most=2), (heads, weight))


def test_an_unchosen_pair_gives_and_gets_no_gradient():
    query, key, value, active = tensors(2, 2, 1, 8, 8, 4)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(routed_attention(query, key, value, active).square().sum(), query)
    assert torch.equal(
        (grad != 0).any(-1).transpose(1, 2), active & (torch.arange(8) > 0)[:, None]
    )  # row 0 sees one key


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(which, bad):
    query, key, value, active = tensors(2, 1, 2, 12, 12, 4)
    clean = routed_attention(query, key, value, active)
    {"query": query, "key": key, "value": value}[which][0, 0, 6, 1] = bad
    got = routed_attention(query, key, value, active)
    assert torch.equal(got[1], clean[1])
    assert torch.allclose(got[0, :, :6], clean[0, :, :6], atol=1e-12)
    if which == "query":
        assert torch.allclose(got[0, :, 7:], clean[0, :, 7:], atol=1e-12)
        assert bool(got[0, 0, 6].isfinite().all()) == (not active[0, 6, 0])
    elif which == "value" or bad != bad:
        rows = ~got[0].isfinite().all(-1)
        assert torch.equal(rows[:, 6:], active[0].T[:, 6:])


def test_an_infinite_query_shows_also_where_all_its_products_are_minus_infinity():
    query, key, value, active = tensors(1, 1, 2, 12, 12, 4)
    key[..., 1] = -key[..., 1].abs() - 0.1
    query[0, 0, 6, 1] = torch.inf
    got = routed_attention(query, key, value, torch.ones_like(active))
    assert (~got.isfinite().all(-1)).nonzero().tolist() == [[0, 0, 6]]


def test_memory_stays_linear():
    """No T x T tensor, of bool neither, and none kept for the backward pass."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return out

    length = 2048
    query, key, value = (torch.randn(1, 1, length, 2, requires_grad=True) for _ in range(3))
    saved = []
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        routed_attention(query, key, value, torch.ones(1, length, 1, dtype=torch.bool)).sum().backward()
    assert largest <= 256 * length
    assert sum(saved) < length * length


def test_empty_single_and_half_precision():
    query, key, value, active = tensors(2, 1, 2, 5, 5, 4)
    assert routed_attention(query[:, :, :0], key, value, active[:, :0]).shape == (2, 2, 0, 4)
    assert routed_attention(query[:0], key[:0], value[:0], active[:0]).shape == (0, 2, 5, 4)
    assert routed_projection(torch.zeros(2, 0, 4), torch.zeros(3, 4, 2), torch.zeros(2, 0, 3).bool()).shape == (
        2,
        0,
        3,
        2,
    )
    assert routed_output(torch.zeros(2, 0, 3, 2), torch.zeros(3, 2, 4), torch.zeros(2, 0, 3).bool()).shape == (2, 0, 4)
    one = routed_attention(query[:, :, -1:], key, value, active[:, -1:])
    assert torch.allclose(one, routed_attention(query, key, value, active)[:, :, -1:], atol=1e-12)
    half = routed_attention(query.half(), key.half(), value.half(), active)
    assert half.dtype == torch.float16
    assert torch.allclose(half.double(), routed_attention(query, key, value, active), atol=5e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert routed_attention(query.float(), key.float(), value.float(), active).dtype == torch.bfloat16


def test_compiles_to_one_graph():
    query, key, value, active = tensors(2, 1, 2, 9, 9, 4, dtype=torch.float32)
    x, weight = torch.randn(2, 9, 6), torch.randn(2, 6, 4)

    def both(query, key, value, active, x, weight):
        heads = routed_attention(query, key, value, active) + routed_projection(x, weight, active).transpose(1, 2)
        return routed_output(heads.transpose(1, 2), weight.mT, active)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    arguments = (query, key, value, active, x, weight)
    assert torch.allclose(compiled(*arguments), both(*arguments), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": torch.ones(2, 5, 3, dtype=torch.bool)}, "active must be bool"),
        ({"active": torch.ones(2, 5, 2)}, "active must be bool"),
        ({"window": 0}, "window must be"),
        ({"window": 2, "causal": False}, "window is for causal"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"impl": "fast"}, "impl must be one of"),
        ({"impl": "triton"}, "impl='triton'"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, "attention_mask must be"),
        ({"key": torch.zeros(2, 1, 4, 4, dtype=torch.float64)}, "value"),
        ({"key": torch.zeros(2, 1, 5, 4)}, "not alike"),
        ({"query": torch.zeros(2, 2, 6, 4, dtype=torch.float64)}, "causal rows need their own keys"),
    ],
)
def test_wrong_use_is_refused(change, message):
    query, key, value, active = tensors(2, 1, 2, 5, 5, 4)
    with pytest.raises(ValueError, match=message):
        routed_attention(**({"query": query, "key": key, "value": value, "active": active} | change))


def test_kernels_under_the_interpreter():
    """float32 and float16, forward and backward: groups, windows, padding, more keys than queries, no and all heads; NaN; opcheck."""
    code = """
        import torch
        torch.set_num_threads(1)
        from heedful.attention import dispatch_heads, routed_attention, routed_output, routed_projection
        from heedful.attention.head_routing import triton as kernels
        generator = torch.Generator().manual_seed(0)
        def close(got, want, bound, *what):
            error = (got.double() - want).norm() / want.norm().clamp(min=1e-9)
            assert error < bound, (*what, float(error))
        for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 3e-3)):
            for length, keys, heads, kv, share, options in (
                (70, 70, 4, 2, 0.5, {}), (33, 50, 2, 2, 0.5, {"causal": False}), (65, 80, 2, 1, 0.4, {"window": 9}),
                (40, 40, 2, 2, 0.6, {"padded": True}), (1, 30, 2, 1, 1.0, {}), (20, 20, 2, 1, 0.0, {}),
            ):
                query = torch.randn(2, heads, length, 16, generator=generator).to(dtype)
                key, value = torch.randn(2, 2, kv, keys, 16, generator=generator).to(dtype)
                active = torch.rand(2, length, heads, generator=generator) < share
                grad = torch.randn(2, heads, length, 16, generator=generator).to(dtype)
                mask = None
                if options.pop("padded", False):
                    mask = torch.rand(2, keys, generator=generator) < 0.8
                    mask[:, :3] = False
                    key, value = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (key, value))
                leaves = [x.requires_grad_() for x in (query, key, value)]
                wide = [x.detach().double().requires_grad_() for x in leaves]
                got = routed_attention(*leaves, active, attention_mask=mask, impl="triton", **options)
                want = routed_attention(*wide, active, attention_mask=mask, impl="reference", **options)
                grads = torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, wide, grad.double())
                for name, a, b in zip("oqkv", (got, *grads[0]), (want, *grads[1])):
                    close(a, b, bound, dtype, length, options, name)
        query, key, value = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(3))
        active = torch.rand(1, 40, 2, generator=generator) < 0.5
        clean = routed_attention(query, key, value, active, impl="triton")
        sees = torch.arange(40) >= 20
        active[0, 20, 0] = True
        clean = routed_attention(query, key, value, active, impl="triton")
        for which in range(3):
            for bad in (torch.nan, torch.inf):  # done again in the same order: here, without fused products, the same bits
                inputs = [x.clone() for x in (query, key, value)]
                inputs[which][0, 0, 20, 3] = bad
                got = routed_attention(*inputs, active, impl="triton")
                assert torch.equal(got[:, :, :20], clean[:, :, :20]) and torch.equal(got[:, 1], clean[:, 1])
                rows = ~got[0, 0].isfinite().all(-1)
                if which == 0:
                    assert rows.nonzero().tolist() == [[20]]
                    assert torch.equal(got[0, 0, 21:], clean[0, 0, 21:])
                elif which == 2 or bad != bad:
                    assert torch.equal(rows, active[0, :, 0] & sees)
        query[0, 0, 0, 3] = torch.inf * -key[0, 0, 0, 3].sign()  # its one product is -inf
        active[0, 0, 0] = True
        got = routed_attention(query, key, value, active, impl="triton")
        assert got[0, 0, 0].isnan().all() and torch.equal(got[:, :, 1:], clean[:, :, 1:])

        x, weight, bias = torch.randn(2, 40, 24), torch.randn(3, 24, 16), torch.randn(3, 16)
        active = torch.rand(2, 40, 3, generator=generator) < 0.5
        results = []
        for impl in ("triton", "reference"):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = routed_projection(leaves[0], leaves[1], active, leaves[2], impl=impl)
            results.append((y, *torch.autograd.grad((y * torch.arange(16.0)).sum(), leaves)))
        for a, b in zip(*results):
            close(a, b.double(), 1e-5)
        dispatch = dispatch_heads(active)
        rows, before = kernels.dispatch_heads_op(active)
        assert torch.equal(before, dispatch.before)
        for head, count in enumerate(before[:, -1].tolist()):
            assert torch.equal(rows[head, :count], dispatch.rows[head, :count])
        scores = torch.randint(5, (2, 40, 7), generator=generator).float()  # many ties
        scores[0, 3, 2] = torch.nan
        for k in (0, 1, 3, 7):
            order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
            assert torch.equal(kernels.choose_heads_op(scores, k), torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True))
        torch.library.opcheck(kernels.dispatch_heads_op, (active,), test_utils=("test_schema",))
        torch.library.opcheck(kernels.choose_heads_op, (scores, 3), test_utils=("test_schema", "test_faketensor"))
        heads, weight = torch.randn(2, 40, 3, 16), torch.randn(3, 16, 24)
        heads[~active] = torch.nan
        results = []
        for impl in ("triton", "reference"):
            leaves = [t.clone().requires_grad_() for t in (heads, weight)]
            y = routed_output(*leaves, active, impl=impl)
            results.append((y, *torch.autograd.grad((y * torch.arange(24.0)).sum(), leaves)))
        for a, b in zip(*results):
            close(a, b.double(), 1e-5)
        _, rows, before = dispatch_heads(active)
        query, key, value = (torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3))
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(kernels.routed_attention_op, (query, key, value, None, rows, before, True, 0, 0.25), test_utils=checks)
        flat = active.flatten(0, 1)
        torch.library.opcheck(kernels.routed_output_op, (heads.flatten(0, 1).nan_to_num().requires_grad_(), weight, flat, rows, before, 3), test_utils=checks)
        torch.library.opcheck(kernels.routed_projection_op, (x.flatten(0, 1), torch.randn(3, 24, 16, requires_grad=True), bias, flat, rows, before), test_utils=checks)
        compiled = torch.compile(lambda *t: routed_attention(*t, active, impl="triton").sum(), fullgraph=True, backend="aot_eager")
        grads = [torch.autograd.grad(f(query, key, value), (query, key, value)) for f in (compiled, lambda *t: routed_attention(*t, active).sum())]
        for a, b in zip(*grads):
            close(a, b.double(), 1e-5)
        print("fine")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]
