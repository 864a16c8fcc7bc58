import copy
import dataclasses

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interp.models import BOS_ONLY, COPY, SILENT, WORDS, random_model, self_answered_prompts, word_tokenizer
from torch.autograd.profiler import profile
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import heedful
from heedful.interp import retrieval_scores
from heedful.interp.retrieval_heads import TopKeys, copy_paste_scores


def brute_force(model, prompts, mode):
    """The card's count from eager's full attention maps: ``(N, L, H)``."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    rows = []
    for prompt in prompts:
        ids = torch.cat([prompt.input_ids, prompt.answer_ids[:-1]])
        maps = torch.cat(eager(ids[None], output_attentions=True).attentions)  # (L, H, T, T)
        layers, heads = maps.shape[:2]
        needle = set(prompt.columns.tolist())
        scores = torch.zeros(layers, heads)
        for layer in range(layers):
            for head in range(heads):
                pasted = []
                for step, token in enumerate(prompt.answer_ids.tolist()):
                    j = int(maps[layer, head, len(prompt.input_ids) - 1 + step].argmax())
                    if j in needle and prompt.input_ids[j] == token:
                        pasted.append(j)
                scores[layer, head] = (len(set(pasted)) if mode == "set" else len(pasted)) / len(needle)
        rows.append(scores)
    return torch.stack(rows)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("variant", ["decode", "teacher-forced"])
@pytest.mark.parametrize("mode", ["set", "sum"])
def test_scores_equal_the_count_from_eager_attention_maps(key_value_heads, variant, mode):
    model = random_model(num_key_value_heads=key_value_heads, seed=key_value_heads)
    prompts = self_answered_prompts(model)
    with torch.no_grad():
        expected = brute_force(model, prompts, mode)
    scores = retrieval_scores(model, WORDS, prompts=prompts, mode=mode, variant=variant, batch_size=2)
    assert torch.equal(scores.per_instance, expected)
    assert scores.pass_rate == 1.0
    assert (expected > 0).any()
    if mode == "set":
        assert (expected <= 1).all()


HYBRID = {"qwen3_next": 4}  # only every fourth layer has softmax attention, and eager returns maps of those alone


@pytest.mark.parametrize("name", tiny_models.names("decoder"))
def test_every_decoder_family_scores_as_its_eager_maps_do(name):
    model = tiny_models.build(name, vocab_size=12, bos_token_id=0, eos_token_id=None, pad_token_id=None)
    prompts = self_answered_prompts(model, count=3, lengths=(24, 19))
    with torch.no_grad():
        expected = brute_force(model, prompts, "set")
    for options in ({}, {"variant": "teacher-forced"}, {"batch_size": 1, "prefill_chunk_size": 9}):
        found = retrieval_scores(model, WORDS, prompts=prompts, **options)
        measured = ~found.per_instance.isnan()
        if name in HYBRID:
            assert measured[:, HYBRID[name] - 1 :: HYBRID[name]].all()
            assert measured.sum() == expected.numel()
            assert torch.equal(found.per_instance[measured], expected.flatten())
        else:
            assert torch.equal(found.per_instance[measured], expected[measured])
            windows = [kind != "full_attention" for kind in getattr(model.config, "layer_types", None) or []]
            assert measured.all() or any(windows) or getattr(model.config, "sliding_window", None)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 5},  # prompts of three lengths together: left padding
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 5, "batch_size": 3},
        {"variant": "teacher-forced"},
        {"variant": "teacher-forced", "batch_size": 1},
    ],
)
def test_chunks_caches_batches_and_padding_change_no_score(options):
    model = random_model()
    prompts = self_answered_prompts(model, count=6, lengths=(9, 31, 22))
    plain = retrieval_scores(model, WORDS, prompts=prompts, batch_size=2).per_instance
    assert torch.equal(retrieval_scores(model, WORDS, prompts=prompts, **options).per_instance, plain)
    assert (plain > 0).any()


def test_permuting_heads_permutes_the_scores():
    model = random_model(num_key_value_heads=4)
    prompts = self_answered_prompts(model)
    before = retrieval_scores(model, WORDS, prompts=prompts).per_instance
    order = torch.tensor([2, 0, 3, 1])
    shuffled = copy.deepcopy(model)
    attention = shuffled.model.layers[1].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(projection.weight.view(4, 8, 32)[order].flatten(0, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight.view(32, 4, 8)[:, order].flatten(1))
    after = retrieval_scores(shuffled, WORDS, prompts=prompts).per_instance
    assert torch.equal(after[:, 1], before[:, 1, order])
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.equal(before[:, 1, order], before[:, 1])


@pytest.mark.parametrize("variant", ["decode", "teacher-forced"])
def test_a_head_built_to_copy_scores_one_and_a_sink_head_zero(retriever, variant):
    model, tokenizer, haystack, needles = retriever
    scores = retrieval_scores(model, tokenizer, haystack, needles, lengths=[60, 100], instances=3, variant=variant)
    assert scores.per_instance.shape == (30, 1, 3)
    assert (scores.per_instance[:, 0, COPY] == 1.0).all()
    assert (scores.per_instance[:, 0, BOS_ONLY] == 0.0).all()
    assert (
        scores.per_instance[:, 0, SILENT] == 0.0
    ).all()  # all logits equal: the first key, BOS, counts as the top one
    assert scores.retrieval_heads() == [(0, COPY, 1.0)]
    assert scores.activation_frequency.tolist() == [[1.0, 0.0, 0.0]]


def test_only_passed_instances_count(retriever):
    model, tokenizer, haystack, needles = retriever
    wrong = dataclasses.replace(needles[1], question="hay3")
    scores = retrieval_scores(model, tokenizer, haystack, [needles[0], wrong], lengths=[60], depths=[0.5], instances=4)
    assert scores.attempted == 4
    assert scores.pass_rate == 0.5
    assert scores.scores[0, COPY] == 1.0
    with pytest.warns(UserWarning, match="passed none of 2 prompts"):
        nothing = retrieval_scores(model, tokenizer, haystack, [wrong], lengths=[60], depths=[0.5], instances=2)
    assert nothing.per_instance.shape == (0, 1, 3)
    assert nothing.pass_rate == 0.0


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 6}, {"variant": "teacher-forced"}]
)
def test_a_window_that_cannot_reach_the_needle_gives_nan_and_one_that_can_gives_the_score(options):
    model = random_model(MistralConfig, MistralForCausalLM, sliding_window=16)
    far = self_answered_prompts(model, lengths=(40, 31), columns=torch.arange(3, 9))
    assert retrieval_scores(model, WORDS, prompts=far, **options).per_instance.isnan().all()

    near = self_answered_prompts(model, lengths=(40,), columns=torch.arange(26, 40))  # slots are not columns here
    with torch.no_grad():
        expected = brute_force(model, near, "set")
    assert (expected > 0).any()
    assert torch.equal(retrieval_scores(model, WORDS, prompts=near, **options).per_instance, expected)


def test_only_the_window_layers_of_a_mixed_model_give_nan():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = random_model(
        Gemma2Config,
        Gemma2ForCausalLM,
        attention="eager",
        sliding_window=12,
        layer_types=types,
        query_pre_attn_scalar=8,
    )
    prompts = self_answered_prompts(model, lengths=(40,), columns=torch.arange(2, 12))
    for options in ({}, {"variant": "teacher-forced"}, {"cache_implementation": "static"}):
        nan = retrieval_scores(model, WORDS, prompts=prompts, **options).per_instance.isnan()
        assert nan[:, [0, 2]].all()
        assert not nan[:, 1].any()


@pytest.mark.parametrize("name", tiny_models.names("vision-language"))
def test_the_text_stack_of_a_vision_language_model_is_scored(name):
    model = tiny_models.build(name)
    model.generation_config.eos_token_id = None
    words = word_tokenizer([f"w{i}" for i in range(tiny_models.VOCABULARY - 2)])
    prompts = self_answered_prompts(model, count=3, words=words)
    decode, forced = (
        retrieval_scores(model, words, prompts=prompts, variant=variant) for variant in ("decode", "teacher-forced")
    )
    config = model.config.get_text_config()
    assert decode.per_instance.shape == (3, config.num_hidden_layers, config.num_attention_heads)
    assert torch.equal(decode.per_instance.nan_to_num(-1), forced.per_instance.nan_to_num(-1))
    assert not decode.per_instance.isnan().all()


def test_a_model_adapted_by_peft_is_scored():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(random_model(), settings)
    prompts = self_answered_prompts(model)
    found = retrieval_scores(model, WORDS, prompts=prompts).per_instance
    with torch.no_grad():
        assert torch.equal(found, brute_force(model.merge_and_unload(), prompts, "set"))


def test_layers_that_are_not_asked_for_have_no_score():
    model = random_model()
    prompts = self_answered_prompts(model)
    whole = retrieval_scores(model, WORDS, prompts=prompts).per_instance
    part = retrieval_scores(model, WORDS, prompts=prompts, layers=[2]).per_instance
    assert torch.equal(part[:, 2], whole[:, 2])
    assert part[:, :2].isnan().all()
    with pytest.raises(ValueError, match="7"):
        retrieval_scores(model, WORDS, prompts=prompts, layers=[7])
    with pytest.raises(ValueError, match="mode must be"):
        retrieval_scores(model, WORDS, prompts=prompts, mode="mean")


def test_progress_is_told_and_the_model_is_left_as_it_was():
    model = random_model()
    prompts = self_answered_prompts(model)
    ids = prompts[0].input_ids[None]
    before = model(ids).logits
    told = []
    retrieval_scores(
        model, WORDS, prompts=prompts, batch_size=2, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert torch.equal(model(ids).logits, before)
    assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(3, 12))
def test_set_and_sum_mode(seed, steps, length):
    generator = torch.Generator().manual_seed(seed)
    top = torch.randint(0, length + 2, (1, 4, steps), generator=generator)
    prompt = torch.randint(0, 3, (length,), generator=generator)
    emitted = torch.randint(0, 3, (steps,), generator=generator)
    needle = torch.arange(1, 1 + max(1, length // 2))
    first = torch.zeros(1, steps, dtype=torch.long)
    in_set, in_sum = (copy_paste_scores(top, first, [emitted], [prompt], [needle], mode=m)[0] for m in ("set", "sum"))
    assert ((in_set >= 0) & (in_set <= 1) & (in_set <= in_sum)).all()
    for head in range(4):
        hits = [
            j for j, w in zip(top[0, head].tolist(), emitted.tolist(), strict=True) if j in needle and prompt[j] == w
        ]
        assert in_sum[head] * len(needle) == pytest.approx(len(hits))
        assert in_set[head] * len(needle) == pytest.approx(len(set(hits)))
    first[:] = 2  # the first needle token is out of sight at every step
    assert copy_paste_scores(top, first, [emitted], [prompt], [needle]).isnan().all()


def allocated(run):
    """All bytes that were allocated meanwhile, freed ones too: no less than the peak."""
    with profile(profile_memory=True) as record, torch.no_grad():
        run()
    return sum(max(0, event.nbytes()) for event in record.kineto_results.events() if event.name() == "[memory]")


def test_one_row_at_32k_keys_costs_less_than_64_mib():
    heads, key_heads, dim, tokens = 32, 8, 16, 32_768
    model = random_model(
        hidden_size=64, num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=dim, num_hidden_layers=1,
        max_position_embeddings=40_000,
    )  # fmt: skip

    def step(probe=None):
        cache = DynamicCache(config=model.config)
        cache.update(torch.randn(1, key_heads, tokens, dim), torch.randn(1, key_heads, tokens, dim), 0)
        with heedful.attach(model, *([probe] if probe else [])):
            return allocated(lambda: model(torch.tensor([[3]]), past_key_values=cache, logits_to_keep=1))

    step()
    probe = TopKeys(layers=None, rows="last")
    probe.column = tokens
    plain, probed = step(), step(probe)
    assert probe.top[0][0].shape == (1, heads, 1)
    assert 0 < probed - plain < 64 * 2**20


def test_a_bfloat16_model_is_scored():
    model = random_model().to(torch.bfloat16)
    prompts = self_answered_prompts(model)
    scores = retrieval_scores(model, WORDS, prompts=prompts, batch_size=1)
    assert scores.pass_rate > 0
    assert ((scores.per_instance >= 0) & (scores.per_instance <= 1)).all()


def test_prompts_or_what_builds_them_and_a_model_that_speaks(retriever):
    model, tokenizer, haystack, needles = retriever
    prompts = self_answered_prompts(random_model())
    with pytest.raises(ValueError, match="prompts are ready"):
        retrieval_scores(model, tokenizer, prompts=prompts, lengths=[60])
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        retrieval_scores(model.model, tokenizer, haystack, needles, lengths=[60])
    with pytest.raises(ValueError, match="must be at least 1"):
        retrieval_scores(model, tokenizer, haystack, needles, lengths=[60], prefill_chunk_size=-4)
