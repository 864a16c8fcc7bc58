"""Landmark attention against its definition, block by block; the Triton kernels under the interpreter."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.attention import landmark_attention
from heedful.attention.landmark import reference


def definition(query, key, value, marks, mask=None, scale=None):
    """Row by row, block by block, as the paper has it; also the weights `(B, H, T, T)`."""
    batch, heads, length, dim = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    marks = marks.expand(batch, length)
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    weights = query.new_zeros(batch, heads, length, length)
    for b in range(batch):
        blocks, current = [], []  # finished ones: (tokens, landmark)
        for i in range(length):
            if not mask[b, i]:
                continue
            if not marks[b, i]:
                current.append(i)
            keys = [*current, *(landmark for _, landmark in blocks)]
            if keys:
                scores = query[b, :, i : i + 1] @ key[b].mT * (dim**-0.5 if scale is None else scale)
                outer = scores[:, 0, keys].softmax(-1)
                weights[b, :, i, current] = outer[:, : len(current)]
                for n, (tokens, _) in enumerate(blocks):
                    gate = outer[:, len(current) + n, None]
                    weights[b, :, i, tokens] = gate * scores[:, 0, tokens].softmax(-1)
            if marks[b, i]:
                if current:
                    blocks.append((current, i))
                current = []
    return weights @ value, weights


def tensors(batch, heads, kv_heads, length, dim, generator, dtype=torch.float64):
    query = torch.randn(batch, heads, length, dim, dtype=dtype, generator=generator)
    key, value = torch.randn(2, batch, kv_heads, length, dim, dtype=dtype, generator=generator)
    return query, key, value


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), groups=st.integers(1, 2), length=st.integers(1, 19), dim=st.sampled_from([1, 6]),
    share=st.sampled_from([0.0, 0.1, 0.4, 1.0]), padded=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_reference_is_the_definition(batch, kv_heads, groups, length, dim, share, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = tensors(batch, kv_heads * groups, kv_heads, length, dim, generator)
    marks = torch.rand(batch, length, generator=generator) < share
    mask = torch.rand(batch, length, generator=generator) < 0.7 if padded else None
    want, weights = definition(query, key, value, marks, mask)
    seen = weights.sum(-1)
    assert ((seen - 1).abs() < 1e-9).logical_or(seen == 0).all()
    value = value.masked_fill(marks[:, None, :, None], torch.nan)  # never read
    got = landmark_attention(query, key, value, marks, attention_mask=mask)
    assert torch.allclose(got, want, atol=1e-10)


def test_row_blocks_and_lengths(monkeypatch):
    """Several blocks of rows, recomputed in the backward, give what one gives; T = 0, B = 0, T = 1."""
    generator = torch.Generator().manual_seed(0)
    leaves = [x.requires_grad_() for x in tensors(1, 2, 1, 70, 4, generator)]
    marks = torch.arange(70) % 9 == 8

    def run():
        out = landmark_attention(*leaves, marks)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    whole = run()
    monkeypatch.setattr(reference, "_SCORES", 16 * 70)
    for a, b in zip(run(), whole, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    for shape in ((0, 2, 5, 4), (2, 2, 0, 4)):
        empty = torch.zeros(shape)
        assert landmark_attention(empty, empty, empty, torch.zeros(shape[2], dtype=torch.bool)).shape == shape
    one = torch.randn(1, 1, 1, 4)
    assert torch.equal(landmark_attention(one, one, one, torch.tensor([False])), one)
    assert landmark_attention(one, one, one, torch.tensor([True])).abs().sum() == 0


def test_before_the_first_landmark_it_is_causal_attention():
    generator = torch.Generator().manual_seed(0)
    query, key, value = tensors(2, 4, 2, 30, 8, generator, torch.float32)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    got = landmark_attention(query, key, value, torch.arange(30) == 30)
    assert torch.allclose(got, want, atol=1e-6)


def exact_landmarks(generator, length, dim, marks):
    """Queries and keys such that each landmark's score is the log-sum-exp of its block's, for every query: a one-hot of the
    query's index behind the query, and those logarithms, one for each query, in the landmark's key."""
    query, key, value = tensors(1, 2, 2, length, dim, generator)
    scores = query @ key.mT
    wide_query = torch.cat([query, torch.eye(length, dtype=query.dtype).expand(1, 2, -1, -1)], -1)
    wide_key = torch.cat([key, key.new_zeros(1, 2, length, length)], -1)
    begin = 0
    for landmark in marks.nonzero().flatten().tolist():
        wide_key[:, :, landmark, :dim] = 0
        if landmark > begin:
            wide_key[:, :, landmark, dim:] = scores[..., begin:landmark].logsumexp(-1)
        begin = landmark + 1
    dense = torch.ones(length, length).tril().bool() & ~marks
    dense[0] |= ~dense[0].any() & (torch.arange(length) == 0)
    want = scores.masked_fill(~dense, -torch.inf).softmax(-1).nan_to_num() @ value
    return wide_query, wide_key, value, want


def test_exactness():
    """With such landmarks the two levels make one softmax over all ordinary tokens, landmark rows too."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.zeros(40, dtype=torch.bool)
    marks[[6, 7, 15, 33]] = True  # blocks of any length, one without a token
    query, key, value, want = exact_landmarks(generator, 40, 6, marks)
    got = landmark_attention(query, key, value, marks, scale=1.0)
    assert torch.allclose(got, want, atol=1e-12)


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    leaves = [x.requires_grad_() for x in tensors(2, 2, 1, 11, 3, generator)]
    marks = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]]).bool()
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, :2] = False
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, marks, attention_mask=mask), leaves)
    out = landmark_attention(*leaves, marks, attention_mask=mask)
    _, d_key, d_value = torch.autograd.grad(out.square().sum(), leaves)
    assert d_value.masked_select(marks[:, None, :, None]).abs().max() == 0
    assert d_key[0, 0, 2].abs().max() > 0
    assert d_key[0, 0, 4].abs().max() > 0
    assert d_key[0, 0, 5].abs().max() == 0  # a block without a token
    assert d_key[0, 0, 9].abs().max() > 0  # seen by row 10 alone
    own = torch.autograd.grad(landmark_attention(*leaves, marks)[0, :, 9].sum(), leaves[1])[0]
    assert own[0, 0, 9].abs().max() == 0
    assert own[0, 0, 4].abs().max() > 0


def test_causal_rows_apart_padding_and_nan():
    generator = torch.Generator().manual_seed(0)
    query, key, value = tensors(2, 2, 1, 40, 4, generator)
    marks = torch.arange(40) % 8 == 7
    out = landmark_attention(query, key, value, marks)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, 30:] = torch.randn(x[:, :, 30:].shape, dtype=x.dtype, generator=generator)
    assert torch.equal(landmark_attention(*changed, marks)[:, :, :30], out[:, :, :30])
    assert torch.allclose(landmark_attention(query[1:], key[1:], value[1:], marks)[0], out[1], atol=1e-12)
    # Left padding of two blocks, full of NaN, changes nothing.
    padded = [torch.cat([x.new_full((2, x.shape[1], 16, 4), torch.nan), x], 2) for x in (query, key, value)]
    leaves = [x.requires_grad_() for x in padded]
    mask = torch.arange(56).expand(2, -1) >= 16
    got = landmark_attention(*leaves, torch.arange(56) % 8 == 7, attention_mask=mask)
    assert torch.allclose(got[:, :, 16:], out, atol=1e-12)
    assert got[:, :, :16].abs().max() == 0
    for gradient in torch.autograd.grad(got.sum(), leaves):
        assert torch.isfinite(gradient).all()
        assert gradient[:, :, :16].abs().max() == 0
    # A NaN in a key reaches the rows that see it, of its batch row.
    key = key.clone()
    key[0, 0, 20] = torch.nan
    got = landmark_attention(query, key, value, marks)
    assert torch.isnan(got[0, :, 20:23]).all()
    assert torch.isnan(got[0, :, 24:]).all()
    assert torch.equal(got[0, :, :20], out[0, :, :20])
    assert torch.equal(got[1], out[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_behind(bad):
    """It makes every row from its own on NaN, and no earlier one of the same block of rows; not at a landmark, nor in padding."""
    query, key, value = tensors(2, 4, 2, 40, 4, torch.Generator().manual_seed(0), torch.float32)
    marks, mask = torch.arange(40) % 8 == 7, torch.arange(40).expand(2, -1) < 36
    want = landmark_attention(query, key, value, marks, attention_mask=mask)
    value[:, :, 23], value[:, :, 37] = bad, bad  # a landmark, padding
    assert torch.equal(landmark_attention(query, key, value, marks, attention_mask=mask), want)
    value[0, 1, 20, 2] = bad
    got = landmark_attention(query, key, value, marks, attention_mask=mask)
    assert got[0, 2:, 20:36].isnan().all()
    assert torch.equal(got[0, 2:, :20], want[0, 2:, :20])
    assert not got[0, 2:, 36:].any()
    assert torch.equal(got[0, :2], want[0, :2])
    assert torch.equal(got[1], want[1])


def test_dtypes_autocast_and_compile():
    generator = torch.Generator().manual_seed(0)
    query, key, value = tensors(1, 2, 1, 48, 8, generator, torch.float32)
    marks = torch.arange(48) % 8 == 7
    want = landmark_attention(*(x.double() for x in (query, key, value)), marks)
    for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-6)):
        got = landmark_attention(*(x.to(dtype) for x in (query, key, value)), marks)
        assert got.dtype == dtype
        assert (got.double() - want).norm() / want.norm() < bound
    with torch.autocast("cpu", torch.bfloat16):
        assert landmark_attention(query, key, value, marks).dtype == torch.bfloat16
    compiled = torch.compile(landmark_attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(query, key, value, marks).double(), want, atol=1e-5)


def test_bad_input_is_refused():
    x = torch.randn(2, 4, 10, 16)
    marks = torch.zeros(10, dtype=torch.bool)
    for message, call in {
        "is_landmark": lambda: landmark_attention(x, x, x, marks.long()),
        "attention_mask": lambda: landmark_attention(x, x, x, marks, attention_mask=torch.ones(2, 10)),
        "multiple": lambda: landmark_attention(x, x[:, :3], x[:, :3], marks),
        "LandmarkCache": lambda: landmark_attention(x[:, :, :3], x, x, marks),
        "impl": lambda: landmark_attention(x, x, x, marks, impl="fast"),
        "triton": lambda: landmark_attention(x[..., :5], x[..., :5], x[..., :5], marks, impl="triton"),
        "scale": lambda: landmark_attention(x, x, x, marks, scale=0.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_kernels_under_the_interpreter():
    """Solos, tiles of several blocks, long blocks, blocks of any lengths, padding, scores far apart, exactness; opcheck."""
    code = """
        import torch
        torch.set_num_threads(1)
        from heedful.attention import landmark_attention
        from heedful.attention.landmark import triton as kernels
        g = torch.Generator().manual_seed(0)
        every = lambda length, n: torch.arange(length) % n == n - 1
        mask = torch.ones(2, 90, dtype=torch.bool)
        mask[0, :17], mask[1, 80:], mask[1, 50] = False, False, False
        cases = [
            (1, 2, 1, 70, every(70, 8), None, 1.0), (1, 1, 1, 70, every(70, 32), None, 1.0), (1, 1, 1, 100, every(100, 45), None, 1.0),
            (2, 2, 2, 90, torch.rand(2, 90, generator=g) < 0.15, mask, 1.0), (1, 1, 1, 64, every(64, 8), None, 30.0),
            (1, 1, 1, 1, every(1, 4), None, 1.0), (1, 1, 1, 40, every(40, 99), None, 1.0),
        ]
        for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 3e-3)):
            for batch, heads, kv, length, marks, real, size in cases:
                q = torch.randn(batch, heads, length, 16, generator=g) * size
                k, v = torch.randn(2, batch, kv, length, 16, generator=g)
                weight = torch.randn(batch, heads, length, 16, generator=g).to(dtype)
                ours = [x.to(dtype).requires_grad_() for x in (q, k, v)]
                wide = [x.detach().double().requires_grad_() for x in ours]
                out = landmark_attention(*ours, marks, attention_mask=real, impl="triton")
                want = landmark_attention(*wide, marks, attention_mask=real, impl="reference")
                got = (out, *torch.autograd.grad((out * weight).sum(), ours))
                exact = (want, *torch.autograd.grad((want * weight.double()).sum(), wide))
                for a, b in zip(got, exact):
                    error = (a.double() - b).norm() / b.norm().clamp(min=0.1)
                    assert error < bound, (dtype, length, size, float(error))
        # What is not finite shows in the rows that see it, and in no earlier one, whatever tile it is in.
        tensors = [torch.randn(1, 1, 70, 16, generator=g) for _ in range(3)]
        for n in (8, 26, 60):
            clean = landmark_attention(*tensors, every(70, n), impl="triton")[0, 0]
            for which, bad in ((0, torch.nan), (1, torch.nan), (2, torch.inf)):
                broken = [x.clone() for x in tensors]
                broken[which][0, 0, 40, 3] = bad
                got = landmark_attention(*broken, every(70, n), impl="triton")[0, 0]
                assert torch.equal(got[:40], clean[:40]), (n, which)
                assert got[40].isnan().all(), (n, which)
                assert torch.equal(got[41:], clean[41:]) if which == 0 else got[41:].isnan().all(), (n, which)
        x = torch.zeros(0, 1, 5, 16)
        assert landmark_attention(x, x, x, every(5, 2), impl="triton").shape == x.shape
        q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
        marks = every(20, 6).expand(1, -1)
        torch.library.opcheck(kernels.landmark_attention_op, (q, k, v, marks, None, 0.25))
        q, k, v = (x.detach() for x in (q, k, v))
        out, lse = kernels.landmark_attention_op(q, k, v, marks, None, 0.25)
        torch.library.opcheck(
            kernels.landmark_attention_backward_op, (q, k, v, marks, None, 0.25, out, lse, torch.ones_like(out)),
            test_utils=("test_schema", "test_faketensor"),
        )
        print("fine")
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "fine", run.stderr[-3000:]
