"""Lightning attention against its quadratic definition; the Triton kernels under the interpreter."""

import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.attention import alibi_slopes, lightning_attention


def quadratic(query, key, value, decay, scale=None):
    """The definition, with all T x T weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    at = torch.arange(query.shape[2], dtype=query.dtype)
    distance = at[:, None] - at
    weights = torch.exp(-decay.to(query.dtype)[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
    return (query @ key.mT * weights) @ value * (query.shape[3] ** -0.5 if scale is None else scale)


def recurrent(query, key, value, decay, state, scale):
    """The definition, token by token."""
    outputs = []
    for q, k, v in zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True):
        state = torch.exp(-decay)[:, None, None] * state + k[..., :, None] * v[..., None, :]
        outputs.append(scale * (q[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2), state


def tensors(batch, kv_heads, groups, length, dim, columns, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((kv_heads * groups, dim), (kv_heads, dim), (kv_heads, columns))
    return [torch.randn(batch, h, length, d, dtype=dtype, generator=generator) for h, d in shapes]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 513, 913])
def test_equals_the_quadratic_form(length):
    inputs = tensors(1, 2, 2, length, 8, 5)
    decay = alibi_slopes(4).double()
    want = quadratic(*inputs, decay, 1.0)
    for chunk_size in (1000, 64, 37):
        assert error(lightning_attention(*inputs, decay, 1.0, chunk_size=chunk_size), want) < 1e-12
    narrow = [x.float() for x in inputs]
    assert error(lightning_attention(*narrow, decay.float(), 1.0), want) < 1e-5
    half = [x.bfloat16() for x in inputs]
    assert lightning_attention(*half, decay).dtype == torch.bfloat16
    assert error(lightning_attention(*half, decay, 1.0), want) < 2e-2


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), groups=st.sampled_from([1, 3]), length=st.integers(1, 40),
    dim=st.sampled_from([1, 5, 16]), columns=st.sampled_from([1, 4, 17]), chunk=st.integers(1, 50),
    rate=st.sampled_from([0.0, 0.3, 3.0, 60.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_awkward_shapes(batch, kv_heads, groups, length, dim, columns, chunk, rate, seed):
    inputs = tensors(batch, kv_heads, groups, length, dim, columns, seed)
    decay = rate * torch.rand(kv_heads * groups, dtype=torch.float64)
    initial = torch.randn(batch, kv_heads * groups, dim, columns, dtype=torch.float64)
    options = {"chunk_size": chunk, "output_final_state": True}
    got, state = lightning_attention(*inputs, decay, initial_state=initial, **options)
    repeated = [inputs[0], *(x.repeat_interleave(groups, 1) for x in inputs[1:])]
    want, last = recurrent(*repeated, decay, initial, dim**-0.5)
    assert torch.allclose(got, want, atol=1e-10)
    assert torch.allclose(state, last, atol=1e-10)
    # Cut anywhere, the state handed on, down to single tokens.
    cut = seed % (length + 1)
    head, between = lightning_attention(*(x[:, :, :cut] for x in inputs), decay, initial_state=initial, **options)
    tail, end = lightning_attention(*(x[:, :, cut:] for x in inputs), decay, initial_state=between, **options)
    assert torch.allclose(torch.cat([head, tail], 2), got, atol=1e-10)
    assert torch.allclose(end, state, atol=1e-10)


def test_limits_of_the_decay():
    query, key, value = tensors(2, 2, 1, 70, 8, 6)
    plain = (query @ key.mT).tril() @ value
    assert error(lightning_attention(query, key, value, torch.zeros(2), 1.0), plain) < 1e-12
    own = (query * key).sum(-1, keepdim=True) * value
    assert error(lightning_attention(query, key, value, torch.full((2,), 60.0), 1.0), own) < 1e-12
    for chunk_size in (16, 64):  # exponents up to 64 * 50, in float32
        fast = torch.full((2,), 50.0)
        got, state = lightning_attention(
            query.float(), key.float(), value.float(), fast, 1.0, chunk_size=chunk_size, output_final_state=True
        )
        assert error(got, own) < 1e-5
        assert error(state, key[:, :, -1, :, None] * value[:, :, -1, None, :]) < 1e-5


def test_causal_and_linear():
    query, key, value = tensors(1, 2, 1, 100, 8, 8)
    decay = alibi_slopes(2).double()
    before = lightning_attention(query, key, value, decay)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, 60:] += 1
    assert torch.equal(lightning_attention(*changed, decay)[:, :, :60], before[:, :, :60])
    other = torch.randn_like(value)
    both = lightning_attention(query, key, 2 * value + other, decay)
    assert torch.allclose(both, 2 * before + lightning_attention(query, key, other, decay), atol=1e-12)
    both = lightning_attention(2 * query + key, key, value, decay)
    assert torch.allclose(both, 2 * before + lightning_attention(key, key, value, decay), atol=1e-12)


def test_gradients():
    leaves = [x.requires_grad_() for x in tensors(1, 2, 2, 70, 6, 5)]
    decay = alibi_slopes(4).double()
    weight = torch.randn(1, 4, 70, 5, dtype=torch.float64)
    ours = torch.autograd.grad((lightning_attention(*leaves, decay, chunk_size=16) * weight).sum(), leaves)
    theirs = torch.autograd.grad((quadratic(*leaves, decay) * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < 1e-10
    small = [x.requires_grad_() for x in tensors(1, 1, 2, 5, 2, 3)]
    initial = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True, True, False]])
    for given_mask in (None, mask):
        assert torch.autograd.gradcheck(
            lambda q, k, v, s, m=given_mask: lightning_attention(
                q, k, v, decay[:2], initial_state=s, output_final_state=True, chunk_size=2, attention_mask=m
            ),
            (*small, initial),
        )


def test_padding_left_and_right_stops_the_clock():
    query, key, value = tensors(3, 2, 1, 50, 4, 4)
    decay = alibi_slopes(2).double()
    initial = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    spans = [(0, 50), (13, 50), (4, 31)]
    mask = torch.zeros(3, 50, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    hidden = [torch.where(mask[:, None, :, None], x, torch.nan) for x in (query, key, value)]
    got, state = lightning_attention(
        *hidden, decay, initial_state=initial, attention_mask=mask, output_final_state=True, chunk_size=16
    )
    for row, (start, end) in enumerate(spans):
        alone, last = lightning_attention(
            *(x[row : row + 1, :, start:end] for x in (query, key, value)), decay,
            initial_state=initial[row : row + 1], output_final_state=True,
        )  # fmt: skip
        assert torch.allclose(got[row, :, start:end], alone[0], atol=1e-12)
        assert torch.allclose(state[row], last[0], atol=1e-12)
        assert not got[row, :, :start].any()
        assert not got[row, :, end:].any()
    nothing, state = lightning_attention(
        *hidden, decay, initial_state=initial, attention_mask=torch.zeros_like(mask), output_final_state=True
    )
    assert not nothing.any()
    assert torch.equal(state, initial)


def test_packed_documents():
    query, key, value = tensors(1, 2, 1, 50, 4, 3)
    decay = alibi_slopes(2).double()
    ends = [0, 7, 7, 30, 50]
    initial = torch.randn(4, 2, 4, 3, dtype=torch.float64)
    got, states = lightning_attention(
        query, key, value, decay, initial_state=initial, cu_seqlens=torch.tensor(ends), output_final_state=True
    )
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        alone, last = lightning_attention(
            *(x[:, :, start:end] for x in (query, key, value)), decay, initial_state=initial[number : number + 1],
            output_final_state=True,
        )  # fmt: skip
        assert torch.allclose(got[:, :, start:end], alone, atol=1e-12)
        assert torch.allclose(states[number], last[0], atol=1e-12)


def test_nan_stays_behind():
    """It never reaches another row, head, or an earlier chunk."""
    clean = tensors(2, 2, 1, 200, 8, 8, dtype=torch.float32)
    decay = alibi_slopes(2)
    want = lightning_attention(*clean, decay)
    for which in range(3):
        inputs = [x.clone() for x in clean]
        inputs[which][0, 0, 130] = torch.nan
        got = lightning_attention(*inputs, decay)
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[0, 1], want[0, 1])
        assert torch.equal(got[0, 0, :128], want[0, 0, :128])
        assert got[0, 0, 130].isnan().all()
        if which:
            assert got[0, 0, 130:].isnan().all()


def test_empty_and_strided_inputs():
    decay = alibi_slopes(2)
    state = torch.randn(1, 2, 4, 4)
    nothing, same = lightning_attention(
        *torch.randn(3, 1, 2, 0, 4), decay, initial_state=state, output_final_state=True
    )
    assert nothing.shape == (1, 2, 0, 4)
    assert torch.equal(same, state)
    assert lightning_attention(*torch.randn(3, 0, 2, 5, 4), decay).shape == (0, 2, 5, 4)
    wide = torch.randn(1, 30, 2, 3, 4)
    views = [x.transpose(1, 2) for x in wide.unbind(3)]
    assert (
        error(lightning_attention(*views, decay), lightning_attention(*(x.contiguous() for x in views), decay)) < 1e-6
    )


def test_alibi_slopes():
    assert torch.equal(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    assert torch.allclose(alibi_slopes(6), torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]))
    assert torch.allclose(alibi_slopes(8, 0, 4), alibi_slopes(8) * 1.00001)
    assert alibi_slopes(8, 3, 4).max() < 1e-5
    for arguments in ((0,), (4, 1), (4, 4, 4), (4, -1, 4)):
        with pytest.raises(ValueError):
            alibi_slopes(*arguments)


def test_autocast_keeps_the_state_wide():
    inputs = tensors(1, 2, 1, 20, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = lightning_attention(*inputs, alibi_slopes(2), output_final_state=True)
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    want = lightning_attention(*(x.bfloat16() for x in inputs), alibi_slopes(2))
    assert torch.equal(output, want)


def test_wrong_use_is_refused():
    query, key, value = tensors(1, 2, 2, 10, 4, 4, dtype=torch.float32)
    decay = alibi_slopes(4)
    cases = [
        ("decay", lambda: lightning_attention(query, key, value, decay.clone().requires_grad_())),
        ("decay", lambda: lightning_attention(query, key, value, -decay)),
        ("decay", lambda: lightning_attention(query, key, value, decay[:2])),
        ("scale", lambda: lightning_attention(query, key, value, decay, 0.0)),
        ("chunk_size", lambda: lightning_attention(query, key, value, decay, chunk_size=0)),
        ("key", lambda: lightning_attention(query, key[:, :, :5], value, decay)),
        ("value", lambda: lightning_attention(query, key, value[:, :1], decay)),
        ("heads", lambda: lightning_attention(query[:, :3], key, value, decay[:3])),
        ("initial_state", lambda: lightning_attention(query, key, value, decay, initial_state=torch.zeros(1, 2, 4, 4))),
        ("attention_mask", lambda: lightning_attention(query, key, value, decay, attention_mask=torch.ones(1, 10))),
        ("cu_seqlens", lambda: lightning_attention(query, key, value, decay, cu_seqlens=torch.tensor([0, 11]))),
        ("impl", lambda: lightning_attention(query, key, value, decay, impl="fast")),
        ("triton", lambda: lightning_attention(query, key, value, decay, impl="triton")),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=words):
            call()


def test_compiles_whole():
    query, key, value = tensors(1, 2, 1, 70, 8, 8, dtype=torch.float32)
    decay = alibi_slopes(2)
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="aot_eager")
    mask = torch.ones(1, 70, dtype=torch.bool)
    for options in ({}, {"attention_mask": mask, "output_final_state": True}):
        got, want = (
            compiled(query, key, value, decay, **options),
            lightning_attention(query, key, value, decay, **options),
        )
        torch.testing.assert_close(got, want)


def test_kernels_under_the_interpreter():
    """float32 and float16; several segments, masks, documents, states, groups, D != E; gradients; NaN; opcheck; compile."""
    code = """
        import torch
        torch.set_num_threads(1)
        from heedful.attention import alibi_slopes, lightning_attention
        from heedful.attention.lightning import triton as kernels
        generator = torch.Generator().manual_seed(0)
        def random(*shape):
            return torch.randn(shape, generator=generator)
        assert kernels._segment_length(1, 1, 1) == 64
        for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
            for batch, length, kv, groups, dim, columns, mode in (
                (2, 1, 1, 1, 16, 16, "state"), (1, 70, 2, 1, 16, 16, ""), (2, 150, 1, 2, 5, 7, "state mask"),
                (1, 200, 1, 1, 16, 20, "packed"), (1, 180, 1, 2, 16, 16, "packed state"), (1, 129, 2, 1, 1, 1, "state"),
            ):
                inputs = [random(batch, kv * groups, length, dim), random(batch, kv, length, dim), random(batch, kv, length, columns)]
                options, sequences = {}, batch
                if "mask" in mode:
                    real = torch.ones(length, batch, dtype=torch.bool).T
                    real[0, :37] = False
                    real[1, 101:] = False
                    options["attention_mask"] = real
                    inputs = [torch.where(real[:, None, :, None], x, torch.nan) for x in inputs]
                if "packed" in mode:
                    options["cu_seqlens"] = torch.tensor([0, 3, 3, 100, length])
                    sequences = 4
                rates = (3 * alibi_slopes(kv * groups))[:, None].expand(-1, 2)[:, 0]
                state = random(sequences, kv * groups, dim, columns) if "state" in mode else None
                out_weight, state_weight = random(batch, kv * groups, length, columns), random(sequences, kv * groups, dim, columns)
                results = []
                for impl, kind, wide in (("triton", dtype, torch.float32), ("reference", torch.float64, torch.float64)):
                    leaves = [x.to(dtype).to(kind).requires_grad_() for x in inputs]
                    start = None if state is None else state.to(wide).requires_grad_()
                    output, last = lightning_attention(
                        *leaves, rates, initial_state=start, output_final_state=True, impl=impl, **options
                    )
                    assert last.dtype == wide
                    total = (output.double() * out_weight).sum() + (last.double() * state_weight).sum()
                    results.append([output, last, *torch.autograd.grad(total, leaves + ([] if start is None else [start]))])
                for name, got, want in zip(("o", "state", "dq", "dk", "dv", "dstate"), *results):
                    error = float((got.detach().double() - want.detach()).norm() / want.detach().norm())
                    assert error < bound, (dtype, length, mode, name, error)
        # One token: the kernel of the recurrent step.
        inputs, state = [random(2, 2, 1, 5), random(2, 1, 1, 5), random(2, 1, 1, 7)], random(2, 2, 5, 7)
        for real in (None, torch.tensor([[True], [False]])):
            options = {"initial_state": state, "output_final_state": True, "attention_mask": real}
            got = lightning_attention(*inputs, rates[:2], impl="triton", **options)
            torch.testing.assert_close(got, lightning_attention(*inputs, rates[:2], impl="reference", **options))
        # No decay and a fast one, across segments.
        inputs = [random(1, 2, 200, 16) for _ in range(3)]
        rates = torch.tensor([0.0, 60.0])
        got = lightning_attention(*inputs, rates, impl="triton")
        torch.testing.assert_close(got, lightning_attention(*inputs, rates), rtol=1e-4, atol=1e-4)
        # NaN stays behind.
        broken = [x.clone() for x in inputs]
        broken[1][0, 0, 130] = torch.nan
        after = lightning_attention(*broken, rates, impl="triton")
        assert torch.equal(after[0, 1], got[0, 1]) and torch.equal(after[0, 0, :128], got[0, 0, :128])
        assert after[0, 0, 130:].isnan().all()
        # Registered operators, and a whole graph.
        turned = [random(1, 9, 2, 4).transpose(1, 2), random(1, 9, 4, 1).permute(0, 3, 1, 2), random(1, 9, 1, 3).transpose(1, 2)]
        given = (*turned, rates, None, None, None)
        for op, inputs in (
            (kernels.lightning_attention_op, (*given, 0.5, True)),
            (kernels.lightning_attention_backward_op, (*given, random(1, 2, 9, 3), None, 0.5)),
        ):
            torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_faketensor"))
        small = [random(1, 2, 9, 4).requires_grad_(), random(1, 1, 9, 4).requires_grad_(), random(1, 1, 9, 3).requires_grad_()]
        start = random(1, 2, 4, 3).requires_grad_()
        torch.library.opcheck(kernels.lightning_attention_op, (*small, rates, None, None, start, 0.5, True))
        torch.library.opcheck(
            kernels.lightning_attention_backward_op,
            (*(x.detach() for x in small), rates, None, None, start.detach(), random(1, 2, 9, 3), random(1, 2, 4, 3), 0.5),
            test_utils=("test_schema", "test_faketensor"),
        )
        def loss(q, k, v):
            return lightning_attention(q, k, v, rates, impl="triton").square().sum()
        ours = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*small), small)
        torch.testing.assert_close(ours, torch.autograd.grad(loss(*small), small))
        print("fine")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]
