"""Steps captured as CUDA graphs, against the eager engine on the same device, in float32."""

import gc
from dataclasses import astuple

import numpy as np
import pytest
import torch
from decoding_tools import RandomTree, padding
from tiny_models import build, inputs
from transformers import DynamicCache

import heedful
from heedful.decoding import (
    HiddenTransfer,
    LongSpec,
    Medusa,
    PromptLookup,
    Sequence,
    TokenRecycling,
    graph,
    longspec,
    release_graphs,
    sizing,
)
from heedful.decoding.device_walk import ancestors_of, settle
from heedful.decoding.drafter import DeviceStep, DraftingOutputs
from heedful.decoding.on_device import LookupOnDevice, RecyclingOnDevice

pytest.importorskip("triton")
from heedful.decoding.settle_rows import settle_rows

pytestmark = pytest.mark.gpu
GREEDY = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
DRAFTERS = {
    "none": lambda model: None,
    "prompt lookup": lambda model: PromptLookup(),
    "token recycling": lambda model: TokenRecycling(max_nodes=30),
    "sequence": lambda model: Sequence(PromptLookup(), TokenRecycling(max_nodes=30)),
    "medusa": lambda model: Medusa.for_model(model).cuda(),
    "longspec": lambda model: LongSpec.for_model(model).cuda(),
    "hidden transfer": lambda model: HiddenTransfer.for_model(model).cuda(),
}


def setting(name="llama", batch=1, **changes):
    model = build(name, head_dim=64, **changes).cuda()
    given = inputs(model, batch=batch, length=11, padding="left" if batch > 1 else None)
    return model, {key: value.cuda() for key, value in given.items()}


@pytest.fixture(autouse=True)
def _clean():
    yield
    release_graphs()


def both(model, make, given, **options):
    """The same generate in both engines; drafters are made anew, so that neither knows what the other has seen."""
    return [
        heedful.generate(model, drafter=make(model), engine=engine, **given, **options) for engine in ("graph", "eager")
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_drafter_gives_the_tokens_of_the_eager_engine(drafter, batch):
    model, given = setting(batch=batch)
    captured, eager = both(model, DRAFTERS[drafter], given, **GREEDY)
    assert torch.equal(captured.sequences, eager.sequences)
    assert captured.stats.capture_seconds > 0
    assert eager.stats.capture_seconds == 0
    own = DRAFTERS[drafter](model)
    # Behind a prompt it drafts eagerly in the first, captures in the second, and replays in the third.
    results = [heedful.generate(model, drafter=own, engine="graph", **given, **GREEDY) for _ in range(3)]
    assert all(torch.equal(result.sequences, eager.sequences) for result in results)
    if drafter in ("medusa", "longspec", "hidden transfer"):  # which learn nothing
        assert results[0].stats.accepted == results[1].stats.accepted == results[2].stats.accepted
    if drafter != "none":
        assert list(graph.sessions_of(model).values())[-1].first.graph is not None


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "qwen3"])
def test_windows_soft_caps_and_trees_from_the_host(name):
    model, given = setting(name, batch=3)
    reference = model.generate(**given, **GREEDY)
    host = lambda model: RandomTree(reference.cpu(), padding(given))  # noqa: E731
    for make in (DRAFTERS["token recycling"], DRAFTERS["hidden transfer"], host):
        captured, eager = both(model, make, given, **GREEDY)
        assert torch.equal(captured.sequences, reference)
        assert torch.equal(eager.sequences, reference)


def test_compiled_steps_give_the_same_tokens():
    model, given = setting(hidden_size=512, intermediate_size=1024)
    reference = model.generate(**given, **GREEDY)
    for make in (DRAFTERS["none"], DRAFTERS["token recycling"], DRAFTERS["token recycling"]):
        result = heedful.generate(model, drafter=make(model), compile=True, **given, **GREEDY)
        assert torch.equal(result.sequences, reference)
    known = graph.sessions_of(model)
    assert len(known) == 3
    with pytest.raises(ValueError, match="leave compile out"):
        heedful.generate(model, drafter=DRAFTERS["hidden transfer"](model), compile=True, **given, **GREEDY)
    assert len(known.compiled) == 2 * 2  # place and forward: the second drafter finds those of the first


def test_compiled_beams():
    model, given = setting()
    drafter = DRAFTERS["longspec"](model)
    plain = heedful.generate(model, drafter=drafter, engine="graph", **given, **GREEDY)
    for _ in range(2):
        result = heedful.generate(model, drafter=drafter, compile=True, **given, **GREEDY)
        assert torch.equal(result.sequences, model.generate(**given, **GREEDY))
        assert result.stats.accepted == plain.stats.accepted


@torch.no_grad()
def test_beams_are_those_of_the_operations():
    model, given = setting(batch=3)
    drafter = LongSpec.for_model(model, initializer_range=0.3, window=16, tree_shape=(4, 16, 7)).cuda()
    ids, drafts = given["input_ids"], []
    for device in ("cuda", "cpu"):
        model, drafter, ids = model.to(device), drafter.to(device), ids.to(device)
        drafter.bind(model)
        drafter.fit(model, 3)
        state, cache = longspec._State(drafter, 3), DynamicCache()
        model(ids, past_key_values=cache)
        length = torch.tensor([11, 8, 9], device=device)  # of which so many tokens count
        at = torch.arange(11, device=device).expand(3, -1)
        state.write(ids, torch.where(at < length[:, None], at, -1))
        drafts.append([x.cpu() for x in state.draft(ids[:, 3], length, cache, length, torch.zeros_like(length))])
    assert torch.equal(drafts[0][0], drafts[1][0])
    assert torch.equal(drafts[0][1], drafts[1][1])


def test_forks_in_bfloat16_are_near_ties():
    model, _ = setting(dtype=torch.bfloat16)
    drafter, forks = TokenRecycling(max_nodes=30), 0
    for seed in range(8):
        given = {key: value.cuda() for key, value in inputs(model, batch=1, length=11, seed=seed).items()}
        reference = model.generate(**given, **GREEDY)
        got = heedful.generate(model, drafter=drafter, engine="graph", **given, **GREEDY).sequences
        differ = (got != reference)[0].nonzero()
        if len(differ):
            forks += 1
            top = model(reference[:, : int(differ[0])]).logits[0, -1].float().topk(2).values
            assert top[0] - top[1] < 0.3
    assert forks < 8


def test_end_tokens_inside_a_path():
    model, given = setting(batch=3)
    plain = model.generate(**given, **GREEDY)
    options = GREEDY | {"eos_token_id": [int(plain[0, -20]), int(plain[1, -35])]}
    reference = model.generate(**given, **options)
    for make in DRAFTERS.values():
        result = heedful.generate(model, drafter=make(model), engine="graph", **given, **options)
        assert torch.equal(result.sequences, reference)


def test_sampling_with_one_candidate_is_greedy_and_other_processors_are_refused():
    model, given = setting()
    reference = model.generate(**given, **GREEDY)
    sample = GREEDY | {"do_sample": True, "temperature": 0.7, "top_k": 1, "top_p": 0.9}
    drafter = TokenRecycling(max_nodes=30)
    assert torch.equal(heedful.generate(model, drafter=drafter, engine="graph", **given, **sample).sequences, reference)
    with pytest.raises(ValueError, match="logits processors beyond"):
        heedful.generate(model, drafter=drafter, engine="graph", repetition_penalty=1.2, **given, **GREEDY)
    options = GREEDY | {"repetition_penalty": 1.2}
    fallen_back = heedful.generate(model, drafter=drafter, **given, **options)
    assert fallen_back.stats.capture_seconds == 0
    assert torch.equal(fallen_back.sequences, model.generate(**given, **options))


def test_sampled_tokens_have_the_models_distribution():
    model, given = setting()
    ids = given["input_ids"].repeat(2000, 1)
    options = {"do_sample": True, "top_k": 4, "temperature": 1.3, "max_new_tokens": 3, "eos_token_id": None}
    torch.manual_seed(0)
    drafter = TokenRecycling(max_nodes=15, update_from_prompt=True)
    got = heedful.generate(model, ids, drafter, engine="graph", pad_token_id=0, **options).sequences[:, -3:]
    torch.manual_seed(1)
    expected = model.generate(ids, pad_token_id=0, **options)[:, -3:]
    for position in range(3):
        ours, theirs = (torch.bincount(x[:, position], minlength=96) / len(x) for x in (got, expected))
        assert (ours - theirs).abs().sum() / 2 < 0.06


@pytest.mark.parametrize("drafter", ["none", "sequence", "longspec", "hidden transfer", "host"])
def test_one_synchronisation_a_step(drafter, monkeypatch):
    model, given = setting()
    reference = model.generate(**given, **GREEDY)
    make = DRAFTERS.get(drafter, lambda model: RandomTree(reference.cpu()))
    own = make(model)
    for _ in range(3):  # captures; trees from the host have several buckets
        heedful.generate(model, drafter=own, engine="graph", **given, **GREEDY)
    reads = 0
    read = graph.CapturedStep.read

    def counted(self, slot):
        nonlocal reads
        reads += 1
        return read(self, slot)

    def strict(loop):
        def run(self, *arguments):
            torch.cuda.set_sync_debug_mode("error")  # an operation that waits for the device raises
            try:
                return loop(self, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    monkeypatch.setattr(graph.CapturedStep, "read", counted)
    for name in ("_run_ahead", "_step_from_host"):
        monkeypatch.setattr(graph.GraphEngine, name, strict(getattr(graph.GraphEngine, name)))
    result = heedful.generate(model, drafter=own, engine="graph", **given, **GREEDY)
    assert result.stats.steps <= reads <= result.stats.steps + 1  # the step that was already under way
    assert torch.equal(result.sequences, reference)


@pytest.mark.parametrize("nodes", [1, 7, 64, 100])
def test_step_kernels_give_what_the_operations_give(nodes):
    torch.manual_seed(nodes)
    for batch in (1, 3):
        parents = torch.stack(
            [torch.tensor([-1, *(int(torch.randint(-1, i, ())) for i in range(1, nodes))]) for _ in range(batch)]
        )
        ancestors = ancestors_of(parents)
        # What does not hang below the root only fills the tree up.
        parents = torch.where(ancestors[:, :, 0], parents, -1)
        ancestors = ancestors_of(parents)
        depth = int(ancestors.sum(-1).max()) - 1
        tokens, choices = torch.randint(0, 3, (2, batch, nodes))
        trees = [graph.Trees(batch, nodes, torch.device(device)) for device in ("cpu", "cuda")]
        for one in trees:
            one.write(tokens.to(one.tokens.device), parents.to(one.tokens.device))
        for name in ("tokens", "parents", "ancestors"):
            assert torch.equal(getattr(trees[0], name), getattr(trees[1], name).cpu()), name
        ends, state = torch.tensor([2, *[-1] * 7]), [*torch.randint(0, 60, (2, batch)), torch.randint(1, 9, (batch,))]
        state.append(torch.rand(batch) < 0.3)
        mine = [x.cuda() for x in state]
        want = settle(tokens, parents, ancestors, choices, depth + 1, ends, *state, 64)
        got = settle_rows(*(x.cuda() for x in (tokens, parents, ancestors, choices)), depth + 1, ends.cuda(), *mine, 64)
        for a, b in zip([*state, *astuple(want)], [*mine, *astuple(got)], strict=True):
            assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("length", [40, 5000])
def test_drafts_are_those_of_the_operations(length):
    torch.manual_seed(0)
    vocabulary, letters = 30, 30 if length > 1000 else 4
    pairs = []  # on the CPU, on the GPU
    for device in ("cpu", "cuda"):
        lookup = LookupOnDevice(2, length + 100, 10, 3, 4, torch.device(device))
        lookup.prefill(torch.arange(2 * length).view(2, length).pow(2).remainder(letters), DraftingOutputs())
        pairs.append((lookup, RecyclingOnDevice(TokenRecycling().template, vocabulary, 8, 60, torch.device(device))))
    lengths, path = torch.full((2,), length), torch.zeros(2, 1, dtype=torch.long)
    count, tokens = torch.ones(2, dtype=torch.long), torch.randint(0, letters, (2, 1))
    for _ in range(6):
        roots, logits = torch.randint(0, letters, (2,)), torch.randn(2, tokens.shape[1], vocabulary)
        # Of several nodes with one token it is left open which is learnt from.
        apart = torch.randperm(vocabulary)[: tokens.numel()].view_as(tokens)
        for which in (0, 1):
            drafts = []
            for pair in pairs:
                device = pair[1].tokens.device
                given = (apart if which else tokens, logits, None, path, count, roots, lengths, lengths)
                step = DeviceStep(*(x if x is None else x.to(device) for x in given), None)
                drafts.append([x.cpu() for x in pair[which].advance(step)])
            used = drafts[0][1] >= 0
            assert torch.equal(drafts[0][1], drafts[1][1])
            assert torch.equal(drafts[0][0][used], drafts[1][0][used])
        count = torch.randint(1, 12, (2,))
        tokens, path = torch.randint(0, letters, (2, 11)), torch.minimum(torch.arange(11), count[:, None] - 1)
        lengths = lengths + count


@torch.no_grad()
def test_sizes_are_those_that_pay_in_graphs(monkeypatch):
    model, given = setting()
    with sizing.in_graphs():
        costs = sizing.forward_costs(model)
        monkeypatch.setattr(graph, "verify_seconds", None)  # once for a model
        assert np.array_equal(costs, sizing.forward_costs(model))
    assert 0 < costs[0] <= costs[-1]
    assert not np.array_equal(costs, sizing.forward_costs(model)), "launched one by one a forward has costs of its own"
    counted = torch.zeros(1, device="cuda")
    with sizing.in_graphs():
        assert sizing.seconds_of(lambda: counted.add_(1), counted.device) > 0
    assert counted.item() == 1 + 6  # by hand, and replayed
    drafter = LongSpec.for_model(model, measured=[([1, 1], 1.0), ([2, 4], 10.0)]).cuda()
    for tokens, shape in ((10.0, (2, 4)), (1.0, ())):
        drafter.measured[1] = ([2, 4], tokens)
        drafter._fitted = ()
        release_graphs(model)
        result = heedful.generate(model, drafter=drafter, engine="graph", **given, **GREEDY)
        assert drafter.shape == shape
        assert torch.equal(result.sequences, model.generate(**given, **GREEDY))


def test_what_the_host_drafts_beside_token_recycling():
    model, given = setting()
    reference = model.generate(**given, **GREEDY)
    drafter = Sequence(RandomTree(reference.cpu()), TokenRecycling())
    for _ in range(2):
        result = heedful.generate(model, drafter=drafter, engine="graph", **given, **GREEDY)
        assert torch.equal(result.sequences, reference)


def test_a_long_run_does_not_grow():
    model, given = setting()
    drafter = Sequence(PromptLookup(), TokenRecycling(max_nodes=30))
    options = GREEDY | {"max_new_tokens": 1000}
    memory = []
    for _ in range(4):
        stats = heedful.generate(model, drafter=drafter, engine="graph", **given, **options).stats
        memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert stats.capture_seconds == 0
    assert memory[1] == memory[2] == memory[3]
    plain = []
    for tokens in (100, 1000, 1000):
        torch.cuda.reset_peak_memory_stats()
        heedful.generate(model, engine="graph", **given, **(options | {"max_new_tokens": tokens}))
        plain.append(torch.cuda.max_memory_allocated())
    assert plain[2] - plain[1] < 2**20


def test_graphs_that_become_garbage_in_a_capture_do_not_break_it(monkeypatch):
    model, given = setting()
    reference = model.generate(**given, **GREEDY)
    heedful.generate(model, engine="graph", **given, **GREEDY)
    held = [model.__dict__.pop(graph._ATTRIBUTE)]
    held[0].compiled["itself"] = held[0]  # a circle: only the collector ends it
    verify, captures = graph.Session.verify, []

    def dropping(self, trees):
        if torch.cuda.is_current_stream_capturing():
            captures.append(len(held))
            held.clear()
            assert len([[] for _ in range(10_000)]) == 10_000  # enough to wake the collector
        return verify(self, trees)

    monkeypatch.setattr(graph.Session, "verify", dropping)
    threshold = gc.get_threshold()
    gc.set_threshold(100, 1, 1)
    try:
        result = heedful.generate(model, engine="graph", **given, **GREEDY)
    finally:
        gc.set_threshold(*threshold)
    assert captures == [1]
    assert torch.equal(result.sequences, reference)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_device_than_the_current_one():
    model, given = setting()
    model, given = model.to("cuda:1"), {key: value.to("cuda:1") for key, value in given.items()}
    for make in (DRAFTERS["none"], DRAFTERS["sequence"]):
        result = heedful.generate(model, drafter=make(model), engine="graph", **given, **GREEDY)
        assert result.stats.capture_seconds > 0
        assert torch.equal(result.sequences, model.generate(**given, **GREEDY))


def test_new_weights_are_captured_anew():
    model, given = setting()
    heedful.generate(model, engine="graph", **given, **GREEDY)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight)
    result = heedful.generate(model, engine="graph", **given, **GREEDY)
    assert torch.equal(result.sequences, model.generate(**given, **GREEDY))


def test_memory_is_reported_and_released():
    model, given = setting()
    heedful.generate(model, engine="graph", **given, **GREEDY)  # cuBLAS makes its workspaces
    release_graphs(model)
    before = torch.cuda.memory_allocated()
    result = heedful.generate(model, engine="graph", **given, **GREEDY)
    (session,) = graph.sessions_of(model).values()
    assert result.stats.capture_seconds > 0
    assert result.stats.graph_bytes >= session.cache.nbytes > 0
    again = heedful.generate(model, engine="graph", **given, **GREEDY)
    assert again.stats.capture_seconds == 0
    assert again.stats.graph_bytes == result.stats.graph_bytes
    release_graphs(model)
    assert session.cache.nbytes == 0
    assert torch.cuda.memory_allocated() < before + 2**18
