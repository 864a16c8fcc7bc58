"""Logits and probabilities of exactly the heads and rows that the parts of a call ask about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heedful.seam.call import AttentionCall
from heedful.seam.masks import put, take
from heedful.seam.selection import ALL, Rows, padded_indices


class Weights:
    """Logits, then probabilities, in tiles: heads that are asked about in the same rows.

    So a one-row probe beside an all-rows edit of one head stays one row.
    """

    def __init__(self, call: AttentionCall, asked: Sequence[tuple[tuple[int, ...], Rows]]) -> None:
        wanted: dict[int, dict[str, Rows]] = {}
        for heads, rows in asked:
            for head in heads:
                wanted.setdefault(head, {})[rows.key] = rows
        tiles: dict[str, list[int]] = {}
        for head, selections in wanted.items():
            tiles.setdefault(" + ".join(sorted(selections)), []).append(head)
        self.tiles = [Tile(call, heads, _union(call, wanted[heads[0]], key)) for key, heads in tiles.items()]

    def softmax(self) -> None:
        """Turns the logits into probabilities."""
        for tile in self.tiles:
            tile.values = tile.call.softmax(tile.values)

    def get(self, heads: tuple[int, ...], rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Values (B, h, R, Tk) and visible keys (B or 1, h or 1, R, Tk), None for all."""
        values, visible, order = [], [], []
        for tile in self.tiles:
            mine = tile.among(heads)
            if tile.is_exactly(mine, heads, rows):
                return tile.values, tile.visible
            if mine:
                places, slots = [tile.place[h] for h in mine], tile.slots(rows)
                values.append(take(tile.values, places, slots))
                visible.append(tile.seen(places, slots))
                order += mine
        back = [order.index(h) for h in heads]
        joined = torch.cat(values, 1)[:, back]
        if all(seen is None for seen in visible):
            return joined, None
        seen = torch.cat([torch.ones_like(v, dtype=torch.bool) if s is None else s.expand_as(v)
                          for v, s in zip(values, visible, strict=True)], 1)  # fmt: skip
        return joined, seen[:, back]

    def set(self, heads: tuple[int, ...], rows: Rows, new: Tensor) -> None:
        """Takes edited values (B, h, R, Tk)."""
        for tile in self.tiles:
            mine = tile.among(heads)
            if tile.is_exactly(mine, heads, rows):
                tile.values = new
            elif mine:
                piece, slots = new[:, [heads.index(h) for h in mine]], tile.slots(rows)
                tile.values = put(tile.values, piece, [tile.place[h] for h in mine], slots, None)


class Tile:
    """Heads that are asked about in the same rows, and their logits or probabilities (B, h, R, Tk)."""

    def __init__(self, call: AttentionCall, heads: list[int], rows: Rows) -> None:
        self.heads, self.rows = heads, rows
        self.place = {head: i for i, head in enumerate(heads)}
        self.call = call.at(heads, rows.index)
        self.values = self.call.logits()
        self.visible = None if self.call.sees_all else self.call.visible()

    def among(self, heads: Sequence[int]) -> list[int]:
        return [h for h in heads if h in self.place]

    def is_exactly(self, mine: list[int], heads: Sequence[int], rows: Rows) -> bool:
        return mine == self.heads and len(mine) == len(heads) and rows.key == self.rows.key

    def seen(self, places: list[int], slots: Tensor | None) -> Tensor | None:
        """Visible keys of some of its heads and rows, None for all."""
        visible = None if self.visible is None else take(self.visible, places, slots)
        if slots is None:
            return visible
        valid = (slots >= 0)[:, None, :, None]
        return valid if visible is None else visible & valid

    def slots(self, rows: Rows) -> Tensor | None:
        """Where the given rows stand in this tile, (B, R), -1 for none; None if they are the tile's own."""
        if rows.key == self.rows.key or rows.index is None:
            return None
        if self.rows.index is None:
            return rows.index
        found = (self.rows.index[:, None, :] == rows.index[:, :, None]).int().argmax(-1)
        return torch.where(rows.index >= 0, found, -1)


def _union(call: AttentionCall, selections: dict[str, Rows], key: str) -> Rows:
    """All rows of several selections."""
    if len(selections) == 1:
        return next(iter(selections.values()))
    queries = call.query.shape[2]
    chosen = torch.zeros(call.query.shape[0], queries + 1, dtype=torch.bool, device=call.query.device)
    for rows in selections.values():
        if rows.index is None:
            return ALL
        chosen = chosen.scatter(1, torch.where(rows.index >= 0, rows.index, queries), True)
    return Rows(key, padded_indices(chosen[:, :queries]))
