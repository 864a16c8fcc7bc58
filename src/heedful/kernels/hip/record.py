"""What HiPAttention keeps of a layer: the choice of keys that decoding goes on with, and counts for the report."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from heedful.attention import HiPMask
from heedful.attention.hip.decode import HiPDecodeState
from heedful.kernels.hip.exact import products

# Latest keys by which a batch row is known again after beam search has reordered the cache. In the first layer a key says
# no more than its token and position, and beams share tokens: those back to where the choice was made should differ.
TAIL = 16


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice of keys, how many steps it has served, and the latest keys it saw of each sample: (B, tail, D)."""

    mask: HiPMask
    uses: int
    tail: Tensor

    def for_rows_of(self, key: Tensor, padded: bool) -> Choice | None:
        """The choice for a call's keys `(B, Hkv, T, D)`; None if the cache was split or cropped since.

        padded: Whether the call has a padding mask; with another kind than the choice had, it is another sequence.
        """
        batch, then = key.shape[0], self.mask.num_keys
        if (
            batch != self.mask.blocks.shape[0]
            or key.shape[2] <= then
            or padded != (self.mask.attention_mask is not None)
        ):
            return None
        if batch == 1:
            return self
        # Beam search reorders the cache between steps: the row whose latest keys are these keys made the choice.
        same = (key[:, None, 0, then - self.tail.shape[1] : then] == self.tail).flatten(2).all(-1)
        row = (2 * same + torch.eye(batch, device=same.device)).argmax(1)
        real = self.mask.attention_mask
        mask = dataclasses.replace(
            self.mask,
            blocks=self.mask.blocks[row],
            search_end=self.mask.search_end[row],
            attention_mask=None if real is None else real[row],
        )
        return dataclasses.replace(self, mask=mask)


class DeviceChoice:
    """The choice of a layer in buffers that never move, for steps that must not ask the host, and their counts.

    Attributes:
        state: The operator's `HiPDecodeState`.
        latest: `(B, TAIL, D)`, the first key head's keys of the tokens that were last, by which a row is known again.
        counts: int64 `(3,)`: keys read, keys visible, refreshes; those of the layer's `Tally`, to which this adds.
    """

    def __init__(self, state: HiPDecodeState, key: Tensor, counts: Tensor, smaller: DeviceChoice | None = None) -> None:
        """`smaller`: The choice so far, of a state with less room."""
        self.state, self.counts = state, counts
        self.latest = key.new_full((len(key), TAIL, key.shape[3]), torch.nan)
        if smaller is not None:
            state.blocks[..., : smaller.state.nodes] = smaller.state.blocks
            state.chosen_at.copy_(smaller.state.chosen_at)
            state.refreshes.copy_(smaller.state.refreshes)
            self.latest.copy_(smaller.latest)

    def fits(self, batch: int, heads: int, dtype: torch.dtype) -> bool:
        return (self.state.batch, self.state.heads, self.latest.dtype) == (batch, heads, dtype)

    @torch.no_grad()
    def recognise(self, key: Tensor, lengths: Tensor) -> None:
        """Gives each row the choice of the row that it continues; a row that continues none has none."""
        before = _latest(key, lengths - 1)
        same = (before[:, None] == self.latest).flatten(2).all(-1)  # (B, B)
        if len(same) > 1:
            self.state.reorder((2 * same + torch.eye(len(same), device=same.device)).argmax(1))
        self.state.chosen_at.masked_fill_(~same.any(1)[:, None], -1)
        self.latest.copy_(_latest(key, lengths))

    @torch.no_grad()
    def count(self, lengths: Tensor, first_real: Tensor, chosen_before: Tensor) -> None:
        """Counts a step, on the device. `chosen_before`: `state.chosen_at` as it was."""
        state = self.state
        visible = lengths - first_real
        age = lengths - state.chosen_at[:, 0]
        most = state.num_sink_tokens + state.nodes * state.block_size_k + state.sliding_window + age
        read = torch.minimum(visible, most)  # the last block chosen may reach into the window: a token or two less
        refreshed = (state.chosen_at != chosen_before).any()
        self.counts.add_(torch.stack((read.sum() * state.heads, visible.sum() * state.heads, refreshed)))


def _latest(key: Tensor, lengths: Tensor) -> Tensor:
    """The first key head's keys of the last tokens of rows of these lengths: `(B, TAIL, D)`."""
    slots = (lengths[:, None] + torch.arange(-TAIL, 0, device=key.device)).clamp(min=0)
    return key[:, 0].gather(1, slots[..., None].expand(-1, -1, key.shape[3]))


@dataclasses.dataclass
class Tally:
    """What happened on one layer. Sums stay on the device until they are asked for."""

    dense_calls: int = 0
    refreshes: int = 0
    keys_read: int | Tensor = 0
    keys_visible: int | Tensor = 0
    mass: float | Tensor = 0.0
    mass_rows: int | Tensor = 0
    on_device: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict)

    def counts(self, device: torch.device) -> Tensor:
        """What `DeviceChoice` adds to: one tensor for all sequences, in a place that captured graphs know."""
        if device not in self.on_device:
            self.on_device[device] = torch.zeros(3, dtype=torch.int64, device=device)
        return self.on_device[device]

    @torch.no_grad()
    def count(self, mask: HiPMask) -> None:
        batch, heads = mask.blocks.shape[:2]
        real = mask.attention_mask
        if real is None:
            real = torch.ones(batch, mask.num_keys, dtype=torch.bool, device=mask.blocks.device)
        visible = (real.cumsum(1) * real)[:, mask.num_keys - mask.num_queries :]
        self.keys_visible = self.keys_visible + heads * visible.sum()
        self.keys_read = self.keys_read + (mask.keys_read() * (visible > 0)[:, None]).sum()

    @torch.no_grad()
    def count_mass(
        self, query: Tensor, key: Tensor, mask: HiPMask, scale: float, softcap: float | None, rows: int
    ) -> None:
        """Adds the softmax mass that the chosen keys hold of dense attention, on `rows` rows of the later half."""
        if rows == 0 or mask.num_queries == 0:
            return
        last = mask.num_queries - 1
        row = torch.linspace(last // 2, last, min(rows, last + 1), device=query.device).round().long()
        logits = products(query[:, :, row], key) * scale  # (B, Hq, R, Tk)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        slots = torch.arange(mask.num_keys, device=query.device)
        at = mask.num_keys - mask.num_queries + row
        visible = (slots <= at[:, None])[None]
        if mask.attention_mask is not None:
            visible = visible & mask.attention_mask[:, None]
        weights = logits.masked_fill_(~visible[:, None], -torch.inf).softmax(-1)
        kept = (weights * _attended(mask, row)).sum(-1)
        real = visible.any(-1) if mask.attention_mask is None else mask.attention_mask[:, at]
        real = real[:, None].expand_as(kept)
        self.mass = self.mass + torch.where(real, kept, 0).double().sum()
        self.mass_rows = self.mass_rows + real.sum()

    def summary(self) -> dict[str, Any]:
        read, visible, refreshes = int(self.keys_read), int(self.keys_visible), self.refreshes
        for counts in self.on_device.values():
            here = counts.tolist()
            read, visible, refreshes = read + here[0], visible + here[1], refreshes + here[2]
        sampled = int(self.mass_rows)
        return {
            "keys_read": read,
            "keys_visible": visible,
            "share_of_keys_read": read / visible if visible else 1.0,
            "mass_kept": float(self.mass) / sampled if sampled else None,
            "refreshes": refreshes,
            "dense_calls": self.dense_calls,
        }


def _attended(mask: HiPMask, row: Tensor) -> Tensor:
    """Which keys some rows of a mask attend to: bool `(B, Hq, R, Tk)`."""
    batch, heads = mask.blocks.shape[:2]
    block = row // mask.block_size_q
    some = dataclasses.replace(mask, blocks=mask.blocks[:, :, block], search_end=mask.search_end[:, block])
    tokens = some.block_tokens().clamp(max=mask.num_keys)  # NOWHERE: a place past the end, which is dropped
    chosen = torch.zeros(batch, heads, len(row), mask.num_keys + 1, dtype=torch.bool, device=row.device)
    chosen = chosen.scatter_(-1, tokens, True)[..., :-1]
    slots = torch.arange(mask.num_keys, device=row.device)
    at = mask.num_keys - mask.num_queries + row
    start = mask.window_starts()[:, block, row % mask.block_size_q][:, None, :, None]
    first = mask.first_slot[:, None, None, None]
    sink = (slots >= first) & (slots < first + mask.num_sink_tokens)
    return (chosen | sink | (slots >= start)) & (slots <= at[:, None])
