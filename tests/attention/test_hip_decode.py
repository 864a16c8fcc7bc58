"""Decoding with HiP attention over a static cache: the steps are those of `hip_attention`, whatever the cache holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.attention import hip_attention
from heedful.attention.hip.decode import HiPDecodeState, hip_decode

ROW = {"block_size_q": 1, "block_stride_q": 1}


def cache(batch, kv_heads, capacity, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, kv_heads, capacity, dim, generator=generator)
    return key, torch.randn(batch, kv_heads, capacity, dim + 4, generator=generator), generator


@settings(max_examples=30, deadline=None)
@given(
    interval=st.integers(1, 5),
    window=st.sampled_from([0, 1, 20]),
    sinks=st.sampled_from([0, 3]),
    top_k=st.integers(1, 40),
    block_size_k=st.integers(1, 3),
    shared=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 7, 50]),
    start=st.integers(60, 160),
    seed=st.integers(0, 99),
)
def test_steps_are_those_of_hip_attention(
    interval, window, sinks, top_k, block_size_k, shared, padding, start, seed
):  # fmt: skip
    """A choice at each refresh, that choice with its window extended between; padding and unused slots hold NaN."""
    capacity, first = 180, torch.tensor([0, padding])
    key, value, generator = cache(2, 2, capacity, 8, seed)
    sizes = {"top_k": top_k, "block_size_k": block_size_k, "sliding_window": window, "num_sink_tokens": sinks}
    state = HiPDecodeState(2, 4, capacity, head_group_size=shared, **sizes)
    options = {"softcap": 3.0, "sink_logits": torch.randn(4, generator=generator), "scale": 0.4}
    mask = None
    for step in range(7):
        length = start + step
        query = torch.randn(2, 4, 1, 8, generator=generator)
        keys, values = key.clone(), value.clone()
        for x in (keys, values):
            x[:, :, length:] = torch.nan
            x[1, :, :padding] = torch.nan
        lengths = torch.full((2,), length)
        got = hip_decode(
            query, keys, values, lengths, state, refresh_interval=interval, first_real=first, **options
        )  # fmt: skip
        want, mask = hip_attention(
            query,
            key[:, :, :length],
            value[:, :, :length],
            mask=None if step % interval == 0 else mask,
            attention_mask=torch.arange(length) >= first[:, None],
            head_group_size=shared,
            return_mask=True,
            **sizes,
            **ROW,
            **options,
        )
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert torch.equal(state.keys_read(lengths, first), mask.keys_read()[:, :, 0])
    assert (state.refreshes == -(-7 // interval)).all()


def test_rows_of_different_lengths_do_not_mix():
    key, value, generator = cache(3, 1, 200, 8)
    sizes = {"top_k": 16, "sliding_window": 8, "num_sink_tokens": 2}
    together = HiPDecodeState(3, 2, 200, **sizes)
    alone = [HiPDecodeState(1, 2, 200, **sizes) for _ in range(3)]
    for step in range(5):
        lengths = torch.tensor([5, 90, 180]) + step
        query = torch.randn(3, 2, 1, 8, generator=generator)
        output = hip_decode(query, key, value, lengths, together, refresh_interval=3)
        for row, state in enumerate(alone):
            one = slice(row, row + 1)
            single = hip_decode(query[one], key[one], value[one], lengths[one], state, refresh_interval=3)
            assert torch.equal(output[one], single)


def test_enough_keys_are_dense_attention():
    key, value, generator = cache(1, 1, 100, 8)
    query = torch.randn(1, 2, 1, 8, generator=generator)
    for length in (1, 2, 3, 50, 100):
        state = HiPDecodeState(1, 2, 100, top_k=100, sliding_window=1, num_sink_tokens=0)
        output = hip_decode(query, key, value, torch.tensor([length]), state, refresh_interval=1)
        dense = torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, :length], value[:, :, :length], enable_gqa=True
        )
        torch.testing.assert_close(output, dense, atol=1e-5, rtol=1e-5)


def test_reset_reorder_and_shorter_rows():
    key, value, generator = cache(2, 1, 100, 8)
    state = HiPDecodeState(2, 2, 100, top_k=8, sliding_window=4, num_sink_tokens=1)

    def step(length):
        query = torch.randn(2, 2, 1, 8, generator=generator)
        return hip_decode(query, key, value, torch.tensor([length, length]), state, refresh_interval=50)

    step(60)
    blocks = state.blocks.clone()
    assert not torch.equal(blocks[0], blocks[1])
    state.reorder(torch.tensor([1, 1]))
    assert torch.equal(state.blocks, blocks[[1, 1]])
    step(61)
    assert state.refreshes.unique().tolist() == [1]
    step(40)  # a cropped cache
    assert state.refreshes.unique().tolist() == [2]
    assert state.chosen_at.unique().tolist() == [40]
    address = state.blocks.data_ptr()
    state.reset()
    assert (state.blocks == -1).all()
    assert (state.chosen_at == -1).all()
    step(41)
    assert state.refreshes.unique().tolist() == [1]
    assert state.blocks.data_ptr() == address


def test_an_empty_batch():
    state = HiPDecodeState(0, 2, 100)
    output = hip_decode(
        torch.zeros(0, 2, 1, 8),
        *torch.zeros(2, 0, 1, 100, 8),
        torch.zeros(0, dtype=torch.long),
        state,
        refresh_interval=1,
    )
    assert output.shape == (0, 2, 1, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 2, 8)}, "query must be"),
        ({"key": torch.zeros(2, 3, 50, 8)}, "not a multiple of the 3 heads"),
        ({"value": torch.zeros(2, 2, 49, 8)}, "value must be"),
        ({"value": torch.zeros(2, 2, 50, 8, dtype=torch.float64)}, "value is torch.float64"),
        ({"lengths": torch.tensor([5.0, 5.0])}, "lengths must be"),
        ({"lengths": torch.tensor([0, 5])}, "lengths must be from 1"),
        ({"lengths": torch.tensor([5, 51])}, "lengths must be from 1"),
        ({"first_real": torch.tensor([5])}, "first_real must be"),
        ({"state": HiPDecodeState(1, 4, 50)}, "state is for"),
        ({"state": HiPDecodeState(2, 4, 40)}, "max_length=40"),
        ({"refresh_interval": 0}, "refresh_interval"),
        ({"scale": 0.0}, "scale"),
        ({"softcap": -1.0}, "softcap"),
        ({"sink_logits": torch.zeros(2)}, "sink_logits"),
        ({"impl": "fast"}, "impl must be"),
        ({"impl": "triton"}, "impl='triton'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "query": torch.zeros(2, 4, 1, 8),
        "key": torch.zeros(2, 2, 50, 8),
        "value": torch.zeros(2, 2, 50, 8),
        "lengths": torch.tensor([5, 6]),
        "state": HiPDecodeState(2, 4, 50),
        "refresh_interval": 1,
    }
    with pytest.raises(ValueError, match=message):
        hip_decode(**arguments | change)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"max_length": 1.5}, "max_length"),
        ({"block_stride_k": 3}, "block_stride_k"),
        ({"head_group_size": 3}, "head_group_size"),
    ],
)
def test_sizes_of_a_state(sizes, message):
    with pytest.raises(ValueError, match=message):
        HiPDecodeState(**{"batch": 1, "heads": 4, "max_length": 100} | sizes)
