import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from heedful.decoding import PromptLookup


def brute_force(sequence, num_tokens, max_ngram_size):
    """The definition: the latest earlier occurrence of the longest n-gram, and what followed it."""
    for size in range(min(max_ngram_size, len(sequence) - 1), 0, -1):
        gram = sequence[-size:]
        for start in range(len(sequence) - size - 1, -1, -1):
            if sequence[start : start + size] == gram:
                return sequence[start + size : start + size + num_tokens]
    return None


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 4))
def test_is_the_definition(sequence, num_tokens, max_ngram_size):
    drafter = PromptLookup(num_tokens, max_ngram_size)
    root, committed = torch.tensor(sequence[-1:]), [torch.tensor(sequence[:-1], dtype=torch.long)]
    (tree,) = drafter.propose(root, committed)
    expected = brute_force(sequence, num_tokens, max_ngram_size)
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


@pytest.mark.parametrize("arguments", [{"num_tokens": 0}, {"max_ngram_size": 0}])
def test_arguments(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        PromptLookup(**arguments)
