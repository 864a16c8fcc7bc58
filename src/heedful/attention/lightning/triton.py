"""Lightning Attention-2 in Triton, forward and backward.

One pair of kernels does everything. `_outputs` walks over a segment of a sequence, tile by tile: inside the tile the
quadratic form, from all before it the D x E state, which stays in registers. Segments of one sequence run side by side,
each from its own start state: `_segment_states` sums what a segment adds, `_scan` carries the sums along. With enough
sequences and heads to fill the device there is one segment, and nothing is read twice.

The gradients are the same operator with the roles exchanged (o = f(q, k, v), M the decay):

    dq_i = sum_{j <= i} M_ij (do_i . v_j) k_j      f(do, v, k), state transposed
    dv_j = sum_{i >= j} M_ij (k_j . q_i) do_i      f(k, q, do), backwards in time
    dk_j = sum_{i >= j} M_ij (v_j . do_i) q_i      f(v, do, q), backwards in time, state transposed

Backwards in time is a negative stride, and a state that has been decayed to the row before (the forward state is that of
its last row): its first and last values are then the gradients of the final and the initial state.

Only differences of positions are exponentiated, so no exponent is ever positive.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from heedful.attention.interpreter import INTERPRETED
from heedful.attention.lightning.reference import real_bounds

_UNSPECIALISED = ["length", "segments", "segment_length"]


@triton.jit
def _locate(bounds, table, segment, segments, length, MASKED: tl.constexpr, PACKED: tl.constexpr):
    """The sequence a segment is of, its number in it, the sequence's batch row, first token and number of tokens."""
    if PACKED:
        sequence = tl.load(table + segment * 2)
        index = tl.load(table + segment * 2 + 1)
        row = sequence * 0
    else:
        sequence = segment // segments
        index = segment % segments
        row = sequence
    if PACKED or MASKED:
        start = tl.load(bounds + sequence * 2)
        count = tl.load(bounds + sequence * 2 + 1) - start
    else:
        start = length * 0
        count = length
    return sequence, index, row.to(tl.int64), start, count


@triton.jit
def _token(tensor, row, head, token, stride_b, stride_h, stride_t):
    """Pointer to a token's vector. Inside a tile offsets are 32 bits: a pointer for each element would fill the registers."""
    return tensor + row * stride_b + head.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _segment_states(
    key,
    value,
    mask,
    bounds,
    table,
    decay,
    states,
    length,
    segments,
    segment_length,
    stride_key_b,
    stride_key_h,
    stride_value_b,
    stride_value_h,
    HEADS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    STRIDE_KEY_T: tl.constexpr,
    STRIDE_VALUE_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    REVERSE: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each segment but a sequence's last adds to the state: fp32 `(segments, Hq, D, E)`."""
    SPLITS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(0) // SPLITS % HEADS
    segment = tl.program_id(0) // (SPLITS * HEADS)
    _, index, row, start, count = _locate(bounds, table, segment, segments, length, MASKED, PACKED)
    first = index * segment_length
    if first + segment_length >= count:
        return
    rate = tl.load(decay + head) * 1.4426950408889634
    # Beyond 2^-150 a float32 weight is zero: the tokens before that add nothing.
    reach = tl.minimum(tl.where(rate > 0, 152 / rate, 3e9), segment_length.to(tl.float32)).to(tl.int32)
    begin = first + (segment_length - reach) // BLOCK_T * BLOCK_T

    dims = tl.arange(0, BLOCK_D)
    columns = split * BLOCK_E + tl.arange(0, BLOCK_E)
    at = tl.arange(0, BLOCK_T)
    if REVERSE:
        token = start + count - 1 - begin
        along = -at
        behind = BLOCK_T - at
    else:
        token = start + begin
        along = at
        behind = BLOCK_T - 1 - at
    kept = tl.exp2(-rate * behind)
    whole = tl.exp2(-rate * BLOCK_T)
    key_offset = along[:, None] * STRIDE_KEY_T + dims[None, :]
    value_offset = along[:, None] * STRIDE_VALUE_T + columns[None, :]
    key = _token(key, row, head // KEY_GROUP, token, stride_key_b, stride_key_h, STRIDE_KEY_T)
    value = _token(value, row, head // VALUE_GROUP, token, stride_value_b, stride_value_h, STRIDE_VALUE_T)
    tile = tl.cast(-BLOCK_T if REVERSE else BLOCK_T, tl.int64)
    state = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    for _ in range(begin, first + segment_length, BLOCK_T):
        if MASKED:
            real = tl.load(mask + row * length + token + along)[:, None] != 0
            token += tile.to(tl.int32)
            k = tl.load(key + key_offset, mask=real & (dims < D)[None, :], other=0.0)
            v = tl.load(value + value_offset, mask=real & (columns < E)[None, :], other=0.0)
        else:
            k = tl.load(key + key_offset, mask=None if D == BLOCK_D else (dims < D)[None, :])
            v = tl.load(value + value_offset, mask=None if E % BLOCK_E == 0 else (columns < E)[None, :])
        v = (v * kept[:, None]).to(k.dtype)
        state = tl.dot(tl.trans(k), v, state * whole, input_precision=PRECISION)
        key += tile * STRIDE_KEY_T
        value += tile * STRIDE_VALUE_T
    place = states + (segment.to(tl.int64) * HEADS + head) * (D * E)
    inside = (dims < D)[:, None] & (columns < E)[None, :]
    tl.store(place + dims[:, None] * E + columns[None, :], state, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _scan(
    states,
    initial,
    bounds,
    firsts,
    decay,
    length,
    segments,
    segment_length,
    stride_initial_d,
    stride_initial_e,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """In place: from what each segment adds to the state that it starts from."""
    block = tl.program_id(0) % ((D * E + BLOCK - 1) // BLOCK)
    head = tl.program_id(0) // ((D * E + BLOCK - 1) // BLOCK) % HEADS
    sequence = tl.program_id(0) // ((D * E + BLOCK - 1) // BLOCK * HEADS)
    if PACKED:
        first = tl.load(firsts + sequence)
    else:
        first = sequence * segments
    if PACKED or MASKED:
        count = tl.load(bounds + sequence * 2 + 1) - tl.load(bounds + sequence * 2)
    else:
        count = length
    whole = tl.exp2(-tl.load(decay + head) * 1.4426950408889634 * segment_length)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < D * E
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        place = initial + (sequence.to(tl.int64) * HEADS + head) * (D * E)
        state = tl.load(place + at // E * stride_initial_d + at % E * stride_initial_e, mask=inside, other=0.0)
    place = states + (first.to(tl.int64) * HEADS + head) * (D * E) + at
    for _ in tl.range(0, tl.cdiv(count, segment_length) - 1, num_stages=4):
        added = tl.load(place, mask=inside, other=0.0)
        tl.store(place, state, mask=inside)
        state = state * whole + added
        place += HEADS * D * E
    tl.store(place, state, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _outputs(
    query,
    key,
    value,
    output,
    mask,
    bounds,
    table,
    decay,
    states,
    initial,
    final,
    scale,
    length,
    segments,
    segment_length,
    stride_query_b,
    stride_query_h,
    stride_key_b,
    stride_key_h,
    stride_value_b,
    stride_value_h,
    stride_output_b,
    stride_output_h,
    stride_state_d,
    stride_state_e,
    stride_final_d,
    stride_final_e,
    HEADS: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    STRIDE_QUERY_T: tl.constexpr,
    STRIDE_KEY_T: tl.constexpr,
    STRIDE_VALUE_T: tl.constexpr,
    STRIDE_OUTPUT_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    REVERSE: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATES: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    FINAL_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A segment's rows of the output, and from a sequence's last segment the final state."""
    SPLITS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(0) // SPLITS % HEADS
    segment = tl.program_id(0) // (SPLITS * HEADS)
    sequence, index, row, start, count = _locate(bounds, table, segment, segments, length, MASKED, PACKED)
    first = index * segment_length
    if (first >= count) & (index > 0):
        return
    last = tl.minimum(first + segment_length, count)
    rate = tl.load(decay + head) * 1.4426950408889634

    dims = tl.arange(0, BLOCK_D)
    columns = split * BLOCK_E + tl.arange(0, BLOCK_E)
    in_state = (dims < D)[:, None] & (columns < E)[None, :]
    if HAS_STATES:
        place = states + (segment.to(tl.int64) * HEADS + head) * (D * E)
        place += dims[:, None] * stride_state_d + columns[None, :] * stride_state_e
        state = tl.load(place, mask=in_state, other=0.0)
    elif HAS_INITIAL:
        place = initial + (sequence.to(tl.int64) * HEADS + head) * (D * E)
        place += dims[:, None] * stride_state_d + columns[None, :] * stride_state_e
        state = tl.load(place, mask=in_state, other=0.0)
    else:
        state = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)

    at = tl.arange(0, BLOCK_T)
    if REVERSE:
        token = start + count - 1 - first
        along = -at
        ahead = at
    else:
        token = start + first
        along = at
        ahead = at + 1
    query_offset = along[:, None] * STRIDE_QUERY_T + dims[None, :]
    key_offset = along[:, None] * STRIDE_KEY_T + dims[None, :]
    value_offset = along[:, None] * STRIDE_VALUE_T + columns[None, :]
    output_offset = along[:, None] * STRIDE_OUTPUT_T + columns[None, :]
    query = _token(query, row, head // QUERY_GROUP, token, stride_query_b, stride_query_h, STRIDE_QUERY_T)
    key = _token(key, row, head // KEY_GROUP, token, stride_key_b, stride_key_h, STRIDE_KEY_T)
    value = _token(value, row, head // VALUE_GROUP, token, stride_value_b, stride_value_h, STRIDE_VALUE_T)
    output = _token(output, row, head, token, stride_output_b, stride_output_h, STRIDE_OUTPUT_T)
    tile = tl.cast(-BLOCK_T if REVERSE else BLOCK_T, tl.int64)

    distance = at[:, None] - at[None, :]
    within = tl.where(distance >= 0, tl.exp2(-rate * tl.maximum(distance, 0)), 0.0)
    from_state = tl.exp2(-rate * ahead)[:, None] * scale
    for begin in range(first, last, BLOCK_T):
        rows = tl.minimum(last - begin, BLOCK_T)
        inside = (at < rows)[:, None]
        if MASKED:
            real = tl.load(mask + row * length + token + along, mask=at < rows, other=0)[:, None] != 0
            token += tile.to(tl.int32)
        else:
            real = inside
        q = tl.load(query + query_offset, mask=real if D == BLOCK_D else real & (dims < D)[None, :], other=0.0)
        k = tl.load(key + key_offset, mask=real if D == BLOCK_D else real & (dims < D)[None, :], other=0.0)
        v = tl.load(value + value_offset, mask=real if E % BLOCK_E == 0 else real & (columns < E)[None, :], other=0.0)
        if q.dtype == tl.float16:  # a state of many tokens may be beyond float16
            before = tl.dot(q.to(tl.float32), state, input_precision="tf32")
        else:
            before = tl.dot(q, state.to(q.dtype), input_precision=PRECISION)
        weights = tl.dot(q, tl.trans(k), input_precision=PRECISION) * within
        # Not accumulated onto `before`: a chain of products would be laid out for half of the warps.
        within_tile = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        tl.store(
            output + output_offset,
            (within_tile * scale + before * from_state).to(output.dtype.element_ty),
            mask=inside if E % BLOCK_E == 0 else inside & (columns < E)[None, :],
        )
        # The state moves on by the rows there are, not by the tile: it stays that of the last token.
        behind = tl.maximum(rows - 1 - at, 0) + (1 if REVERSE else 0)
        v = (v * tl.exp2(-rate * behind)[:, None]).to(k.dtype)
        state = tl.dot(tl.trans(k), v, state * tl.exp2(-rate * rows), input_precision=PRECISION)
        query += tile * STRIDE_QUERY_T
        key += tile * STRIDE_KEY_T
        value += tile * STRIDE_VALUE_T
        output += tile * STRIDE_OUTPUT_T

    if HAS_FINAL and last == count:
        if FINAL_SCALE:
            state *= scale
        place = final + (sequence.to(tl.int64) * HEADS + head) * (D * E)
        place += dims[:, None] * stride_final_d + columns[None, :] * stride_final_e
        tl.store(place, state, mask=in_state)


class _Config(NamedTuple):
    block_t: int  # tokens of a tile
    block_e: int  # columns of the state that a program holds
    num_warps: int
    num_stages: int


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter's
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may take."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _config(dim: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[_Config, _Config]:
    """Of `_segment_states` and of `_outputs`."""
    block_e = max(16, triton.next_power_of_2(columns))
    if INTERPRETED:
        return _Config(32, block_e, 4, 1), _Config(32, block_e, 4, 1)
    if dtype == torch.float32:  # "ieee" products run on the plain units, out of registers
        narrow = _Config(16, 16, 8, 1) if dim > 128 else _Config(32, min(block_e, 32), 8, 1)
        return narrow, narrow
    memory = _shared_memory(device)
    if memory < 128 * 1024:  # consumer cards
        narrow = _Config(32, min(block_e, 32), 4, 2)
        return narrow, narrow
    if dim > 128:
        wide = _Config(64, min(block_e, 64 if memory > 180 * 1024 else 32), 8, 2)
        return wide, wide
    if block_e <= 64 or memory < 180 * 1024:
        return _Config(64, min(block_e, 64), 4, 3), _Config(64, min(block_e, 64), 4, 2)
    return _Config(64, 64, 4, 4), _Config(64, 128, 8, 3)


def _segment_length(lanes: int, tokens: int, slots: int) -> int:
    """Tokens of a segment, for `lanes` sequences and heads on a device that runs `slots` programs at a time.

    Long segments have few states to write and read, and the past of most heads decays to zero within one, so that little is
    read twice. The longest that fill the slots in whole rounds, if any do.
    """
    if INTERPRETED:
        return 64
    best, fill = 32768, 0.0
    for size in (32768, 16384, 8192, 4096, 2048, 1024):
        rounds = lanes * -(-tokens // size) / slots
        filled = rounds / math.ceil(rounds)
        if filled > 1.1 * fill:
            best, fill = size, filled
    return best


class _Plan(NamedTuple):
    """How the sequences are cut into segments, for all the kernels of a call."""

    sequences: int
    segments: int  # of a sequence, at most; of all of them if packed
    segment_length: int
    programs: int  # segments of all sequences
    bounds: Tensor | None  # int32 (sequences, 2): first token, and one past the last
    table: Tensor | None  # int32 (programs, 2): sequence, number in it
    firsts: Tensor | None  # int32 (sequences,): a sequence's first segment


def _plan(
    query: Tensor,
    columns: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_length: int | None = None,
) -> _Plan:
    batch, heads, length = query.shape[:3]
    main = _config(query.shape[3], columns, query.dtype, query.device)[1]
    slots = _multiprocessors(query.device) * (8 // main.num_warps)
    lanes = batch * heads * -(-columns // main.block_e)
    size = segment_length or _segment_length(lanes, length, slots)
    segments = -(-length // size)
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        bounds = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], 1).int()
        ends = ((bounds[:, 1] - bounds[:, 0] + (size - 1)) // size).clamp(min=1).cumsum(0)
        programs = segments + sequences
        firsts = torch.cat([ends.new_zeros(1), ends])[:-1]
        number = torch.arange(programs, device=query.device)
        sequence = torch.searchsorted(ends, number, right=True)
        spare = sequence >= sequences  # what lies past a sequence's end does nothing
        sequence = sequence.clamp(max=sequences - 1)
        index = torch.where(spare, (2**31 - 1) // size - 1, number - firsts[sequence])
        table = torch.stack([sequence, index], 1).int()
        return _Plan(sequences, programs, size, programs, bounds, table, firsts.int())
    rows = None if mask is None else real_bounds(mask).int()
    return _Plan(batch, segments, size, batch * segments, rows, None, None)


def _like(tensor: Tensor, heads: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """`(B, heads, T, columns)`, uninitialised, in memory as `tensor` is: heads before tokens or tokens before heads."""
    batch, _, length, _ = tensor.shape
    dtype = dtype or tensor.dtype
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((batch, length, heads, columns), dtype=dtype).transpose(1, 2)
    return tensor.new_empty((batch, heads, length, columns), dtype=dtype)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    mask: Tensor | None,
    decay: Tensor,
    plan: _Plan,
    scale: float,
    *,
    states: Tensor | None = None,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    transposed: bool = False,
    reverse: bool = False,
    configs: tuple[_Config, _Config] | None = None,
) -> Tensor | None:
    """`output = f(query, key, value)`, and `final` where it is given. Gives the start states of the segments, to be used
    again; `transposed`: `states`, `initial` and `final` are `(..., E, D)`."""
    heads, dim, columns = output.shape[1], query.shape[3], value.shape[3]
    summing, main = configs or _config(dim, columns, query.dtype, query.device)
    device = query.device
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    across = (1, dim) if transposed else (columns, 1)
    common = {"HEADS": heads, "D": dim, "E": columns}
    common |= {"MASKED": mask is not None, "PACKED": plan.table is not None}
    more = {"BLOCK_D": max(16, triton.next_power_of_2(dim)), "REVERSE": reverse, "PRECISION": precision}
    # The stride of a token is a constant of the model, not of the length; known, it costs no registers.
    strides = {"STRIDE_KEY_T": key.stride(2), "STRIDE_VALUE_T": value.stride(2)}
    groups = strides | {"KEY_GROUP": heads // key.shape[1], "VALUE_GROUP": heads // value.shape[1]}
    sizes = (query.shape[2], plan.segments, plan.segment_length)
    if plan.segments > 1 and states is None:
        assert not transposed
        states = torch.empty((plan.programs, heads, dim, columns), dtype=torch.float32, device=device)
        splits = -(-columns // summing.block_e)
        _segment_states[(plan.programs * heads * splits,)](
            key,
            value,
            mask,
            plan.bounds,
            plan.table,
            decay,
            states,
            *sizes,
            *key.stride()[:2],
            *value.stride()[:2],
            BLOCK_E=summing.block_e,
            BLOCK_T=summing.block_t,
            num_warps=summing.num_warps,
            num_stages=summing.num_stages,
            **common,
            **more,
            **groups,
        )
        block = 512
        _scan[(plan.sequences * heads * -(-dim * columns // block),)](
            states,
            initial,
            plan.bounds,
            plan.firsts,
            decay,
            *sizes,
            *across,
            BLOCK=block,
            HAS_INITIAL=initial is not None,
            num_warps=4,
            **common,
        )
    splits = -(-columns // main.block_e)
    _outputs[(plan.programs * heads * splits,)](
        query,
        key,
        value,
        output,
        mask,
        plan.bounds,
        plan.table,
        decay,
        states,
        initial,
        final,
        scale,
        *sizes,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *output.stride()[:2],
        *across,
        *across,
        BLOCK_E=main.block_e,
        BLOCK_T=main.block_t,
        STRIDE_QUERY_T=query.stride(2),
        STRIDE_OUTPUT_T=output.stride(2),
        QUERY_GROUP=heads // query.shape[1],
        HAS_STATES=states is not None,
        HAS_INITIAL=initial is not None,
        HAS_FINAL=final is not None,
        FINAL_SCALE=reverse,
        num_warps=main.num_warps,
        num_stages=main.num_stages,
        **common,
        **more,
        **groups,
    )
    return states


def _contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    """Copies where a row's elements are apart, or tokens too far apart for offsets of 32 bits inside a tile."""
    return [x if x.stride(3) == 1 and x.stride(2) < 2**23 else x.contiguous() for x in tensors]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    heads, columns = query.shape[1], value.shape[3]
    plan = _plan(query, columns, mask, cu_seqlens)
    output = _like(query, heads, columns)
    query, key, value = _contiguous_rows(query, key, value)
    if plan.bounds is not None:
        output.zero_()  # what is in no sequence
    shape = (plan.sequences, heads, query.shape[3], columns) if want_final else (0,)
    final = torch.empty(shape, dtype=torch.float32, device=query.device)
    initial = None if initial is None else initial.contiguous()
    _run(query, key, value, output, mask, decay, plan, scale, initial=initial, final=final if want_final else None)
    return output, final


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    d_output: Tensor,
    d_final: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, kv_heads = query.shape[1], key.shape[1]
    dim, columns = query.shape[3], value.shape[3]
    plan = _plan(query, columns, mask, cu_seqlens)
    # Each query head's share of a shared key's gradient, summed in float32.
    wide = torch.float32 if heads != kv_heads else None
    d_query = _like(query, heads, dim)
    d_key, d_value = _like(key, heads, dim, wide), _like(value, heads, columns, wide)
    shared = (d_key, d_value) if wide is None else (_like(key, kv_heads, dim), _like(value, kv_heads, columns))
    if plan.bounds is not None:
        for gradient in (d_query, d_key, d_value):
            gradient.zero_()
    shape = (plan.sequences, heads, dim, columns) if initial is not None else (0,)
    d_initial = torch.empty(shape, dtype=torch.float32, device=query.device)
    # The states of f(do, v, k) are the transposed ones of f(q, k, v).
    initial = None if initial is None else initial.mT.contiguous()
    d_final = None if d_final is None else d_final.float().contiguous() / scale
    query, key, value, d_output = _contiguous_rows(query, key, value, d_output)
    arguments = (mask, decay, plan, scale)
    _run(d_output, value, key, d_query, *arguments, initial=initial)
    states = _run(
        key,
        query,
        d_output,
        d_value,
        *arguments,
        initial=d_final,
        final=d_initial if initial is not None else None,
        reverse=True,
    )
    _run(value, d_output, query, d_key, *arguments, states=states, initial=d_final, transposed=True, reverse=True)
    if wide is not None:
        for gradient, parts in zip(shared, (d_key, d_value), strict=True):
            gradient.copy_(parts.unflatten(1, (kv_heads, -1)).sum(2))
    return d_query, *shared, d_initial


@triton.jit
def _step(
    query,
    key,
    value,
    output,
    mask,
    decay,
    initial,
    final,
    scale,
    stride_query_b,
    stride_query_h,
    stride_key_b,
    stride_key_h,
    stride_value_b,
    stride_value_h,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """One token: S = exp(-decay) S + k^T v, o = q S."""
    head = tl.program_id(0) % HEADS
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (dims < D)[:, None] & (columns < E)[None, :]
    in_key = dims < D
    in_value = columns < E
    passed = 1.0  # tokens: none at padding, where the state waits
    if MASKED:
        real = tl.load(mask + batch) != 0
        in_key = in_key & real
        in_value = in_value & real
        passed = tl.where(real, 1.0, 0.0)
    k = tl.load(key + batch * stride_key_b + (head // GROUP) * stride_key_h + dims, mask=in_key, other=0.0)
    v = tl.load(value + batch * stride_value_b + (head // GROUP) * stride_value_h + columns, mask=in_value, other=0.0)
    q = tl.load(query + batch * stride_query_b + head * stride_query_h + dims, mask=in_key, other=0.0)
    state = k.to(tl.float32)[:, None] * v.to(tl.float32)[None, :]
    place = (batch * HEADS + head) * (D * E) + dims[:, None] * E + columns[None, :]
    if HAS_INITIAL:
        kept = tl.exp2(-tl.load(decay + head) * 1.4426950408889634 * passed)
        state += kept * tl.load(initial + place, mask=inside, other=0.0)
    tl.store(final + place, state, mask=inside)
    o = tl.sum(q.to(tl.float32)[:, None] * state, 0) * scale
    tl.store(output + (batch * HEADS + head) * E + columns, o.to(output.dtype.element_ty), mask=columns < E)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    mask: Tensor | None,
    initial: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token of each row, without gradients: `(B, Hq, 1, E)` and the state."""
    query, key, value = _contiguous_rows(query, key, value)
    batch, heads, _, dim = query.shape
    columns = value.shape[3]
    output = query.new_empty((batch, heads, 1, columns))
    final = torch.empty((batch, heads, dim, columns), dtype=torch.float32, device=query.device)
    block_e = min(32, max(16, triton.next_power_of_2(columns)))
    _step[(batch * heads, -(-columns // block_e))](
        query,
        key,
        value,
        output,
        mask,
        decay,
        None if initial is None else initial.contiguous(),
        final,
        scale,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        HEADS=heads,
        GROUP=heads // key.shape[1],
        D=dim,
        E=columns,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_E=block_e,
        MASKED=mask is not None,
        HAS_INITIAL=initial is not None,
        num_warps=4,
    )
    return output, final


@torch.library.custom_op("heedful::lightning_attention", mutates_args=())
def lightning_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(query, key, value, decay, mask, cu_seqlens, initial, scale, want_final)


@lightning_attention_op.register_fake
def _(query, key, value, decay, mask, cu_seqlens, initial, scale, want_final):
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, columns = query.shape[1], value.shape[3]
    shape = (sequences, heads, query.shape[3], columns) if want_final else (0,)
    return _like(query, heads, columns), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("heedful::lightning_attention_backward", mutates_args=())
def lightning_attention_backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    d_output: Tensor,
    d_final: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(query, key, value, decay, mask, cu_seqlens, initial, d_output, d_final, scale)


@lightning_attention_backward_op.register_fake
def _(query, key, value, decay, mask, cu_seqlens, initial, d_output, d_final, scale):
    d_initial = (
        query.new_empty((0,), dtype=torch.float32) if initial is None else torch.empty_like(initial.contiguous())
    )
    return (
        _like(query, query.shape[1], query.shape[3]),
        _like(key, key.shape[1], key.shape[3]),
        _like(value, value.shape[1], value.shape[3]),
        d_initial,
    )


def _save(ctx, inputs, output):
    query, key, value, decay, mask, cu_seqlens, initial, scale, want_final = inputs
    ctx.save_for_backward(query, key, value, decay, mask, cu_seqlens, initial)
    ctx.scale, ctx.want_final = scale, want_final


def _differentiate(ctx, d_output, d_final):
    query, key, value, decay, mask, cu_seqlens, initial = ctx.saved_tensors
    d_query, d_key, d_value, d_initial = lightning_attention_backward_op(
        query, key, value, decay, mask, cu_seqlens, initial, d_output, d_final if ctx.want_final else None, ctx.scale
    )
    return d_query, d_key, d_value, None, None, None, None if initial is None else d_initial, None, None


lightning_attention_op.register_autograd(_differentiate, setup_context=_save)


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    """`(output, final state)`; the latter is empty unless asked for."""
    decay, mask = decay.contiguous(), None if mask is None else mask.contiguous()
    wants_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, initial)
    )
    one_token = query.shape[2] == 1 and cu_seqlens is None and not wants_gradient
    # A registered operator costs more than the kernel of one token.
    if one_token and not torch.compiler.is_compiling():
        with _device(query):
            return step(query, key, value, decay, mask, initial, scale)
    return lightning_attention_op(query, key, value, decay, mask, cu_seqlens, initial, scale, want_final)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
