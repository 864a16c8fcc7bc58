"""HiP attention in plain PyTorch, to be read next to the paper; the oracle of every faster implementation.

`choose` is the paper's mask estimation, `attend` its sparse attention. Both walk over the query blocks in chunks of
bounded memory, so that nothing of Tq x Tk size exists, and work on matrices whose shape does not depend on what else is
in the batch: a row gets the same bits alone and in company.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from heedful.attention.hip.mask import NOWHERE, HiPMask, Layout, Stage, layout, only_real

# Elements of the largest temporary of one chunk of query blocks: near the size of a CPU's cache; enough to fill a GPU.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_GPU = 1 << 22, 1 << 25


# Both entry points plan their chunks in Python: compiling them would compile anew for every length.
@torch.compiler.disable
@torch.no_grad()
def choose(
    query: Tensor,
    key: Tensor,
    *,
    top_k: int,
    block_size_q: int,
    block_stride_q: int,
    block_size_k: int,
    block_stride_k: int,
    sliding_window: int,
    num_sink_tokens: int,
    head_group_size: int,
    attention_mask: Tensor | None,
    sample_method: str,
    generator: torch.Generator | None,
) -> HiPMask:
    """Estimates the mask: for each query block, a tree search for the key blocks with the largest dot products.

    Every round splits the n nodes of the tree in halves, scores each half by one representative block, and keeps the n
    best: `2 * top_k * sampled rows` dot products a round, `ceil(log2(blocks / n))` rounds.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    device = query.device
    where = layout(query, key, block_size_q, sliding_window, attention_mask)
    rows, count, window, real_rows = where.rows, where.count, where.window, where.real_rows

    def searchable_blocks(end: Tensor) -> Tensor:
        return (end - num_sink_tokens).clamp(min=0).add(block_size_k - 1) // block_size_k

    num_blocks = searchable_blocks(where.search_end - where.first_slot[:, None])  # (B, N)

    # What is the same for all batch rows is planned on the host, from the slots alone (as if nothing were padded):
    # more rounds than a padded row needs leave its choice as it is.
    host_end = num_keys - num_queries + rows * torch.arange(1, count + 1)
    plan = searchable_blocks(host_end.clamp(max=num_keys) - window)
    nodes = where.nodes(top_k, block_size_k, num_sink_tokens)
    blocks = torch.full((batch, heads, count, nodes), -1, dtype=torch.int32, device=device)
    mask = HiPMask(
        blocks, where.search_end, num_queries, num_keys, rows, block_size_k, window, num_sink_tokens, attention_mask
    )
    if nodes == 0:
        return mask
    largest_node = -(-plan // nodes)
    rounds = sum((largest_node > (1 << bit)).long() for bit in range(int(largest_node.amax()).bit_length()))
    rounds = torch.where(plan > 0, rounds, -1)  # -1: nothing searchable

    # Sampled queries: every block_stride_q-th row, or the last row of a block that is shorter than that.
    sample = torch.arange(min(block_stride_q, rows) - 1, rows, block_stride_q, device=device)
    votes = sample < real_rows[..., None]  # (B, N, s)
    sample = torch.where(votes, sample, real_rows[..., None] - 1)
    votes[..., 0] = True
    # A row may not vote on keys in its own window or future. -1: no vote at all.
    vote_limit = torch.where(votes, where.block_slot[:, None] + sample - window, -1)
    sample = (sample + rows * torch.arange(count, device=device)[:, None]).clamp(max=num_queries - 1)

    work = batch * heads * 2 * nodes * block_size_k * (key.shape[-1] + sample.shape[-1])
    for lo, hi in _runs(rounds, _chunk(work, device)):
        depth = int(rounds[lo])
        if depth < 0:
            continue
        queries = _take(query, sample[:, None, lo:hi])  # (B, Hq, c, s, D)
        origin = (where.first_slot + num_sink_tokens)[:, None, None, None]
        scorer = Scorer(
            queries,
            key,
            attention_mask,
            vote_limit[:, None, lo:hi],
            origin,
            block_size_k,
            block_stride_k,
            head_group_size,
        )
        available = num_blocks[:, None, lo:hi, None].expand(batch, heads, hi - lo, 1)
        if depth == 0 or sample_method != "oracle":
            start, size = tree(scorer, available, nodes, depth, sample_method, generator)
        else:
            start, size = _scan(scorer, available, nodes)
        # Sorted, empty places last.
        chosen = torch.where(size > 0, start, num_keys).sort(-1).values
        blocks[:, :, lo:hi] = torch.where(chosen < num_keys, chosen, -1)
    return mask


class Scorer:
    """Scores key blocks for a chunk of query blocks: the maximum of q.k over sampled rows and sampled keys of it."""

    def __init__(
        self,
        queries: Tensor,
        key: Tensor,
        attention_mask: Tensor | None,
        vote_limit: Tensor,
        origin: Tensor,
        block_size_k: int,
        block_stride_k: int = 1,
        head_group_size: int = 1,
    ) -> None:
        self.queries = queries.to(_compute_dtype(queries))
        self.key = key
        self.attention_mask = attention_mask
        self.vote_limit = vote_limit[..., None]  # (B, 1, c, s, 1)
        self.origin = origin
        self.block_size_k = block_size_k
        self.head_group_size = head_group_size
        self.offset = torch.arange(0, block_size_k, block_stride_k, device=key.device)

    def __call__(self, block: Tensor) -> Tensor:
        """Scores of blocks `(B, Hq, c, m)`; a block that no sampled row may see scores the lowest finite number."""
        slots = ((self.origin + block * self.block_size_k)[..., None] + self.offset).flatten(-2)
        slots = only_real(slots, self.attention_mask, self.key.shape[2])
        keys = _take(self.key, slots.unflatten(1, (self.key.shape[1], -1))).flatten(1, 2).to(self.queries.dtype)
        score = self.queries @ keys.mT  # (B, Hq, c, s, m * b_k)
        hidden = slots[..., None, :] > self.vote_limit
        score = score.masked_fill_(hidden, torch.finfo(score.dtype).min).amax(-2)
        return by_group(score.unflatten(-1, (-1, len(self.offset))).amax(-1), self.head_group_size)


def by_group(scores: Tensor, head_group_size: int) -> Tensor:
    """Scores `(B, Hq, ...)` of heads that share their keys: the maximum over each group."""
    if head_group_size == 1:
        return scores
    groups = scores.unflatten(1, (-1, head_group_size))
    return groups.amax(2, keepdim=True).expand_as(groups).flatten(1, 2)


def tree(
    score: Scorer, available: Tensor, nodes: int, depth: int, sample_method: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The hierarchical search: `(start, size)` of the n nodes left, in blocks, each `(B, Hq, c, n)`."""
    node = torch.arange(nodes + 1, device=available.device)
    bound = node * available // nodes
    start, size = bound[..., :-1], bound.diff(dim=-1)
    for _ in range(depth):
        left = size // 2
        start = torch.stack((start, start + left), -1).flatten(-2)
        size = torch.stack((left, size - left), -1).flatten(-2)
        if sample_method == "center":
            offset = size // 2
        elif sample_method == "first":
            offset = torch.zeros_like(size)
        elif sample_method == "last":
            offset = (size - 1).clamp(min=0)
        else:
            draw = torch.rand(size.shape, generator=generator, device=size.device)
            offset = (draw * size).long().clamp(max=(size - 1).clamp(min=0))
        scores = score(start + offset).masked_fill(size == 0, -torch.inf)
        # A stable sort, since the order of topk is not specified on ties.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :nodes].sort(-1).values
        start, size = start.gather(-1, best), size.gather(-1, best)
    return start, size


def _scan(score: Scorer, available: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """The tree whose nodes are scored by their best block ("oracle"), which is the n best of all blocks.

    Of the nodes of any round at most n hold one of the n best blocks, and these outscore all others, so every round
    keeps them. Quadratic: every block is scored, a segment at a time.
    """
    total = max(nodes, int(available.amax()))
    parts = []
    for segment in torch.arange(total, device=available.device).split(2 * nodes):
        parts.append(score(segment.expand(*available.shape[:-1], -1)))
    block = torch.arange(total, device=available.device).expand(*available.shape[:-1], -1)
    scores = torch.cat(parts, -1).masked_fill(block >= available, -torch.inf)
    start = scores.sort(dim=-1, descending=True, stable=True).indices[..., :nodes]
    return start, (start < available).long()


@torch.compiler.disable
@torch.no_grad()
def choose_in_stages(
    query: Tensor,
    key: Tensor,
    *,
    stages: Sequence[Stage],
    top_k: int,
    sliding_window: int,
    num_sink_tokens: int,
    head_group_size: int,
    attention_mask: Tensor | None,
) -> HiPMask:
    """Estimates the mask as InfiniteHiP does: each stage scans the chunks that the last one kept, in smaller pieces.

    The first stage visits every chunk: `2 * log2(chunk)` keys of it, for the means of runs of the block's rows.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    device = query.device
    window = max(sliding_window, stages[0][0] - 1)
    places = [layout(query, key, stage[0], window, attention_mask) for stage in stages]
    last = places[-1]
    origin = (last.first_slot + num_sink_tokens)[:, None, None, None]
    chunk_size = stages[-1][2]
    nodes = last.nodes(top_k, chunk_size, num_sink_tokens)
    blocks = torch.full((batch, heads, last.count, nodes), -1, dtype=torch.int32, device=device)
    mask = HiPMask(
        blocks,
        last.search_end,
        num_queries,
        num_keys,
        last.rows,
        chunk_size,
        window,
        num_sink_tokens,
        attention_mask,
    )
    if nodes == 0:
        return mask
    most = -(-max(0, places[0].last_end - num_sink_tokens) // stages[0][2])
    work = max(most, *(-(-(stage[3] or 1) // stage[2]) for stage in stages))
    work *= batch * heads * (key.shape[-1] + max(-(-stage[0] // stage[1]) for stage in stages))
    work *= stages[0][0] // stages[-1][0]
    step = _chunk(work, device)
    for lo in range(0, places[0].count, step):
        start = torch.arange(most, device=device).mul(stages[0][2])[None, None, None].expand(batch, heads, 1, -1)
        for number, (block_size_q, block_stride_q, chunk_size, _) in enumerate(stages):
            where = places[number]
            finer = stages[0][0] // block_size_q
            some = slice(lo * finer, min((lo + step) * finer, where.count))
            if number > 0:
                start = start.repeat_interleave(stages[number - 1][0] // block_size_q, 2)
                pieces = torch.arange(stages[number - 1][2] // chunk_size, device=device) * chunk_size
                start = (start[..., None] + pieces).flatten(-2)[:, :, : some.stop - some.start]
            means, votes = _means(query, where, some, block_stride_q)
            limit = torch.where(votes, where.search_end[:, some, None] - 1, -1)
            scorer = Scorer(means, key, attention_mask, limit[:, None], origin, 1)
            end = (where.search_end[:, None, some, None] - origin).clamp(min=0)
            score = by_group(_scan_chunks(scorer, start, chunk_size, end), head_group_size)
            budget = top_k if number == len(stages) - 1 else stages[number + 1][3]
            assert budget is not None
            best = (
                score.sort(dim=-1, descending=True, stable=True)
                .indices[..., : -(-budget // chunk_size)]
                .sort(-1)
                .values
            )
            # What holds no searchable key comes last and stays that: its pieces start past the end, too.
            start = torch.where(score == -torch.inf, NOWHERE // 2, start).expand_as(score).gather(-1, best)
        chosen = start.sort(-1).values
        chosen = torch.where(chosen < end, chosen // chunk_size, -1)[..., :nodes]
        blocks[:, :, some, : chosen.shape[-1]] = chosen.int()
    return mask


def _means(query: Tensor, where: Layout, some: slice, stride: int) -> tuple[Tensor, Tensor]:
    """Means of each run of `stride` real rows, `(B, Hq, c, runs, D)`, and which runs have any, `(B, c, runs)`."""
    rows = query[:, :, some.start * where.rows : some.stop * where.rows].to(_compute_dtype(query))
    rows = torch.nn.functional.pad(rows, (0, 0, 0, (some.stop - some.start) * where.rows - rows.shape[2]))
    rows = rows.unflatten(2, (-1, where.rows))
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -where.rows % stride)).unflatten(3, (-1, stride))
    row = torch.arange(rows.shape[3] * stride, device=query.device).view(-1, stride)
    real = row < where.real_rows[:, some, None, None]  # (B, c, runs, stride)
    rows = rows.masked_fill(~real[:, None, ..., None], 0)
    return rows.sum(-2) / real.sum(-1).clamp(min=1)[:, None, ..., None], real.any(-1)


def _scan_chunks(score: Scorer, start: Tensor, chunk_size: int, end: Tensor) -> Tensor:
    """Scores of chunks: the best of the tokens that a search by halves meets; -inf for a chunk without tokens."""
    right = torch.minimum(start + chunk_size, end)
    left, right = torch.broadcast_tensors(start, right)
    active = left < right
    left = torch.where(active, left, 0)
    right = torch.where(active, right, 1)
    best = torch.full(left.shape, -torch.inf, device=left.device, dtype=score.queries.dtype)
    for _ in range(max(1, chunk_size.bit_length() - 1)):  # one more, of single tokens, would meet the same again
        middle = (left + right) // 2
        of_left, of_right = score(torch.cat([(left + middle) // 2, (middle + right) // 2], -1)).chunk(2, -1)
        better_right = of_right >= of_left
        best = best.maximum(torch.where(better_right, of_right, of_left))
        left, right = torch.where(better_right, middle, left), torch.where(better_right, right, middle)
    return best.masked_fill(~active, -torch.inf)


@torch.compiler.disable
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: HiPMask,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attends to what the mask chose: `(B, Hq, Tq, Dv)` in the query's dtype; differentiable.

    One softmax over three disjoint parts: window, sinks, chosen blocks. Products and sums are float32 (float64 for
    float64 inputs). A row that sees no key gives 0.
    """
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    rows, count = mask.block_size_q, mask.blocks.shape[2]
    places = mask.blocks.shape[3] * mask.block_size_k
    dtype = _compute_dtype(query)
    device = query.device

    # The windows of a block's rows together: from the first row's window start to the last row.
    block_slot = num_keys - num_queries + rows * torch.arange(count)
    oldest_row = block_slot if mask.chosen_at is None else block_slot.clamp(max=mask.chosen_at)
    window_from = oldest_row + 1 - mask.sliding_window
    window_width = max(1, int((block_slot + rows - window_from).amax()))
    window_slots = window_from.to(device)[:, None] + torch.arange(window_width, device=device)
    # The sinks are the same for all query blocks.
    sink_slots = mask.first_slot[:, None] + torch.arange(min(mask.num_sink_tokens, num_keys), device=device)
    sink_slots = only_real(sink_slots, mask.attention_mask, num_keys)[:, None, None, None]
    sink_key = _take(key, sink_slots).to(dtype)

    if sink_logits is not None:
        sink_logits = sink_logits.to(dtype).view(kv_heads, 1, -1, 1, 1)

    searched = (block_slot + rows - mask.sliding_window - mask.num_sink_tokens > 0) & (places > 0)
    work = batch * heads * ((places + window_width + mask.num_sink_tokens) * rows + 2 * places * dim)
    outputs = []
    for lo, hi in _runs(searched.long(), _chunk(work, device)):
        # Layout (B, Hkv, c, G, b_q, D): the G query heads of a key head lie side by side, so that no key is repeated.
        chunk = query[:, :, lo * rows : hi * rows].to(dtype) * scale
        chunk = torch.nn.functional.pad(chunk, (0, 0, 0, (hi - lo) * rows - chunk.shape[2]))
        chunk = chunk.unflatten(2, (hi - lo, rows)).unflatten(1, (kv_heads, -1)).transpose(2, 3).contiguous()
        row_slot = mask.row_slots(lo, hi)[:, None, :, None]  # (c, 1, b_q, 1)
        window_start = mask.window_starts(lo, hi)[:, None, :, None, :, None]  # (B, 1, c, 1, b_q, 1)

        # A part: logits (B, Hkv, c, G, b_q, keys), -inf where hidden, and values (B, Hkv, c or 1, G or 1, keys, Dv).
        slots = only_real(window_slots[None, None, lo:hi, None], mask.attention_mask, num_keys)  # (B or 1, 1, c, 1, W)
        visible = (slots[..., None, :] >= window_start) & (slots[..., None, :] <= row_slot)
        parts = [(_logits(chunk, _take(key, slots).to(dtype), visible, softcap), _values(value, slots, dtype))]

        if mask.num_sink_tokens > 0:
            visible = sink_slots[..., None, :] < window_start
            read = torch.where(sink_slots <= row_slot[:, :, -1], sink_slots, NOWHERE)
            parts.append((_logits(chunk, sink_key, visible, softcap), _values(value, read, dtype)))

        if searched[lo]:
            slots = mask.block_tokens(lo, hi).unflatten(1, (kv_heads, -1)).transpose(2, 3)  # (B, Hkv, c, G, keys)
            visible = slots[..., None, :] < window_start
            parts.append((_logits(chunk, _take(key, slots).to(dtype), visible, softcap), _values(value, slots, dtype)))

        output = _softmax_sum(parts, sink_logits).to(query.dtype)
        outputs.append(output.transpose(2, 3).flatten(1, 2).flatten(2, 3))
    return torch.cat(outputs, 2)[:, :, :num_queries]


def _logits(queries: Tensor, keys: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    logits = _matmul(queries, keys.mT)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill_(~visible, -torch.inf)


def _softmax_sum(parts: list[tuple[Tensor, Tensor]], sink_logits: Tensor | None) -> Tensor:
    """The softmax over the logits of all parts together, times their values; 0 for rows whose logits are all -inf.

    The parts are summed one by one, so that a part which is wholly hidden changes no bit.
    """
    with torch.no_grad():
        peak = torch.cat([logits.amax(-1, keepdim=True) for logits, _ in parts], -1).amax(-1, keepdim=True)
        peak = peak.clamp(min=torch.finfo(peak.dtype).min) if sink_logits is None else peak.maximum(sink_logits)
    weights = [logits.sub_(peak).exp_() for logits, _ in parts]
    total = torch.stack([weight.sum(-1, keepdim=True) for weight in weights]).sum(0)
    if sink_logits is not None:
        total = total + (sink_logits - peak).exp()
    output = torch.stack([_matmul(weight, values) for weight, (_, values) in zip(weights, parts, strict=True)]).sum(0)
    return output / total.masked_fill(total == 0, 1.0)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """`(B, Hkv, c, G, m, k) @ (B, Hkv, c or 1, G or 1, k, n)`; a group that shares its matrix goes in one product."""
    if right.shape[3] == 1:
        return (left.flatten(3, 4) @ right[:, :, :, 0]).unflatten(3, left.shape[3:5])
    return left @ right


def _take(source: Tensor, slots: Tensor) -> Tensor:
    """Rows of `source (B, H, T, D)` at `slots (B or 1, H or 1, ...)`: `(B, H, ..., D)`; any row for NOWHERE."""
    batch, heads, length, dim = source.shape
    head = torch.arange(batch * heads, device=source.device).view(batch, heads, *[1] * (slots.ndim - 2))
    slots = slots.clamp(0, length - 1)
    if not source.is_contiguous() and batch * heads * slots[0, 0].numel() < source.numel() // dim:
        # A few rows of a view (of a static cache, say): flattening it would copy all of it.
        return source[head // heads, head % heads, slots]
    flat = (head * length + slots).flatten()
    return source.reshape(-1, dim).index_select(0, flat).view(batch, heads, *slots.shape[2:], dim)


def _values(value: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Values at `slots`, 0 for NOWHERE: a NaN in what nobody reads would survive its weight of 0."""
    return _take(value, slots).to(dtype).masked_fill_((slots == NOWHERE)[..., None], 0)


def _runs(kinds: Tensor, limit: int) -> Iterator[tuple[int, int]]:
    """Splits query blocks into runs `lo, hi` of one kind and at most `limit` blocks."""
    lo = 0
    for length in kinds.unique_consecutive(return_counts=True)[1].tolist():
        for start in range(lo, lo + length, limit):
            yield start, min(start + limit, lo + length)
        lo += length


def _chunk(work: int, device: torch.device) -> int:
    """How many query blocks of so many elements make a chunk."""
    return max(1, (_CHUNK_ELEMENTS if device.type == "cpu" else _CHUNK_ELEMENTS_GPU) // work)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
