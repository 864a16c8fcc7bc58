"""Drafters for the tests of the decoding engine: from nothing and garbage to what will come out."""

from __future__ import annotations

import random

import torch

from heedful.decoding import Drafter, DraftTree


class Empty(Drafter):
    """Proposes nothing, in both legal ways in turn."""

    def __init__(self, reference=None):
        self.calls = 0

    def propose(self, roots, committed):
        self.calls += 1
        if self.calls % 2:
            return [None] * len(roots)
        return DraftTree(roots[:, None], torch.tensor([-1]))


class _Oracle(Drafter):
    """Knows the reference ``(B, length)`` and right-guesses a share of it; ``skip``: padding tokens of each row."""

    def __init__(self, reference=None, skip=None, seed=0, right=0.7, vocabulary=90):
        self.reference, self.skip, self.right, self.vocabulary = reference, skip, right, vocabulary
        self.random = random.Random(seed)

    def future(self, row, committed):
        if self.reference is None:
            return []
        skip = 0 if self.skip is None else self.skip[row]
        return self.reference[row][skip + len(committed) + 1 :].tolist()

    def guess(self, truth, depth):
        """A token for a node of this depth whose ancestors are all right; and whether it is right as well."""
        if depth < len(truth) and self.random.random() < self.right:
            return truth[depth], True
        return self.random.randrange(self.vocabulary), False


class Chain(_Oracle):
    def propose(self, roots, committed):
        trees = []
        for row, root in enumerate(roots.tolist()):
            truth, tokens = self.future(row, committed[row]), [root]
            for depth in range(5):
                tokens.append(self.guess(truth, depth)[0])
            trees.append(DraftTree.chain(torch.tensor(tokens)))
        return trees


class StaticTree(_Oracle):
    """One topology for all rows, given as one tree; the right tokens lie on its last branch."""

    parents = (-1, 0, 0, 1, 0, 4, 4, 6, 6, 8)
    right_path = ((4, 0), (6, 1), (8, 2), (9, 3))

    def propose(self, roots, committed):
        rows = []
        for row, root in enumerate(roots.tolist()):
            truth = self.future(row, committed[row])
            tokens = [root]
            for node in range(1, len(self.parents)):
                depth = dict(self.right_path).get(node)
                known = depth is not None and depth < len(truth)
                tokens.append(truth[depth] if known else self.random.randrange(self.vocabulary))
            rows.append(tokens)
        return DraftTree(torch.tensor(rows), torch.tensor(self.parents))


class RandomTree(_Oracle):
    """A tree of random shape and size a row, duplicate siblings included; every now and then none."""

    most = 14

    def propose(self, roots, committed):
        trees = []
        for row, root in enumerate(roots.tolist()):
            if self.random.random() < 0.1:
                trees.append(None)
                continue
            truth = self.future(row, committed[row])
            tokens, parents, depths, right = [root], [-1], [0], [True]
            for node in range(1, self.random.randint(1, self.most)):
                parent = self.random.randrange(node)
                token, good = self.guess(truth, depths[parent]) if right[parent] else (self.random.randrange(90), False)
                tokens.append(token)
                parents.append(parent)
                depths.append(depths[parent] + 1)
                right.append(good)
            trees.append(DraftTree(torch.tensor(tokens), torch.tensor(parents)))
        return trees


class Recorder(Drafter):
    """Wraps a drafter and keeps everything the engine says."""

    def __init__(self, inner, requires=frozenset()):
        self.inner, self.requires = inner, frozenset(requires)
        self.begun, self.prompts, self.proposed, self.updates, self.keys = [], [], [], [], []

    def begin(self, model, batch_size):
        self.begun.append((model, batch_size))
        self.inner.begin(model, batch_size)

    def prefill(self, tokens, outputs):
        self.prompts.append((tokens, outputs))

    def propose(self, roots, committed):
        self.proposed.append((roots.clone(), [c.clone() for c in committed]))
        return self.inner.propose(roots, committed)

    def update(self, trees, outputs, paths, new_roots):
        if outputs.cache is not None:  # the cache goes on: keep what it holds now
            self.keys.append(outputs.cache.layers[0].keys.clone())
        self.updates.append((trees, outputs, paths, new_roots))


DRAFTERS = {"empty": Empty, "chain": Chain, "static tree": StaticTree, "random tree": RandomTree}


def padding(batch):
    """Left-padding tokens of each row of a batch from `tiny_models.inputs`."""
    return (batch["attention_mask"] == 0).sum(-1).tolist()
