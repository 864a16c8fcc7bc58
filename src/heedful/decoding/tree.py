"""Draft trees: the tokens a drafter proposes, and the shape that verification reads them in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import LongTensor, Tensor


@dataclass(frozen=True, eq=False, slots=True)
class DraftTree:
    """A tree of proposed tokens. Node 0 is the root: the last token chosen, which the model has not read yet.

    A tree carries no probabilities: the walk that accepts it is exact for any tree.

    Args:
        tokens: LongTensor ``(n,)``, the token of each node; ``tokens[0]`` is the root. ``(B, n)`` when one tree with the
            same shape serves all rows of a batch.
        parents: LongTensor ``(n,)``: ``parents[0] == -1`` and ``0 <= parents[i] < i`` for every other node. Siblings may
            carry the same token; the first one counts.
    """

    tokens: LongTensor
    parents: LongTensor

    @classmethod
    def chain(cls, tokens: LongTensor) -> DraftTree:
        """The tree in which every token is the only child of the one before. ``tokens``: ``(n,)``, the root first."""
        return cls(tokens, torch.arange(-1, tokens.shape[-1] - 1))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.parents.shape[0]


class Topology:
    """What the shape of a tree fixes: depths, children, and who may see whom."""

    def __init__(self, parents: tuple[int, ...]) -> None:
        if not parents or parents[0] != -1:
            raise ValueError(
                f"node 0 of a draft tree is its root and has the parent -1, got parents {list(parents)[:8]}"
            )
        for node, parent in enumerate(parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"the parent of node {node} must be one of the nodes 0 to {node - 1}, got {parent}")
        self.parents = parents
        self.size = len(parents)
        self.depths = [0] * self.size
        self.children: list[list[int]] = [[] for _ in parents]
        self.ancestors = torch.eye(self.size, dtype=torch.bool)  # [i, j]: j is i or an ancestor of i
        for node, parent in enumerate(parents[1:], start=1):
            self.depths[node] = self.depths[parent] + 1
            self.children[parent].append(node)
            self.ancestors[node] |= self.ancestors[parent]
        self.depth = max(self.depths)
        self.depth_tensor = torch.tensor(self.depths)
        self.parent_tensor = torch.tensor(parents)
        self._on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Depths ``(n,)`` and the additive ancestor-or-self mask ``(n, n)`` on a device, made once."""
        if (device, dtype) not in self._on_device:
            hidden = torch.zeros(self.size, self.size, dtype=dtype).masked_fill_(
                ~self.ancestors, torch.finfo(dtype).min
            )
            self._on_device[device, dtype] = (self.depth_tensor.to(device), hidden.to(device))
        return self._on_device[device, dtype]


@lru_cache(maxsize=256)
def topology(parents: tuple[int, ...]) -> Topology:
    """The `Topology` of a tuple of parents. ValueError when they are no tree in which parents come before children."""
    return Topology(parents)


class VerifiedTree:
    """One row's tree as the engine verifies it: tokens checked, on the host, with nodes that have no room left out."""

    __slots__ = ("_source", "shape", "tokens")

    def __init__(self, tokens: list[int], shape: Topology, source: DraftTree | None = None) -> None:
        self.tokens = tokens
        self.shape = shape
        self._source = source

    @property
    def source(self) -> DraftTree:
        """The tree as its drafter knows it."""
        if self._source is None:
            self._source = DraftTree(torch.tensor(self.tokens), torch.tensor(self.shape.parents))  # type: ignore[arg-type]
        return self._source

    @classmethod
    def check(cls, tree: DraftTree, root: int, vocabulary: int, row: int) -> VerifiedTree:
        """Checks a drafter's proposal; a drafter is never trusted.

        Raises:
            ValueError: the tree's root is not the row's root, a parent does not come before its child, tokens and parents
                differ in length, or a token lies outside ``[0, vocabulary)``.
        """
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        if len(tokens) != len(parents):
            raise ValueError(f"row {row}: the draft tree has {len(tokens)} tokens but {len(parents)} parents")
        try:
            shape = topology(tuple(parents))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from None
        if tokens[0] != root:
            raise ValueError(f"row {row}: the draft tree starts with token {tokens[0]}, but the row's root is {root}")
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < vocabulary)
            raise ValueError(
                f"row {row}: token {wrong} of the draft tree lies outside the vocabulary [0, {vocabulary})"
            )
        return cls(tokens, shape, tree)

    def limit(self, max_depth: int, max_nodes: int) -> VerifiedTree:
        """Without the nodes deeper than ``max_depth``, and with at most ``max_nodes`` (the root is always kept)."""
        if self.shape.depth <= max_depth and self.shape.size <= max_nodes:
            return self
        depths = self.shape.depths
        kept = [node for node in range(self.shape.size) if node == 0 or depths[node] <= max_depth][: max(max_nodes, 1)]
        renumbered = {-1: -1} | {node: index for index, node in enumerate(kept)}
        parents = tuple(renumbered[self.shape.parents[node]] for node in kept)
        return VerifiedTree([self.tokens[node] for node in kept], topology(parents))

    def child(self, node: int, token: int) -> int | None:
        """The first child of ``node`` that carries ``token``."""
        for child in self.shape.children[node]:
            if self.tokens[child] == token:
                return child
        return None
