"""Medusa's typical acceptance: drafts that are likely enough are kept, whatever the model itself would have chosen. Lossy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from heedful.decoding.engine import Engine
from heedful.decoding.tree import VerifiedTree

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


class TypicalEngine(Engine):
    """`Engine` whose walk keeps a child x of a node with distribution p if ``p(x) > min(threshold, alpha exp(-H(p)))``.

    H is p's entropy in nats. The longest path is kept (of several the one with the largest sum of log p), and the token after
    it is the arg-max, as in the reference's default. The output does not have the model's distribution.
    """

    def __init__(
        self, *arguments: Any, posterior_threshold: float = 0.09, posterior_alpha: float = 0.3, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.threshold, self.alpha = posterior_threshold, posterior_alpha
        processors: LogitsProcessorList = self.select.processors
        for processor in processors:
            if not isinstance(processor, _WARPERS):
                raise ValueError(
                    f"acceptance='typical' knows temperature, top-k, top-p and min-p, not {type(processor).__name__}; "
                    f"use acceptance='exact'"
                )
        self.select.at_once = False

    def walk(
        self, trees: list[VerifiedTree | None], logits: Tensor, choices: list[list[int]] | None
    ) -> list[list[int]]:
        paths: list[list[int]] = []
        for row, tree in enumerate(trees):
            path: list[int] = []
            if tree is not None:
                scores = self.select.processors(None, logits[row, : tree.shape.size].float())  # type: ignore[arg-type]
                nodes = self._path(tree, scores.log_softmax(-1))
                tokens = [tree.tokens[node] for node in nodes[1:]] + [int(scores[nodes[-1]].argmax())]
                for node, token in zip(nodes, tokens, strict=True):
                    path.append(node)
                    self.emit(row, token)
                    if self._has_ended(row, token):
                        break
                self._count(tree, path)
                self.emitted[row].append(len(path))
            paths.append(path)
        return paths

    def _path(self, tree: VerifiedTree, log_p: Tensor) -> list[int]:
        p = log_p.exp()
        entropy = -(p * torch.log(p + 1e-5)).sum(-1)
        least = torch.minimum(torch.full_like(entropy, self.threshold), self.alpha * torch.exp(-entropy)).tolist()
        sums: list[float | None] = [0.0]
        best, key = 0, (0, 0.0)
        for node in range(1, tree.shape.size):
            parent = tree.shape.parents[node]
            before = sums[parent]
            value = float(log_p[parent, tree.tokens[node]])
            kept = before is not None and float(p[parent, tree.tokens[node]]) > least[parent]
            sums.append(before + value if kept and before is not None else None)
            if kept and (tree.shape.depths[node], sums[node]) > key:
                best, key = node, (tree.shape.depths[node], sums[node] or 0.0)
        path = [best]
        while path[0]:
            path.insert(0, tree.shape.parents[path[0]])
        return path
