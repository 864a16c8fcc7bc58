import copy
import math

import pytest
import torch
from interp.models import BOS_ONLY, COPY, WORDS, random_model, self_answered_prompts
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import heedful
from heedful.interp import (
    HeadRemoval,
    HeadScores,
    ablate_heads,
    head_outputs,
    needle_recall,
    recall_without_heads,
    retrieval_scores,
)

EXACT = "donot_use_mm_for_euclid_dist"


class Outputs(heedful.Probe):
    """Keeps the heads' outputs of each call, and the visible keys and values that they came from."""

    def __init__(self, **selectors):
        super().__init__(**selectors)
        self.calls = []

    def outputs(self, call, output):
        self.calls.append((call.phase, output, call.visible(), call.value))


def left_padded(seed=0, batch=3, width=12):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 12, (batch, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def without_columns(model, heads, dim=8):
    """The model with these heads' columns of the output projection set to zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, head in heads:
            model.model.layers[layer].self_attn.o_proj.weight[:, head * dim : (head + 1) * dim] = 0
    return model


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_zero_equals_zeroed_columns_of_the_output_projection(key_value_heads):
    model = random_model(num_key_value_heads=key_value_heads)
    heads = [(0, 1), (2, 3), (2, 0)]
    inputs = left_padded()
    real = inputs["attention_mask"].bool()
    with heedful.attach(model, ablate_heads(heads)):
        ablated = model(**inputs).logits
    assert (ablated - without_columns(model, heads)(**inputs).logits)[real].abs().max() == 0.0
    assert not torch.equal(ablated, model(**inputs).logits)


def test_zeroing_a_whole_layer_removes_its_attention_output():
    model = random_model(attention_bias=True)
    with heedful.attach(model, ablate_heads([(1, head) for head in range(4)])):
        ablated = model(**left_padded()).logits
    silent = copy.deepcopy(model)
    silent.model.layers[1].self_attn.o_proj.weight.data.zero_()  # its bias stays
    assert torch.equal(ablated, silent(**left_padded()).logits)


@pytest.mark.parametrize("mode", ["zero", "uniform", "mean", "resample"])
def test_the_other_heads_of_the_group_stay_bit_equal(mode):
    model = random_model()
    inputs = left_padded()
    reference = head_outputs(model, inputs["input_ids"], inputs["attention_mask"])
    plain, edited = Outputs(layers=[1]), Outputs(layers=[1])
    with torch.no_grad():
        with heedful.attach(model, plain):
            model(**inputs)
        with heedful.attach(model, ablate_heads([(1, 2)], mode, reference=reference), edited):
            model(**inputs)
    before, after = plain.calls[0][1], edited.calls[0][1]
    real = inputs["attention_mask"].bool()
    for head in (0, 1, 3):  # heads 2 and 3 share a key-value head
        assert torch.equal(before[:, head][real], after[:, head][real])
    assert not torch.equal(before[:, 2][real], after[:, 2][real])


@pytest.mark.parametrize("window", [None, 5])
def test_uniform_says_the_mean_of_the_visible_values(window):
    if window:
        model = random_model(MistralConfig, MistralForCausalLM, sliding_window=window)
    else:
        model = random_model()
    inputs = left_padded()
    probe = Outputs(layers=[1], heads=[2])
    with heedful.attach(model, ablate_heads([(1, 2)], "uniform"), probe), torch.no_grad():
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert [phase for phase, *_ in probe.calls] == ["prefill", "decode", "decode", "decode"]
    for _, output, visible, value in probe.calls:
        weights = visible.float() / visible.sum(-1, keepdim=True).clamp(min=1)
        expected = weights @ value[:, 1:2]  # key-value head of query head 2
        seen = visible.any(-1).expand(output.shape[:3])
        torch.testing.assert_close(output[seen], expected[seen], atol=1e-6, rtol=0)


def test_uniform_equals_a_query_projection_of_zero():
    model = random_model()
    zeroed = copy.deepcopy(model)
    zeroed.model.layers[0].self_attn.q_proj.weight.data[8:16] = 0
    inputs = left_padded()
    real = inputs["attention_mask"].bool()
    with heedful.attach(model, ablate_heads([(0, 1)], "uniform")):
        torch.testing.assert_close(model(**inputs).logits[real], zeroed(**inputs).logits[real], atol=1e-5, rtol=0)


def test_means_and_samples_of_a_reference_text():
    model = random_model()
    inputs = left_padded(batch=5)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    with torch.no_grad():
        model(**inputs)
    outputs = dict(seen)  # the hooks go on
    real = inputs["attention_mask"].bool()
    reference = head_outputs(model, inputs["input_ids"], inputs["attention_mask"], samples=7, batch_size=2)
    assert reference.n == real.sum()
    for layer in range(3):
        rows = outputs[layer].view(*real.shape, 4, 8)[real]  # (n, H, D), padding left out
        torch.testing.assert_close(reference.mean[layer], rows.mean(0))
        assert reference.samples[layer].shape == (7, 4, 8)
        distances = torch.cdist(reference.samples[layer].flatten(1), rows.flatten(1), compute_mode=EXACT)
        assert (distances.min(1).values < 1e-4).all()
        assert len(distances.argmin(1).unique()) == 7
    assert set(head_outputs(model, inputs["input_ids"], layers=[2]).mean) == {2}


def test_mean_says_the_same_everywhere():
    model = random_model()
    inputs = left_padded()
    reference = head_outputs(model, inputs["input_ids"], inputs["attention_mask"])
    probe = Outputs(layers=[1], heads=[3, 0])
    with heedful.attach(model, ablate_heads([(1, 0), (1, 3)], "mean", reference=reference), probe):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for _, output, visible, _ in probe.calls:
        seen = visible.any(-1).expand(output.shape[:3])
        expected = reference.mean[1][[3, 0]][:, None].expand_as(output)
        assert torch.equal(output[seen], expected[seen])


def test_resample_draws_from_the_samples_by_seed_alone():
    model = random_model()
    inputs = left_padded(batch=1)
    reference = head_outputs(model, left_padded(seed=9, batch=4, width=16)["input_ids"], samples=50)

    def run(seed, **options):
        probe = Outputs(layers=[1], heads=[2])
        with heedful.attach(model, ablate_heads([(1, 2)], "resample", reference=reference, seed=seed), probe):
            model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
        return torch.cat([output for _, output, *_ in probe.calls], 2)[0, 0]

    first = run(0)
    assert (first[:, None] == reference.samples[1][:, 2]).all(-1).any(1).all()
    assert len(first.unique(dim=0)) > 5
    assert torch.equal(run(0), first)
    assert torch.equal(run(0, cache_implementation="static"), first)
    assert torch.equal(run(0, prefill_chunk_size=5), first)
    assert not torch.equal(run(1), first)


def test_resample_does_not_depend_on_batch_and_padding():
    model = random_model()
    reference = head_outputs(model, left_padded(seed=9, batch=4, width=16)["input_ids"])
    inputs = left_padded()
    part = ablate_heads([(1, 2), (0, 1)], "resample", reference=reference)
    with heedful.attach(model, part):
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        together = model(**inputs, position_ids=positions).logits
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            alone = model(inputs["input_ids"][row, real][None]).logits[0]
            torch.testing.assert_close(together[row, real], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["zero", "uniform"])
@pytest.mark.parametrize("static", [False, True])
def test_phases(mode, static):
    model = random_model()
    inputs = left_padded()
    heads = [(1, 2)]

    def outputs(*parts):
        probe = Outputs(layers=[1], heads=[2])
        options = {"cache_implementation": "static"} if static else {}
        with heedful.attach(model, *parts, probe), torch.no_grad():
            model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        return [output for _, output, *_ in probe.calls]

    plain = outputs()
    prefill, decode, both, also_both = (
        outputs(ablate_heads(heads, mode, phase=phase)) for phase in ("prefill", "decode", "both", "all")
    )
    assert torch.equal(decode[0], plain[0])
    assert not torch.equal(decode[1], plain[1])
    assert torch.equal(prefill[0], both[0])
    assert not torch.equal(prefill[0], plain[0])
    assert all(torch.equal(x, y) for x, y in zip(both, also_both, strict=True))
    if mode == "zero":
        assert [bool((output == 0).all()) for output in decode] == [False, True, True]
        real = inputs["attention_mask"].bool()
        assert (both[0][:, 0][real] == 0).all()
        assert not (prefill[1] == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"num_beams": 3}]
)
def test_generate_with_padding_and_any_cache(options):
    model = random_model()
    heads = [(0, 0), (1, 2), (2, 1)]
    inputs = left_padded()
    expected = without_columns(model, heads).generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    with heedful.attach(model, ablate_heads(heads)):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **options), expected)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **options), expected)


def test_a_family_with_fused_projections():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=12, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4, bos_token_id=0)
    ).eval()
    ids = left_padded()["input_ids"]
    silent = copy.deepcopy(model)
    silent.transformer.h[1].attn.c_proj.weight.data[16:24] = 0  # Conv1D: inputs are rows
    with heedful.attach(model, ablate_heads([(1, 2)])):
        torch.testing.assert_close(model(ids).logits, silent(ids).logits, atol=1e-5, rtol=0)


def test_the_heads_of_top_are_taken_as_they_are_and_bad_ones_refused():
    model = random_model()
    ids = left_padded()["input_ids"]
    with heedful.attach(model, ablate_heads([(1, 2, 0.9), (1, 2, 0.9), (0, 3, 0.5)])):
        triples = model(ids).logits
    with heedful.attach(model, ablate_heads([(0, 3), (1, 2)])):
        assert torch.equal(model(ids).logits, triples)
    for arguments, message in (
        (([],), "empty"),
        (([(1,)],), "pairs"),
        (([(0, 0)], "median"), "mode must be"),
        (([(0, 0)], "mean"), "needs reference=heedful.interp.head_outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate_heads(*arguments)
    with pytest.raises(ValueError, match="phase must be"):
        ablate_heads([(0, 0)], phase="training")
    with pytest.raises(ValueError, match=r"lacks layers \[2\]"):
        ablate_heads([(0, 0), (2, 0)], "mean", reference=head_outputs(model, ids, layers=[0]))
    with pytest.raises(ValueError, match="9"):
        heedful.attach(model, ablate_heads([(0, 9)]))


@pytest.mark.parametrize("variant", ["decode", "teacher-forced"])
@pytest.mark.parametrize("mode", ["zero", "uniform"])
def test_recall_goes_with_the_copying_head_and_with_no_other(retriever, variant, mode):
    model, tokenizer, haystack, needles = retriever
    options = {"lengths": [60], "depths": [0.2, 0.8], "instances": 2, "variant": variant}

    def recall(heads):
        parts = [ablate_heads(heads, mode)]
        return needle_recall(model, tokenizer, haystack, needles, parts=parts, **options).recall

    assert recall([(0, COPY)]) == 0.0
    assert recall([(0, BOS_ONLY)]) == 1.0


def test_decode_only_ablation_acts_from_the_first_answer_token_on(retriever):
    model, tokenizer, haystack, needles = retriever
    parts = [ablate_heads([(0, COPY)], "uniform", phase="decode")]
    options = {"lengths": [60], "depths": [0.5], "instances": 2}
    result = needle_recall(model, tokenizer, haystack, needles, parts=parts, **options)
    assert result.recall == 0.0
    wanted = needles[0].answer.split()
    assert result.responses[0].split()[0] != wanted[0]
    parts = [
        ablate_heads([(0, COPY)], "uniform", phase="prefill")
    ]  # one layer: what the prompt's rows say reaches nobody
    assert needle_recall(model, tokenizer, haystack, needles, parts=parts, **options).recall == 1.0


def test_the_causal_test(retriever):
    model, tokenizer, haystack, needles = retriever
    options = {"lengths": [60], "depths": [0.3, 0.7], "instances": 1, "needles": needles}
    scores = retrieval_scores(model, tokenizer, haystack, **options)
    told = []
    result = recall_without_heads(
        model,
        tokenizer,
        scores,
        haystack,
        counts=(1, 2),
        draws=2,
        progress=lambda *state: told.append(state),
        **options,
    )
    assert result.recall == 1.0
    assert result.n == 2
    assert result.without_retrieval_heads == {1: 0.0, 2: 0.0}
    assert result.without_random_heads == {1: [1.0, 1.0], 2: [1.0, 1.0]}
    assert result.random_median == {1: 1.0, 2: 1.0}
    assert told[-1] == (7, 7)
    assert "retrieval" in str(result)
    assert result.plot().axes
    with pytest.raises(ValueError, match="counts must lie"):
        recall_without_heads(model, tokenizer, scores, haystack, counts=(9,), **options)
    with pytest.raises(ValueError, match="no decode calls"):
        recall_without_heads(model, tokenizer, scores, haystack, phase="decode", variant="teacher-forced", **options)


def test_random_draws_are_fixed_over_prompts_and_nested(monkeypatch):
    """Every prompt of a condition runs under the same heads, and fewer heads are the first of the same draw."""
    from heedful.interp import ablation

    model = random_model()
    scores = HeadScores(torch.linspace(1, 0, 12).view(1, 3, 4), threshold=0.8)
    seen = []
    monkeypatch.setattr(
        ablation, "ablate_heads", lambda heads, *a, **k: seen.append([h[:2] for h in heads]) or ablate_heads(heads)
    )
    prompts = self_answered_prompts(model, count=4)
    recall_without_heads(model, WORDS, scores, counts=(1, 3), draws=2, prompts=prompts, batch_size=1)
    retrieval = {row[:2] for row in scores.retrieval_heads()}
    assert seen[0] == [(0, 0)]
    assert seen[1] == [(0, 0), (0, 1), (0, 2)]
    assert seen[2] == seen[4][:1]
    assert seen[3] == seen[5][:1]
    assert seen[4] != seen[5]
    assert not any(retrieval & set(heads) for heads in seen[2:])


def test_a_table_without_control():
    result = HeadRemoval(1.0, {1: 0.5}, {1: []}, 4)
    assert "-" in str(result)
    assert math.isnan(result.plot().axes[0].lines[1].get_ydata()[1])
