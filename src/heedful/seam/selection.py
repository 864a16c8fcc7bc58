"""Which parts act in a call, and on which of its query rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from heedful.seam.call import AttentionCall, is_recording
from heedful.seam.parts import Edit, Part, PartError, stages_of


@dataclass(frozen=True, eq=False)
class Rows:
    """Query rows of one call: (B, R) indices, -1 where a sample has fewer, or None for all. Equal keys, equal rows."""

    key: str
    index: Tensor | None

    @property
    def any(self) -> bool:
        return self.index is None or self.index.shape[1] > 0


ALL = Rows("all", None)


def padded_indices(chosen: Tensor) -> Tensor:
    """The True places of each row of (B, T), in order, as (B, R) indices padded with -1."""
    count = chosen.sum(1, keepdim=True)
    size = int(count.max()) if len(chosen) else 0
    index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    return index.masked_fill(torch.arange(size, device=index.device) >= count, -1)


@dataclass(eq=False)
class Tally:
    """What one part did on one layer; tensors stay on their device until `Attachment.report` reads them."""

    calls: int = 0
    rows: int | Tensor = 0  # query rows that saw a key, over all calls and samples
    heads: tuple[int, ...] = ()
    moved: Tensor | None = None  # attention that an edit moved, per head: sum over rows of half the absolute difference
    moved_rows: int | Tensor = 0

    def count(self, call: AttentionCall) -> None:
        """Counts a call and its rows."""
        if is_recording(call.query):
            return
        self.calls += 1
        self.heads = call.head_list
        batch, _, queries, _ = call.query.shape
        if call.rows is None and call.original_mask is None:
            self.rows = self.rows + batch * queries
        else:
            with torch.no_grad():
                self.rows = self.rows + call.sees_any().expand(batch, -1, -1).any(1).sum()

    def count_moved(self, before: Tensor, after: Tensor, visible: Tensor | None) -> None:
        """Adds the difference of two weightings (B, h, R, Tk), in the rows that see any key."""
        moved = (after - before).abs_().sum(-1) / 2
        if visible is None:
            self.moved_rows = self.moved_rows + moved[:, 0].numel()
        else:
            sees = visible.any(-1).expand(moved.shape)
            moved = moved * sees
            self.moved_rows = self.moved_rows + sees[:, 0].sum()
        moved = moved.sum((0, 2))
        self.moved = moved if self.moved is None else self.moved + moved

    def report(self) -> dict[str, Any]:
        """The counts as plain numbers."""
        counts: dict[str, Any] = {"calls": self.calls, "rows": int(self.rows), "heads": sorted(self.heads)}
        if self.moved is not None:
            shares = (self.moved / max(int(self.moved_rows), 1)).tolist()
            counts["mass_moved"] = dict(sorted(zip(self.heads, shares, strict=True)))
        return counts


@dataclass(eq=False)
class Selected:
    """One part on one layer, with its selectors as they were when `attach` was called.

    Attributes:
        heads: Query heads, or None for all.
        rows: None, "last", "generated", or a boolean mask (1 or B, T) on the CPU.
        steps: None, "prefill", "decode", or a range or frozenset of decode steps.
        memories: What the part remembers of each sequence (`AttentionCall.memory`), by its cache.
    """

    part: Part
    layer: int
    heads: tuple[int, ...] | None
    rows: Any
    steps: Any
    cross: bool
    max_bytes: int | None

    def __post_init__(self) -> None:
        self.name = type(self.part).__name__
        self.stages = stages_of(self.part)
        self.weighs = bool(self.stages & {"logits", "probabilities"})
        self.edits = isinstance(self.part, Edit)
        self.counts_steps = self.steps is not None and not isinstance(self.steps, str)
        self.by_mask = isinstance(self.rows, Tensor)
        # Names of the row selection in an ordinary call and in a verification.
        self.row_key = "last" if isinstance(self.rows, str) and self.rows == "last" else "all"
        self.tree_key = "all" if self.rows is None else "real"
        if self.by_mask:
            self.row_key = self.tree_key = f"mask {id(self.rows)}"
        if self.counts_steps:
            self.tree_key += f" steps {id(self.steps)}"
        self.tally = Tally()
        self.memories: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()

    def acts(self, call: AttentionCall, step: Callable[[], int]) -> bool:
        """Whether the part acts in this kind of call at all (a verification is sorted out row by row)."""
        if isinstance(self.rows, str) and self.rows == "generated" and call.phase != "decode":
            return False
        if self.counts_steps:
            return call.phase == "decode" and (call.verification is not None or step() in self.steps)
        return self.steps is None or call.phase == self.steps

    def find_rows(self, call: AttentionCall, known: dict[str, Rows]) -> Rows:
        """The query rows to hand over. `known` keeps those of this call's other parts, by key."""
        key = self.row_key if call.verification is None else self.tree_key
        if key == "last" and call.query.shape[2] == 1 and call.original_mask is None:
            key = "all"  # the only row, and no padding
        if key == "all":
            return ALL
        if key not in known:
            known[key] = Rows(key, self._indices(call))
        return known[key]

    def _indices(self, call: AttentionCall) -> Tensor:
        tree = call.verification
        if tree is None and not self.by_mask:
            return call.visibility.last_row()
        if tree is None:
            tokens = int(call.past) + torch.arange(call.query.shape[2])[None]
            return padded_indices(self._masked(call, tokens)).to(call.query.device)
        steps = tree.steps.cpu()
        chosen = steps >= 0
        if self.counts_steps:
            chosen = chosen & torch.tensor([[step in self.steps for step in line] for line in steps.tolist()])
        if self.by_mask:
            chosen = chosen & self._masked(call, tree.prompt_length + steps)
        return padded_indices(chosen).to(call.query.device)

    def _masked(self, call: AttentionCall, tokens: Tensor) -> Tensor:
        """Looks tokens (1 or B, T) up in the boolean mask given as `rows`."""
        batch, mask = call.query.shape[0], self.rows
        if batch % mask.shape[0]:
            raise PartError(
                f"layer {self.layer}: rows of {self.name} is a mask for {mask.shape[0]} samples, but the call has "
                f"{batch}. Give a mask (T,) or (B, T) for this batch."
            )
        mask = mask.repeat_interleave(batch // mask.shape[0], 0)  # generate expands samples to beams in this way
        tokens = tokens.expand(batch, -1)
        inside = (tokens >= 0) & (tokens < mask.shape[1])
        return inside & mask.gather(1, tokens.clamp(0, mask.shape[1] - 1))

    def memory(self, cache: Any, of_this_call: dict[Any, Any]) -> dict[Any, Any]:
        """The dict of this sequence, or without a cache that of this call."""
        if cache is None or torch.compiler.is_compiling():
            return of_this_call
        return self.memories.setdefault(cache, {})
