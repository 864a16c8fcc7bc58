"""Bounded positions: HiP attention beyond the length that a model was trained on, as in InfiniteHiP (arXiv 2502.08910).

A rotated key says how far away it is. Beyond the training length no head has ever seen such a distance, so keys are
turned to positions that it has seen. In the search all keys stand at position 0 and the queries one window later: they
are ranked by what they hold. In the attention the chosen keys take consecutive positions that end where the window
begins ("streaming"); the window keeps its own. Rotations compose, so the cache stays as it is: a key that was turned by
its own position is turned on by the difference. Query and key are moved by the same rule, only distances matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from heedful.attention import HiPMask, hip_attention
from heedful.attention.hip import reference
from heedful.attention.hip.decode import HiPDecodeState, _slots
from heedful.attention.hip.mask import NOWHERE, Stage, only_real
from heedful.kernels.hip.exact import best_blocks, due, renew, without_autocast
from heedful.seam import AttentionCall
from heedful.seam.call import is_recording

# Elements of the largest temporary of one chunk of query blocks.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_GPU = 1 << 22, 1 << 26

# Attention that is known to turn the first channels of every layer's queries and keys in two halves. Others have layers
# without rotation, pairs of neighbouring channels, or channels at the end, which a call does not tell.
_KNOWN = frozenset(
    f"{name}Attention"
    for name in (
        "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2", "Gemma3", "Phi3",
        "Olmo2", "Granite", "GptOss", "Starcoder2", "SeedOss", "Phi", "StableLm",
    )
)  # fmt: skip
_FIXED = ("default", "linear", "llama3", "yarn", "proportional")  # frequencies that do not change with the length


class Rotation:
    """A layer's rotary position embedding: turns queries and keys from one position to another.

    Attributes:
        frequencies: float32 `(R / 2,)`, radians a token, of the channel pairs (i, i + R / 2); what comes after the first
            R channels is not turned.
        factor: What the model multiplies its cos and sin by (YaRN).
    """

    def __init__(self, frequencies: Tensor, factor: float = 1.0) -> None:
        self.frequencies, self.factor = frequencies, factor

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> Rotation:
        """That of an attention module of transformers.

        Raises:
            ValueError: If the module's attention or its kind of rotation is not known here.
        """
        config: Any = module.config
        kind = type(module).__name__
        parameters = getattr(config, "rope_parameters", None)
        if kind not in _KNOWN or not parameters:
            raise ValueError(
                f"{kind}: how this attention turns its keys is not known, so they cannot be moved to other positions. "
                "Use HiPAttention without trained_length."
            )
        layer_type = None
        if "rope_theta" not in parameters and "rope_type" not in parameters:  # one for each type of layer
            layer_type = config.layer_types[module.layer_idx]
            parameters = parameters[layer_type]
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in _FIXED:
            raise ValueError(
                f"{kind}: rotary embeddings of type {rope_type!r} change with the length of the context, so keys cannot "
                "be moved to other positions. Use HiPAttention without trained_length."
            )
        if rope_type != "default":
            given = {} if layer_type is None else {"layer_type": layer_type}
            frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, device, **given)
            return cls(frequencies.float(), factor)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = int(width * parameters.get("partial_rotary_factor", 1.0))
        channel = torch.arange(0, width, 2, dtype=torch.float, device=device)
        return cls(1.0 / parameters["rope_theta"] ** (channel / width))

    def check(self, rotary: tuple[Tensor, Tensor] | None, positions: Tensor, real: Tensor, layer: int) -> None:
        """Raises unless this is what the model itself computed for tokens at `positions (B, T)`, where `real`."""
        fits = rotary is not None and rotary[0].dim() == 3 and rotary[0].shape[1] == positions.shape[1]
        if fits:
            assert rotary is not None
            angle = self._angle(positions)
            close = 3e-3 if rotary[0].dtype == torch.float32 else 3e-2
            for given, mine in zip(rotary, (angle.cos(), angle.sin()), strict=True):
                half = given[..., : mine.shape[-1]]
                fits = fits and half.shape[-1] == mine.shape[-1]
                fits = fits and bool((((half - self.factor * mine).abs() < close) | ~real[..., None]).all())
        if not fits:
            raise ValueError(
                f"layer {layer}: the model's rotary embedding is not the one that its config describes for these "
                "positions, so keys cannot be moved to other positions. Use HiPAttention without trained_length."
            )

    def _angle(self, positions: Tensor) -> Tensor:
        return positions[..., None].float() * self.frequencies  # in float32, as the model did it: then it cancels

    def move(self, x: Tensor, source: Tensor, target: Tensor | int) -> Tensor:
        """Turns `x (..., D)`, that stands at positions `source (...)`, to positions `target`; float32 or float64."""
        then = self._angle(source)
        cos, sin = then.cos(), -then.sin()
        if isinstance(target, Tensor):
            now = self._angle(target)
            cos, sin = now.cos() * cos - now.sin() * sin, now.sin() * cos + now.cos() * sin
        elif target != 0:
            raise ValueError("a number as target must be 0")
        return _turn(x.to(torch.promote_types(x.dtype, torch.float32)), cos, sin)

    def place(self, x: Tensor, target: Tensor, most: int) -> Tensor:
        """Turns `x (..., D)`, that stands at 0, to positions `target (...)` from `-most` to 0."""
        table = self._angle(torch.arange(-most, 1, device=x.device))
        place = target + most
        return _turn(x, table.cos()[place], table.sin()[place])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (i, i + R / 2) of `x (..., D)` by angles whose cos and sin are `(..., R / 2)`."""
    half = cos.shape[-1]
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned = (torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin))
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, -1)


def offsets(call: AttentionCall, real: Tensor) -> Tensor:
    """Position minus slot of each batch row's tokens, int64 `(B,)`.

    real: Bool `(B, total)`.

    Raises:
        ValueError: If the call does not say its positions, or they are not consecutive.
    """
    rows = real[:, real.shape[1] - call.query.shape[2] :]
    slot = torch.arange(real.shape[1] - rows.shape[1], real.shape[1], device=real.device)
    apart = _positions(call) - slot
    last = (rows * torch.arange(1, rows.shape[1] + 1, device=rows.device)).argmax(1, keepdim=True)
    offset = apart.gather(1, last)
    if bool(((apart != offset) & rows).any()):
        raise ValueError(
            f"layer {call.layer}: the positions of a row do not count up one by one, so keys cannot be moved to others. "
            "Use HiPAttention without trained_length."
        )
    return offset[:, 0]


def place(call: AttentionCall) -> Tensor:
    """The position of a decode step's token, `(B,)`."""
    return _positions(call)[:, -1]


def _positions(call: AttentionCall) -> Tensor:
    if call.positions is None:
        raise ValueError(
            f"layer {call.layer}: the model does not say the positions of its tokens, so keys cannot be moved to others. "
            "Pass position_ids, or use HiPAttention without trained_length."
        )
    return call.positions


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    offset: Tensor,
    rotation: Rotation,
    trained_length: int,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    **sizes: Any,
) -> tuple[Tensor, HiPMask | None, HiPMask | None]:
    """HiP attention of many rows: blocks whose last row is beyond `trained_length` with bounded positions.

    Shapes as in `hip_attention`; `offset (B,)` as from `offsets`. Returns the output and the masks of the first and of
    the last rows; behind left padding some rows may be in both.
    """
    batch, _, queries, _ = query.shape
    keys, stages = key.shape[2], sizes.get("stages")
    rows = min(sizes["block_size_q"], queries)
    count = -(-queries // rows)
    ends = (torch.arange(1, count + 1, device=query.device) * rows).clamp(max=queries) + keys - queries
    first = (
        torch.zeros(batch, dtype=torch.long, device=query.device) if real is None else real.to(torch.uint8).argmax(1)
    )
    beyond = ends - first[:, None] > trained_length  # (B, N)
    some, every = int((~beyond.any(0)).sum()), int((~beyond.all(0)).sum())  # where the first begins, the last has begun
    near, far, near_mask, far_mask = None, None, None, None
    if every > 0:  # exactly as without an extension
        end = min(every * rows, queries)
        upto = keys - queries + end
        near, near_mask = hip_attention(
            query[:, :, :end], key[:, :, :upto], value[:, :, :upto], return_mask=True,
            attention_mask=None if real is None else real[:, :upto],
            scale=scale, softcap=softcap, sink_logits=sink_logits, **sizes,
        )  # fmt: skip
    if some < count:
        late = query[:, :, some * rows :]
        own = torch.arange(keys, device=query.device) + offset[:, None]  # (B, Tk)
        bare = rotation.move(key, own[:, None], 0)
        window = max(sizes["sliding_window"], (stages[0][0] if stages else sizes["block_size_q"]) - 1)
        place = own[:, None, keys - late.shape[2] :]
        seeking = rotation.move(late, place, torch.full_like(place, window))
        # Only the choice is used; a few columns of the values keep the rest of the call small.
        dtype = query.dtype
        _, far_mask = hip_attention(
            seeking.to(dtype), bare.to(dtype), value[..., :16], return_mask=True, attention_mask=real, **sizes
        )
        far = attend(late, key, bare, value, far_mask, offset, rotation, scale, softcap, sink_logits)
    if near is None or far is None:
        output = near if far is None else far
        assert output is not None
        return output, near_mask, far_mask
    begin = some * rows
    both = beyond[:, some:every].repeat_interleave(rows, 1)[:, None, : near.shape[2] - begin, None]
    overlap = near.shape[2] - begin
    mixed = torch.where(both, far[:, :, :overlap], near[:, :, begin:])
    return torch.cat((near[:, :, :begin], mixed, far[:, :, overlap:]), 2), near_mask, far_mask


@without_autocast
def attend(
    query: Tensor,
    key: Tensor,
    bare: Tensor,
    value: Tensor,
    mask: HiPMask,
    offset: Tensor,
    rotation: Rotation,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention to what `mask` chose, the chosen keys at consecutive positions before the window.

    `bare (B, Hkv, Tk, D)`: the keys at position 0. Sums are float32.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    rows, count, device = mask.block_size_q, mask.blocks.shape[2], query.device
    sinks = mask.first_slot[:, None] + torch.arange(mask.num_sink_tokens, device=device)
    sinks = only_real(sinks, mask.attention_mask, keys)[:, None, None]
    width = max(1, mask.sliding_window + rows - 1)
    places = mask.num_sink_tokens + mask.blocks.shape[3] * mask.block_size_k
    work = batch * heads * ((places + width) * rows + 3 * places * key.shape[3])
    step = max(1, (_CHUNK_ELEMENTS if device.type == "cpu" else _CHUNK_ELEMENTS_GPU) // work)
    outputs = []
    for lo in range(0, count, step):
        hi = min(count, lo + step)
        # (B, Hkv, G, c, b_q, D): the G query heads of a key head, blocks of rows.
        rotated = query[:, :, lo * rows : hi * rows]
        rotated = torch.nn.functional.pad(rotated, (0, 0, 0, (hi - lo) * rows - rotated.shape[2]))
        rotated = rotated.unflatten(2, (hi - lo, rows)).unflatten(1, (kv_heads, -1))
        slot = mask.row_slots(lo, hi)  # (c, b_q)
        start = mask.window_starts(lo, hi)  # (B, c, b_q)

        chosen = torch.cat((sinks.expand(-1, heads, hi - lo, -1), mask.block_tokens(lo, hi)), -1)  # (B, Hq, c, m)
        chosen = chosen.unflatten(1, (kv_heads, -1))
        listed = chosen < mask.search_end[:, None, None, lo:hi, None]
        target = listed.cumsum(-1) - 1 - listed.sum(-1, keepdim=True)  # -n .. -1; the window begins at 0
        source = (slot + offset[:, None, None])[:, None, None]
        away = rotation.move(rotated, source, (slot - start)[:, None, None])
        turned = rotation.place(_at(bare, chosen), target, places)
        far = _logits(away * scale, turned, chosen[..., None, :] < start[:, None, None, ..., None], softcap)

        window = slot[:, :1] + 1 - mask.sliding_window + torch.arange(width, device=device)  # (c, w)
        window = only_real(window.expand(batch, 1, 1, -1, -1), mask.attention_mask, keys)
        seen = (window[..., None, :] >= start[:, None, None, ..., None]) & (window[..., None, :] <= slot[..., None])
        near = _logits(rotated.to(far.dtype) * scale, _at(key, window).to(far.dtype), seen, softcap)

        far_values, near_values = (_at(value, at, 0).to(far.dtype) for at in (chosen, window))
        output = _weighted(far, far_values, near, near_values, sink_logits)
        outputs.append(output.to(query.dtype).flatten(1, 2).flatten(2, 3))
    return torch.cat(outputs, 2)[:, :, :queries]


@without_autocast
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    state: HiPDecodeState,
    offset: Tensor,
    rotation: Rotation,
    trained_length: int,
    *,
    refresh_interval: int,
    first_real: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    sample_method: str = "center",
    stages: Sequence[Stage] | None = None,
) -> Tensor:
    """`hip_decode`, with bounded positions for the rows that are beyond `trained_length`.

    `stages`: The staged scan instead of the tree; all `lengths` must be T then.

    While a graph is captured, and on a GPU with `sample_method="center"` and no stages, nothing is asked: what differs is
    decided on the device, and every step searches.
    """
    batch, kv_heads = key.shape[:2]
    beyond = (lengths - first_real > trained_length).view(batch, 1, 1)
    here = (lengths - 1 + offset).view(batch, 1, 1)
    renewed = due(state, lengths, refresh_interval)
    chosen = None
    unasked = query.is_cuda and sample_method == "center" and stages is None
    if state.nodes and (is_recording(query) or unasked or bool(renewed.any())):
        chosen = _choose(query, key, lengths, state, first_real, offset, rotation, beyond, here, sample_method, stages)
    renew(state, chosen, renewed, lengths)

    reach = min(max(1, state.sliding_window + refresh_interval - 1), key.shape[2])
    slots, visible = _slots(state, lengths, first_real, reach)
    places = state.num_sink_tokens + state.nodes * state.block_size_k
    slots = torch.where(visible, slots, (lengths - 1)[:, None, None]).unflatten(1, (kv_heads, -1))
    visible = visible.unflatten(1, (kv_heads, -1))[..., None, :]
    chosen, window = slots[..., :places], slots[..., places:]
    listed = visible[..., 0, :places]
    rank = listed.cumsum(-1) - 1 - listed.sum(-1, keepdim=True)
    own = chosen + offset.view(batch, 1, 1, 1)
    chosen_at = state.chosen_at.long().repeat_interleave(state.head_group_size, 1)[..., None]  # (B, Hq, 1)
    start = torch.maximum(
        torch.minimum(lengths[:, None, None], chosen_at) - state.sliding_window, first_real[:, None, None]
    )
    target = torch.where(beyond, (lengths - 1)[:, None, None] - start, here)
    away = rotation.move(query, here.expand_as(target), target).unflatten(1, (kv_heads, -1))
    turned = rotation.move(_at(key, chosen), own, torch.where(beyond[..., None], rank, own))
    far = _logits(away * scale, turned, visible[..., :places], softcap)
    rows = query.unflatten(1, (kv_heads, -1)).to(far.dtype) * scale
    near = _logits(rows, _at(key, window).to(far.dtype), visible[..., places:], softcap)
    far_values, near_values = (_at(value, at).to(far.dtype) for at in (chosen, window))
    far, far_values, near, near_values = (x[:, :, :, None] for x in (far, far_values, near, near_values))
    output = _weighted(far, far_values, near, near_values, sink_logits)[:, :, :, 0]
    return output.to(query.dtype).flatten(1, 2)


@torch.no_grad()
def _choose(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    state: HiPDecodeState,
    first_real: Tensor,
    offset: Tensor,
    rotation: Rotation,
    beyond: Tensor,
    here: Tensor,
    sample_method: str,
    stages: Sequence[Stage] | None,
) -> Tensor:
    """The search of one row, by the tree over keys that are turned as they are read: int32 `(B, S, n)`."""
    batch, heads = query.shape[:2]
    kv_heads, size = key.shape[1], state.block_size_k
    target = torch.where(beyond, state.sliding_window, here)
    seeking = rotation.move(query, here.expand(-1, heads, -1), target.expand(-1, heads, -1))  # (B, Hq, 1, D)
    if sample_method == "oracle" or stages is not None:
        slot = torch.arange(key.shape[2], device=key.device)
        own = slot + offset[:, None, None]
        moved = rotation.move(key, own, torch.where(beyond, 0, own))
        if stages is None:
            return best_blocks(seeking, moved, lengths, state, first_real)
        choice = reference.choose_in_stages(
            seeking, moved, stages=stages, top_k=state.nodes * size, sliding_window=state.sliding_window,
            num_sink_tokens=state.num_sink_tokens, head_group_size=state.head_group_size,
            attention_mask=slot >= first_real[:, None],
        )  # fmt: skip
        found = choice.blocks[:, :: state.head_group_size, 0]
        return torch.nn.functional.pad(found, (0, state.nodes - found.shape[-1]), value=-1)
    origin = (first_real + state.num_sink_tokens).view(batch, 1, 1, 1)
    end = (lengths - state.sliding_window).view(batch, 1, 1, 1)
    within = torch.arange(0, size, state.block_stride_k, device=key.device)

    def score(block: Tensor) -> Tensor:
        slots = ((origin + block * size)[..., None] + within).flatten(-2)[:, :, 0]  # (B, Hq, m)
        hidden = slots >= end[..., 0]
        slots = slots.clamp(max=key.shape[2] - 1).unflatten(1, (kv_heads, -1))
        own = slots + offset.view(batch, 1, 1, 1)
        keys = rotation.move(_at(key, slots), own, torch.where(beyond[..., None], 0, own)).flatten(1, 2)
        scores = (seeking @ keys.mT)[:, :, 0].masked_fill(hidden, torch.finfo(seeking.dtype).min)
        return reference.by_group(scores.unflatten(-1, (-1, len(within))).amax(-1), state.head_group_size)[:, :, None]

    available = (((end - origin).clamp(min=0) + size - 1) // size).expand(-1, heads, 1, 1)
    start, width = reference.tree(score, available, state.nodes, state.rounds, sample_method, None)  # type: ignore[arg-type]
    chosen = torch.where(width > 0, start, key.shape[2]).sort(-1).values
    return torch.where(chosen < key.shape[2], chosen, -1)[:, :: state.head_group_size, 0].int()


def _at(x: Tensor, slots: Tensor, missing: float | None = None) -> Tensor:
    """Rows of `x (B, Hkv, T, D)` at `slots (B, Hkv or 1, ...)`: `(B, Hkv, ..., D)`; `missing` at NOWHERE, or any row."""
    batch, heads, length, _ = x.shape
    shape = (batch, heads, *[1] * (slots.ndim - 2))
    row = torch.arange(batch, device=x.device).view(batch, *shape[2:], 1)
    head = torch.arange(heads, device=x.device).view(1, heads, *shape[2:])
    found = x[row, head, slots.clamp(max=length - 1)]
    return found if missing is None else found.masked_fill((slots == NOWHERE)[..., None], missing)


def _logits(query: Tensor, key: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    logits = query @ key.mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~visible, -torch.inf)


def _weighted(far: Tensor, far_values: Tensor, near: Tensor, near_values: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Values by one softmax over two sets of logits `(B, Hkv, G, c, r, keys)`; 0 for rows of -inf; sinks take a share."""
    with torch.no_grad():
        peak = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True)).clamp(
            min=torch.finfo(far.dtype).min
        )
        if sink_logits is not None:
            sink_logits = sink_logits.to(far.dtype).view(1, far.shape[1], -1, 1, 1, 1)
            peak = torch.maximum(peak, sink_logits)
    far, near = (far - peak).exp(), (near - peak).exp()
    total = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + (sink_logits - peak).exp()
    return (far @ far_values + near @ near_values) / total.masked_fill(total == 0, 1.0)
