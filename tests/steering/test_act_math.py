"""The two forms of the calibration, and the column statistics, on bare tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from heedful.seam import AttentionCall
from heedful.seam.masks import Visibility
from heedful.steering import calibrate_outputs, calibrate_probabilities
from heedful.steering._columns import HeadPairs, column_statistics

HEADS = st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)])
BLOCKS = st.sampled_from([1, 400, 1 << 20])


def make_call(batch=2, heads=4, kv_heads=2, length=9, dim=8, dtype=torch.float64, seed=0, mask=None, query=None):
    g = torch.Generator().manual_seed(seed)
    query, key, value = (
        scale * torch.randn(batch, n, length, dim, generator=g, dtype=torch.float64)
        for scale, n in ((3.0, heads), (1.0, kv_heads), (1.0, kv_heads))
    )
    return call_of(query.to(dtype), key.to(dtype), value.to(dtype), mask)


def call_of(query, key, value, mask=None):
    batch, _, queries, dim = query.shape
    nothing = dict.fromkeys(
        [
            "positions",
            "rotary",
            "softcap",
            "sinks",
            "position_bias",
            "cache",
            "verification",
            "function",
            "original_mask",
        ]
    )
    visibility = Visibility(mask, batch, queries, key.shape[2], True, False, None, key.shape[2] - queries, query.device)
    return AttentionCall(
        torch.nn.Module(), 0, query, key, value, dim**-0.5, 0.0, cross=False, causal=True, past=0, keywords={},
        visibility=visibility, **nothing,
    )  # fmt: skip


def weights(call):
    """The oracle: the whole matrix (B, H, T, T)."""
    key = call.key.repeat_interleave(call.groups, 1)
    logits = call.query @ key.mT * call.scaling
    mask = call.visibility.mask
    mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    return logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)


def late_sinks(probabilities, threshold):
    length = probabilities.shape[-1]
    sinks = probabilities.sum(-2) / torch.arange(length, 0, -1) > threshold
    sinks[..., 0] = False
    return sinks


def matrix_form(call, sinks, beta):
    edited, freed = calibrate_probabilities(weights(call), sinks[:, :, None], beta)
    return edited @ call.value.repeat_interleave(call.groups, 1), freed


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), HEADS, st.integers(1, 20), BLOCKS, st.integers(0, 99))
def test_column_means_are_those_of_the_matrix(batch, heads, length, block_bytes, seed):
    call = make_call(batch, *heads, length, seed=seed)
    statistics = column_statistics(HeadPairs.of(call), block_bytes)
    expected = weights(call).sum(-2) / torch.arange(length, 0, -1)
    torch.testing.assert_close(statistics.means.view(expected.shape), expected, atol=1e-12, rtol=0)
    assert (statistics.counts == torch.arange(length, 0, -1)).all()
    assert (statistics.reach == length).all()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), HEADS, st.integers(2, 20), st.sampled_from([0.0, 0.4, 1.0]), BLOCKS,
    st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_grouped_form_equals_weight_form(batch, heads, length, beta, block_bytes, dtype, masked, seed):
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1) if masked else None
    call = make_call(batch, *heads, length, dtype=dtype, seed=seed, mask=mask)
    sinks = late_sinks(weights(call), 1.5 / length)
    expected, mass = matrix_form(call, sinks, beta)
    output, freed = calibrate_outputs(HeadPairs.of(call), sinks.flatten(0, 1), beta, block_bytes)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(output.view(expected.shape), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(freed.view(mass.shape), mass, atol=tolerance, rtol=0)


def test_weight_form_invariants():
    probabilities = weights(make_call(length=30, seed=3)).float()
    sinks = late_sinks(probabilities, 2 / 30)[:, :, None]
    assert sinks.any(-1).all()
    edited, freed = calibrate_probabilities(probabilities, sinks, 0.4)
    torch.testing.assert_close(edited.sum(-1), torch.ones(2, 4, 30), atol=1e-6, rtol=0)
    assert (edited.triu(1) == 0).all()
    assert (edited[..., 0, 0] == 1).all()
    on_sinks = (probabilities * sinks).sum(-1)
    torch.testing.assert_close((edited * sinks).sum(-1), 0.4 * on_sinks, atol=1e-6, rtol=0)
    torch.testing.assert_close(freed, 0.6 * on_sinks, atol=1e-6, rtol=0)
    gains = (edited / probabilities).masked_fill(sinks | (probabilities == 0), torch.nan)
    most, least = gains.nan_to_num(-torch.inf).amax(-1), gains.nan_to_num(torch.inf).amin(-1)
    torch.testing.assert_close(most, least, rtol=1e-4, atol=0, msg="receivers of a row must grow by the same factor")
    assert least.min() >= 1 - 1e-6
    assert torch.equal(calibrate_probabilities(probabilities, sinks, 1.0)[0], probabilities)


def test_a_row_entirely_on_sinks_is_left_alone_and_finite():
    probabilities = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    edited, freed = calibrate_probabilities(probabilities, torch.tensor([False, True, False]), 0.4)
    torch.testing.assert_close(edited, torch.tensor([[0.0, 1.0, 0.0], [0.8, 0.2, 0.0]]))
    torch.testing.assert_close(freed, torch.tensor([0.0, 0.3]))
    edited.square().sum().backward()
    assert probabilities.grad.isfinite().all()

    sinks = torch.tensor([[False, True]])
    query = torch.zeros(1, 1, 2, 4)
    query[..., 0] = 400.0  # the receiver's weight underflows to exactly 0 in fp32
    query.requires_grad_()
    key = torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]])[None, None]
    value = torch.eye(2, 4)[None, None]
    everyone = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    output, freed = calibrate_outputs(HeadPairs.of(call_of(query, key, value, everyone)), sinks, 0.4)
    torch.testing.assert_close(output[0], value[0, 0, 1].expand(2, 4))
    assert (freed == 0).all()
    output.sum().backward()
    assert query.grad.isfinite().all()

    only_sinks = torch.tensor([[False, True], [False, True]])[None, None]
    output, freed = calibrate_outputs(HeadPairs.of(call_of(query, key, value, only_sinks)), sinks, 0.4)
    torch.testing.assert_close(output[0], value[0, 0, 1].expand(2, 4))
    assert (freed == 0).all()

    output, freed = calibrate_outputs(HeadPairs.of(call_of(query, key, value, ~everyone)), sinks, 0.4)
    assert output.isfinite().all()
    assert (freed == 0).all()


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_gradients_are_those_of_the_weight_form(block_bytes):
    call = make_call(length=12, seed=5)
    sinks = late_sinks(weights(call), 1.5 / 12)
    inputs = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    probe = torch.randn(2, 4, 12, 8, dtype=torch.float64)
    expected = torch.autograd.grad((matrix_form(call, sinks, 0.4)[0] * probe).sum(), inputs)
    output, _ = calibrate_outputs(HeadPairs.of(call), sinks.flatten(0, 1), 0.4, block_bytes)
    got = torch.autograd.grad((output.view(probe.shape) * probe).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def test_memory_is_linear_in_the_length():
    block = 1 << 20
    call = make_call(1, 2, 1, 3000, 16, dtype=torch.float32)
    with Largest() as largest:
        pairs = HeadPairs.of(call)
        sinks = column_statistics(pairs, block).late_sinks(alpha=20.0, threshold=None, exempt_first=1)
        assert sinks.any()
        calibrate_outputs(pairs, sinks, 0.4, block)
    matrix = 2 * 3000 * 3000 * 4
    assert largest.bytes <= max(block, 2 * 3000 * 16 * 4) < matrix / 50
