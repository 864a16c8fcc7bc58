"""Visibility against the definition, for every kind of mask that transformers hands over."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from heedful.seam.masks import Visibility, put, take


def visibility(mask, batch, queries, keys, *, causal=True, flash=False, window=None, slot=0):
    return Visibility(mask, batch, queries, keys, causal, flash, window, slot, torch.device("cpu"))


@st.composite
def sequences(draw):
    """A batch of padded sequences of which `queries` rows run now over `keys` filled slots."""
    batch, past, queries = draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 6))
    side = draw(st.sampled_from(["left", "right"]))
    keys = past + queries
    padding = [draw(st.integers(0, keys)) for _ in range(batch)]
    window = draw(st.sampled_from([None, 2, 4]))
    slots = torch.arange(keys)
    real = torch.stack([slots >= p if side == "left" else slots < keys - p for p in padding])
    rows = past + torch.arange(queries)
    seen = (slots[None] <= rows[:, None])[None] & real[:, None]
    if window:
        seen = seen & (slots[None] > rows[:, None] - window)
    return batch, queries, keys, real, seen, window


@settings(max_examples=60, deadline=None)
@given(sequences(), st.sampled_from(["bool", "float", "flash", "static bool", "static float", "flex"]))
def test_every_kind_of_mask_says_the_same(sequence, kind):
    batch, queries, keys, real, seen, window = sequence
    mask, slot, flash = seen[:, None], keys - queries, False
    if kind.startswith("static"):  # empty slots after the filled ones
        mask = torch.cat([mask, torch.zeros(batch, 1, queries, 3, dtype=torch.bool)], 3)
        slot = torch.tensor(slot)
    if kind.endswith("float"):
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    if kind == "flash":
        mask, flash = real.long(), True
    if kind == "flex":
        table = seen

        class Block:  # stands for a BlockMask: what counts is its rule
            @staticmethod
            def mask_mod(b, h, q, k):
                return table[b, q, k]

        mask = Block()
    v = visibility(mask, batch, queries, mask.shape[3] if kind.startswith("static") else keys, flash=flash,
                   window=window if flash else None, slot=slot)  # fmt: skip
    assert torch.equal(v.of()[:, 0, :, :keys].expand(batch, -1, -1), seen)
    assert not v.of()[..., keys:].any()
    assert torch.equal(v.sees()[:, 0].expand(batch, -1), seen.any(-1))
    rows = torch.randint(-1, queries, (batch, 2))
    expected = torch.stack([torch.stack([seen[b, r] & (r >= 0) for r in rows[b]]) for b in range(batch)])
    assert torch.equal(v.of([0], rows)[:, 0, :, :keys].expand(batch, -1, -1), expected)
    assert torch.equal(v.sees([0], rows)[:, 0].expand(batch, -1), expected.any(-1))
    own = torch.stack([real[b, keys - queries :] for b in range(batch)])
    assert torch.equal(v.real_rows(), own)
    last = [max([i for i in range(queries) if own[b, i]], default=-1) for b in range(batch)]
    assert v.last_row()[:, 0].tolist() == last
    if own.any(1).all():  # a sliding static cache does not say which slot is whose
        v.slot = None
        assert v.last_row()[:, 0].tolist() == last


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (5, 9), (1, 7)])
def test_no_mask(queries, keys):
    """Causal without a mask is aligned to the upper left (a static cache's prefill); one row sees everything."""
    v = visibility(None, 2, queries, keys)
    expected = torch.ones(queries, keys).tril().bool() if queries > 1 else torch.ones(1, keys).bool()
    assert torch.equal(v.of()[0, 0], expected)
    assert torch.equal(v.of(None, torch.tensor([[0], [-1]]))[:, 0, 0], torch.stack([expected[0], expected[0] & False]))
    assert v.last_row().tolist() == [[queries - 1]] * 2
    assert v.real_keys().sum(1).tolist() == [queries if queries > 1 else keys] * 2
    assert visibility(None, 2, queries, keys, causal=False).of().all()


def test_flash_without_a_mask_is_aligned_to_the_end():
    v = visibility(None, 1, 3, 5, flash=True, window=2)
    assert torch.equal(v.of()[0, 0].int(), torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]))


def test_the_last_row_of_a_bidirectional_block_is_the_last():
    seen = torch.ones(6, 6).tril().bool()
    seen[2:6, 2:6] = True  # an image at the end
    seen[:, 5] = False  # and one token of padding
    seen[5] = False
    assert visibility(seen[None, None], 1, 6, 6).last_row().tolist() == [[4]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 4), st.data())
def test_put_writes_exactly_what_take_reads(batch, heads, length, count, data):
    x = torch.randn(batch, heads, length, 3)
    chosen = data.draw(st.one_of(st.none(), st.permutations(range(heads))))
    rows = torch.stack([torch.randperm(length + 1)[: min(count, length)] - 1 for _ in range(batch)])
    rows = None if data.draw(st.booleans()) else rows
    picked = take(x, chosen, rows)
    valid = torch.rand(picked.shape[:3]) < 0.7
    out = put(x, picked + 1, chosen, rows, valid)
    expected = x.clone()
    for b in range(batch):
        for i, h in enumerate(chosen or range(heads)):
            for j in range(picked.shape[2]):
                r = j if rows is None else int(rows[b, j])
                if r >= 0 and valid[b, i, j]:
                    expected[b, h, r] = x[b, h, r] + 1
    assert torch.equal(out, expected)
