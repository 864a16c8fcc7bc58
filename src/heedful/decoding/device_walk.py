"""The walk down the trees as tensor operations of fixed shapes: what `Engine.walk` does, without leaving the device, and
the numbers that change with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Walk:
    """Where the walk went.

    Attributes:
        path: ``(B, m)`` the accepted nodes, node 0 first; entries from ``count`` on repeat the last one.
        emitted: ``(B, m)`` the token chosen at each of them.
        count: ``(B,)`` accepted nodes, which is the number of tokens emitted; at least 1.
    """

    path: Tensor
    emitted: Tensor
    count: Tensor


def walk(tokens: Tensor, parents: Tensor, ancestors: Tensor, choices: Tensor, path_length: int) -> Walk:
    """Goes down each tree as far as its nodes carry the tokens that the model chose.

    A node is reached if its token is the choice at its parent, no earlier sibling carries the same token, and its parent is
    reached. Reached nodes therefore form one chain, the tokens of which are those that plain decoding would have emitted.

    Args:
        tokens: ``(B, n)`` the nodes' tokens.
        parents: ``(B, n)``; -1 for the root and for nodes that only fill the tree up.
        ancestors: bool ``(B, n, n)``, ancestor or self.
        choices: ``(B, n)`` the token chosen after each node.
        path_length: m, the most nodes of a path (the depth of the deepest tree, and 1).
    """
    batch, nodes = tokens.shape
    index = torch.arange(nodes, device=tokens.device)
    chosen = tokens == choices.gather(1, parents.clamp(min=0))
    # Of siblings with one token the first counts. Were both followed, the longer of two draws would win, which is biased.
    twins = (parents[:, :, None] == parents[:, None, :]) & (tokens[:, :, None] == tokens[:, None, :])
    first = ~(twins & (index[None, :] < index[:, None])).any(-1)
    follows = (chosen & first & (parents >= 0)) | (index == 0)
    reached = (follows[:, None, :] | ~ancestors).all(-1) & ((parents >= 0) | (index == 0))
    depths = ancestors.sum(-1) - 1
    count = reached.sum(-1)
    # Reached nodes have depths 0, 1, ..., count - 1: each goes to the place of its depth, all others behind the end.
    places = torch.where(reached, depths, path_length)
    path = torch.zeros(batch, path_length + 1, dtype=torch.long, device=tokens.device)
    path = path.scatter(1, places, index.expand(batch, nodes))[:, :path_length]
    last = path.gather(1, count[:, None] - 1)
    path = torch.where(torch.arange(path_length, device=tokens.device) < count[:, None], path, last)
    return Walk(path, choices.gather(1, path), count)


def ancestors_of(parents: Tensor) -> Tensor:
    """Ancestor or self, bool ``(B, n, n)``, of the trees ``parents (B, n)`` (-1: a root), by squaring the parent relation."""
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    reach = ((parents[:, :, None] == index) | (index[:, None] == index)).float()
    for _ in range(max(1, (nodes - 1).bit_length())):
        reach = (reach @ reach).clamp(max=1.0)
    return reach > 0.5


def trim(walked: Walk, end_tokens: Tensor, remaining: Tensor) -> tuple[Tensor, Tensor]:
    """Ends each walk with the first end-of-sequence token and with the last token there is room for.

    Args:
        walked: the walk.
        end_tokens: ``(k,)``, -1 where there is none.
        remaining: ``(B,)`` tokens that may still be emitted.

    Returns:
        The number of tokens that stay ``(B,)``, and whether the row has ended with them ``(B,)``.
    """
    length = walked.emitted.shape[1]
    at = torch.arange(length, device=walked.emitted.device)
    ends = (walked.emitted[:, :, None] == end_tokens).any(-1) & (at < walked.count[:, None])
    first_end = torch.where(ends, at, length).amin(-1)
    count = torch.minimum(torch.minimum(walked.count, first_end + 1), remaining)
    return count, (first_end < count) | (count >= remaining)


def place(
    ancestors: Tensor, lengths: Tensor, positions: Tensor, last: Tensor, capacity: int, rows_per_node: int = 1
) -> tuple[Tensor, Tensor]:
    """Where the nodes of trees with ``ancestors (B, n, n)`` stand: rows of the cache ``(B, n * rows_per_node)``, and positions
    ``(B, n)``.

    Rows that have ended are verified too, without a trace; theirs must not lie past the cache's end. Nodes past the ``last``
    token that may be emitted are never accepted, and learned positions may end there.
    """
    nodes = ancestors.shape[1]
    rows = lengths[:, None] + torch.arange(nodes * rows_per_node, device=lengths.device)
    depths = ancestors.sum(-1) - 1
    return rows.clamp(max=capacity - 1), torch.minimum(positions[:, None] + depths, last[:, None])


@dataclass(slots=True)
class Settled:
    """A verification's outcome.

    Attributes:
        path: ``(B, m)`` the nodes that stay, node 0 first; entries from ``count`` on repeat the last one.
        count: ``(B,)`` how many, at least 1 (also in a row that had ended, in which nothing changes).
        roots: ``(B,)`` the token chosen after the last of them.
        sources, targets: ``(B, m)`` the rows of the cache that the walk's nodes are in, and those where they belong.
        report: ``(B, m + 3)`` for the host: emitted tokens, the depth of the tree as far as there was room for it, how many
            tokens count, whether the row has ended.
    """

    path: Tensor
    count: Tensor
    roots: Tensor
    sources: Tensor
    targets: Tensor
    report: Tensor


def settle(
    tokens: Tensor,
    parents: Tensor,
    ancestors: Tensor,
    choices: Tensor,
    path_length: int,
    end_tokens: Tensor,
    lengths: Tensor,
    positions: Tensor,
    remaining: Tensor,
    finished: Tensor,
    capacity: int,
) -> Settled:
    """`walk`, `trim`, and the rows' numbers ``(B,)`` brought up to date in place: lengths, positions, remaining, finished."""
    walked = walk(tokens, parents, ancestors, choices, path_length)
    count, ended = trim(walked, end_tokens, remaining)
    count = torch.where(finished, 0, count)
    at = torch.arange(path_length, device=tokens.device)
    sources = (lengths[:, None] + walked.path).clamp(max=capacity - 1)
    targets = (lengths[:, None] + at).clamp(max=capacity - 1)
    last = count.clamp(min=1)[:, None] - 1
    path = torch.where(at < count[:, None], walked.path, walked.path.gather(1, last))
    roots = walked.emitted.gather(1, last)[:, 0]
    depth = torch.where(parents >= 0, ancestors.sum(-1) - 1, 0).amax(-1)
    depth = torch.minimum(depth, remaining - 1).clamp(min=0)
    report = torch.cat([walked.emitted, torch.stack([depth, count, (finished | ended).long()], dim=1)], dim=1)
    lengths.add_(count)
    positions.add_(count)
    remaining.sub_(count)
    finished.logical_or_(ended)
    return Settled(path, count.clamp(min=1), roots, sources, targets, report)
