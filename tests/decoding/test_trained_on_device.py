"""Drafters with weights in the fixed-shape engine (on the CPU, not captured): the tokens of generate, the drafts of the host."""

from functools import partial

import pytest
import torch
from tiny_models import build, inputs

import heedful
from heedful.decoding import HiddenTransfer, LongSpec, Medusa, PromptLookup, Sequence, graph
from heedful.decoding.device_walk import ancestors_of
from heedful.decoding.engine import Engine
from heedful.decoding.generate import _Run

GREEDY = {"max_new_tokens": 28, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _graph_engine(monkeypatch):
    monkeypatch.setattr(_Run, "_engine_class", lambda self, *_: partial(graph.GraphEngine, capture=False))
    yield
    heedful.decoding.release_graphs()


def made(kind, model):
    torch.manual_seed(3)
    if kind == "medusa":
        return Medusa.for_model(model, tree=[[0], [1], [0, 0], [0, 1], [0, 0, 0]])
    longspec = LongSpec.for_model(model, tree_shape=(4, 6, 6), window=16, initializer_range=0.3)
    return longspec if kind == "longspec" else Sequence(PromptLookup(), longspec)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["medusa", "longspec", "lookup, else longspec"])
def test_the_same_tokens_and_the_same_drafts(kind, name, batch):
    model = build(name, dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    reference = model.generate(**given, **GREEDY)
    accepted = []
    for on_device in (True, False):
        drafter = made(kind, model)
        if not on_device:
            drafter.on_device = lambda *_: None
        for _ in range(2):  # a session that is used again begins anew
            result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
            assert torch.equal(result.sequences, reference)
        accepted.append(result.stats.accepted)
    assert accepted[0] == accepted[1]
    assert result.stats.tokens_per_step > 1.0


def test_end_tokens_inside_a_path():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=3, length=11, padding="left")
    free = model.generate(**given, **GREEDY)
    options = GREEDY | {"eos_token_id": [int(free[0, 20]), int(free[2, 30])]}
    reference = model.generate(**given, **options)
    for kind in ("medusa", "longspec"):
        assert torch.equal(heedful.generate(model, drafter=made(kind, model), **given, **options).sequences, reference)


@pytest.mark.parametrize("source", ["anchor", "previous"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["mistral", "llama", "gemma3_text", "qwen3"])
def test_pseudo_rows_are_those_of_the_eager_engine(name, batch, source, monkeypatch):
    """Nodes that no token is chosen at, with places in the cache, positions, windows and masks of their own."""
    model = build(name, dtype=torch.float64)
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    reference = model.generate(**given, **GREEDY)
    torch.manual_seed(0)
    last = model.config.num_hidden_layers
    drafter = HiddenTransfer.for_model(model, transfer_layers=[0, 1, last], source=source)
    with torch.no_grad():
        for map_ in drafter.maps:
            map_.weight.add_(torch.randn_like(map_.weight), alpha=0.1)
    accepted, capacity = [], None
    for _ in range(2):  # a session that is used again begins anew
        result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
        assert torch.equal(result.sequences, reference)
        accepted.append(result.stats.accepted)
        (session,) = graph.sessions_of(model).values()
        assert capacity in (None, session.capacity)
        capacity = session.capacity
    monkeypatch.setattr(_Run, "_engine_class", lambda self, *_: Engine)
    result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
    accepted.append(result.stats.accepted)
    assert accepted[0] == accepted[1]
    assert max(n for row in result.stats.accepted for n in row) >= (2 if name == "mistral" else 3)
    for graphs, eager in zip(accepted[0], accepted[2], strict=True):
        # The eager engine drafts nothing at first, here the root is repeated: where it was taken, texts are cut elsewhere.
        if graphs[0] == eager[0] == 1:
            assert graphs == eager
    if name == "mistral":
        assert accepted[0] == accepted[2]


def test_appended_nodes_see_their_own_path():
    parents = torch.tensor([[-1, 0, 0, 1]])
    expected = ancestors_of(torch.tensor([[-1, 0, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7]]))
    trees = graph.Trees(1, 4, parents.device, parents[0].tolist())
    assert torch.equal(trees.mask(12), expected)
    assert torch.equal(trees.mask(8), expected[:, :8, :8])
    assert torch.equal(trees.mask(4), ancestors_of(parents))


def test_trees_of_too_many_rows_are_left_to_the_eager_engine():
    model = build("llama")
    drafter = HiddenTransfer.for_model(model)
    assert drafter.rows_per_node == 4
    assert HiddenTransfer.for_model(model, num_transfer_steps=0).rows_per_node == 1
    wide = (
        [[i] for i in range(10)]
        + [[i, j] for i in range(10) for j in range(10)]
        + [[0, 0, j] for j in range(10)]
        + [[0, 1, j] for j in range(10)]
    )
    assert HiddenTransfer.for_model(model, tree=wide).rows_per_node == 1
