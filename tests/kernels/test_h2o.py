"""H2O against its simulation, which keeps every key and masks what the cache would have dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build
from transformers import DynamicCache

import heedful
from heedful.kernels import H2OAttention, H2OCache


class Simulation(heedful.Kernel):
    """Masking in place of dropping: all keys stay, with a mask (B, Hkv, T) of those that still count and their scores.

    Written a sample, head and token at a time. For models without windows, softcap and sinks.
    """

    def __init__(self, heavy, recent):
        super().__init__()
        self.heavy, self.recent = heavy, recent
        self.state = {}

    def __call__(self, call):
        batch, heads, queries, _ = call.query.shape
        total, kv_heads = call.key.shape[2], call.key.shape[1]
        real = call.real_keys()
        if call.layer not in self.state:
            sizes = [
                [b if isinstance(b, int) else int(int(real[row].sum()) * b) for b in (self.heavy, self.recent)]
                for row in range(batch)
            ]
            kept = torch.zeros(batch, kv_heads, 0, dtype=torch.bool)
            self.state[call.layer] = (sizes, kept, torch.zeros(batch, kv_heads, 0))
        sizes, kept, scores = self.state[call.layer]
        new = real[:, None, -queries:].expand(-1, kv_heads, -1)
        kept = torch.cat([kept, new], 2)
        scores = torch.nn.functional.pad(scores, (0, queries))
        output = torch.zeros_like(call.query)
        for row in range(batch):
            for head in range(heads):
                group = head // (heads // kv_heads)
                for i in range(queries):
                    at = total - queries + i
                    if not real[row, at]:
                        continue
                    seen = kept[row, group] & (torch.arange(total) <= at)
                    logits = call.key[row, group] @ call.query[row, head, i] * call.scaling
                    weights = logits.masked_fill(~seen, -torch.inf).softmax(0)
                    output[row, head, i] = weights @ call.value[row, group]
                    scores[row, group] += weights
        for row in range(batch):
            heavy, recent = sizes[row]
            for group in range(kv_heads):
                slots = kept[row, group].nonzero().flatten().tolist()
                if len(slots) <= heavy + recent:
                    continue
                old = slots[: len(slots) - recent]
                best = sorted(old, key=lambda slot: -float(scores[row, group, slot]))[:heavy]
                for slot in set(old) - set(best):
                    kept[row, group, slot] = False
                    scores[row, group, slot] = 0
        self.state[call.layer] = (sizes, kept, scores)
        return output


def prompt(batch=2, length=24, padding=(0, 7), seed=0):
    ids = torch.randint(5, 80, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding[:batch]):
        mask[row, :count] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy(model, cache, *parts, new_tokens=10, **given):
    with heedful.attach(model, *parts):
        return model.generate(
            **given, past_key_values=cache, do_sample=False, max_new_tokens=new_tokens, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip


@pytest.mark.parametrize("budgets", [(5, 4), (0, 6), (6, 0), (0.25, 0.2)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_the_masking_simulation_token_by_token(family, budgets):
    model = build(family, dtype=torch.float64)
    heavy, recent = budgets
    cache = H2OCache(model.config, heavy_budget=heavy, recent_budget=recent)
    found = greedy(model, cache, H2OAttention(), **prompt())
    simulation = Simulation(heavy, recent)
    expected = greedy(model, DynamicCache(), simulation, **prompt())
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-8, rtol=1e-8)
    for index, layer in enumerate(cache.layers):
        _, kept, scores = simulation.state[index]
        for row in range(2):
            for head in range(kept.shape[1]):
                slots = kept[row, head].nonzero().flatten()
                here = layer.positions[row, head]
                assert torch.equal(here[here >= 0], slots)
                torch.testing.assert_close(layer.scores[row, head][here >= 0].float(), scores[row, head, slots])


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_budgets_of_the_length_change_nothing(family, beams):
    model = build(family)
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(**prompt(), **options)
    # Without a config mistral's windows are honoured by the part; with one its layers keep their own cache.
    config = None if family == "mistral" else model.config
    for budgets in ({"heavy_budget": 32, "recent_budget": 0}, {"heavy_budget": 0, "recent_budget": 32}):
        with heedful.attach(model, H2OAttention()):
            found = model.generate(**prompt(), past_key_values=H2OCache(config, **budgets), **options)
        assert torch.equal(found, expected)


def test_never_more_than_the_budget_and_the_latest_always():
    model = build("llama")
    cache = H2OCache(heavy_budget=4, recent_budget=3)
    ids = prompt(padding=(0, 5))
    with heedful.attach(model, H2OAttention()) as attached:
        output = model(**ids, past_key_values=cache)
        mask = ids["attention_mask"]
        for step in range(6):
            for layer in cache.layers:
                assert layer.keys.shape[2] == layer.values.shape[2] == 7
                assert layer.get_seq_length() == 24 + step
                assert layer.get_mask_sizes(1) == (8, 24 + step - 7)
                latest = torch.arange(24 + step - 3, 24 + step)
                assert (layer.positions[:, :, -3:] == latest).all()
                assert (layer.positions.diff(dim=2) > 0).all()
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, attention_mask=mask, past_key_values=cache)
        assert attached.report()[0]["tokens_kept"] == 7
        assert attached.report()[0]["tokens_seen"] == 30


def test_a_row_in_a_batch_is_as_if_alone():
    model = build("llama", dtype=torch.float64)
    budgets = {"heavy_budget": 0.2, "recent_budget": 0.2}
    given = prompt(padding=(0, 9))
    both = greedy(model, H2OCache(**budgets), H2OAttention(), **given)
    for row, padding in enumerate((0, 9)):
        alone = greedy(
            model, H2OCache(**budgets), H2OAttention(), input_ids=given["input_ids"][row : row + 1, padding:]
        )
        torch.testing.assert_close(
            torch.stack(both.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-8, rtol=1e-8
        )


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 30), heavy=st.integers(0, 8), recent=st.integers(0, 8), chunk=st.integers(1, 30))
def test_a_prompt_in_chunks_keeps_what_the_rule_says(length, heavy, recent, chunk):
    """Eviction by the rule at the end of every chunk, from scores that all its queries have added to."""
    from heedful.kernels.h2o import H2OLayer

    if heavy + recent == 0:
        recent = 1
    generator = torch.Generator().manual_seed(length)
    layer = H2OLayer(heavy, recent)
    kept, scores = [], {}
    for start in range(0, length, chunk):
        size = min(chunk, length - start)
        keys, _ = layer.update(*torch.randn(2, 1, 1, size, 4, generator=generator))
        kept += range(start, start + size)
        assert keys.shape[2] == len(kept)
        sums = torch.rand(1, 1, len(kept), generator=generator)
        for slot, value in zip(kept, sums[0, 0].tolist(), strict=True):
            scores[slot] = scores.get(slot, 0.0) + value
        layer.observe(sums, torch.ones(1, size, dtype=torch.bool))
        old = kept[: max(0, len(kept) - recent)]
        best = sorted(old, key=lambda slot: -scores[slot])[:heavy]
        kept = sorted(best) + kept[len(old) :]
        assert layer.positions[0, 0].tolist() == kept
        assert len(kept) <= heavy + recent


def test_scores_go_with_their_beams():
    model = build("llama")
    cache = H2OCache(heavy_budget=4, recent_budget=4)
    with heedful.attach(model, H2OAttention()):
        model(**prompt(), past_key_values=cache)
    before = [
        {name: getattr(layer, name).clone() for name in ("keys", "values", "positions", "scores", "heavy", "recent")}
        for layer in cache.layers
    ]
    cache.reorder_cache(torch.tensor([1, 1]))
    for layer, old in zip(cache.layers, before, strict=True):
        for name, value in old.items():
            assert torch.equal(getattr(layer, name), value[[1, 1]])
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].scores.shape[0] == cache.layers[0].keys.shape[0] == 4
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.layers[0].positions.shape[0] == cache.layers[0].heavy.shape[0] == 1
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].positions is None
    with heedful.attach(model, H2OAttention()):
        model(**prompt(), past_key_values=cache)
    assert torch.equal(cache.layers[0].scores, before[0]["scores"])


def test_by_name_as_an_attention_implementation():
    model = build("llama")
    budgets = {"heavy_budget": 5, "recent_budget": 4}
    expected = greedy(model, H2OCache(**budgets), H2OAttention(), **prompt())
    heedful.register_attention("h2o", H2OAttention())
    model.set_attn_implementation("h2o")
    found = greedy(model, H2OCache(**budgets), **prompt())
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    model.set_attn_implementation("sdpa")


def test_prefill_in_blocks_is_the_prefill(monkeypatch):
    from heedful.kernels import h2o

    model, caches = build("llama", dtype=torch.float64), []
    for size in (1 << 25, 300):
        monkeypatch.setattr(h2o, "_BLOCK", size)
        cache = H2OCache(heavy_budget=6, recent_budget=4)
        with heedful.attach(model, H2OAttention()):
            logits = model(**prompt(), past_key_values=cache).logits
        caches.append((logits, cache.layers[2].scores, cache.layers[2].positions))
    torch.testing.assert_close(caches[0][0][0], caches[1][0][0])
    torch.testing.assert_close(caches[0][1], caches[1][1])
    assert torch.equal(caches[0][2], caches[1][2])


def test_wrong_use_is_one_clear_error():
    model = build("llama")
    with heedful.attach(model, H2OAttention()), pytest.raises(ValueError, match="H2OCache"):
        model.generate(**prompt(), max_new_tokens=2)
    cache = H2OCache(heavy_budget=4, recent_budget=4)
    with pytest.raises(ValueError, match="attach"):
        model.generate(**prompt(), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="cropped"):
        cache.layers[0].crop(-1)
    for wrong in (
        {"heavy_budget": -1},
        {"recent_budget": 1.5},
        {"heavy_budget": 0, "recent_budget": 0},
        {"heavy_budget": "all"},
    ):
        with pytest.raises(ValueError, match="budget"):
            H2OCache(**wrong)
    ids = prompt()["input_ids"]
    prefix = torch.ones(24, 24, dtype=torch.bool).tril() | (torch.arange(24) < 4)
    with heedful.attach(model, H2OAttention()), pytest.raises(ValueError, match="honours causal masks"):
        model(ids, attention_mask=prefix[None, None].expand(2, -1, -1, -1), past_key_values=H2OCache())
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    with heedful.attach(model, H2OAttention()), pytest.raises(ValueError, match="one document"):
        model(ids, position_ids=positions, past_key_values=H2OCache())
    with heedful.attach(model, H2OAttention()) as attached:  # no cache: nothing to drop
        model(**prompt(), use_cache=False)
    assert attached.report()[0]["dense_calls"] == 1
