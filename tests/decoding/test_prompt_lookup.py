import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from heedful.decoding import PromptLookup
from heedful.decoding.on_device import LookupOnDevice


def brute_force(sequence, num_tokens, max_ngram_size, num_tokens_short):
    """The definition: the latest earlier occurrence of the longest n-gram, and what followed it; less after a shorter one."""
    for size in range(min(max_ngram_size, len(sequence) - 1), 0, -1):
        gram = sequence[-size:]
        for start in range(len(sequence) - size - 1, -1, -1):
            if sequence[start : start + size] == gram:
                count = num_tokens if size == max_ngram_size else min(num_tokens, num_tokens_short)
                return sequence[start + size : start + size + count]
    return None


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 4), st.integers(1, 7))
def test_is_the_definition(sequence, num_tokens, max_ngram_size, num_tokens_short):
    drafter = PromptLookup(num_tokens, max_ngram_size, num_tokens_short)
    root, committed = torch.tensor(sequence[-1:]), [torch.tensor(sequence[:-1], dtype=torch.long)]
    (tree,) = drafter.propose(root, committed)
    expected = brute_force(sequence, num_tokens, max_ngram_size, num_tokens_short)
    if expected is None:
        assert tree is None
    else:
        assert tree.tokens.tolist() == [sequence[-1], *expected]
        assert tree.parents.tolist() == list(range(-1, len(expected)))


def test_rows_look_into_their_own_text():
    drafter = PromptLookup(num_tokens=2)
    trees = drafter.propose(torch.tensor([1, 1]), [torch.tensor([1, 7, 8]), torch.tensor([5, 6])])
    assert trees[0].tokens.tolist() == [1, 7, 8]
    assert trees[1] is None


@pytest.mark.parametrize("arguments", [{"num_tokens": 0}, {"max_ngram_size": 0}, {"num_tokens_short": 0}])
def test_arguments(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        PromptLookup(**arguments)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=20), st.integers(1, 4), st.integers(1, 4))
def test_on_the_device_it_looks_up_the_same(sequence, max_ngram_size, num_tokens_short):
    drafter = PromptLookup(5, max_ngram_size, num_tokens_short)
    device = LookupOnDevice(1, 32, 5, max_ngram_size, drafter.num_tokens_short, torch.device("cpu"))
    device.text[0, : len(sequence)] = torch.tensor(sequence)
    tokens, parents = device.read(torch.tensor([len(sequence) - 1]))
    count = 1 + int((parents[0] >= 0).sum())
    (tree,) = drafter.propose(torch.tensor(sequence[-1:]), [torch.tensor(sequence[:-1])])
    assert tokens[0, :count].tolist() == ([sequence[-1]] if tree is None else tree.tokens.tolist())
    assert parents[0, :count].tolist() == list(range(-1, count - 1))
