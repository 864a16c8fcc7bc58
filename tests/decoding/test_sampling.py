"""Sampled output: the same tokens as generate under the same seed at batch 1, the same distribution always."""

import itertools
from functools import partial

import pytest
import torch
from decoding_tools import Chain, RandomTree, StaticTree, padding
from tiny_models import build, inputs
from transformers import LlamaConfig, LlamaForCausalLM

import heedful
from heedful.decoding import Drafter, DraftTree, TokenRecycling, graph
from heedful.decoding.engine import Engine
from heedful.decoding.generate import _Run
from heedful.decoding.selection import TokenSelector

SAMPLING = {"max_new_tokens": 20, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"min_p": 0.02, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"typical_p": 0.9, "epsilon_cutoff": 1e-3},
    ],
)
def test_batch_one_draws_what_generate_draws(options):
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    for seed in range(3):
        torch.manual_seed(seed)
        reference = model.generate(**given, **SAMPLING, **options)
        state = torch.get_rng_state()
        for drafter in (None, RandomTree(reference), Chain(reference), TokenRecycling(max_nodes=20)):
            torch.manual_seed(seed)
            result = heedful.generate(model, drafter=drafter, **given, **SAMPLING, **options)
            assert torch.equal(result.sequences, reference)
            assert torch.equal(torch.get_rng_state(), state), "one draw a token, and nothing else drawn"


def test_a_seed_reproduces_a_batch():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=3, padding="left")
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(heedful.generate(model, drafter=StaticTree(None, padding(given)), **given, **SAMPLING).sequences)
    assert torch.equal(*results)


def test_num_return_sequences():
    model = build("llama", dtype=torch.float64)
    given = inputs(model, batch=1)
    torch.manual_seed(0)
    result = heedful.generate(model, drafter=RandomTree(None), num_return_sequences=4, **given, **SAMPLING)
    assert result.sequences.shape == (4, given["input_ids"].shape[1] + 20)
    assert len({tuple(row) for row in result.sequences.tolist()}) == 4


class EveryPair(Drafter):
    """Siblings, one of them twice, and one grandchild each: all cases of acceptance within three tokens."""

    def propose(self, roots, committed):
        rest = torch.tensor([1, 2, 1, 0, 3, 2])
        return DraftTree(
            torch.cat([roots[:, None], rest.expand(len(roots), -1)], 1), torch.tensor([-1, 0, 0, 0, 1, 2, 3])
        )


class Drawn(Drafter):
    """A tree drawn anew for every row and step from its own generator: siblings drawn independently, often the same token."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def propose(self, roots, committed):
        chances = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1]).expand(len(roots), -1)
        tokens = torch.multinomial(chances, 5, replacement=True, generator=self.generator)
        return DraftTree(torch.cat([roots[:, None], tokens], 1), torch.tensor([-1, 0, 0, 1, 1, 2]))


VOCABULARY, ROWS = 5, 5000


def small_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_()
        model.lm_head.weight.mul_(1.1)
    return model


def distance_to_enumeration(drafter, rounds):
    """Total variation between three sampled tokens and their exact distribution; tokens a step; the test's own noise."""
    model = small_model()
    triples = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=3)))
    prompt = torch.tensor([[2, 4]])
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(triples), -1), triples], 1)).logits[:, 1:4].log_softmax(-1)
    exact = logits.gather(2, triples[..., None]).squeeze(2).sum(1).exp()
    counts = torch.zeros(VOCABULARY**3)
    steps = 0
    for _ in range(rounds):
        result = heedful.generate(
            model, prompt.expand(ROWS, -1).contiguous(), drafter, do_sample=True, top_k=0, max_new_tokens=3
        )
        places = VOCABULARY ** torch.tensor([2, 1, 0])
        counts += torch.bincount((result.sequences[:, 2:] * places).sum(1), minlength=VOCABULARY**3)
        steps += sum(len(row) for row in result.stats.accepted)
    draws = ROWS * rounds
    noise = float((exact * (1 - exact) / draws).sqrt().sum()) * 0.4
    return float((counts / draws - exact).abs().sum()) / 2, steps / draws, noise


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("drafter", [EveryPair, Drawn])
def test_distribution_of_three_tokens_against_enumeration(drafter, engine, monkeypatch):
    """1e5 draws, total variation below 0.01, for a tree that is always the same and for one drawn at random."""
    if engine == "graph":
        monkeypatch.setattr(graph, "ROWS", 16)  # a small cache, since there are 5,000 rows
        fixed_shapes = partial(graph.GraphEngine, capture=False)
        monkeypatch.setattr(_Run, "_engine_class", lambda self, *_: fixed_shapes)
    distance, steps, noise = distance_to_enumeration(drafter(), 20)
    assert steps < 1.9, "some steps must have accepted drafts"
    assert noise < 0.006, "the test itself must be able to see 0.01"
    assert distance < 0.01


class WrongEngine(Engine):
    """Acceptance rules that are in use and not exact; each draws from ``p``, the model's distribution at a node."""

    def walk(self, trees, logits, choices):
        paths = []
        for row, tree in enumerate(trees):
            path = [] if tree is None else self.follow(tree, logits[row].double().softmax(-1))
            if tree is not None:
                tokens = [tree.tokens[node] for node in path[1:]] + [self.bonus]
                room = self.max_length - len(self.tokens[row])
                path, tokens = path[:room], tokens[:room]
                for token in tokens:
                    self.emit(row, token)
                if len(self.tokens[row]) == self.max_length:
                    self.stopped[row] = self.max_length
                self.emitted[row].append(len(path))
            paths.append(path)
        return paths

    @staticmethod
    def draw(p):
        return int(torch.multinomial(p, 1))


class RatioOnDeterministicChildren(WrongEngine):
    """min(1, p/q) with the drafter's q for children that were not drawn from q, and the residual max(p - q, 0)."""

    def follow(self, tree, p):
        path, q = [0], 1 / VOCABULARY
        while True:
            left = p[path[-1]].clone()
            for child in tree.shape.children[path[-1]]:
                if torch.rand(()) < left[tree.tokens[child]] / q:
                    path.append(child)
                    break
                left[tree.tokens[child]] = max(0.0, float(left[tree.tokens[child]]) - q)
                left /= left.sum()
            else:
                self.bonus = self.draw(left)
                return path


class RedrawForEveryPath(WrongEngine):
    """One draw for each path and position; the path with the most hits wins."""

    def follow(self, tree, p):
        best = [0]
        for leaf in range(tree.shape.size):
            nodes = [leaf]
            while nodes[0]:
                nodes.insert(0, tree.shape.parents[nodes[0]])
            hits = [0]
            for node, child in itertools.pairwise(nodes):
                if self.draw(p[node]) != tree.tokens[child]:
                    break
                hits.append(child)
            best = max(best, hits, key=len)
        self.bonus = self.draw(p[best[-1]])
        return best


class ResampleFromAll(WrongEngine):
    """After a rejection a draw from p, the rejected token included."""

    def follow(self, tree, p):
        path = [0]
        while tree.shape.children[path[-1]]:
            child = tree.shape.children[path[-1]][0]
            if torch.rand(()) >= p[path[-1], tree.tokens[child]]:
                break
            path.append(child)
        self.bonus = self.draw(p[path[-1]])
        return path


@pytest.mark.parametrize("rule", [RatioOnDeterministicChildren, RedrawForEveryPath, ResampleFromAll])
def test_wrong_rules_fail_against_enumeration(rule, monkeypatch):
    monkeypatch.setattr(_Run, "_engine_class", lambda self, *_: rule)
    monkeypatch.setattr(TokenSelector, "nodes", lambda self, logits: [])
    distance, _, noise = distance_to_enumeration(EveryPair(), 1)
    assert distance > 0.05 > 1.5 * noise
