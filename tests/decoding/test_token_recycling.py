import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from decoding_tools import padding
from hypothesis import given, settings
from tiny_models import build, inputs

import heedful
from heedful.decoding import DraftTree, TokenRecycling, sizing, token_recycling
from heedful.decoding.drafter import DraftingOutputs
from heedful.decoding.token_recycling import PAPER_TEMPLATE, AdjacencyMatrix

GREEDY = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TEXT = [torch.tensor([50, 51])]  # what comes before a root
CHAIN = [(0,) * depth for depth in range(1, 5)]


def begun(model=None, **options):
    drafter = TokenRecycling(**options)
    drafter.begin(build("llama") if model is None else model, 1)
    return drafter


def learn(drafter, matrix, share=0.5):
    """Fills the drafter's matrix with ``(V, k)`` tokens."""
    vocabulary, k = matrix.shape
    own = drafter.matrices[0]
    own.write(np.arange(vocabulary), matrix, np.full((vocabulary, k), share), np.full(vocabulary, -1))


def paths_of(tree):
    """Every node but the root as the path of tokens that leads to it."""
    found = set()
    for node in range(1, len(tree)):
        path, at = [], node
        while at:
            path.insert(0, int(tree.tokens[at]))
            at = int(tree.parents[at])
        found.add(tuple(path))
    return found


def test_the_papers_template():
    depths = [len(path) for path in PAPER_TEMPLATE]
    assert [depths.count(d) for d in range(1, 7)] == [8, 21, 25, 15, 8, 3]
    assert len(set(PAPER_TEMPLATE)) == 80
    nodes = set(PAPER_TEMPLATE) | {()}
    for path in PAPER_TEMPLATE:
        assert path[:-1] in nodes
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in nodes, "ranks are used from 0 on without gaps"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_a_draft_is_a_walk_over_the_matrix(seed, k):
    rng = np.random.default_rng(seed)
    matrix = np.argsort(rng.random((96, 96)), axis=1)[:, :k]  # distinct successors: a path of tokens names a node
    drafter = begun(num_candidates=k, max_nodes=80)
    learn(drafter, matrix)
    root = int(rng.integers(96))
    (tree,) = drafter.propose(torch.tensor([root]), [torch.tensor([], dtype=torch.long)])
    expected = set()
    for path in PAPER_TEMPLATE:
        if max(path) < k:
            at, tokens = root, []
            for rank in path:
                at = int(matrix[at, rank])
                tokens.append(at)
            expected.add(tuple(tokens))
    assert paths_of(tree) == expected
    assert len(tree) == 1 + len([p for p in PAPER_TEMPLATE if max(p) < k])


@pytest.mark.parametrize("max_nodes", [1, 2, 7, 30])
def test_a_cut_tree_holds_the_likeliest_nodes(max_nodes):
    rng = np.random.default_rng(0)
    drafter, whole = begun(max_nodes=max_nodes), begun(max_nodes=80)
    matrix = np.argsort(rng.random((96, 96)), axis=1)[:, :8]
    shares = np.sort(rng.dirichlet(np.ones(8), 96), axis=1)[:, ::-1]
    for each in (drafter, whole):
        each.matrices[0].write(np.arange(96), matrix, shares, np.full(96, -1))
    (tree,) = drafter.propose(torch.tensor([3]), TEXT)
    assert len(tree) == max_nodes + 1
    tokens, scores = whole.template.read(whole.matrices[0], 51, 3, 2.0)
    best = np.sort(scores[1:])[::-1][:max_nodes]
    kept = [s for t, s in zip(tokens[1:], scores[1:], strict=True) if s >= best[-1]]
    assert paths_of(tree) <= paths_of(whole.propose(torch.tensor([3]), TEXT)[0])
    assert len(kept) >= max_nodes
    assert sum(best) == pytest.approx(sum(sorted(kept, reverse=True)[:max_nodes]))


def test_unseen_tokens_have_no_children():
    drafter = begun(max_nodes=80)
    assert drafter.propose(torch.tensor([3]), TEXT) == [None]
    drafter.matrices[0].write(np.array([3]), np.arange(10, 18)[None], np.full((1, 8), 0.1), np.array([-1]))
    (tree,) = drafter.propose(torch.tensor([3]), TEXT)
    assert paths_of(tree) == {(token,) for token in range(10, 18)}


def test_every_verified_node_writes_its_candidates_and_accepted_ones_last():
    drafter = begun(max_nodes=80)
    logits = torch.randn(1, 5, 96)
    before = drafter.matrices[0].tokens.copy()
    # Token 7 stands in an accepted node (2) and in two rejected ones (1 and 4).
    tree = DraftTree(torch.tensor([5, 7, 7, 9, 7]), torch.tensor([-1, 0, 0, 2, 3]))
    drafter.update([tree], DraftingOutputs(logits=logits), [[0, 2, 3]], torch.tensor([20]))
    after = drafter.matrices[0].tokens
    for token, node in ((5, 0), (7, 2), (9, 3)):
        assert after[token].tolist() == logits[0, node].topk(8).indices.tolist()
    untouched = np.setdiff1d(np.arange(96), [5, 7, 9])
    assert np.array_equal(after[untouched], before[untouched])


def test_padding_of_the_output_head_never_enters():
    model = build("llama")
    model.resize_token_embeddings(104)
    model.config.vocab_size = 96  # tokens from 96 on are padding
    drafter = begun(model, max_nodes=80)
    assert drafter.matrices[0].vocabulary == 96
    logits = torch.zeros(1, 1, 104)
    logits[..., 96:] = 9.0
    tree = DraftTree(torch.tensor([5]), torch.tensor([-1]))
    drafter.update([tree], DraftingOutputs(logits=logits), [[0]], torch.tensor([100]))
    assert drafter.matrices[0].tokens.max() < 96
    assert drafter.propose(torch.tensor([100]), TEXT) == [None]


@pytest.mark.parametrize("state", ["cold", "hot", "random"])
def test_the_matrix_changes_speed_never_text(state):
    model = build("llama", dtype=torch.float64)
    batch = inputs(model, batch=1)
    reference = model.generate(**batch, **GREEDY)
    drafter = TokenRecycling(max_nodes=80)
    if state == "hot":
        heedful.generate(model, drafter=drafter, **batch, **GREEDY)
    if state == "random":
        drafter.begin(model, 1)
        learn(drafter, np.random.default_rng(0).integers(0, 96, (96, 8)))
    assert torch.equal(heedful.generate(model, drafter=drafter, **batch, **GREEDY).sequences, reference)


def test_a_repeated_prompt_is_faster_and_clear_forgets():
    model = build("llama", dtype=torch.float64)
    batch = inputs(model, batch=1)
    drafter = TokenRecycling(max_nodes=80)
    cold = heedful.generate(model, drafter=drafter, **batch, **GREEDY).stats
    hot = heedful.generate(model, drafter=drafter, **batch, **GREEDY).stats
    assert hot.tokens_per_step > cold.tokens_per_step
    drafter.clear()
    again = heedful.generate(model, drafter=drafter, **batch, **GREEDY).stats
    assert again.accepted == cold.accepted


def test_no_template_is_plain_decoding_and_one_candidate_a_bigram_cache():
    model = build("llama", dtype=torch.float64)
    batch = inputs(model, batch=1)
    for drafter in (TokenRecycling(tree_template=[]), TokenRecycling(max_nodes=0)):
        assert heedful.generate(model, drafter=drafter, **batch, **GREEDY).stats.tokens_per_step == 1.0
    bigram = begun(num_candidates=1, tree_template=CHAIN, max_nodes=80)
    successors = np.roll(np.arange(96), -1)[:, None]
    learn(bigram, successors)
    (tree,) = bigram.propose(torch.tensor([10]), TEXT)
    assert tree.tokens.tolist() == [10, 11, 12, 13, 14]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3]


def test_update_from_prompt_learns_every_prompt_token():
    model = build("llama", dtype=torch.float64)
    batch = inputs(model, batch=3, padding="left")
    drafter = TokenRecycling(update_from_prompt=True, max_nodes=0)
    heedful.generate(model, drafter=drafter, **batch, **(GREEDY | {"max_new_tokens": 1}))
    real = batch["attention_mask"].bool()
    known = set(np.flatnonzero(drafter.matrices[0].tokens[:, 0] >= 0).tolist())
    assert known == set(batch["input_ids"][real].tolist())
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions).logits
    last = int(batch["input_ids"][2, -1])  # written last of all
    assert drafter.matrices[0].tokens[last].tolist() == logits[2, -1].float().topk(8).indices.tolist()


def test_rows_share_a_matrix_or_have_their_own():
    model = build("llama", dtype=torch.float64)
    batch = inputs(model, batch=3, padding="left")
    reference = model.generate(**batch, **GREEDY)
    for share in (True, False):
        drafter = TokenRecycling(share_rows=share, max_nodes=20)
        result = heedful.generate(model, drafter=drafter, **batch, **GREEDY)
        assert torch.equal(result.sequences, reference)
        assert len(drafter.matrices) == (1 if share else 3)
    alone = TokenRecycling(max_nodes=20)
    row = {"input_ids": batch["input_ids"][1:2]}
    expected = heedful.generate(model, drafter=alone, **row, **GREEDY).stats.accepted
    assert result.stats.accepted[1] == expected[0], "no row's drafts depend on another's text"
    assert padding(batch)[0] > 0


def test_save_and_load(tmp_path):
    model = build("llama", dtype=torch.float64)
    batch = inputs(model, batch=1)
    drafter = TokenRecycling(max_nodes=20)
    with pytest.raises(ValueError, match="nothing to save"):
        drafter.save(tmp_path / "empty.safetensors")
    heedful.generate(model, drafter=drafter, **batch, **GREEDY)
    drafter.save(tmp_path / "warm.safetensors")
    loaded = TokenRecycling(max_nodes=20).load(tmp_path / "warm.safetensors")
    assert np.array_equal(loaded.matrices[0].tokens, drafter.matrices[0].tokens)
    hot = [heedful.generate(model, drafter=d, **batch, **GREEDY).stats.accepted for d in (drafter, loaded)]
    assert hot[0] == hot[1]
    with pytest.raises(ValueError, match="num_candidates=8"):
        TokenRecycling(num_candidates=4).load(tmp_path / "warm.safetensors")
    with pytest.raises(ValueError, match="clear"):
        heedful.generate(build("llama", vocab_size=112), drafter=loaded, **batch, **GREEDY)


def test_state_is_small():
    matrix = AdjacencyMatrix(32000, 8)
    assert matrix.tokens.nbytes + matrix.codes.nbytes == 5 * 32000 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates"),
        ({"max_nodes": -1}, "max_nodes"),
        ({"max_nodes": "many"}, "max_nodes"),
        ({"tree_template": [(0, 0)]}, "parent"),
        ({"tree_template": [(8,)]}, "rank"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TokenRecycling(**options)


def test_auto_times_once_and_chooses_by_cost(monkeypatch):
    model = build("llama")
    timed = []
    original = sizing._time
    monkeypatch.setattr(sizing, "_time", lambda *a: timed.append(1) or original(*a))
    forwards = []
    model.register_forward_pre_hook(lambda *args: forwards.append(1))
    for _ in range(2):
        drafter = begun(model, max_nodes="auto")
    assert len(timed) == 1
    assert not forwards, "a user's hooks do not see the timing"
    costs = sizing.forward_costs(model)
    assert costs.shape == (81,)
    assert (np.diff(costs) >= 0).all()

    rng = np.random.default_rng(0)
    learn(drafter, np.argsort(rng.random((96, 96)), axis=1)[:, :8], share=0.3)
    sizes = []
    for slope in (0.0, 0.1, 10.0):  # nodes for nothing, at a tenth of a forward, at ten forwards each
        drafter._costs = 1 + slope * np.arange(81)
        (tree,) = drafter.propose(torch.tensor([3]), TEXT)
        sizes.append(1 if tree is None else len(tree))
    assert sizes[0] > 40, "all but the unlikeliest"
    assert 1 < sizes[1] < sizes[0]
    assert sizes[2] == 1


def test_in_graphs_as_many_nodes_as_cost_about_one_row_are_drafted(monkeypatch):
    monkeypatch.setattr(token_recycling, "forward_costs", None)
    with sizing.in_graphs():
        drafter = begun(max_nodes="auto")
    learn(drafter, np.argsort(np.random.default_rng(0).random((96, 96)), axis=1)[:, :8], share=0.3)
    (tree,) = drafter.propose(torch.tensor([3]), TEXT)
    assert len(tree) == token_recycling.NODES_ON_DEVICE


def test_a_model_with_parts_attached_is_not_timed(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(sizing, "_time", None)

    class Count(heedful.Probe):
        calls = 0

        def outputs(self, call, output):
            Count.calls += 1

    with heedful.attach(model, Count(layers=[0])):
        assert begun(model, max_nodes="auto")._costs is not None
    assert Count.calls == 0


def rates(matrix, token, pace=2, agreement=0):
    return matrix.rates[pace, agreement, matrix.codes[token]]


def test_measured_rates_follow_what_comes_true():
    matrix = AdjacencyMatrix(10, 2)
    tokens = np.arange(10)
    matrix.write(tokens, np.tile([1, 2], (10, 1)), np.tile([0.9, 0.1], (10, 1)), np.full(10, -1))
    assert rates(matrix, 0)[0] > rates(matrix, 0)[1]
    for _ in range(64):  # the second candidate is always the one
        matrix.learn_rates(np.array([3]), np.array([4]), np.array([2]), 2.0)
    assert rates(matrix, 0)[1] > 0.8 > 0.2 > rates(matrix, 0)[0]


def test_what_followed_two_tokens_ranks_their_successors():
    """The draft's tokens come from the matrix alone; which of them are verified depends on the text as well."""
    rng = np.random.default_rng(0)
    matrix = np.argsort(rng.random((96, 96)), axis=1)[:, :8]
    plain, noted = begun(max_nodes=1), begun(max_nodes=1)
    for drafter in (plain, noted):
        learn(drafter, matrix, share=0.2)
    third = int(matrix[3, 2])
    noted.matrices[0].note(np.array([51, 3, third]))
    assert plain.propose(torch.tensor([3]), TEXT)[0].tokens.tolist() == [3, int(matrix[3, 0])]
    assert noted.propose(torch.tensor([3]), TEXT)[0].tokens.tolist() == [3, third]


def test_pairs_are_those_of_the_text():
    model = build("llama", dtype=torch.float64)
    batch = inputs(model, batch=1)
    drafter = TokenRecycling(max_nodes=7)
    text = heedful.generate(model, drafter=drafter, **batch, **GREEDY).sequences[0].numpy()
    own = drafter.matrices[0]
    expected = AdjacencyMatrix(own.vocabulary, own.num_candidates)
    for at in range(len(text) - 2):
        expected.note(text[at : at + 3])
    known = own.pairs >= 0
    assert known.sum() > 10
    assert (
        own.pairs[known] == expected.pairs[known]
    ).mean() > 0.9  # the last step's tokens are noted with the next step


def test_a_corpus_warms_the_first_prompt():
    """`warm` writes what the model says behind every token of the corpus, and the text's own pairs."""
    model = build("llama", dtype=torch.float64)
    batch = inputs(model, batch=1)
    text = model.generate(**batch, **GREEDY)[0]
    with pytest.raises(ValueError, match="at least 512 tokens"):
        TokenRecycling().warm(text, model)
    cold, warm = TokenRecycling(max_nodes=20), TokenRecycling(max_nodes=20).warm(text, model, length=len(text))
    logits = model(text[None]).logits[0]
    last = {int(token): at for at, token in enumerate(text)}
    for token, at in last.items():
        assert warm.matrices[0].tokens[token].tolist() == logits[at].float().topk(8).indices.tolist()
    steps = [heedful.generate(model, drafter=d, **batch, **GREEDY).stats.steps for d in (warm, cold)]
    assert steps[0] < steps[1]
    apart = TokenRecycling(max_nodes=20, share_rows=False).warm(text, model, length=len(text))
    apart.begin(model, 3)  # every row is warm, and none sees another's text
    assert len(apart.matrices) == 3
    apart.matrices[0].tokens[:] = 7
    for matrix in apart.matrices[1:]:
        assert all(matrix.tokens[t].tolist() == logits[at].float().topk(8).indices.tolist() for t, at in last.items())
    apart.clear()
    apart.begin(model, 1)
    assert (apart.matrices[0].tokens == -1).all()


def test_a_file_of_one_matrix_is_what_every_row_begins_with(tmp_path):
    model = build("llama", dtype=torch.float64)
    shared = TokenRecycling(max_nodes=20)
    heedful.generate(model, drafter=shared, **inputs(model, batch=1), **GREEDY)
    shared.save(tmp_path / "matrix.safetensors")
    apart = TokenRecycling(max_nodes=20, share_rows=False).load(tmp_path / "matrix.safetensors")
    apart.begin(model, 2)
    assert all((matrix.tokens == shared.matrices[0].tokens).all() for matrix in apart.matrices)
    (tmp_path / "other.safetensors").write_text("not a file of tensors")
    with pytest.raises(ValueError, match=r"no file of TokenRecycling\.save"):
        shared.load(tmp_path / "other.safetensors")


def test_sessions_do_not_see_each_other():
    model = build("llama", dtype=torch.float64)
    first, second = TokenRecycling(max_nodes=20), TokenRecycling(max_nodes=20)
    alone = heedful.generate(model, drafter=TokenRecycling(max_nodes=20), **inputs(model, batch=1), **GREEDY).stats
    heedful.generate(model, drafter=first, **inputs(model, batch=1, seed=1), **GREEDY)
    beside = heedful.generate(model, drafter=second, **inputs(model, batch=1), **GREEDY).stats
    assert beside.accepted == alone.accepted
