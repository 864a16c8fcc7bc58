import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import heedful
from heedful.interp import Needle, NeedleRecall, needle_prompts, needle_recall
from heedful.interp.answers import is_right
from heedful.kernels import HiPAttention


def sentencepiece_like(text, appends_eos=False):
    """Words with a mark in front: what Llama 2 and Mistral tokenizers look like."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(
        [text, " ".join(map(str, range(10, 100)))],
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    single = "<s> $A </s>" if appends_eos else "<s> $A"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@settings(deadline=None, max_examples=15)
@given(length=st.integers(160, 400), depth=st.floats(0, 1), seed=st.integers(0, 1000))
def test_prompts_have_the_length_asked_for_and_know_where_the_answer_stands(tokenizer, prose, length, depth, seed):
    (prompt,) = needle_prompts(tokenizer, prose, lengths=[length], depths=[depth], instances=1, seed=seed)
    text = tokenizer.decode(prompt.input_ids[1:].tolist())
    value = prompt.needle.answer.strip()
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert len(prompt.input_ids) + len(prompt.answer_ids) == length
    assert tokenizer.decode(prompt.input_ids[prompt.columns].tolist()).strip() == value
    assert tokenizer.decode(prompt.answer_ids.tolist()) == prompt.needle.answer
    assert text.count(value) == 1  # an induction head finds nothing else to copy
    assert text.count(prompt.needle.statement) == 1
    assert text.endswith(prompt.needle.question)
    assert (prompt.columns.diff() == 1).all()


def test_the_needle_stands_after_a_sentence_end_near_its_depth(tokenizer, prose):
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        for prompt in needle_prompts(tokenizer, prose, lengths=[400], depths=[depth], instances=3):
            text = tokenizer.decode(prompt.input_ids[1:].tolist())
            context = text[: text.rindex("\n\n" + prompt.needle.question)]
            at = context.index(prompt.needle.statement)
            before = context[:at].rstrip()
            assert not before or depth == 1.0 or before[-1] in ".!?"
            share = len(before) / (len(context) - len(prompt.needle.statement))
            assert share == pytest.approx(depth, abs=0.08)


def test_a_cell_does_not_depend_on_the_others_and_the_seed_decides(tokenizer, prose):
    def ids(**options):
        return [p.input_ids.tolist() for p in needle_prompts(tokenizer, prose, **options)]

    alone = ids(lengths=[200], depths=[0.5], instances=1)
    among = ids(lengths=[180, 200], depths=[0.1, 0.5], instances=2)
    assert among[6] == alone[0]
    assert len({tuple(row) for row in among}) == 8
    assert ids(lengths=[200], depths=[0.5], instances=1, seed=1) != alone


@pytest.mark.parametrize("appends_eos", [False, True])
def test_tokenizers_with_word_marks_and_an_end_token(prose, appends_eos):
    tokenizer = sentencepiece_like(prose, appends_eos)
    for prompt in needle_prompts(tokenizer, prose, lengths=[150], depths=[0.0, 0.4, 1.0], instances=2):
        assert prompt.input_ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in prompt.input_ids
        assert tokenizer.eos_token_id not in prompt.answer_ids
        assert 148 <= len(prompt.input_ids) + len(prompt.answer_ids) <= 150
        assert prompt.input_ids[prompt.columns].tolist() == prompt.answer_ids.tolist()


def test_a_format_that_brings_its_own_bos_does_not_get_two(tokenizer, prose):
    form = "<bos>Book: {context} End.\nAsk: {question}"
    (prompt,) = needle_prompts(tokenizer, prose, lengths=[150], depths=[0.5], instances=1, prompt_format=form)
    assert (prompt.input_ids == tokenizer.bos_token_id).sum() == 1
    assert tokenizer.decode(prompt.input_ids[prompt.columns].tolist()) == prompt.needle.answer.strip()


def test_own_needles_are_used_in_turn(tokenizer, prose):
    needles = [Needle(f"The {thing} was left in the {place}.", f"The {thing} was left in the", f" {place}")
               for thing, place in (("lantern", "cellar"), ("violin", "orchard"))]  # fmt: skip
    prompts = needle_prompts(tokenizer, prose, needles, lengths=[120], depths=[0.2, 0.8], instances=2)
    assert [prompt.needle for prompt in prompts] == [*needles, *needles]
    assert tokenizer.decode(prompts[1].input_ids[prompts[1].columns].tolist()).strip() == "orchard"


def test_bad_requests_name_the_remedy(tokenizer, prose):
    with pytest.raises(ValueError, match="pass a longer haystack"):
        needle_prompts(tokenizer, prose[:200], lengths=[500])
    with pytest.raises(ValueError, match="lengths must be above 20"):
        needle_prompts(tokenizer, prose, lengths=[20])
    with pytest.raises(ValueError, match="0 to 1"):
        needle_prompts(tokenizer, prose, depths=[50])
    with pytest.raises(ValueError, match="must contain"):
        needle_prompts(tokenizer, prose, prompt_format="{question}")
    with pytest.raises(ValueError, match="contains the answer 'the'"):
        needle_prompts(tokenizer, prose, [Needle("Look for the", "Look for", " the")], lengths=[100])
    with pytest.raises(ValueError, match="does not occur"):
        Needle("The number is 7.", "The number is", " 8")
    with pytest.raises(ValueError, match="begin with a space"):
        needle_prompts(tokenizer, prose, [Needle("She is travelling.", "She is tra", "velling")], lengths=[120])

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        needle_prompts(Slow(), prose)


def test_names_and_numbers_of_new_needles_are_not_in_the_text():
    for seed in range(50):
        needle = Needle.draw(np.random.default_rng(seed), avoid="Alfonzo Beatrix Casimir Jessop")
        assert not any(word in needle.statement for word in ("Alfonzo", "Beatrix", "Casimir", "Jessop"))


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (" 48213", " 48213", True),
        (" 48213.", " 48213", True),
        (" 4821", " 48213", False),
        (" 48312", " 48213", False),
        ("", " 48213", False),
        ("eat a sandwich in sunny Dolores Park", " eat a sandwich and sit in Dolores Park on a sunny day", True),
        ("sit on a bench", " eat a sandwich and sit in Dolores Park on a sunny day", False),
        ("the the the the the the", " the cat sat on the mat", False),
    ],
)
def test_success_is_rouge_1_recall_above_one_half(response, answer, right):
    assert is_right(response, answer) is right


@pytest.mark.parametrize("variant", ["decode", "teacher-forced"])
def test_recall_of_a_model_that_retrieves_by_construction(retriever, variant):
    model, tokenizer, haystack, needles = retriever
    result = needle_recall(
        model,
        tokenizer,
        haystack,
        needles,
        lengths=[60, 120],
        depths=[0.2, 0.9],
        instances=3,
        batch_size=5,
        variant=variant,
    )
    assert result.recall == 1.0
    assert result.responses[0] == needles[0].answer.strip()
    cells, lengths, depths = result.grid()
    assert (lengths, depths) == ([60, 120], [0.2, 0.9])
    assert torch.equal(cells, torch.ones(2, 2))
    wrong = [Needle(needle.statement, "hay3", needle.answer) for needle in needles]  # asks for something else
    assert needle_recall(model, tokenizer, haystack, wrong, lengths=[60], variant=variant).recall == 0.0


def test_longer_responses_end_at_the_end_token(retriever):
    model, tokenizer, haystack, needles = retriever
    last = tokenizer.convert_tokens_to_ids(needles[0].answer.split()[2])
    options = {"lengths": [60], "depths": [0.5], "instances": 1}
    assert needle_recall(model, tokenizer, haystack, needles[:1], max_new_tokens=20, **options).recall == 1.0
    model.generation_config.eos_token_id = last
    try:
        result = needle_recall(model, tokenizer, haystack, needles[:1], max_new_tokens=20, **options)
    finally:
        model.generation_config.eos_token_id = None
    assert result.responses == [" ".join(needles[0].answer.split()[:2])]
    assert result.recall == 0.0


def test_recall_prints_and_draws():
    result = NeedleRecall(
        torch.tensor([True, False, True]), ["", "", ""], torch.tensor([64, 64, 128]), torch.tensor([0.1, 0.9, 0.9])
    )
    cells, _, _ = result.grid()
    assert math.isnan(cells[1, 0])
    assert "67%" in str(result)
    assert result.plot().axes[0].get_title() == "Recall 67%"


def test_prompts_beyond_the_context_and_unknown_variants_are_refused(retriever):
    model, tokenizer, haystack, needles = retriever
    with pytest.raises(ValueError, match="the model's context is 256"):
        needle_recall(model, tokenizer, haystack, needles, lengths=[300])
    with pytest.raises(ValueError, match="variant must be"):
        needle_recall(model, tokenizer, haystack, needles, lengths=[60], variant="beam")
    with pytest.raises(ValueError, match="belong to variant='decode'"):
        needle_recall(model, tokenizer, haystack, needles, lengths=[60], variant="teacher-forced", max_new_tokens=5)
    with pytest.raises(ValueError, match="must be at least 1"):
        needle_recall(model, tokenizer, haystack, needles, lengths=[60], batch_size=0)


def test_prompts_beyond_the_context_are_read_under_an_extension(retriever):
    model, tokenizer, haystack, needles = retriever
    sizes = {"sliding_window": 32, "num_sink_tokens": 4, "block_size_q": 16}
    with heedful.attach(model, HiPAttention(top_k=64, **sizes)), pytest.raises(ValueError, match="context is 256"):
        needle_recall(model, tokenizer, haystack, needles, lengths=[300])
    with heedful.attach(model, HiPAttention(top_k=64, trained_length=256, **sizes)):
        recall = needle_recall(model, tokenizer, haystack, needles, lengths=[300], instances=2)
    assert recall.recall == 1.0


def test_training_mode_and_gradients_come_back(retriever):
    model, tokenizer, haystack, needles = retriever
    model.train()
    needle_recall(model, tokenizer, haystack, needles, lengths=[60], instances=1)
    assert model.training
    model.eval()
    assert torch.is_grad_enabled()
