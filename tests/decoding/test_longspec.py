"""LongSpec: lags, moved positions, the ring, the beam tree (the card's list, as far as it concerns the draft)."""

import numpy as np
import pytest
import torch
from tiny_models import build, inputs
from transformers import DynamicCache

import heedful
from heedful.decoding import LongSpec, Medusa, longspec
from heedful.decoding.longspec import _State, _windowed

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def block(model, **options):
    torch.manual_seed(3)
    drafter = LongSpec.for_model(model, **{"initializer_range": 0.3, "tree_shape": (4, 6, 6), **options})
    drafter.bind(model)
    drafter.fit(model, 1)
    return drafter


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3", "gpt_oss"])
def test_greedy_output_does_not_depend_on_the_block(name, batch):
    model = build(name, dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    reference = model.generate(**given, **GREEDY)
    for options in ({"window": 4}, {"tree_shape": (1, 1)}, {"tree_shape": ()}):
        for cache in (None, "static"):
            result = heedful.generate(
                model, drafter=block(model, **options), cache_implementation=cache, **given, **GREEDY
            )
            assert torch.equal(result.sequences, reference)
    assert result.stats.tokens_per_step == 1.0  # no levels, no drafts


@torch.no_grad()
@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_a_query_never_reads_keys_nearer_than_the_lag(lag, monkeypatch):
    model = build("llama", dtype=torch.float64)
    drafter = block(model)
    ids, positions = inputs(model, batch=1, length=14)["input_ids"], torch.arange(14)[None]
    before = drafter.logits(model, ids, lag, positions)
    original = model.get_decoder().forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        for layer in kwargs["past_key_values"].layers:
            layer.keys[:, :, 9] += 7.0
            layer.values[:, :, 9] -= 7.0
        return out

    monkeypatch.setattr(model.get_decoder(), "forward", forward)
    after = drafter.logits(model, ids, lag, positions)
    assert torch.equal(before[:, : 9 + lag], after[:, : 9 + lag])
    assert not torch.allclose(before[:, 9 + lag :], after[:, 9 + lag :])


@torch.no_grad()
def test_a_uniform_offset_changes_nothing_and_anchors_only_their_scores():
    model = build("llama", max_position_embeddings=40_000)
    drafter = block(model, initializer_range=0.02)
    ids = inputs(model, batch=1, length=24)["input_ids"]
    at = torch.arange(24)[None]
    base = drafter.logits(model, ids, 1, at)
    assert torch.allclose(base, drafter.logits(model, ids, 1, at + 30_000), atol=2e-3)
    moved = at.clone()
    moved[:, 4:] += 9000
    anchored = drafter.logits(model, ids, 1, moved)
    assert torch.allclose(base[:, :4], anchored[:, :4], atol=1e-5)
    assert not torch.allclose(base[:, 4:], anchored[:, 4:], atol=1e-4)


@torch.no_grad()
def test_the_first_level_is_the_training_forward_and_a_chain_is_greedy():
    model = build("llama", dtype=torch.float64)
    drafter = block(model, window=8, tree_shape=(3, 2))
    ids = inputs(model, batch=1, length=24)["input_ids"]
    expected = drafter.logits(model, ids, 1, torch.arange(24)[None])[0, 18].topk(3).indices
    cache = DynamicCache()
    model(ids[:, :18], past_key_values=cache)

    def draft(drafter, first):
        state = _State(drafter, 1)
        for start in range(first, 18, 5):  # in pieces, so that places are taken again
            piece = torch.arange(start, min(18, start + 5))
            state.write(ids[:, piece], piece[None])
        where = torch.tensor([18])
        return state.draft(ids[:, 18], where, cache, where, torch.zeros(1, dtype=torch.long))

    tokens, parents = draft(drafter, 0)
    assert torch.equal(tokens[0, 1:4], expected)
    assert parents[0].tolist()[:4] == [-1, 0, 0, 0]
    again, _ = draft(drafter, 10)  # what lies before the window does not matter
    assert torch.equal(tokens, again)
    drafter.shape = (1, 1, 1, 1)
    chain, parents = draft(drafter, 0)
    assert chain[0, 1] == expected[0]
    assert parents[0].tolist() == [-1, 0, 1, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("window", [3, 8, 16])
def test_what_a_tree_overwrites_is_not_missed(window):
    model = build("llama", dtype=torch.float64)
    drafter = block(model, window=window, tree_shape=(2, 5, 5))
    ids, none = inputs(model, batch=2, length=50)["input_ids"], torch.zeros(2, dtype=torch.long)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    state, length = _State(drafter, 2), torch.tensor([1, 5])
    for row in range(2):
        at = torch.full((2, int(length.max())), -1)
        at[row, : length[row]] = torch.arange(int(length[row]))
        for piece in range(0, at.shape[1], window):
            state.write(ids[:, piece : piece + window][:, : at.shape[1] - piece], at[:, piece : piece + window])
    for step in range(18):
        roots = ids.gather(1, length[:, None])[:, 0]
        fresh = _State(drafter, 2)
        last = length[:, None] - window + torch.arange(window)
        fresh.write(ids.gather(1, last.clamp(min=0)), last.clamp(min=-1))
        got, want = (one.draft(roots, length, cache, length, none) for one in (state, fresh))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        count = torch.tensor([1 + step % 3, 1 + step % 2])
        new = length[:, None] + torch.arange(3)
        state.write(ids.gather(1, new), torch.where(torch.arange(3) < count[:, None], new, -1))
        length = length + count


@pytest.mark.parametrize("length", [1, 6, 7, 12, 13, 29])
def test_windows_in_blocks_are_the_dense_windows(length):
    query, keys, values = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    at = torch.arange(length)
    near = (at[None] <= at[:, None]) & (at[None] >= at[:, None] - 6)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, near, enable_gqa=True)
    assert torch.allclose(_windowed(query, keys, values, 6), expected, atol=1e-12)


@torch.no_grad()
def test_siblings_differ_and_the_memory_does_not_grow():
    model = build("llama", dtype=torch.float64)
    drafter = block(model, window=16)
    sizes = set()
    for length in (20, 60):
        given = inputs(model, batch=1, length=length)
        heedful.generate(model, drafter=drafter, **given, **GREEDY)
        sizes.add(drafter._state.keys.shape)
    assert sizes == {(1, drafter.num_key_value_heads, 2 * 16 + 1 + 4 + 6, drafter.head_dim)}
    cache = DynamicCache()
    model(given["input_ids"], past_key_values=cache)
    where = torch.tensor([60])
    tokens, parents = drafter._state.draft(torch.tensor([4]), where, cache, where, torch.zeros(1, dtype=torch.long))
    pairs = list(zip(parents[0].tolist(), tokens[0].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


def test_the_shape_is_the_one_that_pays_on_the_device(monkeypatch, tmp_path):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    drafter = block(model)
    found = drafter.calibrate(model, given["input_ids"], shapes=((1,), (4, 6)), new_tokens=12)
    assert [shape for shape, _ in found] == [[1], [4, 6]]
    assert all(tokens >= 1.0 for _, tokens in found)
    assert drafter.tree_shape == (4, 6, 6)
    drafter.save_pretrained(tmp_path)
    drafter = LongSpec.from_pretrained(tmp_path)
    assert [tuple(entry) for entry in drafter.measured] == [(shape, tokens) for shape, tokens in found]
    drafter.measured = [([1, 1], 1.6), ([4, 6], 2.0)]
    monkeypatch.setattr(longspec, "seconds_of", lambda run, device: run() and 0.1)
    chosen = []
    for slope in (0.0, 0.06, 10.0):
        monkeypatch.setattr(
            longspec, "forward_costs", lambda model, batch, rows, slope=slope: 1 + slope * np.arange(rows)
        )
        drafter._fitted = ()
        result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
        assert torch.equal(result.sequences, model.generate(**given, **GREEDY))
        chosen.append(drafter.shape)
    assert chosen == [(4, 6), (1, 1), ()]
    assert result.stats.tokens_per_step == 1.0
    drafter.fit_device = False
    heedful.generate(model, drafter=drafter, **given, **GREEDY)
    assert drafter.shape == (4, 6, 6)


def test_a_cycle_is_learnt():
    torch.manual_seed(0)
    model = build("llama", vocab_size=12)
    cycle = torch.arange(3, 12).repeat(8)[None]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model(cycle, labels=cycle).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.requires_grad_(False)
    drafter = LongSpec.for_model(model, tree_shape=(1, 1, 1))
    optimiser = torch.optim.Adam(drafter.parameters(), 1e-2)
    for step in range(120):
        torch.manual_seed(step)
        loss, figures = drafter.loss(model, cycle)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(figures["accuracy"]) > 0.95
    result = heedful.generate(model, cycle[:, :10], drafter, **GREEDY | {"max_new_tokens": 41})
    assert result.stats.tokens_per_step > 3.5


def test_save_load_and_refusals(tmp_path, capsys):
    model = build("llama")
    drafter = block(model)
    drafter.save_pretrained(tmp_path)
    loaded = LongSpec.from_pretrained(tmp_path)
    assert capsys.readouterr().out == ""
    assert tuple(loaded.tree_shape) == (4, 6, 6)
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="another drafter than Medusa"):
        Medusa.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        LongSpec.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        LongSpec.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="use Medusa instead"):
        LongSpec.for_model(build("gpt2"))
    for name in ("cohere2", "glm4", "deepseek_v3"):  # pairs side by side; half a head; latent
        with pytest.raises(ValueError, match="use Medusa instead"):
            LongSpec.for_model(build(name))
    with pytest.raises(ValueError, match="made for hidden_size"):
        heedful.generate(build("llama", hidden_size=48), drafter=loaded, **inputs(model, batch=1), **GREEDY)
    with pytest.raises(ValueError, match="at least one node"):
        LongSpec.for_model(model, tree_shape=(4, 0))
