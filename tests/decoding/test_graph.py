"""The fixed-shape engine on the CPU, its operations run one by one instead of captured: the tokens of model.generate."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from decoding_tools import DRAFTERS, Empty, padding
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build, inputs

import heedful
from heedful.decoding import Drafter, DraftTree, LongSpec, Medusa, PromptLookup, Sequence, TokenRecycling, graph
from heedful.decoding.device_walk import Walk, ancestors_of, trim, walk
from heedful.decoding.generate import _Run
from heedful.decoding.tree import VerifiedTree, topology

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text", "qwen3", "gpt2")


@pytest.fixture(autouse=True)
def _graph_engine(monkeypatch):
    monkeypatch.setattr(_Run, "_engine_class", lambda self, *_: partial(graph.GraphEngine, capture=False))
    yield
    heedful.decoding.release_graphs()


def setting(name="llama", batch=1, length=11):
    model = build(name, dtype=torch.float64)
    return model, inputs(model, batch=batch, length=length, padding="left" if batch > 1 else None)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_generate(name, batch):
    model, given = setting(name, batch)
    reference = model.generate(**given, **GREEDY)
    drafters = [Empty(), *(make(reference, padding(given)) for make in DRAFTERS.values() if make is not Empty)]
    for drafter in (None, *drafters):
        result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
        assert torch.equal(result.sequences, reference), type(drafter).__name__
        if drafter is None:
            assert result.stats.tokens_per_step == 1.0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "make",
    [PromptLookup, lambda: TokenRecycling(max_nodes=30), lambda: Sequence(PromptLookup(), TokenRecycling())],
    ids=["prompt lookup", "token recycling", "sequence"],
)
def test_drafters_on_the_device_draft_as_on_the_host(make, batch):
    model, given = setting(batch=batch)
    options = GREEDY | {"max_new_tokens": 80}
    reference = model.generate(**given, **options)
    steps, by_depth = [], []
    for on_device in (True, False):
        drafter = make()
        if not on_device:
            drafter.on_device = lambda *_: None
        result = heedful.generate(model, drafter=drafter, **given, **options)
        assert torch.equal(result.sequences, reference)
        assert result.stats.new_tokens == [80] * batch
        steps.append(result.stats.steps)
        by_depth.append(result.stats.acceptance_by_depth)
    if make is PromptLookup:
        assert steps[0] == steps[1]
        assert by_depth[0] == by_depth[1]
    else:  # the host measures acceptance rates, the device multiplies shares
        assert steps[0] <= 1.3 * steps[1]
        assert steps[0] < 79


@pytest.mark.parametrize("batch", [1, 3])
def test_end_tokens_inside_a_path_and_sessions_that_are_used_again(batch, monkeypatch):
    model, given = setting(batch=batch)
    plain = model.generate(**given, **GREEDY)
    for at in (-3, -9, -15):
        options = GREEDY | {"eos_token_id": [int(plain[0, at]), 89]}
        reference = model.generate(**given, **options)
        for drafter in (None, DRAFTERS["static tree"](plain, padding(given))):
            assert torch.equal(heedful.generate(model, drafter=drafter, **given, **options).sequences, reference)
    assert len(graph.sessions_of(model)) < 8  # not one for each generate
    monkeypatch.setattr(graph, "KEPT_SHARE", 0.0)
    longer = inputs(model, batch=batch, length=17, seed=5)
    assert torch.equal(
        heedful.generate(model, drafter=TokenRecycling(), **longer, **GREEDY).sequences,
        model.generate(**longer, **GREEDY),
    )
    assert len(graph.sessions_of(model)) == 1  # made room


def test_the_cache_after_a_run_is_that_of_a_prefill():
    model, given = setting()
    reference = model.generate(**given, **GREEDY)
    drafter = DRAFTERS["random tree"](reference)
    heedful.generate(model, drafter=drafter, **given, **GREEDY)
    (session,) = graph.sessions_of(model).values()
    cached = int(session.lengths)
    assert cached == reference.shape[1] - 1
    fresh = model(reference[:, :cached], use_cache=True).past_key_values
    for own, layer in zip(session.cache.layers, fresh.layers, strict=True):
        assert torch.allclose(own.keys[:, :, :cached], layer.keys, atol=1e-10)
        assert torch.allclose(own.values[:, :, :cached], layer.values, atol=1e-10)


def test_a_drafter_that_always_errs_changes_speed_only():
    class Garbage(Drafter):
        def propose(self, roots, committed):
            return [DraftTree(torch.tensor([int(root), 0, 0, 0, 1]), torch.tensor([-1, 0, 0, 1, 3])) for root in roots]

    model, given = setting(batch=3)
    reference = model.generate(**given, **GREEDY)
    assert torch.equal(heedful.generate(model, drafter=Garbage(), **given, **GREEDY).sequences, reference)


def test_sessions_belong_to_the_model_and_go_with_it():
    model, given = setting()
    heedful.generate(model, drafter=TokenRecycling(), **given, **GREEDY)
    assert len(graph.sessions_of(model)) == 1
    assert len(graph.sessions_of(copy.deepcopy(model))) == 0
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_sessions_share_what_is_compiled(monkeypatch):
    fused_linear = pytest.importorskip("heedful.decoding.fused_linear")
    traced = []

    def backend(module, inputs):
        traced.append(fused_linear.put_linears_together(module))
        return module.forward

    def compile_other(function, fullgraph=True):
        return torch.compile(function, fullgraph=fullgraph, dynamic=False, backend="eager")

    monkeypatch.setattr(fused_linear, "_backend", backend)
    monkeypatch.setattr(fused_linear, "compile_other", compile_other)
    monkeypatch.setattr(_Run, "_engine_class", lambda self, *_: partial(graph.GraphEngine, capture=False, compile=True))
    model, given = setting("gemma3_text")
    reference = model.generate(**given, **GREEDY)
    for drafter in (None, TokenRecycling(max_nodes=30), TokenRecycling(max_nodes=30), None):
        result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
        assert torch.equal(result.sequences, reference)
    assert len(graph.sessions_of(model)) == 3
    assert len(traced) == 2  # of 1 and of 31 nodes
    for drafter in (Sequence(PromptLookup(), TokenRecycling()), Medusa.for_model(model), LongSpec.for_model(model)):
        with torch._dynamo.config.patch(error_on_recompile=True):  # a draft's shapes and numbers stay
            result = heedful.generate(model, drafter=drafter, **given, **GREEDY)
        assert torch.equal(result.sequences, reference)


def test_released_caches_are_free_at_once():
    model, given = setting()
    heedful.generate(model, drafter=TokenRecycling(), **given, **GREEDY)
    (session,) = graph.sessions_of(model).values()
    keys = [weakref.ref(layer.keys) for layer in session.cache.own_layers]
    del session
    gc.disable()
    try:
        heedful.decoding.release_graphs(model)
        assert all(reference() is None for reference in keys)
    finally:
        gc.enable()
    assert torch.equal(heedful.generate(model, **given, **GREEDY).sequences, model.generate(**given, **GREEDY))


def test_sessions_end_when_the_weights_they_captured_do():
    model, given = setting()
    heedful.generate(model, **given, **GREEDY)
    (first,) = graph.sessions_of(model).values()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)  # in place: a captured step sees it
    assert torch.equal(heedful.generate(model, **given, **GREEDY).sequences, model.generate(**given, **GREEDY))
    assert list(graph.sessions_of(model).values()) == [first]
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight)
    heedful.generate(model, **given, **GREEDY)
    (second,) = graph.sessions_of(model).values()
    assert second is not first


def test_sessions_know_which_adapters_are_on():
    peft = pytest.importorskip("peft")
    base, given = setting()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with_adapter = model.generate(**given, **GREEDY)
    assert torch.equal(heedful.generate(model, **given, **GREEDY).sequences, with_adapter)
    (first,) = graph.sessions_of(base).values()
    with model.disable_adapter():
        heedful.generate(model, **given, **GREEDY)
        (second,) = graph.sessions_of(base).values()
    assert second is not first


def test_trees_on_the_device_that_the_cache_has_no_room_for_are_drafted_on_the_host(monkeypatch):
    class Wide(Drafter):
        def propose(self, roots, committed):
            return [DraftTree(root.repeat(150), torch.tensor([-1, *[0] * 149])) for root in roots]

        def on_device(self, model, batch_size, capacity):
            drafter = graph.Plain()
            drafter.num_nodes = 150
            return drafter

    monkeypatch.setattr(graph, "ROWS", 1)
    model, given = setting()
    result = heedful.generate(model, drafter=Wide(), **given, **GREEDY)
    assert torch.equal(result.sequences, model.generate(**given, **GREEDY))
    (session,) = graph.sessions_of(model).values()
    assert session.drafter is None
    assert max(session.steps) == graph.BUCKETS[-1]


def test_sampling_has_the_models_distribution():
    model, given = setting()
    ids = given["input_ids"].repeat(500, 1)
    logits = model(given["input_ids"]).logits[0, -1]
    options = {"do_sample": True, "top_k": 4, "temperature": 1.3, "max_new_tokens": 3, "eos_token_id": None}
    first = logits.topk(4).indices
    drafter = TokenRecycling(max_nodes=15, update_from_prompt=True)
    torch.manual_seed(0)
    out = heedful.generate(model, ids, drafter, pad_token_id=0, **options).sequences[:, -3:]
    torch.manual_seed(1)
    expected = model.generate(ids, pad_token_id=0, **options)[:, -3:]
    assert set(out[:, 0].tolist()) <= set(first.tolist())
    for position in range(3):
        ours = torch.bincount(out[:, position], minlength=90) / len(out)
        theirs = torch.bincount(expected[:, position], minlength=90) / len(out)
        assert (ours - theirs).abs().sum() / 2 < 0.12


def test_what_the_graphs_cannot_do_is_said():
    model, given = setting()
    for options in ({"engine": "graph"}, {"compile": True}):
        with pytest.MonkeyPatch.context() as patch:
            patch.undo()
            patch.setattr(_Run, "_engine_class", ENGINE_CLASS)
            with pytest.raises(ValueError, match="CUDA device"):
                heedful.generate(model, **given, **GREEDY, **options)
    with pytest.raises(ValueError, match="'auto', 'graph' or 'eager'"):
        heedful.generate(model, **given, engine="fast")
    with pytest.raises(ValueError, match="engine='graph'"):
        heedful.generate(model, **given, engine="eager", compile=True)


ENGINE_CLASS = _Run._engine_class


@st.composite
def walks(draw):
    nodes = draw(st.integers(1, 12))
    parents = (-1, *(draw(st.integers(0, node - 1)) for node in range(1, nodes)))
    tokens = [draw(st.integers(0, 2)) for _ in range(nodes)]  # three tokens: siblings often carry the same one
    choices = [draw(st.integers(0, 2)) for _ in range(nodes)]
    return parents, tokens, choices


@given(walks(), st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_walk_goes_where_the_host_goes(case, spare):
    parents, tokens, choices = case
    shape = topology(parents)
    tree = VerifiedTree(tokens, shape)
    path, node = [0], tree.child(0, choices[0])
    while node is not None:
        path.append(node)
        node = tree.child(node, choices[node])
    given_parents = torch.tensor([[*parents, *[-1] * spare]])
    padded = [torch.tensor([[*values, *[1] * spare]]) for values in (tokens, choices)]
    ancestors = ancestors_of(given_parents)
    assert torch.equal(ancestors[0, : shape.size, : shape.size], shape.ancestors)
    got = walk(padded[0], given_parents, ancestors, padded[1], len(parents) + spare)
    assert got.count.item() == len(path)
    assert got.path[0, : len(path)].tolist() == path
    assert set(got.path[0, len(path) :].tolist()) <= {path[-1]}
    assert got.emitted[0, : len(path)].tolist() == [choices[node] for node in path]


def test_trim():
    emitted = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    walked = Walk(emitted, emitted, torch.tensor([4, 4, 2, 3]))
    count, ended = trim(walked, torch.tensor([7, -1]), torch.tensor([10, 2, 10, 3]))
    assert count.tolist() == [3, 2, 2, 3]
    assert ended.tolist() == [True, True, False, True]
