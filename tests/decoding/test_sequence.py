"""Sequence: the first drafter with enough nodes drafts; all learn."""

import pytest
import torch
from decoding_tools import Chain, Empty, RandomTree, Recorder
from tiny_models import build, inputs

import heedful
from heedful.decoding import Drafter, DraftTree, PromptLookup, Sequence, TokenRecycling

GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Fixed(Drafter):
    def __init__(self, nodes):
        self.nodes, self.updates = nodes, 0

    def propose(self, roots, committed):
        return [
            None if n is None else DraftTree.chain(torch.tensor([int(root), *range(1, n + 1)]))
            for root, n in zip(roots, self.nodes, strict=True)
        ]

    def update(self, trees, outputs, paths, new_roots):
        self.updates += 1


def test_each_row_takes_the_first_that_has_enough_else_the_last():
    first, second, last = Fixed([5, 4, None, 9]), Fixed([6, 6, 2, 6]), Fixed([1, 1, 1, None])
    trees = Sequence(first, second, last).propose(torch.arange(4), [torch.arange(3)] * 4)
    assert [len(tree) - 1 for tree in trees] == [5, 6, 1, 9]
    trees = Sequence(first, last, min_nodes=4).propose(torch.arange(4), [torch.arange(3)] * 4)
    assert [len(tree) - 1 for tree in trees] == [5, 4, 1, 9]
    trees = Sequence(Fixed([None] * 4), last).propose(torch.arange(4), [torch.arange(3)] * 4)
    assert trees[3] is None


def test_update_goes_to_all_and_requirements_add_up():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    drafters = Recorder(PromptLookup(), {"hidden_states"}), TokenRecycling(max_nodes=10), Fixed([3])
    sequence = Sequence(*drafters)
    assert sequence.requires == {"hidden_states", "logits"}
    result = heedful.generate(model, drafter=sequence, **given, **GREEDY)
    assert len(drafters[0].updates) == drafters[2].updates == result.stats.steps


@pytest.mark.parametrize("batch", [1, 3])
def test_lossless(batch):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    reference = model.generate(**given, **GREEDY)
    skip = (given["attention_mask"] == 0).sum(-1).tolist() if batch > 1 else None
    for sequence in (
        Sequence(PromptLookup(), TokenRecycling(max_nodes=20)),
        Sequence(RandomTree(reference, skip), Chain(reference, skip), min_nodes=3),
        Sequence(Empty(), Empty()),
    ):
        assert torch.equal(heedful.generate(model, drafter=sequence, **given, **GREEDY).sequences, reference)


def test_bad_arguments():
    with pytest.raises(ValueError, match="two or more"):
        Sequence(PromptLookup())
    with pytest.raises(TypeError, match="takes drafters, got str"):
        Sequence(PromptLookup(), "token-recycling")
    with pytest.raises(ValueError, match="min_nodes"):
        Sequence(PromptLookup(), TokenRecycling(), min_nodes=0)


def test_sequence_is_as_good_as_the_better_one_on_copies_and_on_repetition():
    model, tokenizer = heedful.zoo.load("classics-20m")
    text = "The key of the tower is 48213. The colour of the door is amber. " * 3
    ids = tokenizer(text, return_tensors="pt").input_ids
    steps = {}
    for name, drafter in {
        "lookup": PromptLookup(),
        "recycling": TokenRecycling(max_nodes=20),
        "both": Sequence(PromptLookup(), TokenRecycling(max_nodes=20)),
    }.items():
        steps[name] = heedful.generate(model, ids, drafter, max_new_tokens=48, do_sample=False).stats.steps
    assert steps["both"] <= min(steps["lookup"], steps["recycling"]) + 2
