import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from heedful.decoding import DraftTree
from heedful.decoding.tree import VerifiedTree, topology


@st.composite
def parents(draw, most=20):
    size = draw(st.integers(1, most))
    return (-1, *(draw(st.integers(0, node - 1)) for node in range(1, size)))


def ancestors(parents, node):
    found = []
    while node != -1:
        found.append(node)
        node = parents[node]
    return found


@settings(deadline=None, max_examples=40)
@given(parents())
def test_topology_is_what_the_parents_say(parents):
    shape = topology(parents)
    for node in range(len(parents)):
        line = ancestors(parents, node)
        assert shape.depths[node] == len(line) - 1
        assert set(shape.ancestors[node].nonzero().flatten().tolist()) == set(line)
        assert shape.children[node] == [child for child in range(len(parents)) if parents[child] == node]
    assert shape.ancestors.sum(-1).tolist() == [depth + 1 for depth in shape.depths]


@settings(deadline=None, max_examples=40)
@given(parents(), st.integers(0, 5), st.integers(0, 12))
def test_limit_keeps_a_tree_and_the_paths(parents, depth, nodes):
    tree = VerifiedTree(list(range(len(parents))), topology(parents))
    cut = tree.limit(depth, nodes)
    assert cut.tokens[0] == 0
    assert cut.shape.size <= max(nodes, 1)
    assert cut.shape.depth <= depth
    if nodes >= len(parents):
        assert cut.shape.size == max(1, sum(d <= depth for d in tree.shape.depths))
    for node, token in enumerate(cut.tokens):  # a token's path of tokens is the path it had
        path = [cut.tokens[a] for a in ancestors(cut.shape.parents, node)]
        assert path == ancestors(parents, token)
    assert cut.source.tokens.tolist() == cut.tokens
    assert tuple(cut.source.parents.tolist()) == cut.shape.parents


def test_first_equal_sibling_counts():
    tree = VerifiedTree([5, 7, 7, 8], topology((-1, 0, 0, 2)))
    assert tree.child(0, 7) == 1
    assert tree.child(0, 8) is None
    assert tree.child(2, 8) == 3


def test_chain():
    tree = DraftTree.chain(torch.tensor([3, 4, 5]))
    assert tree.parents.tolist() == [-1, 0, 1]
    assert len(tree) == 3


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([9, 2], [-1, 0], "root"),
        ([1, 2], [-1, 1], "parent"),
        ([1, 2, 3], [-1, 2, 0], "parent"),
        ([1, 2], [0, 0], "root"),
        ([1, 10], [-1, 0], "vocabulary"),
        ([1, -1], [-1, 0], "vocabulary"),
        ([1, 2], [-1], "parents"),
        ([], [], "root"),
    ],
)
def test_no_tree_is_trusted(tokens, parents, message):
    tree = DraftTree(torch.tensor(tokens, dtype=torch.long), torch.tensor(parents, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        VerifiedTree.check(tree, root=1, vocabulary=10, row=0)
