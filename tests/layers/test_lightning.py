"""The lightning layer and its cache layer: transformers' MiniMax as oracle, states, dtypes, DDP."""

import copy

import pytest
import torch
from processes import run_on_two
from torch.utils.checkpoint import checkpoint
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from heedful.attention import alibi_slopes, lightning_attention
from heedful.layers import LightningAttention, LightningCacheLayer


def test_equals_minimax_with_the_same_weights():
    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, num_hidden_layers=4, block_size=16, hidden_act="silu",
        layer_types=["linear_attention", "full_attention"] * 2,
    )  # fmt: skip
    theirs = MiniMaxLightningAttention(config, layer_idx=2).eval()
    with torch.no_grad():
        theirs.norm.weight.normal_()
    ours = LightningAttention(
        32, 4, head_dim=8, decay=theirs.slope_rate.flatten().tolist(), gate_rank=0, norm="rms",
        norm_eps=theirs.norm.variance_epsilon,
    )  # fmt: skip
    query, key, value = theirs.qkv_proj.weight.view(4, 3, 8, 32).unbind(1)
    ours.load_state_dict(
        {
            "q_proj.weight": query.flatten(0, 1), "k_proj.weight": key.flatten(0, 1), "v_proj.weight": value.flatten(0, 1),
            "o_proj.weight": theirs.out_proj.weight, "norm.weight": theirs.norm.weight, "gate.weight": theirs.output_gate.weight,
        }
    )  # fmt: skip
    x = torch.randn(2, 45, 32)
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[0, :9] = False
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x, None, None)[0], atol=1e-6)
        want = theirs(x, None, mask)[0]
        assert torch.allclose(ours(x, attention_mask=mask)[mask], want[mask], atol=1e-6)
    # Their rule of slopes is ours, but for an epsilon.
    assert torch.allclose(theirs.slope_rate.flatten(), alibi_slopes(4, 2, 4), atol=1e-5)


def test_is_what_it_says():
    torch.manual_seed(0)
    layer = LightningAttention(32, 4, num_kv_heads=2, layer=1, num_layers=3).double()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    q, k, v = (
        torch.nn.functional.silu(p(x)).unflatten(-1, (-1, 8)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    o = lightning_attention(q, k, v, alibi_slopes(4, 1, 3), 1.0).transpose(1, 2).flatten(2)
    gate = torch.sigmoid(layer.gate[1](layer.gate[0](x)))
    want = layer.o_proj(torch.nn.functional.layer_norm(o, (32,), layer.norm.weight, layer.norm.bias) * gate)
    assert torch.allclose(layer(x), want)
    assert layer.gate[0].out_features == 8
    assert LightningAttention(32, 4, use_output_gate=False).gate is None
    simple = LightningAttention(32, 4, norm="simple_rms", use_output_gate=False)
    assert not any("norm" in name for name, _ in simple.named_parameters())


@pytest.mark.parametrize("pieces", [[20], [7, 13], [1] * 20, [11, 1, 8]])
def test_any_cut_through_the_cache_gives_the_same(pieces):
    torch.manual_seed(0)
    layer = LightningAttention(16, 2).double().eval()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :5] = False
    with torch.no_grad():
        want, state = layer(x, attention_mask=mask, output_final_state=True)
        cache = LightningCacheLayer()
        got = [
            layer(part, attention_mask=part_mask, cache=cache)
            for part, part_mask in zip(x.split(pieces, 1), mask.split(pieces, 1), strict=True)
        ]
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-12)
    assert torch.allclose(cache.state, state, atol=1e-12)
    assert cache.get_seq_length() == 20
    assert cache.get_mask_sizes(3) == (23, 0)


def test_packed_documents_do_not_see_each_other():
    torch.manual_seed(0)
    layer = LightningAttention(16, 2).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    got = layer(x, cu_seqlens=torch.tensor([0, 6, 20]))
    assert torch.allclose(got, torch.cat([layer(x[:, :6]), layer(x[:, 6:])], 1), atol=1e-12)


def test_the_cache_layer_keeps_rows_and_refuses_keys():
    cache = LightningCacheLayer()
    with pytest.raises(ValueError, match="keys"):
        cache.update(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(1)
    state = torch.randn(2, 1, 3, 3)
    cache.update_state(state.clone(), 5)
    address = cache.state.data_ptr()
    cache.update_state(2 * state, 1)
    assert cache.state.data_ptr() == address  # a CUDA graph may hold it
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.state, 2 * state[[1, 1]])
    cache.batch_repeat_interleave(2)
    assert cache.state.shape[0] == 4
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.state.any()


def test_rates_stay_float32():
    layer = LightningAttention(32, 4, layer=1, num_layers=3)
    want = alibi_slopes(4, 1, 3)
    for moved in (layer.bfloat16(), copy.deepcopy(layer).half(), layer.double()):
        assert torch.equal(moved.decay, want)
    assert "decay" not in layer.state_dict()
    with torch.device("meta"):
        empty = LightningAttention(32, 4, layer=1, num_layers=3)
    assert torch.equal(empty.to_empty(device="cpu").decay, want)


def test_autocast_and_checkpointing_give_the_same_gradients():
    torch.manual_seed(0)
    layer = LightningAttention(32, 4)
    x = torch.randn(2, 30, 32)
    for dtype in (None, torch.bfloat16):
        gradients = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
            layer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                y = run(x)
            y.float().square().sum().backward()
            gradients.append([p.grad.clone() for p in layer.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()
        if dtype is None:
            exact = gradients[0]
    for a, b in zip(gradients[0], exact, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_compiles_whole():
    torch.manual_seed(0)
    layer = LightningAttention(16, 2)
    x = torch.randn(1, 33, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_two_processes_give_the_gradients_of_one(tmp_path):
    answers = run_on_two(
        """
        from heedful.layers import LightningAttention
        torch.manual_seed(0)
        layer, x = LightningAttention(16, 2).double(), torch.randn(4, 25, 16, dtype=torch.float64)
        layer(x).square().mean().backward()
        alone = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        parallel(x[rank::2]).square().mean().backward()
        for a, b in zip(alone, layer.parameters()):
            torch.testing.assert_close(a, b.grad)
        print("same")
        """,
        tmp_path,
    )
    assert answers == ["same\n"] * 2


def test_wrong_use_is_refused():
    for arguments in (
        {"num_heads": 3},
        {"num_kv_heads": 3},
        {"decay": [1.0]},
        {"decay": [-1.0] * 4},
        {"norm": "batch"},
    ):
        with pytest.raises(ValueError):
            LightningAttention(32, **({"num_heads": 4} | arguments))
    layer, cache = LightningAttention(32, 4), LightningCacheLayer()
    with pytest.raises(ValueError, match="cache"):
        layer(torch.zeros(1, 3, 32), cache=cache, initial_state=torch.zeros(1, 4, 8, 8))
