"""Parts under model.generate: caches, chunks, beams, windows; which rows and steps they act on."""

import family_checks
import pytest
import tiny_models
import torch
from transformers import DynamicCache

import heedful

FAMILIES = [
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "gpt2",
    "gpt_neox",
    "cohere2",
    "deepseek_v3",
]
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 5},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


def generate(model, given, tokens=7, **how):
    return model.generate(**given, max_new_tokens=tokens, do_sample=False, **how)


class Calls(heedful.Probe):
    """What each call looked like on layer 0."""

    def __init__(self, **selectors):
        super().__init__(**{"layers": [0], **selectors})
        self.seen = []

    def outputs(self, call, output):
        past = None if call.past is None else int(call.past)
        rows = None if call.rows is None else call.rows.tolist()
        self.seen.append((call.phase, past, call.query.shape[2], call.key.shape[2], rows))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_identity_and_probes_give_the_same_tokens(name, way):
    model = tiny_models.build(name)
    given = tiny_models.inputs(model, padding="left")
    plain = generate(model, given, **WAYS[way])
    before = family_checks.fingerprint(model)
    whole, last = family_checks.Weights(heads=[1]), family_checks.Weights(heads=[1], rows="last")
    identity = family_checks.Identity("probabilities", rows="last")
    with heedful.attach(model, whole, last, identity):
        tokens = generate(model, given, **WAYS[way])
    assert torch.equal(tokens, plain)
    assert family_checks.fingerprint(model) == before
    for layer in whole.seen:
        for a, b in zip(whole.seen[layer], last.seen[layer], strict=True):
            real = b.sum(-1) > 0  # a chunk may hold padding only
            assert torch.allclose(a[:, :, -1:][real], b[real], atol=1e-6)
            sums = b.sum(-1)[real]
            assert (sums <= 1 + 1e-5).all()
            assert name == "gpt_oss" or torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_next", "llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "t5", "bart"])
def test_other_kinds_generate_the_same_tokens(name):
    model = tiny_models.build(name)
    given = tiny_models.inputs(model, padding="left" if name not in ("t5", "bart") else None)
    given.pop("decoder_input_ids", None)
    plain = generate(model, given)
    probe = family_checks.Weights(rows="last", cross=True)
    with heedful.attach(model, probe, family_checks.Identity("logits", rows="generated")) as attached:
        assert torch.equal(generate(model, given), plain)
    assert all(line["calls"] > 0 for line in attached.report() if not line.get("cross"))
    steps = 2 if name in ("t5", "bart") else 1  # self- and cross-attention
    assert len(probe.seen[attached.layers[0]]) == 7 * steps


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ({}, [("prefill", 0, 12, 12)] + [("decode", 12 + i, 1, 13 + i) for i in range(3)]),
        ({"cache_implementation": "static"}, [("prefill", 0, 12, 15)] + [("decode", 12 + i, 1, 15) for i in range(3)]),
        (
            {"prefill_chunk_size": 5},
            [("prefill", 0, 5, 5), ("prefill", 5, 5, 10), ("prefill", 10, 2, 12)]
            + [("decode", 12 + i, 1, 13 + i) for i in range(3)],
        ),
        ({"use_cache": False}, [("prefill", 0, 12 + i, 12 + i) for i in range(4)]),
    ],
)
def test_phases_and_lengths(way, expected):
    model = tiny_models.build("llama")
    probe = Calls()
    with heedful.attach(model, probe):
        generate(model, tiny_models.inputs(model), 4, **way)
    assert [call[:4] for call in probe.seen] == expected


def test_a_prompt_of_one_token_is_a_prefill():
    model = tiny_models.build("llama")
    for way in ("dynamic", "static"):
        probe = Calls()
        with heedful.attach(model, probe):
            generate(model, tiny_models.inputs(model, length=1), 3, **WAYS[way])
        assert [call[0] for call in probe.seen] == ["prefill", "decode", "decode"]


def test_cross_attention_has_the_phase_of_its_decoder():
    model = tiny_models.build("t5")
    given = tiny_models.inputs(model)
    given.pop("decoder_input_ids")
    probe, steps = Calls(cross=True), Calls(cross=True, steps=[1])
    with heedful.attach(model, probe, steps):
        generate(model, given, 4)
    expected = [("prefill", 0, 1)] + [("decode", i, 1) for i in (1, 2, 3)]
    assert [call[:3] for call in probe.seen] == [call for call in expected for _ in ("self", "cross")]
    assert [call[3] for call in probe.seen] == [1, 12, 2, 12, 3, 12, 4, 12]
    assert [call[:3] for call in steps.seen] == [("decode", 2, 1)] * 2


def test_rows_last_of_chunks_and_right_padding():
    model = tiny_models.build("llama")
    probe = Calls(rows="last")
    with heedful.attach(model, probe):
        generate(model, tiny_models.inputs(model, padding="left"), 2, prefill_chunk_size=3)
    # Sample 0 has 4 padding tokens: none of it in the first chunk of 3.
    assert [call[4] for call in probe.seen] == [[[-1], [2]], [[2], [2]], [[2], [2]], [[2], [2]], [[0], [0]]]
    given = tiny_models.inputs(model, padding="right")
    cache, probe = DynamicCache(config=model.config), Calls(rows="last")
    with heedful.attach(model, probe), torch.no_grad():
        for start in (0, 4, 8):
            ids, mask = given["input_ids"][:, start : start + 4], given["attention_mask"][:, : start + 4]
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert [call[4] for call in probe.seen] == [[[3], [3]], [[3], [3]], [[-1], [3]]]


@pytest.mark.parametrize("way", ["dynamic", "static", "chunked"])
def test_rows_generated_is_decode_only(way):
    model = tiny_models.build("llama")
    probe = Calls(rows="generated")
    with heedful.attach(model, probe):
        generate(model, tiny_models.inputs(model, padding="left"), 5, **WAYS[way])
    assert [(call[0], call[1], call[2]) for call in probe.seen] == [("decode", 12 + i, 1) for i in range(4)]


@pytest.mark.parametrize("way", ["dynamic", "static", "chunked"])
@pytest.mark.parametrize(
    ("steps", "past"),
    [([0], [12]), (range(1, 3), [13, 14]), ([3, 99], [15]), ("decode", [12, 13, 14, 15]), ([], [])],
)
def test_steps_choose_decode_calls(steps, past, way):
    model = tiny_models.build("llama")
    probe, other = Calls(steps=steps), Calls(steps="prefill")
    with heedful.attach(model, probe, other):
        for _ in range(2):  # a second sequence starts counting anew
            generate(model, tiny_models.inputs(model), 5, **WAYS[way])
    assert [call[1] for call in probe.seen] == past * 2
    assert {call[0] for call in other.seen} == {"prefill"}


def test_steps_follow_the_cache_not_the_calls():
    """Two sequences that are decoded in turns (as by classifier-free guidance) keep their own count."""
    model = tiny_models.build("llama")
    probe = Calls(steps=[1])
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with heedful.attach(model, probe), torch.no_grad():
        for cache, length in zip(caches, (4, 9), strict=True):
            model(input_ids=torch.randint(5, 80, (1, length)), past_key_values=cache)
        for _ in range(3):
            for cache in caches:
                model(input_ids=torch.randint(5, 80, (1, 1)), past_key_values=cache)
    assert [call[1] for call in probe.seen] == [5, 10]


def test_a_token_mask_means_the_same_tokens_in_chunks_decode_and_beams():
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[0, [1, 6, 11]] = True
    mask[1, [6, 12]] = True  # the first generated token
    found = {}
    for name, way in {"whole": {}, "chunks": {"prefill_chunk_size": 5}, "beams": {"num_beams": 2}}.items():
        probe = Calls(rows=mask)
        with heedful.attach(model, probe):
            generate(model, given, 4, **way)
        found[name] = [(call[1], call[4]) for call in probe.seen]
    assert found["whole"] == [(0, [[1, 6, 11], [6, -1, -1]]), (12, [[-1], [0]])]
    assert found["chunks"] == [(0, [[1], [-1]]), (5, [[1], [1]]), (10, [[1], [-1]]), (12, [[-1], [0]])]
    assert found["beams"] == [(0, [[1, 6, 11]] * 2 + [[6, -1, -1]] * 2), (12, [[-1]] * 2 + [[0]] * 2)]


def test_an_edit_of_generated_rows_equals_recomputing_them():
    """Decoding with a cache under an edit of the generated rows = one pass over the text with those rows edited."""

    class Sharpen(heedful.Edit):
        def logits(self, call, logits):
            return 3 * logits

    model = tiny_models.build("llama")
    given = tiny_models.inputs(model, padding="left")
    mask = torch.arange(20) >= 12
    for way in ("dynamic", "static", "chunked"):
        with heedful.attach(model, Sharpen(rows="generated", heads=[0, 3])):
            out = generate(model, given, 8, output_logits=True, return_dict_in_generate=True, **WAYS[way])
        attention = torch.cat([given["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        with heedful.attach(model, Sharpen(rows=mask, heads=[0, 3])), torch.no_grad():
            whole = model(input_ids=out.sequences, attention_mask=attention, position_ids=positions).logits[:, 11:-1]
        assert torch.allclose(torch.stack(out.logits, 1), whole, atol=2e-5)
    assert not torch.equal(out.sequences, generate(model, given, 8))


def test_memory_lives_as_long_as_the_sequence():
    model = tiny_models.build("llama")

    class Count(heedful.Probe):
        def __init__(self, **selectors):
            super().__init__(**selectors)
            self.seen = []

        def outputs(self, call, output):
            call.memory["calls"] = call.memory.get("calls", 0) + 1
            assert call.memory is call.memory
            if call.layer == 1:
                self.seen.append(call.memory["calls"])

    part = Count()
    given = tiny_models.inputs(model)
    with heedful.attach(model, part):
        generate(model, given, 3)
        generate(model, given, 2, prefill_chunk_size=5)
        for _ in range(2):  # generate keeps a static cache and resets it
            generate(model, given, 3, cache_implementation="static")
        generate(model, given, 2, use_cache=False)
    assert part.seen == [1, 2, 3] + [1, 2, 3, 4] + [1, 2, 3] * 2 + [1, 1]


def test_a_kernel_sees_the_static_cache_as_it_is():
    model = tiny_models.build("llama")
    seen = []

    class Look(heedful.Kernel):
        def __call__(self, call):
            keys = call.real_keys()
            seen.append((call.key.shape[2], keys.sum(1).tolist(), call.real_rows().sum(1).tolist()))
            return call.original()

    given = tiny_models.inputs(model, padding="left")
    plain = generate(model, given, 3, cache_implementation="static")
    with heedful.attach(model, Look(layers=[0])):
        assert torch.equal(generate(model, given, 3, cache_implementation="static"), plain)
    assert seen == [(14, [8, 12], [8, 12]), (14, [9, 13], [1, 1]), (14, [10, 14], [1, 1])]
