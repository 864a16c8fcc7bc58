"""Shifted sparse attention against one dense softmax with the visible set as its mask, and against LongLoRA's rolling."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from heedful.attention import by_document, shifted_sparse_attention

S2 = {"shift_ratio": 0.5, "num_sink_tokens": 0, "boundary": "wrap"}


def visible_set(real, size, heads, shift_ratio=0.25, num_sink_tokens=4, boundary="separate"):
    """(B, H, T, T), row by row as the paper's card says it."""
    batch, length = real.shape
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row in range(batch):
        slots = real[row].nonzero().flatten()
        if not len(slots):
            continue
        start, count = int(slots[0]), int(slots[-1] - slots[0]) + 1
        position = torch.arange(count)
        i, j = position[:, None], position[None, :]
        for head in range(heads):
            shifted = head >= heads - int(shift_ratio * heads + 0.5) and count > size
            shift = size // 2 if shifted else 0
            if boundary == "wrap":
                turned = (position - shift) % (-(-count // size) * size)  # the row, padded to whole groups and rolled
                see = (turned[:, None] // size == turned[None] // size) & (turned[None] <= turned[:, None])
            else:
                group = torch.div(position - shift, size, rounding_mode="floor")
                see = (group[:, None] == group[None]) & (j <= i)
            see = see | ((j < num_sink_tokens) & (j <= i))
            seen[row, head, start : start + count, start : start + count] = see
    return seen & real[:, None, :, None] & real[:, None, None, :]


def dense(query, key, value, size, *, attention_mask=None, scale=None, **options):
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    real = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask
    seen = visible_set(real, size, heads, **options)
    scores = (query @ key.mT * (dim**-0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
    return torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0.0) @ value


def tensors(batch, kv_heads, groups, length, dim=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    heads = (kv_heads * groups, kv_heads, kv_heads)
    return [torch.randn(batch, n, length, dim, dtype=torch.float64, generator=generator).to(dtype) for n in heads]


def padding(batch, length, left, right, hole=False):
    real = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        real[row, : left[row]] = False
        real[row, length - right[row] :] = False
        if hole and length > 6:
            real[row, length // 2] = False
    return real


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), groups=st.sampled_from([1, 2, 3, 5]), length=st.integers(1, 40),
    size=st.integers(1, 45), shift_ratio=st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]), sinks=st.sampled_from([0, 1, 4, 50]),
    boundary=st.sampled_from(["separate", "wrap"]), pad=st.sampled_from(["none", "some", "holes"]), seed=st.integers(0, 9),
    block=st.sampled_from([8, 128]),
)  # fmt: skip
def test_is_one_softmax_over_the_visible_set_and_so_are_the_gradients(
    batch, kv_heads, groups, length, size, shift_ratio, sinks, boundary, pad, seed, block
):
    from heedful.attention.shifted import reference

    options = {"shift_ratio": shift_ratio, "num_sink_tokens": sinks, "boundary": boundary}
    leaves = [x.requires_grad_() for x in tensors(batch, kv_heads, groups, length, seed=seed)]
    mask = None
    if pad != "none":
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randint(0, length, (batch,), generator=generator) // 2 for _ in range(2))
        mask = padding(batch, length, left, right, hole=pad == "holes")
    weight = torch.randn(leaves[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    want = dense(*leaves, size, attention_mask=mask, **options)
    want_gradients = torch.autograd.grad((want * weight).sum(), leaves)
    before, reference.BLOCK = reference.BLOCK, block
    try:
        got = shifted_sparse_attention(*leaves, size, attention_mask=mask, **options)
        gradients = torch.autograd.grad((got * weight).sum(), leaves)
    finally:
        reference.BLOCK = before
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    for a, b in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"shift_ratio": 1.0}, S2])
def test_one_group_or_sinks_everywhere_is_dense_causal_attention(options):
    query, key, value = tensors(2, 2, 2, 23, 8, dtype=torch.float32)
    want = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for size in (23, 24, 1000):
        torch.testing.assert_close(
            shifted_sparse_attention(query, key, value, size, **options), want, atol=1e-6, rtol=0
        )
    options = {**options, "num_sink_tokens": 23, "boundary": "separate"}
    torch.testing.assert_close(shifted_sparse_attention(query, key, value, 5, **options), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("length", "size", "heads"), [(32, 8, 4), (30, 8, 4), (33, 7, 5), (24, 12, 1)])
def test_s2_attention_is_longloras_rolling(length, size, heads):
    """Roll the last heads back by half a group, attend causally in each group, roll the outputs on."""
    query, key, value = tensors(2, heads, 1, length)
    padded = -(-length // size) * size
    shifted, back = int(heads / 2 + 0.5), size // 2
    pad = [torch.nn.functional.pad(x, (0, 0, 0, padded - length)) for x in (query, key, value)]
    real = torch.arange(padded) < length
    parts = []
    for some, shift in ((slice(0, heads - shifted), 0), (slice(heads - shifted, heads), back)):
        q, k, v = (x[:, some].roll(-shift, 2).unflatten(2, (-1, size)) for x in pad)
        seen = torch.ones(size, size, dtype=torch.bool).tril() & real.roll(-shift).view(-1, 1, size)
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen | torch.eye(size, dtype=torch.bool))
        parts.append(out.flatten(2, 3).roll(shift, 2))
    want = torch.cat(parts, 1)[:, :, :length]
    got = shifted_sparse_attention(query, key, value, size, **S2)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    separate = shifted_sparse_attention(query, key, value, size, **S2 | {"boundary": "separate"})
    differs = (separate - got).abs().amax((0, 3)) > 1e-9
    assert not differs[: heads - shifted].any()
    assert not differs[:, back:].any()
    assert differs[heads - shifted :, :back].all()


def test_causal_in_every_head_unless_wrapped():
    query, key, value = tensors(1, 4, 1, 30)
    changed = value.clone()
    changed[:, :, -1] += 1
    by_default = shifted_sparse_attention(query, key, changed, 8) - shifted_sparse_attention(query, key, value, 8)
    assert (by_default[:, :, :-1] == 0).all()
    assert (by_default[:, :, -1] != 0).all()
    wrapped = shifted_sparse_attention(query, key, changed, 8, **S2) - shifted_sparse_attention(
        query, key, value, 8, **S2
    )
    assert (wrapped[:, 2:, 0] != 0).any()
    for j in range(1, 30):  # no row before j knows of it, by its key or its value
        leaves = [key.clone().requires_grad_(), value.clone().requires_grad_()]
        early = shifted_sparse_attention(query, *leaves, 8)[:, :, :j]
        for gradient in torch.autograd.grad(early.sum(), leaves):
            assert (gradient[:, :, j:] == 0).all()


def test_weights_sum_to_one_and_no_key_counts_twice():
    query, key, _ = tensors(1, 3, 2, 31, 31)
    weights = shifted_sparse_attention(query, key, torch.eye(31, dtype=torch.float64).expand(1, 3, 31, 31), 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6, 31, dtype=torch.float64))
    seen = visible_set(torch.ones(1, 31, dtype=torch.bool), 8, 6)
    scores = (query @ key.repeat_interleave(2, 1).mT * 31**-0.5).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(weights, scores.softmax(-1))


@pytest.mark.parametrize("options", [{}, S2])
def test_padding_changes_nothing_and_neither_does_what_is_in_it(options):
    query, key, value = tensors(1, 2, 2, 29)
    alone = shifted_sparse_attention(query, key, value, 9, **options)
    for left, right in ((6, 0), (0, 5), (3, 11)):
        wide = [torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan) for x in (query, key, value)]
        leaves = [torch.cat([x, torch.randn_like(x)]).requires_grad_() for x in wide]
        mask = padding(2, 29 + left + right, [left, 0], [right, 0])
        got = shifted_sparse_attention(*leaves, 9, attention_mask=mask, **options)
        torch.testing.assert_close(got[:1, :, left : left + 29], alone, atol=1e-10, rtol=0)
        assert (got[0, :, ~mask[0]] == 0).all()
        for gradient in torch.autograd.grad(got.sum(), leaves):
            assert torch.isfinite(gradient).all()
            assert (gradient[0, :, ~mask[0]] == 0).all()


def test_documents_of_a_packed_row_are_as_if_alone():
    query, key, value = tensors(1, 2, 2, 47)
    lengths = [20, 3, 1, 23]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def attend(q, k, v, attention_mask):
        return shifted_sparse_attention(q, k, v, 7, attention_mask=attention_mask)

    packed = by_document(attend, positions, query, key, value)
    apart = [
        shifted_sparse_attention(*x, 7) for x in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(apart, 2), atol=1e-10, rtol=0)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in tensors(2, 1, 3, 11, 3)]
    mask = padding(2, 11, [0, 2], [1, 0])
    for options in ({}, S2):
        call = lambda *x, o=options: shifted_sparse_attention(*x, 4, attention_mask=mask, **o)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves)


def test_memory_is_linear_at_a_fixed_group_and_no_tensor_is_square():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
            return result

    for size, length in ((64, 2048), (2048, 2048)):
        query, key, value = tensors(1, 1, 1, length, 4, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        mask = torch.ones(1, length, dtype=torch.bool)
        with Largest() as largest:
            output = shifted_sparse_attention(*leaves, size, shift_ratio=1.0, attention_mask=mask)
            torch.autograd.grad(output.sum(), leaves)
        assert largest.size <= 128 * (length if size == length else 512) + 4 * length


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4)])
def test_empty_and_single_inputs(shape):
    query = torch.randn(shape, requires_grad=True)
    output = shifted_sparse_attention(query, query, query, 3)
    assert output.shape == shape
    output.sum().backward()
    assert query.grad.shape == shape
    masked = shifted_sparse_attention(query, query, query, 3, attention_mask=torch.ones(shape[0], shape[2]).bool())
    assert masked.shape == shape


def test_a_single_token_is_its_own_value():
    query, key, value = tensors(2, 1, 2, 1)
    torch.testing.assert_close(shifted_sparse_attention(query, key, value, 4), value.expand(-1, 2, -1, -1))
    nothing = torch.zeros(2, 1, dtype=torch.bool)
    assert (shifted_sparse_attention(query, key, value, 4, attention_mask=nothing) == 0).all()


def test_what_is_not_finite_stays_where_it_is_attended():
    query, key, value = tensors(2, 2, 1, 400, dtype=torch.float32)
    for tensor, bad in ((query, torch.nan), (key, torch.inf), (value, torch.nan)):
        inputs = [x.clone() for x in (query, key, value)]
        inputs[[x is tensor for x in (query, key, value)].index(True)][0, :, 300] = bad
        finite = torch.isfinite(shifted_sparse_attention(*inputs, 100)).all(-1)
        assert not finite[0, :, 300].any()
        assert finite[1].all()
        assert finite[0, :, :256].all()  # earlier blocks of queries


def test_an_infinite_query_shows_also_where_all_its_products_are_minus_infinity():
    query, key, value = tensors(1, 2, 1, 40, 16, dtype=torch.float32)
    key[..., 3] = -key[..., 3].abs() - 0.1
    for row in (0, 17):
        inputs = query.clone()
        inputs[0, 0, row, 3] = torch.inf
        finite = shifted_sparse_attention(inputs, key, value, 16).isfinite().all(-1)
        assert (~finite).nonzero().tolist() == [[0, 0, row]]


def test_autocast_computes_in_its_dtype():
    query, key, value = tensors(1, 2, 1, 20, 8, dtype=torch.float32)
    leaf = query.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = shifted_sparse_attention(leaf, key, value, 6)
    assert output.dtype == torch.bfloat16
    half = [x.bfloat16() for x in (leaf, key, value)]
    assert torch.equal(output, shifted_sparse_attention(*half, 6))
    output.float().sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_compiles_whole():
    query, key, value = tensors(2, 1, 4, 30, 8, dtype=torch.float32)
    mask = padding(2, 30, [0, 3], [2, 0])

    def step(query, key, value):
        return shifted_sparse_attention(query, key, value, 8, attention_mask=mask).sin()

    leaves = [x.requires_grad_() for x in (query, key, value)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(step(*leaves).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size"), ({"group_size": 2.5}, "group_size"), ({"shift_ratio": 1.5}, "shift_ratio"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"), ({"boundary": "roll"}, "boundary"), ({"impl": "fast"}, "impl"),
        ({"impl": "triton"}, "triton"), ({"scale": -1.0}, "scale"), ({"key": torch.randn(1, 2, 9, 16)}, "key must be"),
        ({"query": torch.randn(1, 3, 10, 16)}, "multiple"), ({"value": torch.randn(1, 2, 9, 16)}, "value must be"),
        ({"attention_mask": torch.ones(1, 10)}, "attention_mask"), ({"query": torch.randn(2, 10, 16)}, "query must be"),
        ({"key": torch.randn(1, 2, 10, 16).double()}, "not alike"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_clear_error(change, message):
    arguments = {
        "query": torch.randn(1, 4, 10, 16), "key": torch.randn(1, 2, 10, 16), "value": torch.randn(1, 2, 10, 16), "group_size": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        shifted_sparse_attention(**{**arguments, **change})


def test_kernels_under_the_interpreter():
    """Forward and gradients in float32 and float16: sinks, padding on both sides, holes, wrap, odd sizes; opcheck; compile."""
    code = """
        import torch
        torch.set_num_threads(1)
        from heedful.attention import shifted_sparse_attention
        from heedful.attention.shifted import triton as kernels
        generator = torch.Generator().manual_seed(0)
        s2 = {"shift_ratio": 0.5, "num_sink_tokens": 0, "boundary": "wrap"}
        for dtype, bound, cases in (
            (torch.float32, 2e-6, ((2, 1, 3, 101, 41, {}, "holes"), (1, 2, 2, 97, 20, s2, None), (2, 1, 2, 75, 30, s2, "pad"),
                                   (1, 1, 1, 40, 9, {"num_sink_tokens": 33, "shift_ratio": 1.0}, None), (1, 1, 1, 1, 1, {}, None))),
            (torch.float16, 3e-3, ((1, 1, 4, 150, 140, {}, None), (2, 1, 1, 130, 50, s2 | {"num_sink_tokens": 2}, "pad"))),
        ):
            for batch, kv, groups, length, size, options, pad in cases:
                # In memory (B, T, H, D), as in a model.
                query, key, value = (
                    torch.randn(batch, length, n, 16, generator=generator).to(dtype).transpose(1, 2)
                    for n in (kv * groups, kv, kv)
                )
                weight = torch.randn(query.shape, generator=generator).to(dtype)
                mask = None
                if pad:
                    mask = torch.ones(batch, length, dtype=torch.bool)
                    mask[0, :7] = False
                    mask[1, -9:] = False
                    mask[1, 30:33] = pad != "holes"
                    for x in (query, key, value):
                        x.masked_fill_(~mask[:, None, :, None], torch.nan)
                results = []
                for impl, to in (("triton", dtype), ("reference", torch.float64)):
                    leaves = [x.to(to).requires_grad_() for x in (query, key, value)]
                    out = shifted_sparse_attention(*leaves, size, attention_mask=mask, impl=impl, **options)
                    results.append([out.detach(), *torch.autograd.grad((out * weight.to(to)).sum(), leaves)])
                for got, want in zip(*results):
                    error = (got.double() - want).norm() / want.norm().clamp(min=1)
                    assert error < bound, (dtype, length, size, options, pad, float(error))
        inputs = [torch.randn(2, 2, 40, 16, generator=generator).requires_grad_() for _ in range(3)]
        mask = torch.ones(2, 40, dtype=torch.bool)
        mask[0, :5] = False
        torch.library.opcheck(kernels.shifted_sparse_attention_op, (*inputs, mask, 16, 1, 4, True, 0.25))
        step = torch.compile(lambda *x: shifted_sparse_attention(*x, 16, attention_mask=mask, impl="triton"), fullgraph=True, backend="aot_eager")
        assert torch.equal(step(*inputs), shifted_sparse_attention(*inputs, 16, attention_mask=mask, impl="triton"))
        torch.autograd.grad(step(*inputs).sum(), inputs)
        query, key, value = (x.detach().clone() for x in inputs)
        query[0, 0, 5, 3] = torch.inf * -key[0, 0, 5, 3].sign()  # of the first real row: its one product is -inf
        out = shifted_sparse_attention(query, key, value, 16, attention_mask=mask, impl="triton")
        assert (~out.isfinite().all(-1)).nonzero().tolist() == [[0, 0, 5]]
        for shape in ((0, 2, 5, 16), (1, 2, 0, 16)):
            x = torch.randn(shape, requires_grad=True)
            out = shifted_sparse_attention(x, x, x, 3, impl="triton")
            assert out.shape == shape
            out.sum().backward()
        print("fine")
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]


def test_work_grows_with_the_length_and_is_a_quarter_at_a_quarter():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for length in (512, 1024, 2048):
        leaves = [x.requires_grad_() for x in tensors(1, 1, 4, length, 4, dtype=torch.float32)]
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(shifted_sparse_attention(*leaves, 128).sum(), leaves)
        counts.append(counter.get_total_flops())
    assert counts[1] < 2.1 * counts[0]
    assert counts[2] < 2.1 * counts[1]
    seen = visible_set(
        torch.ones(1, 512, dtype=torch.bool), 128, 4
    )  # the products that the kernels make, but for tiles
    assert seen.sum() <= 0.3 * 4 * 512 * 513 / 2
