"""Packed rows: where documents begin, and an operator run on each by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.attention import by_document, hip_attention
from heedful.attention.documents import document_starts


def attention(query, key, value, attention_mask=None):
    """Causal attention with a padding mask, and one thing that depends on the place in the row: a row's first token counts twice."""
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None]
    scores = (query @ key.mT).masked_fill(~seen, -1e30)
    first = torch.zeros(length).index_fill(0, torch.tensor([0]), 0.7)
    return (scores + first).softmax(-1) @ value


def packed(rows):
    """Positions `(B, T)` of rows given as lists of document lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


@st.composite
def rows_of_one_length(draw):
    rows = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3))
    longest = max(map(sum, rows))
    return [row if sum(row) == longest else [*row, longest - sum(row)] for row in rows]


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_one_length(), data=st.data())
def test_each_document_is_by_itself(rows, data):
    positions, generator = packed(rows), torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query, key, value = torch.randn(3, len(rows), 2, positions.shape[1], 4, dtype=torch.float64, generator=generator)
    calls = []

    def watched(*tensors, attention_mask):
        calls.append(attention_mask)
        return attention(*tensors, attention_mask)

    got = by_document(watched, positions, query, key, value)
    for row, lengths in enumerate(rows):
        at = 0
        for n in lengths:
            piece = slice(at, at + n)
            want = attention(*(x[row : row + 1, :, piece] for x in (query, key, value)))
            assert torch.allclose(got[row : row + 1, :, piece], want, atol=1e-12)
            at += n
    assert sum(int(mask.sum()) for mask in calls) == positions.numel()
    assert sum(mask.numel() for mask in calls) <= 2 * positions.numel()  # padded to less than twice
    assert len(calls) <= max(1, positions.shape[1].bit_length())


@given(rows=rows_of_one_length())
@settings(max_examples=30, deadline=None)
def test_starts(rows):
    want = torch.stack([torch.cat([torch.arange(n) == 0 for n in row]) for row in rows])
    assert torch.equal(document_starts(packed(rows)), want)


def test_positions_that_do_not_begin_at_zero():
    positions = torch.tensor(
        [[5, 6, 7, 3, 4], [1, 2, 9, 10, 11]]
    )  # a row's first token begins one, whatever its position
    assert document_starts(positions).int().tolist() == [[1, 0, 0, 1, 0], [1, 0, 1, 0, 0]]


def test_tensors_without_heads_and_of_other_widths():
    positions = packed([[3, 4], [7]])
    label = torch.arange(14).view(2, 7)
    value = torch.randn(2, 3, 7, 5)
    seen = []

    def function(value, label, attention_mask):
        seen.extend(label[attention_mask].tolist())
        return value[..., :2] + label[:, None, :, None]

    got = by_document(function, positions, value, label)
    assert torch.equal(got, value[..., :2] + label[:, None, :, None])
    assert sorted(seen) == list(range(14))


def test_gradients_stay_in_their_document():
    positions = packed([[3, 4, 2]])
    leaves = [torch.randn(1, 1, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: by_document(attention, positions, *x), leaves)
    output = by_document(attention, positions, *leaves)
    (grad,) = torch.autograd.grad(output[:, :, 3:7].square().sum(), leaves[1])
    touched = grad.abs().sum((0, 1, 3)) > 0
    assert touched.tolist() == [False] * 3 + [True] * 4 + [False] * 2


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="batch and length must agree"):
        by_document(attention, packed([[3, 4]]), *torch.randn(3, 1, 2, 6, 4))
    with pytest.raises(ValueError, match="batch and length must agree"):
        by_document(attention, packed([[3, 4]]), *torch.randn(3, 2, 2, 7, 4))


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_no_tokens(batch, length):
    query, key, value = torch.randn(3, batch, 4, length, 8)
    positions = torch.arange(length).expand(batch, length)
    assert by_document(hip_attention, positions, query, key, value).shape == (batch, 4, length, 8)
