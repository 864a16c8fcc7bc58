"""Column statistics of an attention matrix that is never built: the attention each key receives, per sample and head.

A column mean needs every row's softmax, but one row at a time: blocks of query rows are softmaxed over all their keys
and added up, so the memory is that of one block. Everything is counted through the visibility of each row, never
through shapes: static caches are longer than the text, and padding sees and is seen by nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.seam import AttentionCall, Verification

BLOCK_BYTES = 32 << 20


class HeadPairs:
    """The attention of ``N`` pairs of one sample and one query head: the layout in which heads are read and edited.

    Args:
        call: The attention call.
        sample, head: ``(N,)`` indices of the pairs.
        rows: ``(B, R)`` the query rows to look at, -1 for none; None for all.
    """

    def __init__(self, call: AttentionCall, sample: Tensor, head: Tensor, rows: Tensor | None = None) -> None:
        self.call, self.sample, self.head, self.rows = call, sample, head, rows
        self.dtype = torch.promote_types(call.query.dtype, torch.float32)

    @classmethod
    def of(cls, call: AttentionCall) -> HeadPairs:
        """All samples and all heads of the call: ``(B, heads)`` flattened."""
        device = call.query.device
        sample = torch.arange(call.query.shape[0], device=device)
        head = torch.tensor(call.head_list, device=device)
        return cls(call, sample.repeat_interleave(len(head)), head.repeat(len(sample)))

    def __len__(self) -> int:
        return len(self.sample)

    def keep(self, chosen: Tensor, rows: Tensor | None = None) -> HeadPairs:
        """The pairs with the indices ``chosen (n,)``, and of those only the given rows."""
        return HeadPairs(self.call, self.sample[chosen], self.head[chosen], self.rows if rows is None else rows)

    @cached_property
    def query(self) -> Tensor:
        """``(N, R, D)``, fp32 (fp64 stays fp64)."""
        query = self.call.query[self.sample, self.head].to(self.dtype)
        if self.rows is None:
            return query
        index = self.rows[self.sample].clamp(min=0)
        return query.gather(1, index[..., None].expand(-1, -1, query.shape[-1]))

    @cached_property
    def key(self) -> Tensor:
        """``(N, Tk, D)``."""
        return self.call.key[self.sample, self.head // self.call.groups].to(self.dtype)

    @cached_property
    def value(self) -> Tensor:
        """``(N, Tk, Dv)``."""
        return self.call.value[self.sample, self.head // self.call.groups].to(self.dtype)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
        """Consecutive rows whose logits fit into ``block_bytes`` (at least one row)."""
        total = self.query.shape[1]
        size = max(1, block_bytes // max(1, len(self) * self.key.shape[1] * self.key.element_size()))
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))

    def _index(self, block: slice) -> Tensor:
        if self.rows is not None:
            return self.rows[:, block]
        return torch.arange(block.start, block.stop, device=self.sample.device).expand(self.call.query.shape[0], -1)

    def pick(self, x: Tensor) -> Tensor:
        """The pairs of a ``(1 or B, 1 or Hq, ...)`` tensor: ``(N, ...)``, or ``(1, ...)`` if they are all the same."""
        if x.shape[0] == x.shape[1] == 1:
            return x[0]
        sample = self.sample if x.shape[0] > 1 else torch.zeros_like(self.sample)
        head = self.head if x.shape[1] > 1 else torch.zeros_like(self.head)
        return x[sample, head]

    def sees(self, block: slice) -> Tensor:
        """Keys that the rows of the block see, for all samples: boolean ``(B or 1, Hq or 1, r, Tk)``."""
        index = self._index(block)
        same = self.rows is None and self.call.visibility.mask is None  # for all samples: one row of indices will do
        return self.call.visibility.of(None, index[:1] if same else index)

    def width(self, block: slice) -> int:
        """No row of the block sees a key slot from here on: the upper half of a causal matrix is not computed."""
        mask = self.call.visibility
        if self.rows is None and mask.mask is None and mask.causal and not mask.flash and mask.queries > 1:
            return min(block.stop, mask.keys)
        return mask.keys

    def logits(self, query: Tensor, key: Tensor, slots: Tensor | None, block: slice) -> Tensor:
        """Scores of ``query (N, r, D)``, the rows of the block, on ``key (N, k, D)``, before anything is hidden.

        ``slots (N, k)`` says which key slots these are; None for the first k.
        """
        logits = (query * self.call.scaling) @ key.mT
        if self.call.softcap is not None:
            logits = self.call.softcap * torch.tanh(logits / self.call.softcap)
        biases: list[Tensor | None] = [self.call.visibility.bias(None, self._index(block))]
        if self.call.position_bias is not None:
            rows = self._index(block).clamp(min=0)[:, None, :, None]
            whole = self.call.position_bias.expand(rows.shape[0], -1, -1, -1)
            biases.append(whole.gather(2, rows.expand(-1, whole.shape[1], -1, whole.shape[3])))
        for bias in biases:
            if bias is not None:
                mine = self.pick(bias)
                mine = mine[..., : key.shape[1]] if slots is None else gather_slots(mine, slots)
                logits = logits + mine
        return logits

    def probabilities(self, block: slice) -> tuple[Tensor, Tensor]:
        """Attention weights of the rows of a block and the keys they see, ``(N, r, Tk)``; 0 where a key is hidden."""
        visible = self.pick(self.sees(block)).expand(len(self), -1, -1)
        logits = self.logits(self.query[:, block], self.key, None, block)
        return logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1) * visible, visible


def gather_slots(x: Tensor, slots: Tensor) -> Tensor:
    """Columns ``slots (N, k)`` of ``x (N or 1, r, Tk)``: ``(N, r, k)``."""
    return x.expand(len(slots), -1, -1).gather(2, slots[:, None].expand(-1, x.shape[1], -1))


@dataclass(eq=False)
class ColumnStatistics:
    """What the query rows read so far give to each key.

    Attributes:
        sums: ``(..., T)`` attention received.
        counts: ``(..., T)`` rows that could give any.
        reach: ``(...)`` the most keys that one row sees.
    """

    sums: Tensor
    counts: Tensor
    reach: Tensor

    @property
    def means(self) -> Tensor:
        """Mean attention each key gets from the rows that see it, in [0, 1]; 0 for keys that nobody sees."""
        return (self.sums / self.counts.clamp(min=1)).clamp(max=1.0)

    def threshold(self, alpha: float, threshold: float | None) -> Tensor:
        """The mean above which a key is a sink, ``(...)``: the constant, or alpha times the level of uniform
        attention.
        """
        if threshold is not None:
            return torch.full_like(self.reach, threshold, dtype=self.sums.dtype)
        return alpha / self.reach.clamp(min=1).to(self.sums.dtype)

    def late_sinks(self, alpha: float, threshold: float | None, exempt_first: int) -> Tensor:
        """Keys whose mean is above the threshold, without the first ``exempt_first`` real tokens: boolean ``(...,
        T)``.
        """
        real = self.counts > 0
        first = real.cumsum(-1) <= exempt_first
        return (self.means > self.threshold(alpha, threshold)[..., None]) & real & ~first

    def view(self, *shape: int) -> ColumnStatistics:
        """The same with other leading axes."""
        return ColumnStatistics(self.sums.view(*shape, -1), self.counts.view(*shape, -1), self.reach.view(*shape))


@torch.no_grad()
def column_statistics(pairs: HeadPairs, block_bytes: int = BLOCK_BYTES) -> ColumnStatistics:
    """Column statistics of the attention matrix, ``(N, Tk)``, block by block, of all rows that are not padding.

    Memory O(N (T D + block)). A sink is a decision and not a quantity to differentiate, so nothing here has a gradient.
    """
    valid = pairs.call.real_rows()[:, None, :, None]
    sums = pairs.key.new_zeros(pairs.key.shape[:2])
    counts = reach = torch.zeros((), dtype=torch.long, device=sums.device)
    for block in pairs.blocks(block_bytes):
        width = pairs.width(block)
        sees = pairs.sees(block)[..., :width]
        logits = pairs.logits(pairs.query[:, block], pairs.key[:, :width], None, block)
        weights = logits.masked_fill_(~pairs.pick(sees), torch.finfo(logits.dtype).min).softmax(-1)
        sees = sees & valid[:, :, block]  # (B, Hq or 1, r, width)
        counts = counts + pad(sees.sum(2), (0, pairs.key.shape[1] - width))
        reach = torch.maximum(reach, sees.sum(-1).amax(-1))
        rows = pairs.pick(sees.any(-1)).to(weights.dtype).expand(len(pairs), -1)
        sums[:, :width] += (rows[:, None] @ weights)[:, 0]
    return ColumnStatistics(sums, pairs.pick(counts).expand(len(pairs), -1), pairs.pick(reach).expand(len(pairs)))


class RunningColumns:
    """The column statistics of sequences that grow: ``(B, heads, T)`` over the tokens that the cache has held.

    Rows are followed by their keys: after a beam search has reordered the cache, each sample finds its statistics by
    comparing a few numbers of every cached key with those it noted.
    """

    _NOTED = 4  # numbers of a key that are noted

    def __init__(self, call: AttentionCall, length: int) -> None:
        shape = (call.query.shape[0], len(call.head_list), length)
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        counts = torch.zeros(shape, dtype=torch.long, device=call.query.device)
        self.total = ColumnStatistics(counts.to(dtype), counts, counts.new_zeros(shape[:2]))
        self.notes = self._note(call)[:, :0]
        self.frozen: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens (slots of a full-length cache) that the statistics cover."""
        return self.total.sums.shape[-1]

    def grow(self, length: int) -> None:
        """Makes room for tokens that nobody has seen yet."""
        more = max(0, length - self.length)
        self.total.sums, self.total.counts = pad(self.total.sums, (0, more)), pad(self.total.counts, (0, more))

    def add(self, new: ColumnStatistics, call: AttentionCall) -> None:
        """Adds the rows of a call, ``(B, heads, Tk)``."""
        start, width = self.slots(call)
        self.grow(start + width)
        self.total.sums[..., start : start + width] += new.sums[..., :width]
        self.total.counts[..., start : start + width] += new.counts[..., :width]
        self.total.reach = torch.maximum(self.total.reach, new.reach)
        notes = self._note(call)
        self.notes = torch.cat([self.notes[:, :start], notes[:, :width]], 1)

    def add_path(self, given: Tensor, visible: Tensor, rows: Tensor, verification: Verification) -> None:
        """Adds accepted rows of a verification, ``given`` and ``visible (N, R, Tk)`` for ``rows (B, R)`` (-1 for none).

        Key slots behind a sample's sequence hold drafts; the accepted ones move to the places that follow it.
        """
        lengths = verification.lengths.to(rows.device)[:, None]
        real = rows >= 0
        self.grow(int((lengths[:, 0] + real.sum(1)).max()))
        target = torch.where(real, lengths + torch.arange(rows.shape[1], device=rows.device), 0)
        source = (verification.start + rows).clamp(min=0)
        shape = self.total.reach.shape
        for total, part in ((self.total.sums, given), (self.total.counts, visible.long())):
            columns = part.sum(1).view(*shape, -1)
            kept = columns * (torch.arange(columns.shape[-1], device=rows.device) < lengths)[:, None]
            room = min(self.length, columns.shape[-1])
            total[..., :room] += kept[..., :room]
            moved = columns.gather(2, source[:, None].expand(*shape, -1)) * real[:, None]
            total.scatter_add_(2, target[:, None].expand(*shape, -1), moved)
        self.total.reach = torch.maximum(self.total.reach, visible.sum(-1).amax(1).view(shape))

    @staticmethod
    def slots(call: AttentionCall) -> tuple[int, int]:
        """The key slots of the call: slot s < width holds token start + s.

        A cache holds the whole sequence (perhaps with empty slots at its end), or the last tokens of a sliding window.
        """
        tokens, keys = int(call.past) + call.query.shape[2], call.key.shape[2]
        return (0, tokens) if keys >= tokens else (tokens - keys, keys)

    def at_slots(self, x: Tensor, call: AttentionCall) -> Tensor:
        """Booleans of tokens ``(B, heads, T)`` at the key slots of the call ``(B, heads, Tk)``; False for the others."""
        start, width = self.slots(call)
        mine = x[..., start : start + width]
        return pad(mine, (0, call.key.shape[2] - mine.shape[-1]))

    def follow(self, call: AttentionCall) -> None:
        """Puts the samples in the order that the cache has now (beam search, samples that were dropped or repeated)."""
        batch = call.query.shape[0]
        if batch == 1 == len(self.notes):
            return
        start, _ = self.slots(call)
        old = self.notes[:, start:]
        new = self._note(call)[:, : old.shape[1]]
        if torch.equal(old, new):
            return
        parent = torch.stack([(old - sample).abs().sum((1, 2)).argmin() for sample in new])
        self.total = ColumnStatistics(self.total.sums[parent], self.total.counts[parent], self.total.reach[parent])
        self.notes = self.notes[parent]
        self.frozen = None if self.frozen is None else self.frozen[parent]

    def _note(self, call: AttentionCall) -> Tensor:
        return call.key[:, 0, :, : self._NOTED].detach().float().nan_to_num()
