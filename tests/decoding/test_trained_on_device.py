"""Drafters with weights in the fixed-shape engine (on the CPU, not captured): the tokens of generate, the drafts of the host."""

from functools import partial

import pytest
import torch
from tiny_models import build, inputs

import heedful
from heedful.decoding import LongSpec, Medusa, PromptLookup, Sequence, graph
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
