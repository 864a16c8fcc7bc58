"""Where a sequence ends: EOS, length, stop strings and other criteria, inside an accepted path too, and what follows."""

import time

import pytest
import torch
from decoding_tools import Chain, RandomTree, StaticTree, padding
from tiny_models import build, inputs
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

import heedful
from heedful.decoding import DraftTree

OPTIONS = {"do_sample": False, "pad_token_id": 0}


def setup(batch=1, tokens=20):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    free = model.generate(**given, **OPTIONS, max_new_tokens=tokens, eos_token_id=None)
    return model, given, free


def right_chain(free, skip=None):
    return Chain(free, skip, right=1.0)


@pytest.mark.parametrize("place", [0, 1, 3, 7])
def test_eos_inside_a_path(place):
    model, given, free = setup()
    eos = int(free[0, 11 + place])
    reference = model.generate(**given, **OPTIONS, max_new_tokens=20, eos_token_id=eos)
    result = heedful.generate(model, drafter=right_chain(free), **given, **OPTIONS, max_new_tokens=20, eos_token_id=eos)
    assert torch.equal(result.sequences, reference)
    assert result.stats.new_tokens == [reference.shape[1] - 11]
    assert sum(result.stats.accepted[0]) == reference.shape[1] - 12


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 7])
def test_length_inside_a_path(tokens):
    model, given, free = setup()
    for cache in (None, "static"):
        result = heedful.generate(
            model,
            drafter=right_chain(free),
            **given,
            **OPTIONS,
            max_new_tokens=tokens,
            eos_token_id=None,
            cache_implementation=cache,
        )
        assert torch.equal(result.sequences, free[:, : 11 + tokens])
        assert result.stats.new_tokens == [tokens]


def test_eos_pads_finished_rows():
    model, given, free = setup(batch=3)
    eos = [int(free[0, 14]), int(free[2, 20])]
    options = OPTIONS | {"max_new_tokens": 20, "eos_token_id": eos}
    reference = model.generate(**given, **options)
    assert (reference[:, 11:] == 0).any(), "a row must end early"
    for drafter in (None, RandomTree(free, padding(given)), StaticTree(free, padding(given))):
        result = heedful.generate(model, drafter=drafter, **given, **options)
        assert torch.equal(result.sequences, reference)
        for row, new in enumerate(result.stats.new_tokens):
            ends = [i for i, token in enumerate(reference[row, 11:].tolist()) if token in eos]
            assert new == (ends[0] + 1 if ends else reference.shape[1] - 11)


class EndsWith(StoppingCriteria):
    """Ends a row at one of its own tokens."""

    def __init__(self, tokens):
        self.tokens, self.calls = torch.tensor(tokens), []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.clone())
        return torch.isin(input_ids[:, -1], self.tokens)


def test_without_eos_finished_rows_go_on_until_the_last_one_ends():
    model, given, free = setup(batch=3)
    tokens = [int(free[0, 13]), int(free[1, 16]), int(free[2, 22])]
    options = OPTIONS | {"max_new_tokens": 20, "eos_token_id": None}
    reference = model.generate(**given, **options, stopping_criteria=StoppingCriteriaList([EndsWith(tokens)]))
    assert reference.shape[1] < 31
    for drafter in (None, RandomTree(free, padding(given), seed=2), StaticTree(free, padding(given))):
        criteria = StoppingCriteriaList([EndsWith(tokens)])
        result = heedful.generate(model, drafter=drafter, **given, **options, stopping_criteria=criteria)
        assert torch.equal(result.sequences, reference)
        assert result.stats.new_tokens == [reference.shape[1] - 11] * 3
        assert all(1 + sum(row) == reference.shape[1] - 11 for row in result.stats.accepted)


def test_criteria_see_what_generate_shows_them():
    """One call a token, in order, with the sequence so far."""
    model, given, free = setup()
    seen = []
    for drafter in (None, right_chain(free)):
        criterion = EndsWith([])
        heedful.generate(model, drafter=drafter, **given, **OPTIONS, max_new_tokens=8, stopping_criteria=[criterion])
        seen.append(criterion.calls)
    reference = EndsWith([])
    model.generate(**given, **OPTIONS, max_new_tokens=8, stopping_criteria=[reference])
    for calls in seen:
        assert len(calls) == len(reference.calls)
        assert all(torch.equal(a, b) for a, b in zip(calls, reference.calls, strict=True))


def letters(size):
    """A tokenizer with one printable letter for every token."""
    tokenizer = Tokenizer(models.BPE({chr(33 + token): token for token in range(size)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
def test_stop_strings(where):
    model, given, free = setup()
    string = "".join(chr(33 + int(token)) for token in free[0, 15:17])
    tokenizer = letters(96)
    options = {"tokenizer": tokenizer, "max_new_tokens": 20, **OPTIONS}
    if where == "argument":
        options["stop_strings"] = [string]
    elif where == "generation_config":
        config = GenerationConfig(stop_strings=[string], max_new_tokens=20, **OPTIONS)
        options = {"tokenizer": tokenizer, "generation_config": config}
    else:
        model.generation_config.stop_strings = [string]
    reference = model.generate(**given, **options)
    assert reference.shape[1] < free.shape[1]
    for drafter in (None, right_chain(free)):
        result = heedful.generate(model, drafter=drafter, **given, **options)
        assert torch.equal(result.sequences, reference)
    options.pop("tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        heedful.generate(model, **given, **options)


def test_max_time_gives_a_prefix():
    model, given, free = setup(tokens=60)
    began = time.perf_counter()
    result = heedful.generate(
        model, drafter=RandomTree(free), **given, **OPTIONS, max_new_tokens=60, max_time=0.02, eos_token_id=None
    )
    assert time.perf_counter() - began < 5
    assert torch.equal(result.sequences, free[:, : result.sequences.shape[1]])
    assert result.sequences.shape[1] > 11


def test_ended_rows_get_no_tree_and_no_update():
    model, given, free = setup(batch=3)

    class Watch(RandomTree):
        def propose(self, roots, committed):
            proposal = super().propose(roots, committed)
            return [DraftTree(torch.tensor([999]), torch.tensor([-1])) if t is None and i in self.ended else t
                    for i, t in enumerate(proposal)]  # fmt: skip

        ended = frozenset()

        def update(self, trees, outputs, paths, new_roots):
            assert [tree is None for tree in trees] == [not path for path in paths]
            for row in self.ended:
                assert trees[row] is None, "a finished row stays finished"
            self.ended = self.ended | {row for row, root in enumerate(new_roots.tolist()) if root in self.eos}

    drafter = Watch(free, padding(given))
    drafter.eos = [int(free[0, 14])]
    heedful.generate(model, drafter=drafter, **given, **OPTIONS, max_new_tokens=20, eos_token_id=drafter.eos)
    assert drafter.ended
