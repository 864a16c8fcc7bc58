"""What each query row may see, read from any mask that transformers hands to an attention function.

A mask arrives as None, boolean 4-D (SDPA), additive float 4-D (eager), 2-D padding (flash) or a BlockMask (flex).
Everything here is computed for the asked rows only, and never builds a T x T tensor unless all rows are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def take(x: Tensor, heads: Sequence[int] | None = None, rows: Tensor | None = None) -> Tensor:
    """Picks heads (axis 1) and rows (axis 2; (B, R) indices, -1 read as 0) of a (B, H, T, D) tensor.

    Axes of size 1 broadcast and are left alone.
    """
    if heads is not None and x.shape[1] > 1:
        x = x[:, list(heads)]
    if rows is not None and (x.shape[2] > 1 or not rows.shape[1]):
        x = x.expand(rows.shape[0], -1, -1, -1)
        index = rows.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        x = x.gather(2, index)
    return x


def put(x: Tensor, new: Tensor, heads: Sequence[int] | None, rows: Tensor | None, valid: Tensor | None) -> Tensor:
    """A copy of `x` (B, H, T, D) with `new` (B, h, R, D) at the given heads and rows.

    `valid` (B or 1, h or 1, R) says where; None for everywhere but at rows -1.
    """
    new = new.to(x.dtype)
    if valid is None and rows is None and heads is None:
        return new
    if valid is None:
        valid = torch.ones(1, 1, 1, dtype=torch.bool, device=x.device)
    valid = valid.expand(new.shape[:3])
    if heads is None and rows is None:
        return torch.where(valid[..., None], new, x)
    chosen = x if heads is None else x[:, list(heads)]
    if rows is None:
        chosen = torch.where(valid[..., None], new, chosen)
    else:
        # One row more at the end takes what is to be thrown away.
        where = torch.where(valid & (rows >= 0)[:, None], rows[:, None], x.shape[2])
        room = torch.cat([chosen, chosen[:, :, :1]], dim=2)
        chosen = room.scatter(2, where[..., None].expand(new.shape), new)[:, :, :-1]
    if heads is None:
        return chosen
    out = x.clone()
    out[:, list(heads)] = chosen
    return out


@dataclass(eq=False)
class Visibility:
    """The mask of one attention call.

    Attributes:
        mask: The mask as it arrived.
        batch, queries, keys: B, Tq, Tk.
        causal: Whether no mask at all means causal.
        flash: The original is a flash kernel: causality is aligned to the last key, and the window is the kernel's.
        window: Sliding window of a flash kernel, or None.
        slot: Key slot of the first query row, so that row i is the token of slot + i; None where a slot is no token
            of the rows (cross-attention, sliding static caches).
    """

    mask: Any
    batch: int
    queries: int
    keys: int
    causal: bool
    flash: bool
    window: int | None
    slot: int | Tensor | None
    device: torch.device
    _whole: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def hides_nothing(self) -> bool:
        """Whether every row sees every key (as in decoding without padding)."""
        return self.mask is None and (not self.causal or self.queries == 1) and self.window is None

    def _is_tensor(self, dimensions: int) -> bool:
        return isinstance(self.mask, Tensor) and self.mask.dim() == dimensions

    def _shaped(self) -> Tensor:
        return self.mask[..., : self.keys]

    def _hidden_below(self) -> float:
        return torch.finfo(self.mask.dtype).min / 2

    def of(self, heads: Sequence[int] | None = None, rows: Tensor | None = None) -> Tensor:
        """Visible keys (B or 1, heads or 1, R, Tk), boolean; all False in rows of index -1."""
        if self._is_tensor(4):
            part = take(self._shaped(), heads, rows)
            seen = part if part.dtype == torch.bool else part > self._hidden_below()
            seen = seen.expand(-1, -1, self.queries if rows is None else rows.shape[1], -1)
        else:
            index = torch.arange(self.queries, device=self.device)[None] if rows is None else rows.to(self.device)
            seen = self._by_index(index)
        return seen if rows is None else seen & (rows >= 0)[:, None, :, None]

    @property
    def whole(self) -> Tensor:
        """All visible keys (B or 1, 1 or Hq, Tq, Tk), boolean; computed once."""
        if self._whole is None:
            self._whole = self.of()
        return self._whole

    def _by_index(self, rows: Tensor) -> Tensor:
        query = rows[:, None, :, None]
        key = torch.arange(self.keys, device=self.device)
        if self.mask is not None and not isinstance(self.mask, Tensor):  # flex: a BlockMask knows its rule
            sample = torch.arange(self.batch, device=self.device)[:, None, None, None]
            head = torch.zeros((), dtype=torch.long, device=self.device)
            seen: Tensor = self.mask.mask_mod(sample, head, query.clamp(min=0), key)
            return seen.expand(-1, -1, rows.shape[1], self.keys)
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device).expand(1, 1, rows.shape[1], self.keys)
        if self.flash:
            query = query + (self.keys - self.queries)
            if self.causal:
                seen = seen & (key <= query)
            if self.window is not None:
                seen = seen & (key > query - self.window)
            if self.mask is not None:
                seen = seen & self.mask[:, None, None, -self.keys :].bool()
        elif self.causal and self.queries > 1:
            seen = key <= query
        return seen

    def bias(self, heads: Sequence[int] | None, rows: Tensor | None) -> Tensor | None:
        """What an additive mask adds to the logits where it does not hide, or None."""
        if not self._is_tensor(4) or self.mask.dtype == torch.bool:
            return None
        return take(self._shaped(), heads, rows)

    def sees(self, heads: Sequence[int] | None = None, rows: Tensor | None = None) -> Tensor:
        """Whether a row sees any key: (B or 1, heads or 1, R), without a boolean copy of an additive mask."""
        if self._is_tensor(4):
            part = take(self._shaped(), heads, rows)
            some = part.any(-1) if part.dtype == torch.bool else part.amax(-1) > self._hidden_below()
            some = some.expand(-1, -1, self.queries if rows is None else rows.shape[1])
        elif self.mask is None:
            some = torch.ones(
                1, 1, self.queries if rows is None else rows.shape[1], dtype=torch.bool, device=self.device
            )
        else:
            some = self.of(heads, rows).any(-1)
        return some if rows is None else some & (rows >= 0)[:, None]

    def real_keys(self) -> Tensor:
        """Keys that any row sees, (B, Tk): neither padding nor the empty tail of a static cache."""
        if self._is_tensor(4):
            mask = self._shaped()
            seen = mask.any(2) if mask.dtype == torch.bool else mask.amax(2) > self._hidden_below()
            seen = seen.any(1)
        elif self._is_tensor(2):
            seen = self.mask[:, -self.keys :].bool()
        elif self.mask is None:
            key = torch.arange(self.keys, device=self.device)[None]
            seen = key < (self.queries if self.causal and self.queries > 1 and not self.flash else self.keys)
        else:
            seen = self.of().any(2)[:, 0]
        return seen.expand(self.batch, -1)

    def real_rows(self) -> Tensor:
        """Rows whose token is not padding, (B, Tq)."""
        every = torch.ones(self.batch, self.queries, dtype=torch.bool, device=self.device)
        if self.mask is None:
            return every
        if self._is_tensor(2):
            return self.real_keys()[:, -self.queries :]
        if self.slot is not None:  # a token is real where it sees itself
            return every & self._sees_slot(self.slot + torch.arange(self.queries, device=self.device))
        if not self.causal:  # cross-attention: the mask speaks of keys only
            return every
        # The last real row is the first one that sees the last key that anyone sees.
        keys, index = self.real_keys(), torch.arange(self.keys, device=self.device)
        last_key = torch.where(keys, index, -1).amax(1, keepdim=True).clamp(min=0)
        last = self._sees_slot(last_key.expand(-1, self.queries)).int().argmax(1, keepdim=True)
        return every & self.sees().any(1) & (torch.arange(self.queries, device=self.device) <= last)

    def _sees_slot(self, slots: Tensor) -> Tensor:
        """Whether row i sees key slots[..., i], for slots (Tq,) or (B, Tq): (B or 1, Tq)."""
        slots = slots.expand(self.batch, -1)
        if not self._is_tensor(4):
            sample = torch.arange(self.batch, device=self.device)[:, None]
            row = torch.arange(self.queries, device=self.device)
            seen: Tensor = self.mask.mask_mod(sample, torch.zeros_like(sample), row, slots)
            return seen
        mask = self._shaped().expand(self.batch, -1, self.queries, -1)
        own = mask.gather(3, slots[:, None, :, None].expand(-1, mask.shape[1], -1, -1))[..., 0]
        return (own if own.dtype == torch.bool else own > self._hidden_below()).any(1)

    def last_row(self) -> Tensor:
        """The last row that is not padding, (B, 1); -1 where the call holds none of the sample."""
        if self.mask is None:
            return torch.full((self.batch, 1), self.queries - 1, device=self.device)
        index = torch.arange(self.queries, device=self.device)
        return torch.where(self.real_rows(), index, -1).amax(1, keepdim=True)
