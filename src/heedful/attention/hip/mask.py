"""The choice of keys that HiP attention makes, as block indices: one set per batch row, query head and query block."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Of the staged scan: rows of a query block, rows a mean is taken over, tokens of a chunk, tokens to scan (None: all).
Stage = tuple[int, int, int, int | None]

NOWHERE = torch.iinfo(torch.int64).max  # the slot of a token that does not exist: younger than every row


@dataclasses.dataclass(frozen=True)
class HiPMask:
    """Which keys every query row attends to: a causal sliding window, sink tokens, and chosen blocks.

    A *slot* is an index into the key tensor; slots before the first real token of a batch row are left padding. A row
    at slot `s` attends to three disjoint parts: the window, from `window_starts` to `s`; those of the first
    `num_sink_tokens` real tokens that are older than the window; and the older tokens of the chosen blocks.

    Attributes:
        blocks: Chosen key blocks, int32 `(B, Hq, N, n)`, ascending, -1 in empty places (which come last). Block `j`
            holds `block_size_k` tokens from number `num_sink_tokens + j * block_size_k` on, counted from the first
            real token of the batch row.
        search_end: End of the range that was searched, int64 `(B, N)`, a slot, exclusive.
        num_queries: Tq of the call. Its rows are the last Tq of `num_keys` slots, in N blocks of `block_size_q`.
        num_keys: Tk of the call.
        block_size_q: Rows of a query block (the last one may be shorter).
        block_size_k: Tokens of a key block.
        sliding_window: Tokens of the window, the row's own included.
        num_sink_tokens: Sink tokens.
        attention_mask: bool `(B, Tk)`, True for real tokens, or None where all are.
        chosen_at: Slot of the first row that the choice was made for, where that is older than the rows of this mask.
    """

    blocks: Tensor
    search_end: Tensor
    num_queries: int
    num_keys: int
    block_size_q: int
    block_size_k: int
    sliding_window: int
    num_sink_tokens: int
    attention_mask: Tensor | None = None
    chosen_at: int | None = None

    @property
    def first_slot(self) -> Tensor:
        """Slot of the first real token of each batch row, int64 `(B,)`."""
        return first_real_slot(self.attention_mask, self.blocks.shape[0], self.blocks.device)

    def row_slots(self, first: int = 0, last: int | None = None) -> Tensor:
        """Slots of the rows of query blocks `first:last`, int64 `(blocks, block_size_q)`; some may be past Tk."""
        last = self.blocks.shape[2] if last is None else last
        block = torch.arange(first, last, device=self.blocks.device)[:, None]
        row = torch.arange(self.block_size_q, device=self.blocks.device)
        return self.num_keys - self.num_queries + block * self.block_size_q + row

    def window_starts(self, first: int = 0, last: int | None = None) -> Tensor:
        """First slot of each row's window, int64 `(B, blocks, block_size_q)` (negative near the start).

        Rows younger than the choice start their window where the search ended, so that nothing between them is lost.
        """
        search_end = self.search_end[:, first:last, None]
        own = self.row_slots(first, last) + 1 - self.sliding_window
        own = own.expand(search_end.shape[0], -1, -1)
        return own if self.chosen_at is None else torch.minimum(own, search_end)

    def block_tokens(self, first: int = 0, last: int | None = None) -> Tensor:
        """Slots of the chosen tokens, int64 `(B, Hq, blocks, n * block_size_k)`, `NOWHERE` in empty places."""
        blocks = self.blocks[:, :, first:last].long()
        start = self.first_slot[:, None, None, None] + self.num_sink_tokens + blocks * self.block_size_k
        start = torch.where(blocks >= 0, start, self.num_keys)
        offset = torch.arange(self.block_size_k, device=blocks.device)
        return only_real((start[..., None] + offset).flatten(-2), self.attention_mask, self.num_keys)

    def extended(self, num_queries: int, num_keys: int, attention_mask: Tensor | None) -> HiPMask:
        """The last query block's choice, for rows that came later: their windows reach back to where its search ended.

        Args:
            num_queries: Tq of the later call; its rows must be younger than all of this mask's.
            num_keys: Tk of the later call.
            attention_mask: bool `(B, Tk)` of the later call; None only if this mask has none either.

        Raises:
            ValueError: If the rows are not younger than this mask's, or their padding is another.
        """
        if num_keys - num_queries < self.num_keys:
            raise ValueError(
                f"mask was chosen at {self.num_keys} keys, this call has rows from slot {num_keys - num_queries} on: "
                "a choice serves the rows it was made for and younger ones; leave mask out to choose anew"
            )
        if attention_mask is None and self.attention_mask is not None:
            raise ValueError(
                f"mask was chosen with an attention_mask, which says where its blocks lie: give this call's, ({len(self.blocks)}, "
                f"{num_keys})"
            )
        self._check_padding(attention_mask)
        rows = min(self.block_size_q, num_queries)
        count = -(-num_queries // rows)
        batch, heads, blocks_then, places = self.blocks.shape
        last_block = self.num_keys - self.num_queries + (blocks_then - 1) * self.block_size_q
        return dataclasses.replace(
            self,
            blocks=self.blocks[:, :, -1:].expand(batch, heads, count, places),
            search_end=self.search_end[:, -1:].expand(batch, count),
            num_queries=num_queries,
            num_keys=num_keys,
            block_size_q=rows,
            attention_mask=attention_mask,
            chosen_at=last_block if self.chosen_at is None else self.chosen_at,
        )

    def padded(self, attention_mask: Tensor | None) -> HiPMask:
        """This mask with the `attention_mask` of another call of its shape; None leaves its own.

        Raises:
            ValueError: If the first real tokens of the rows are others, from which the blocks count.
        """
        if attention_mask is None:
            return self
        self._check_padding(attention_mask)
        return dataclasses.replace(self, attention_mask=attention_mask)

    def _check_padding(self, attention_mask: Tensor | None) -> None:
        if self.blocks.is_cuda or torch.compiler.is_compiling():
            return  # asking would wait for the device
        first = first_real_slot(attention_mask, len(self.blocks), self.blocks.device)
        if not torch.equal(first, self.first_slot):
            raise ValueError(
                f"mask was chosen where rows begin at slots {self.first_slot.tolist()}, by this attention_mask they begin at "
                f"{first.tolist()}: its blocks would be other tokens; leave mask out to choose anew"
            )

    def dense(self) -> Tensor:
        """The choice as a bool tensor `(B, Hq, Tq, Tk)`, True where attended. For tests and pictures: it is Tq x Tk."""
        batch, heads, count, _ = self.blocks.shape
        device = self.blocks.device
        chosen = torch.zeros(batch, heads, count, self.num_keys + 1, dtype=torch.bool, device=device)
        chosen.scatter_(-1, self.block_tokens().clamp(max=self.num_keys), True)  # the place past the end is dropped
        chosen = chosen[..., :-1].repeat_interleave(self.block_size_q, dim=2)[:, :, : self.num_queries]

        key = torch.arange(self.num_keys, device=device)
        row = self.row_slots().flatten()[: self.num_queries, None]
        window_start = self.window_starts().flatten(1)[:, None, : self.num_queries, None]
        first = self.first_slot[:, None, None, None]
        sink = (key >= first) & (key < first + self.num_sink_tokens)
        attended = ((key >= window_start) | sink | chosen) & (key <= row)
        if self.attention_mask is not None:
            attended = attended & self.attention_mask[:, None, None]
        return attended

    def to_block_mask(self) -> BlockMask:
        """The choice as a mask for `torch.nn.attention.flex_attention`: an oracle to inspect, not a way to be fast.

        Its query blocks are 64 rows and its key blocks 128 keys; which pairs of them are attended is exact, in its
        `mask_mod`. It takes memory in the order of `B * Hq * (Tq / block_size_q) * (Tk / block_size_k)` bytes.

        Example:
            >>> import torch
            >>> from torch.nn.attention.flex_attention import flex_attention
            >>> from heedful.attention import hip_attention
            >>> query, key, value = torch.randn(3, 1, 2, 500, 16)
            >>> output, mask = hip_attention(query, key, value, top_k=64, sliding_window=64, return_mask=True)
            >>> torch.allclose(flex_attention(query, key, value, block_mask=mask.to_block_mask()), output, atol=1e-5)
            True
        """
        from torch.nn.attention.flex_attention import BlockMask

        batch, heads, count, _ = self.blocks.shape
        device = self.blocks.device
        rows, shift = self.block_size_q, self.num_keys - self.num_queries
        origin = self.first_slot + self.num_sink_tokens
        window_start = self.window_starts().flatten(1)[:, : self.num_queries]  # (B, Tq)
        real = self.attention_mask
        table = torch.zeros(
            batch, heads, count, -(-self.num_keys // self.block_size_k) + 1, dtype=torch.bool, device=device
        )
        blocks = self.blocks.long()
        table.scatter_(-1, torch.where(blocks >= 0, blocks, table.shape[-1] - 1), True)
        table[..., -1] = False

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            token = kv - origin[b]
            chosen = (token >= 0) & table[b, h, q // rows, token.clamp(min=0) // self.block_size_k]
            sink = (token < 0) & (token >= -self.num_sink_tokens)
            seen = ((kv >= window_start[b, q]) | sink | chosen) & (kv <= q + shift)
            return seen if real is None else seen & real[b, kv]

        # Pairs of blocks with anything to see: from the ends of the parts, some with nothing in them.
        wide, tall = 128, 64
        q_blocks, kv_blocks = -(-self.num_queries // tall), -(-self.num_keys // wide)
        at = torch.arange(kv_blocks, device=device) * wide
        row = torch.arange(q_blocks, device=device) * tall
        last_row = (row + tall - 1).clamp(max=self.num_queries - 1)
        in_window = (at + wide > window_start[:, row, None]) & (at <= last_row[:, None] + shift)  # (B, Nq, Nkv)
        first = self.first_slot[:, None]
        in_sinks = (at + wide > first) & (at < first + self.num_sink_tokens) & (self.num_sink_tokens > 0)
        tokens = self.block_tokens()
        seen = torch.zeros(batch, heads, count, kv_blocks + 1, dtype=torch.bool, device=device)
        seen.scatter_(-1, torch.where(tokens < self.num_keys, tokens // wide, kv_blocks), True)
        covered = (in_window | in_sinks[:, None])[:, None].expand(batch, heads, -1, -1).clone()
        for offset in range(-(-tall // rows) + 1):
            block = torch.minimum(row // rows + offset, last_row // rows)
            covered |= seen[:, :, block, :-1]
        order = (~covered).to(torch.uint8).sort(dim=-1, stable=True).indices.int()
        return BlockMask.from_kv_blocks(
            covered.sum(-1, dtype=torch.int32),
            order,
            BLOCK_SIZE=(tall, wide),
            mask_mod=mask_mod,
            seq_lengths=(self.num_queries, self.num_keys),
        )

    def keys_read(self) -> Tensor:
        """Number of keys each row attends to, int64 `(B, Hq, Tq)`: the row sums of `dense`, without building it."""
        batch, heads, _, _ = self.blocks.shape
        window_start = self.window_starts()  # (B, N, b_q)
        tokens = self.block_tokens()  # ascending, as the blocks are
        if self.attention_mask is not None:  # but where a hole has put NOWHERE among them
            tokens = tokens.sort(-1).values
        chosen = torch.searchsorted(tokens, window_start[:, None].expand(-1, heads, -1, -1).contiguous())

        real = torch.ones(batch, self.num_keys, dtype=torch.int64, device=tokens.device)
        if self.attention_mask is not None:
            real = self.attention_mask.long()
        before = torch.nn.functional.pad(real.cumsum(1), (1, 0))  # real tokens before each slot

        def real_tokens(start: Tensor, end: Tensor) -> Tensor:
            start, end = (x.clamp(0, self.num_keys).flatten(1) for x in (start, end))
            return (before.gather(1, end) - before.gather(1, start)).clamp(min=0).view_as(window_start)[:, None]

        window = real_tokens(window_start, (self.row_slots() + 1).expand_as(window_start))
        first = self.first_slot[:, None, None].expand_as(window_start)
        sink = real_tokens(first, torch.minimum(window_start, first + self.num_sink_tokens))
        return (chosen + window + sink).flatten(2)[..., : self.num_queries]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the query blocks of a call lie, and where their searches end.

    Attributes:
        rows: Rows of a query block.
        count: Query blocks, N.
        window: The sliding window; with a smaller one, keys in the future of a block's first row would take part in
            its choice.
        last_end: End of the last block's search where nothing is padded, a slot, exclusive.
        first_slot: First real token of each batch row, int64 `(B,)`.
        real_end: Slot after the last real token of each batch row, int64 `(B,)`.
        block_slot: Slot of the first row of each block, int64 `(N,)`.
        real_rows: Rows of each block that are neither past the end nor right padding, at least 1: int64 `(B, N)`.
        search_end: End of each block's search, a slot, exclusive: int64 `(B, N)`.
    """

    rows: int
    count: int
    window: int
    last_end: int
    first_slot: Tensor
    real_end: Tensor
    block_slot: Tensor
    real_rows: Tensor
    search_end: Tensor

    def nodes(self, top_k: int, block_size_k: int, num_sink_tokens: int) -> int:
        """Key blocks to choose: as many as top_k holds, or all there are."""
        return min(-(-top_k // block_size_k), -(-max(0, self.last_end - num_sink_tokens) // block_size_k))


def layout(query: Tensor, key: Tensor, block_size_q: int, sliding_window: int, attention_mask: Tensor | None) -> Layout:
    """The `Layout` of a call."""
    batch, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    device = query.device
    window = max(sliding_window, block_size_q - 1)
    rows = min(block_size_q, num_queries)
    count = -(-num_queries // rows)
    block_slot = num_keys - num_queries + rows * torch.arange(count, device=device)
    real_end = torch.full((batch,), num_keys, device=device)
    if attention_mask is not None:
        real_end = (attention_mask * torch.arange(1, num_keys + 1, device=device)).amax(1)
    real_rows = (real_end[:, None] - block_slot).clamp(1, rows)
    return Layout(
        rows,
        count,
        window,
        num_keys - window,
        first_real_slot(attention_mask, batch, device),
        real_end,
        block_slot,
        real_rows,
        block_slot + real_rows - window,
    )


def first_real_slot(attention_mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Slot of the first True of each row, int64 `(B,)`; 0 where there is no mask."""
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    return attention_mask.to(torch.uint8).argmax(1)


def only_real(slots: Tensor, attention_mask: Tensor | None, num_keys: int) -> Tensor:
    """Slots `(B or 1, ...)`, with `NOWHERE` for those outside the keys or without a real token."""
    real = (slots >= 0) & (slots < num_keys)
    if attention_mask is not None:
        inside = slots.clamp(0, num_keys - 1).expand(attention_mask.shape[0], *slots.shape[1:])
        real = real & attention_mask.gather(1, inside.flatten(1)).view_as(inside)
    return torch.where(real, slots, NOWHERE)
