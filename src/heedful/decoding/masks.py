"""Attention masks of a verification: every node sees its row's committed tokens and its own ancestors, nothing else.

One mask for each type of layer. Windows and chunks count in positions along the node's own path, as if each path were the
only continuation, because the engine's caches keep every key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from heedful.decoding.tree import VerifiedTree

Mask = Tensor | dict[str, Tensor | None] | None

_SLIDING, _CHUNKED, _FULL = "sliding_attention", "chunked_attention", "full_attention"


class MaskBuilder:
    """Builds the masks of a model's verifications, additive, ``(B, 1, n, keys)``, in the model's dtype.

    Args:
        config: the text configuration; its ``layer_types``, ``sliding_window`` and ``attention_chunk_size`` are read.
        attention_mask: ``(B, T)`` of the prompt, or None without padding.
        max_cache_len: the number of keys of a static cache, None for a dynamic one.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        attention_mask: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        max_cache_len: int | None,
    ) -> None:
        self.dtype, self.device, self.max_cache_len = dtype, device, max_cache_len
        self.hidden = torch.finfo(dtype).min
        self.window: int | None = getattr(config, "sliding_window", None)
        self.chunk: int | None = getattr(config, "attention_chunk_size", None)
        layer_types = getattr(config, "layer_types", None)
        # Without `layer_types` all layers are of one kind, and the model takes a single mask.
        self.by_type = layer_types is not None
        if layer_types is not None:
            self.types = sorted(set(layer_types))
        elif self.window is not None:
            self.types = [_SLIDING]
        else:
            self.types = [_CHUNKED if self.chunk is not None else _FULL]
        self.prompt = None if attention_mask is None else attention_mask.to(device=device, dtype=torch.bool)
        # transformers counts chunks from the first token that is not padding.
        self.padding = None if self.prompt is None else self.prompt.int().argmax(-1)

    def build(self, trees: list[VerifiedTree | None], cached: list[int], start: int, nodes: int) -> Mask:
        """The masks of one verification.

        Args:
            trees: one tree a row, None for finished rows.
            cached: for each row, the number of rows of the cache that are its own.
            start: the cache row in which node 0 is written (the longest row's ``cached``).
            nodes: the number of nodes, the largest tree's.
        """
        if self._sees_all(trees, cached, start, nodes):
            masks: dict[str, Tensor | None] = dict.fromkeys(self.types, None)  # what the model's own decode step passes
        elif self.prompt is None and len(trees) == 1 and (tree := trees[0]) is not None:
            masks = self._build_single(tree, start)
        else:
            masks = self._build_batch(trees, cached, start, nodes)
        return masks if self.by_type else masks[self.types[0]]

    def _build_single(self, tree: VerifiedTree, start: int) -> dict[str, Tensor | None]:
        """One row without padding, the case that has to be fast: the committed tokens, then the tree's own mask."""
        shape = tree.shape
        depths, tree_mask = shape.on(self.device, self.dtype)
        end = start + shape.size
        full = torch.zeros((1, 1, shape.size, self.max_cache_len or end), dtype=self.dtype, device=self.device)
        full[0, 0, :, start:end] = tree_mask
        if self.max_cache_len is not None:
            full[..., end:] = self.hidden
        masks: dict[str, Tensor | None] = {}
        for kind in self.types:
            if self._reaches(kind, start + shape.depth + 1):
                masks[kind] = full
                continue
            positions = torch.arange(full.shape[-1], device=self.device)
            positions[start:end] = start + depths
            masks[kind] = full.masked_fill(
                ~self._near(kind, (start + depths)[:, None], positions[None, :], None), self.hidden
            )
        return masks

    def _build_batch(
        self, trees: list[VerifiedTree | None], cached: list[int], start: int, nodes: int
    ) -> dict[str, Tensor | None]:
        batch = len(trees)
        tree_visible = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)  # padding nodes see themselves
        depths = torch.zeros(batch, nodes, dtype=torch.long)
        for row, tree in enumerate(trees):
            if tree is not None:
                tree_visible[row, : tree.shape.size, : tree.shape.size] = tree.shape.ancestors
                depths[row, : tree.shape.size] = tree.shape.depth_tensor
        end = start + nodes
        keys = self.max_cache_len or end
        own = torch.tensor(cached, device=self.device)
        columns = torch.arange(keys, device=self.device)
        prefix = columns[None, :] < own[:, None]
        if self.prompt is not None:
            prefix[:, : self.prompt.shape[1]] &= self.prompt
        visible = prefix[:, None, :].repeat(1, nodes, 1)
        visible[:, :, start:end] |= tree_visible.to(self.device)  # `cached <= start`: no row's own tokens lie there
        nodes_at = own[:, None] + depths.to(self.device)  # (B, n): where each node stands in its row
        positions = columns[None, :].repeat(batch, 1)
        positions[:, start:end] = nodes_at
        masks: dict[str, Tensor | None] = {}
        for kind in self.types:
            near = self._near(kind, nodes_at[:, :, None], positions[:, None, :], self.padding)
            seen = visible if near is None else visible & near
            mask = torch.zeros((batch, 1, nodes, keys), dtype=self.dtype, device=self.device)
            masks[kind] = mask.masked_fill_(~seen[:, None], self.hidden)
        return masks

    def _sees_all(self, trees: list[VerifiedTree | None], cached: list[int], start: int, nodes: int) -> bool:
        """Whether every row has one node, and that sees every key. The keys of finished rows do not matter."""
        return (
            nodes == 1
            and self.prompt is None
            and self.max_cache_len is None
            and all(own == start for own, tree in zip(cached, trees, strict=True) if tree is not None)
            and all(self._reaches(kind, start + 1) for kind in self.types)
        )

    def _reaches(self, kind: str, length: int) -> bool:
        """Whether a layer of this type sees the whole of a sequence of this length."""
        if kind == _SLIDING:
            return length <= (self.window or length)
        if kind == _CHUNKED:
            return length <= (self.chunk or length)
        return True

    def _near(self, kind: str, query: Tensor, key: Tensor, padding: Tensor | None) -> Any:
        """Boolean: the key's position lies in the query's window or chunk. None: layers of this type see everything."""
        if kind == _SLIDING and self.window is not None:
            return key > query - self.window
        if kind == _CHUNKED and self.chunk is not None:
            offset = 0 if padding is None else padding[:, None, None]
            return torch.div(key - offset, self.chunk, rounding_mode="floor") == torch.div(
                query - offset, self.chunk, rounding_mode="floor"
            )
        return None
