"""HiP attention beyond the trained length: where the chosen keys stand, and that nothing else changes."""

import pytest
import torch
from tiny_models import build
from transformers import DynamicCache

import heedful
from heedful import HiPAttention, attach
from heedful.attention.hip.decode import HiPDecodeState
from heedful.kernels.hip import bounded
from heedful.kernels.hip.bounded import Rotation

SMALL = {"top_k": 12, "block_size_q": 8, "sliding_window": 8, "num_sink_tokens": 2, "decode_sample_method": "center"}
EXTENDED = {**SMALL, "trained_length": 32}
FAMILIES = [
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "olmo2", "granite",
    "gpt_oss", "starcoder2", "seed_oss",
]  # fmt: skip


def tokens(batch=2, length=48, seed=0):
    """Each token once: the keys of one token, all at position 0 in the search, would tie."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([5 + torch.randperm(80, generator=g)[:length] for _ in range(batch)])


def left_padded(ids, padding):
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def greedy(model, *parts, new_tokens=8, **inputs):
    with attach(model, *parts):
        return model.generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, output_logits=True, return_dict_in_generate=True
        )


class Keys(heedful.Probe):
    def queries_keys(self, call, query, key):
        self.seen = getattr(self, "seen", [])
        self.seen.append((call.module, query.clone(), key.clone()))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_moving_a_key_is_what_the_model_would_have_done_there(family):
    changes = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2} if family in ("gemma2", "gemma3_text", "gpt_oss") else {}  # fmt: skip
    if family == "mistral":
        changes["sliding_window"] = None
    model, ids = build(family, **changes), tokens(batch=1, length=12)

    def keys(shift):
        probe = Keys()
        with attach(model, probe):
            model(ids, position_ids=torch.arange(12)[None] + shift, use_cache=False)
        return probe.seen

    # Rotary attention sees distances only, so all layers' keys are those of shift 0, elsewhere.
    for (module, _, here), (_, _, there) in zip(keys(0), keys(70), strict=True):
        rotation = Rotation.of(module, here.device)
        moved = rotation.move(here, torch.arange(12), torch.arange(12) + 70)
        torch.testing.assert_close(moved, there, atol=2e-4, rtol=2e-4)
        assert not torch.allclose(here, there, atol=1e-2)


def rotated(rows=48, heads=4, kv_heads=2, width=8, batch=2, dtype=torch.float64):
    """Random queries and keys as they were before rotation, and rotated; the padding of the second sample; values."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, n, rows, width, generator=g, dtype=dtype) for n in (heads, kv_heads, kv_heads)
    )
    padding = torch.tensor([0, 11])[:batch]
    mask = torch.arange(rows) >= padding[:, None]
    rotation = Rotation(1.0 / 100.0 ** (torch.arange(0, 6, 2) / 6))  # the last two channels are not turned
    position = (torch.arange(rows) - padding[:, None])[:, None]
    zero = torch.zeros_like(position)
    turned = [rotation.move(x, zero, position) for x in (2 * query, 2 * key)]
    return rotation, 2 * query, 2 * key, *turned, value, mask, -padding


def dense(rotation, query, key, value, mask, choice, beyond, rows_at):
    """Row by row: the chosen keys at -n..-1, the window from 0 on. Quadratic, from the keys before rotation."""
    batch, heads, rows, width = query.shape
    out = torch.zeros(batch, heads, rows, width, dtype=query.dtype)
    attended = choice.dense()
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                slot = rows_at + r
                if not mask[b, slot]:
                    continue
                block = r // choice.block_size_q
                start = max(int(choice.window_starts()[b, block, r % choice.block_size_q]), int(choice.first_slot[b]))
                seen = attended[b, h, r].nonzero()[:, 0]
                end = int(choice.search_end[b, block])
                last = min(rows, (block + 1) * choice.block_size_q) - 1
                listed = [s for s in attended[b, h, last].nonzero()[:, 0].tolist() if s < end]
                place = {s: i - len(listed) for i, s in enumerate(listed)}
                at = torch.tensor(
                    [s if s >= start or not beyond(b, block) else start + place[s] for s in seen.tolist()]
                )
                k = rotation.move(key[b, h // 2, seen], torch.zeros_like(at), at)
                q = rotation.move(query[b, h, r], torch.tensor(0), torch.tensor(slot))
                weights = torch.softmax(k @ q * width**-0.5, 0)
                out[b, h, r] = weights @ value[b, h // 2, seen]
    return out


def test_prefill_is_its_definition():
    rotation, raw_query, raw_key, query, key, value, mask, offset = rotated()
    sizes = {"top_k": 6, "block_size_q": 8, "sliding_window": 9, "num_sink_tokens": 2, "block_size_k": 2}
    output, near, far = bounded.prefill(
        query, key, value, mask, offset, rotation, 26, scale=8**-0.5, softcap=None, sink_logits=None, **sizes
    )
    assert near.num_queries == 32  # behind 11 tokens of padding the fourth block ends at 21
    assert far.num_queries == 24  # without padding it ends at 32
    first = dense(rotation, raw_query[:, :, :32], raw_key, value, mask, near, lambda b, block: False, 0)
    second = dense(rotation, raw_query[:, :, 24:], raw_key, value, mask, far, lambda b, block: True, 24)
    expected = torch.cat((first[:, :, :24], second), 2)
    expected[1, :, 24:32] = first[1, :, 24:]  # those rows of the second sample are within its trained length
    keep = mask[:, None, :, None]
    torch.testing.assert_close(output * keep, expected * keep, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize(
    ("softcap", "method", "window"), [(None, "center", 9), (2.0, "first", 9), (None, "oracle", 9), (None, "center", 0)]
)
def test_decoding_is_the_prefill_of_a_block_of_one(refresh, softcap, method, window):
    rotation, _, _, query, key, value, mask, offset = rotated()
    sizes = {"top_k": 6, "sliding_window": window, "num_sink_tokens": 2, "block_size_k": 2}
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    state = HiPDecodeState(2, 4, 64, **sizes)
    given = {"scale": 8**-0.5, "softcap": softcap, "sink_logits": sinks}
    first = mask.to(torch.uint8).argmax(1)
    for length in range(20, 49):
        lengths = torch.full((2,), length)
        found = bounded.decode(
            query[:, :, length - 1 : length], key, value, lengths, state, offset, rotation, 26,
            refresh_interval=refresh, first_real=first, sample_method=method, **given,
        )  # fmt: skip
        if (length - 20) % refresh == 0:
            expected, _, _ = bounded.prefill(
                query[:, :, length - 1 : length], key[:, :, :length], value[:, :, :length], mask[:, :length], offset,
                rotation, 26, block_size_q=1, block_stride_q=1, sample_method=method, **sizes, **given,
            )  # fmt: skip
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert state.refreshes.unique().tolist() == [-(-29 // refresh)]


def test_no_distance_is_longer_than_what_was_trained(monkeypatch):
    rotation, _, _, query, key, value, _, offset = rotated(batch=1)
    far = []
    move, place = Rotation.move, Rotation.place

    def watch(self, x, source, target):
        far.append((int(torch.as_tensor(target).min()), int(torch.as_tensor(target).max())))
        return move(self, x, source, target)

    def watch_place(self, x, target, most):
        far.append((int(target.min()), int(target.max())))
        return place(self, x, target, most)

    monkeypatch.setattr(Rotation, "move", watch)
    monkeypatch.setattr(Rotation, "place", watch_place)
    sizes = {"top_k": 6, "block_size_q": 8, "sliding_window": 9, "num_sink_tokens": 2, "block_size_k": 2}
    given = {"scale": 1.0, "softcap": None, "sink_logits": None}
    bounded.prefill(query[:, :, 40:], key, value, None, offset, rotation, 26, **given, **sizes)
    assert len(far) == 4
    assert max(high for _, high in far) - min(low for low, _ in far) <= 2 + 6 + 9 + 8  # a query at 8, a key at -8
    state = HiPDecodeState(1, 4, 48, **{k: v for k, v in sizes.items() if k != "block_size_q"})
    far.clear()
    for length in (44, 45, 46, 47):
        at, zero = torch.tensor([length]), torch.zeros(1, dtype=torch.long)
        row = query[:, :, length - 1 : length]
        bounded.decode(row, key, value, at, state, offset, rotation, 26, refresh_interval=4, first_real=zero, **given)
    assert max(high for _, high in far) - min(low for low, _ in far) <= 2 + 6 + 9 + 4


@pytest.mark.parametrize("shared", [1, 2])
def test_decoding_in_stages_is_the_prefill_in_stages(shared):
    rotation, _, _, query, key, value, mask, offset = rotated()
    stages = [(16, 4, 8, None), (16, 1, 2, 16)]
    sizes = {"top_k": 6, "num_sink_tokens": 2, "head_group_size": shared}
    state = HiPDecodeState(2, 4, 64, block_size_k=2, sliding_window=15, **sizes)
    given = {"scale": 8**-0.5, "softcap": None, "sink_logits": None, "stages": stages}
    first, chosen = mask.to(torch.uint8).argmax(1), set()
    for length in range(20, 49):
        row, lengths = query[:, :, length - 1 : length], torch.full((2,), length)
        keys, values = key[:, :, :length], value[:, :, :length]
        found = bounded.decode(
            row, keys, values, lengths, state, offset, rotation, 26, refresh_interval=1, first_real=first, **given
        )
        real = mask[:, :length]
        expected, _, _ = bounded.prefill(
            row, keys, values, real, offset, rotation, 26, block_size_q=16, sliding_window=9, **sizes, **given
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        chosen.add(tuple(state.blocks[0, 0].tolist()))
    assert len(chosen) > 8


@torch.no_grad()
def test_stages_beyond_the_trained_length():
    model, ids = build("llama"), tokens()
    arguments = {**SMALL, "stages": [(8, 2, 8, None), (8, 1, 4, 24)], "mask_refresh_interval": 3, "trained_length": 32}
    dynamic = greedy(model, HiPAttention(**arguments), input_ids=ids)
    static = greedy(model, HiPAttention(**arguments), input_ids=ids, cache_implementation="static")
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), atol=2e-4, rtol=1e-4)
    # A token decoded is a prefill's row whose block has no other.
    part = HiPAttention(**{**SMALL, "stages": [(1, 1, 8, None), (1, 1, 4, 24)], "trained_length": 32})
    decoded = greedy(model, part, input_ids=ids)
    with attach(model, part):
        whole = model(decoded.sequences).logits[:, 47:-1]
    torch.testing.assert_close(torch.stack(decoded.logits, 1), whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss", "gemma3_text"])
def test_within_the_trained_length_nothing_changes(family, cache):
    model, inputs = build(family), left_padded(tokens(), [0, 5])
    options = {"cache_implementation": "static"} if cache == "static" else {}
    plain = greedy(model, HiPAttention(**SMALL, mask_refresh_interval=3), **inputs, **options)
    part = HiPAttention(**SMALL, mask_refresh_interval=3, trained_length=64)
    found = greedy(model, part, **inputs, **options)
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits), atol=2e-4, rtol=1e-4)
    shorter = greedy(model, HiPAttention(**SMALL, mask_refresh_interval=3, trained_length=32), **inputs, **options)
    assert not torch.allclose(shorter.logits[0], plain.logits[0], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3"])
def test_batches_caches_and_chunks_agree(family):
    model = build(family, **({"sliding_window": None} if family == "mistral" else {}))
    ids = tokens(length=56)
    part = {**EXTENDED, "mask_refresh_interval": 3}
    inputs = left_padded(ids, [0, 16])
    dynamic = greedy(model, HiPAttention(**part), **inputs, new_tokens=5)
    static = greedy(model, HiPAttention(**part), **inputs, new_tokens=5, cache_implementation="static")
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), atol=2e-4, rtol=1e-4)
    for row, padding in ((0, 0), (1, 16)):
        alone = greedy(model, HiPAttention(**part), input_ids=ids[row : row + 1, padding:], new_tokens=5)
        together = torch.stack(dynamic.logits)[:, row]
        torch.testing.assert_close(together, torch.stack(alone.logits)[:, 0], atol=2e-4, rtol=1e-4)
    with attach(model, HiPAttention(**part)):
        whole = model(ids).logits
        cache, parts = DynamicCache(config=model.config), []
        for start, end in ((0, 24), (24, 40), (40, 56)):
            parts.append(model(ids[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["center", "oracle"])
@pytest.mark.parametrize("trained_length", [None, 32])
def test_autocast(method, trained_length):
    model, ids = build("llama"), tokens()
    part = HiPAttention(**{**SMALL, "decode_sample_method": method}, trained_length=trained_length)
    if trained_length is None:
        part = HiPAttention(**{**SMALL, "top_k": 400, "decode_sample_method": method})
        part._keys_a_row = 0  # every key, by a search: else rounding would choose other ones
    expected = greedy(model, part, input_ids=ids, new_tokens=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = greedy(model, part, input_ids=ids, new_tokens=2)
    first, other = found.logits[0].float(), expected.logits[0]
    assert (first - other).norm() < 0.1 * other.norm()
    assert torch.isfinite(found.logits[1]).all()


@torch.no_grad()
def test_packed_documents_are_extended_each_by_itself():
    model, lengths = build("llama"), (40, 3, 61, 23)
    ids = torch.cat([tokens(batch=1, length=n, seed=n) for n in lengths], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with attach(model, HiPAttention(**EXTENDED)):
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(x).logits for x in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-4)
    with attach(model, HiPAttention(**SMALL)):
        assert not torch.allclose(packed, model(ids, position_ids=positions, use_cache=False).logits, atol=1e-2)


@torch.no_grad()
def test_the_report_counts_and_mass_is_of_rows_within():
    model = build("llama")
    with attach(model, HiPAttention(**EXTENDED)) as attached:
        model.generate(tokens(), do_sample=False, max_new_tokens=6)
    for line in attached.report():
        assert line["refreshes"] == 5
        assert 0.2 < line["share_of_keys_read"] < 0.9
        assert 0.3 < line["mass_kept"] <= 1.0


def test_backward_runs_beyond_the_trained_length():
    model, ids = build("llama").train(), tokens()
    with attach(model, HiPAttention(**EXTENDED)):
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.dim() > 1)


# ---- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trained_length": 20}, "below what a row reads"),
        ({"trained_length": 30, "stages": [(32, 1, 8, None), (8, 1, 4, 16)]}, "below what a row reads"),
        ({"trained_length": 64.5}, "trained_length must be an integer"),
        ({"trained_length": 64, "dense_layers": 1}, "dense_layers, heads, rows and steps"),
        ({"trained_length": 64, "steps": "decode"}, "dense_layers, heads, rows and steps"),
        ({"trained_length": 64, "prefill_dense_threshold": 65}, "above trained_length"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiPAttention(**SMALL, **arguments)


@pytest.mark.parametrize(
    "family", ["gpt2", "cohere2", "smollm3", "exaone4", "glm4", "gpt_neox", "deepseek_v3", "ernie4_5"]
)
def test_rotations_that_are_not_known_are_refused_by_name(family):
    model = build(family)
    if family == "cohere2":
        model = build(family, sliding_window=64)
    with pytest.raises(ValueError, match="Attention: how this attention turns its keys is not known"):
        greedy(model, HiPAttention(**EXTENDED), input_ids=tokens())


def rescaled(**parameters):
    return build("llama", rope_parameters={"rope_theta": 1e4, **parameters})


@torch.no_grad()
def test_rotary_types():
    for parameters in (
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ):  # fmt: skip
        model = rescaled(**parameters)
        assert greedy(model, HiPAttention(**EXTENDED), input_ids=tokens()).sequences.shape == (2, 56)
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq.mul_(1.1)  # not what the config says
        with pytest.raises(ValueError, match="layer 0: the model's rotary embedding is not the one"):
            greedy(model, HiPAttention(**EXTENDED), input_ids=tokens())
    with pytest.raises(ValueError, match="'dynamic' change with the length"):
        greedy(rescaled(rope_type="dynamic", factor=2.0), HiPAttention(**EXTENDED), input_ids=tokens())


@torch.no_grad()
def test_positions_that_jump_are_refused():
    model, ids = build("llama"), tokens()
    positions = torch.arange(48).expand(2, -1).clone()
    positions[:, 40:] += 3
    mask = torch.ones(2, 48, dtype=torch.long)
    with attach(model, HiPAttention(**EXTENDED)), pytest.raises(ValueError, match="do not count up one by one"):
        model(ids, position_ids=positions, attention_mask=mask, past_key_values=DynamicCache(config=model.config))
