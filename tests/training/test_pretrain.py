"""The recipe: rows are a function of the step, a killed run goes on with the same losses, the folder loads."""

import itertools
import json
import lzma

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heedful.training.corpus import BOS, Corpus, Rows
from heedful.training.muon import Muon, orthogonalise
from heedful.training.pretrain import build_model, learning_rate, pretrain
from heedful.training.recall import (
    ATTRIBUTES,
    HELD_OUT_ATTRIBUTES,
    HELD_OUT_FIRST_NAMES,
    HELD_OUT_LAST_NAMES,
    HELD_OUT_WORDINGS,
    QUESTIONS,
    STATEMENTS,
    draw_name,
    held_out_prompts,
)
from heedful.training.refine import refinement_document


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small books and a few sums, in the layout of the real data."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "classics").mkdir()
    (folder / "gsm8k").mkdir()
    rng = np.random.default_rng(0)
    words = [
        "river",
        "Mary",
        "stone",
        "walked",
        "London",
        "quiet",
        "under",
        "Harry",
        "letter",
        "night",
        "green",
        "Boston",
    ]
    for part in range(2):
        sentences = ["The " + " ".join(rng.choice(words, 9)) + "." for _ in range(2500)]
        text = "\n\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5))
        with lzma.open(folder / "classics" / f"train-{part}.jsonl.xz", "wt") as file:
            file.write(json.dumps({"title": "t", "author": "a", "year": "1900", "text": text}) + "\n")
    problems = [
        {"question": f"What is {i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}
        for i in range(400)
    ]
    (folder / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return folder


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return Corpus.prepare(data, tmp_path_factory.mktemp("work"), 600)


def small():
    torch.manual_seed(0)
    return build_model(600, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, context=256)


def run(data, out, **options):
    arguments = {
        "steps": 8,
        "tokens_per_step": 512,
        "short": 128,
        "context": 256,
        "vocabulary_size": 600,
        "workers": 0,
        "device": "cpu",
        "compile": False,
        "progress": False,
    }
    return pretrain(data, out, model=small(), **{**arguments, **options})


def losses(out):
    return {
        entry["step"]: entry["loss"] for entry in map(json.loads, (out / "work" / "log.jsonl").read_text().splitlines())
    }


def test_a_killed_run_goes_on_with_the_same_losses_and_weights(data, tmp_path):
    whole = run(data, tmp_path / "whole", stop_after=None)
    run(data, tmp_path / "killed", stop_after=3)
    killed = run(data, tmp_path / "killed")
    assert losses(killed)[8] == pytest.approx(losses(whole)[8], abs=1e-6)
    a, b = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_run_in_the_same_folder_is_refused(data, tmp_path):
    run(data, tmp_path, stop_after=1)
    with pytest.raises(ValueError, match="another `out`"):
        run(data, tmp_path, steps=9)


def test_missing_data_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-\*"):
        pretrain(tmp_path, tmp_path / "out")


def test_folder_loads_and_adds_bos(data, tmp_path):
    out = run(data, tmp_path, steps=2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Mary").input_ids)[0] == BOS
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_rows_are_a_function_of_the_step(corpus):
    options = {"rows": 8, "length": 200, "shares": (0.5, 0.25, 0.25), "steps": 10, "seed": 0}
    a, b = Rows(corpus, first_step=0, **options), Rows(corpus, first_step=0, **options)
    assert torch.equal(a[7], b[7])
    assert not torch.equal(a[7], a[6])
    assert a[3].shape == (8, 201)
    assert bool((a[3][:, 0] == corpus.tokenizer.token_to_id(BOS)).all())


def test_an_epoch_visits_each_crop_of_the_books_once(corpus):
    rows = Rows(corpus, rows=4, length=200, shares=(1.0, 0.0, 0.0), first_step=0, steps=1, seed=0)
    crops = len(corpus.books) // 200 - 1
    seen = {tuple(rows._book(number)[:50]) for number in range(crops)}
    assert len(seen) == crops


def test_training_never_draws_what_the_evaluation_uses(corpus):
    held_out = set(HELD_OUT_FIRST_NAMES) | set(HELD_OUT_LAST_NAMES)
    rng = np.random.default_rng(0)
    for _ in range(3000):
        assert not held_out & set(draw_name(rng, corpus.words).split())
    assert not set(ATTRIBUTES) & set(HELD_OUT_ATTRIBUTES)
    for statement, question in HELD_OUT_WORDINGS:
        assert statement not in STATEMENTS
        assert question not in QUESTIONS


def test_held_out_prompts_contain_the_answer_once_and_fit(corpus):
    def encode(text):
        return corpus.tokenizer.encode(text, add_special_tokens=False).ids

    prompts = held_out_prompts(
        np.asarray(corpus.books), encode, corpus.ends_sentence, corpus.begins_word, length=600, count=5
    )
    for prompt in prompts:
        assert len(prompt.tokens) == 600
        text = corpus.tokenizer.decode(prompt.tokens)
        assert text.count(prompt.answer.strip()) == 1
        assert not text.endswith(prompt.answer)


def test_refinement_marks_exactly_the_asked_values(corpus):
    rng = np.random.default_rng(1)
    ids, asked = refinement_document(rng, corpus, 100)
    assert len(ids) == len(asked)
    value = corpus.tokenizer.decode([token for token, mark in zip(ids, asked, strict=True) if mark]).split()
    before = corpus.tokenizer.decode(ids[: asked.index(True)])
    assert value
    assert all(word in before for word in value[:1])


def test_orthogonalise_gives_singular_values_near_one():
    matrices = torch.randn(3, 24, 64)
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.4


def test_muon_descends_and_refuses_vectors():
    weight = torch.nn.Parameter(torch.randn(16, 16))
    optimiser = Muon([weight], lr=0.05)
    target = torch.randn(16, 16)
    before = float((weight - target).square().mean())
    for _ in range(60):
        loss = (weight - target).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert float(loss) < 0.5 * before
    with pytest.raises(ValueError, match="AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_learning_rate_warms_up_stays_and_falls():
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] < 0.05
    assert rates[60] == rates[399] == 1.0
    assert rates[-1] < 0.02
    assert all(a >= b for a, b in itertools.pairwise(rates[400:]))
