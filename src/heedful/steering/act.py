"""ACT: attention calibration. Late attention sinks give most of their mass back to the tokens that carry meaning.

"Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration", Yu, Wang, Fu, Shi, Shaikh, Lin (ICML 2024), arXiv 2406.15765.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from heedful.seam import AttentionCall, Edit, Kernel, Verification
from heedful.seam.discovery import site_of
from heedful.seam.parts import stages_of
from heedful.steering._columns import (
    BLOCK_BYTES,
    ColumnStatistics,
    HeadPairs,
    RunningColumns,
    column_statistics,
    gather_slots,
)


def calibrate_probabilities(probabilities: Tensor, sinks: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The paper's equation on attention weights: sinks keep a share ``beta``, the rest of their mass goes to the other
    keys.

    The receivers of a row share what is freed in proportion to what they have, so rows still sum to 1. Rows without
    sink mass, and rows whose receivers hold nothing to be proportional to, are returned unchanged.

    Args:
        probabilities: Attention weights ``(..., R, Tk)``.
        sinks: Late sinks, boolean, broadcastable to ``(..., R, Tk)``.
        beta: The share of its mass that a sink keeps, in [0, 1].

    Returns:
        The calibrated weights, same shape and dtype, and the mass that left the sinks ``(..., R)``.
    """
    on_sinks = (probabilities * sinks).sum(-1, keepdim=True)
    received = (probabilities * ~sinks).sum(-1, keepdim=True)
    edited = (on_sinks > 0) & (received > 0)
    freed = torch.where(edited, (1 - beta) * on_sinks, torch.zeros_like(on_sinks))
    gain = 1 + freed / torch.where(edited, received, torch.ones_like(received))
    calibrated = torch.where(edited, probabilities * torch.where(sinks, beta, gain), probabilities)
    return calibrated, freed[..., 0]


def calibrate_outputs(
    pairs: HeadPairs, sinks: Tensor, beta: float, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, Tensor]:
    """The same edit without the weights: attend to the sinks and to the other keys apart, and mix the two outputs.

    With ``m`` the mass of the row on its sinks, ``o1`` the attention over the sinks alone and ``o2`` over the other
    keys alone, the calibrated output is ``beta m o1 + (1 - beta m) o2``. Rows are taken in blocks; memory O(N (T D +
    block)). The sinks are few, so their side costs O(T |S| D). With gradients each block is recomputed in the backward
    pass.

    Args:
        pairs: The heads and rows to edit.
        sinks: Late sinks of each pair, boolean ``(N, Tk)``.
        beta: The share of its mass that a sink keeps, in [0, 1].
        block_bytes: Size of the largest block of logits.

    Returns:
        The outputs ``(N, R, Dv)`` and the mass that left the sinks, ``(N, R)``: 0 in rows that are not edited, whose
        output is plain attention.
    """
    most = max(1, int(sinks.sum(-1).max()))
    slots = sinks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    is_sink = sinks.gather(1, slots)
    sink_key = pairs.key.gather(1, slots[..., None].expand(-1, -1, pairs.key.shape[-1]))
    sink_value = pairs.value.gather(1, slots[..., None].expand(-1, -1, pairs.value.shape[-1]))

    def calibrate(block: slice, query: Tensor, key: Tensor, value: Tensor, sink_key: Tensor, sink_value: Tensor) -> Any:
        seen = pairs.width(block)
        visible = pairs.pick(pairs.sees(block))
        on_sinks = is_sink[:, None] & gather_slots(visible, slots)
        on_others = (visible & ~sinks[:, None])[..., :seen]
        out_1, lse_1 = _attend(pairs.logits(query, sink_key, slots, block), on_sinks, sink_value)
        out_2, lse_2 = _attend(pairs.logits(query, key[:, :seen], None, block), on_others, value[:, :seen])
        mass = torch.sigmoid(lse_1 - lse_2)
        some = on_sinks.any(-1)
        both = some & on_others.any(-1) & (torch.sigmoid(lse_2 - lse_1) > 0)
        kept = torch.where(both, beta * mass, some.to(mass.dtype))
        return torch.lerp(out_2, out_1, kept[..., None]), torch.where(both, (1 - beta) * mass, torch.zeros_like(mass))

    outputs, freed = [], []
    for block in pairs.blocks(block_bytes):
        inputs = (pairs.query[:, block], pairs.key, pairs.value, sink_key, sink_value)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            out, mass = checkpoint(calibrate, block, *inputs, use_reentrant=False)
        else:
            out, mass = calibrate(block, *inputs)
        outputs.append(out)
        freed.append(mass)
    return torch.cat(outputs, 1), torch.cat(freed, 1)


def _attend(logits: Tensor, visible: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the visible keys and its log-sum-exp; finite, with a finite gradient, where a row sees no key."""
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    top = logits.amax(-1, keepdim=True).detach()
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights @ value / total, (top + total.log())[..., 0]


class AttentionCalibration(Edit):
    """Moves attention away from late sinks: tokens after the first that draw more of it than they have to say.

    A key is a sink of a head when the mean attention it gets, over the rows that see it, is above ``alpha / T`` (or
    above ``threshold``). In every row the sinks then keep the share ``beta`` of their mass, and the other keys, the
    first token among them, receive the rest in proportion to what they have. Sinks are found anew for every input,
    sample, layer and head. Nothing is trained; which heads to calibrate is found once, by `search_heads`.

    Example:
        >>> import heedful, torch
        >>> from heedful.steering import AttentionCalibration
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> inputs = tokenizer("It was the best of times, it was the worst of times", return_tensors="pt")
        >>> calibration = AttentionCalibration(heads=[(4, 0), (5, 2)], beta=0.4)
        >>> with heedful.attach(model, calibration):
        ...     tokens = model.generate(**inputs, max_new_tokens=20)
        >>> calibration.mass_moved  # {(4, 0): 0.08, (5, 2): 0.0}

    Args:
        layers: Layers to calibrate. Default None: all (or those that ``heads`` names).
        heads: Query heads: a list of heads (the same in every layer), a list of (layer, head) pairs, a boolean mask
            ``(layers, heads)``, or a `HeadSet`. Default None: all, which is seldom what helps.
        rows, steps: Rows and calls to edit, as for every part. Sinks are always found from all rows of the sequence.
        alpha: A sink gets more than alpha times the attention of a uniform row. T is the most keys that one row of the
            sequence sees: its length, or the window of a sliding-window layer. Nothing is a sink while T <= alpha.
        threshold: Mean attention above which a key is a sink, in place of ``alpha / T`` (the paper's code: 0.1).
        beta: The share of its mass that a sink keeps: 1 changes nothing, 0 removes late sinks.
        exempt_first: So many tokens at the start of each sample (padding apart) are never sinks.
        sinks: "running": decode steps keep the statistics up to date, so that a step is the last row of one uncached
            pass over the sequence with the same queries and keys, and generated tokens may become sinks. "prefill": the
            sinks of the prompt stay; generated tokens are never sinks.
        form: "grouped" computes no weights. "weights" edits the weights themselves, at their memory, and so composes
            with other edits of logits and probabilities; it reads all rows, and gives the same outputs.

    With a cache, earlier rows were edited with the sinks of their time; one uncached pass would edit them with the
    sinks of today. So a cached step equals the last row of an uncached pass in each attention call, and in the logits
    when one layer is calibrated. In sliding-window layers a key is judged by the rows whose window holds it. Beam
    search is followed through the cache's keys; a cropped cache (assisted generation) is refused. `heedful.generate`
    with a drafter gives the tokens of `model.generate` with either kind of sinks.

    Raises:
        ValueError: Bad arguments; a layer whose attention is no plain softmax (learned sink logits, dropout in
            training, a kernel without probabilities), or another edit that this form would overwrite.
        RuntimeError: The cache was cropped, or filled while the part was not attached.

    Cost:
        Prefill: two more passes over the attention of the chosen heads, one for those without a sink; memory O(T D) a
        head and a block of 32 MiB, never T x T. Decode: O(T D) a step and head.

    When not to use:
        On all heads, or on heads found for another model, task or chat template: most heads do not gain. On long texts
        with ``alpha / T``, which then calls much of every local head a sink: give ``threshold``. With models whose
        softmax has a learned sink (gpt-oss), which have no such excess to move.

    Paper:
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
        Attention Calibration", Yu, Wang, Fu, Shi, Shaikh, Lin (ICML 2024), arXiv 2406.15765.
    """

    every_call = True  # statistics need all rows, whichever are edited

    def __init__(
        self,
        *,
        layers: Iterable[int] | None = None,
        heads: Iterable[int] | Iterable[tuple[int, int]] | Tensor | None = None,
        rows: str | Tensor | None = None,
        steps: str | Iterable[int] | None = None,
        alpha: float = 5.0,
        threshold: float | None = None,
        beta: float = 0.4,
        exempt_first: int = 1,
        sinks: str = "running",
        form: str = "grouped",
    ) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is the share of its mass that a sink keeps, between 0 and 1; got {beta}")
        if alpha <= 0 or (threshold is not None and threshold <= 0):
            raise ValueError(f"alpha and threshold must be positive; got alpha={alpha}, threshold={threshold}")
        if exempt_first < 0:
            raise ValueError(f"exempt_first is a number of tokens, 0 or more; got {exempt_first}")
        if sinks not in ("running", "prefill"):
            raise ValueError(f'sinks must be "running" or "prefill"; got {sinks!r}')
        if form not in ("grouped", "weights"):
            raise ValueError(f'form must be "grouped" or "weights"; got {form!r}')
        if form == "weights" and not (rows is None and steps is None):
            raise ValueError(
                'form="weights" reads the weights of all rows: leave rows and steps out, or use form="grouped"'
            )
        layers = None if layers is None else tuple(layers)
        super().__init__(layers=layers, heads=_heads(heads, layers), rows=rows, steps=steps)
        self.alpha, self.threshold, self.beta, self.exempt_first = alpha, threshold, beta, exempt_first
        self.sinks, self.form = sinks, form
        # An edit acts at the stages it overrides; the other form must not make the seam compute anything.
        other = "probabilities" if form == "grouped" else "outputs"
        setattr(self, other, MethodType(getattr(Edit, other), self))
        # For search_heads: the one (layer, head) that is calibrated in each sample of the batch.
        self.only_in_sample: Sequence[tuple[int, int]] | None = None
        self._pending: list[tuple[AttentionCall, RunningColumns, Tensor | None]] = []
        self._figures: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def mass_moved(self) -> dict[tuple[int, int], float]:
        """By (layer, head): the share of attention that left the sinks, mean over all rows edited since `reset`."""
        return {
            (layer, head): float(moved) / int(rows)
            for layer, (moved_by_head, rows_by_head) in sorted(self._figures.items())
            for head, (moved, rows) in enumerate(zip(moved_by_head, rows_by_head, strict=True))
            if rows
        }

    def reset(self) -> None:
        """Forgets the figures of past runs."""
        self._figures.clear()

    def summary(self, layer: int) -> dict[str, Any]:
        """``mass_moved`` by head, for `Attachment.report()`."""
        return {"mass_moved": {head: mass for (where, head), mass in self.mass_moved.items() if where == layer}}

    # ---- the two forms

    def outputs(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The grouped form: `calibrate_outputs` on the heads that have a sink; all other outputs stay as they are."""
        if self.beta == 1:
            return output
        self._check(call)
        self._check_others(call)
        pairs = self._pairs(call)
        if not len(pairs):
            return output
        sinks = self._find_sinks(call, pairs, None)
        if call.rows is not None and not call.rows.shape[1]:
            return output
        chosen = sinks.flatten(1).any(1).nonzero()[:, 0]
        if not len(chosen):
            self._count(call, sinks.new_zeros(0, 1), (chosen, chosen))
            return output
        place = (torch.tensor(call.head_list, device=chosen.device) == pairs.head[chosen, None]).int().argmax(1)
        mine = (pairs.sample[chosen], place)
        if sinks.dim() == 2:
            new, freed = calibrate_outputs(pairs.keep(chosen, call.rows), sinks[chosen], self.beta)
        else:  # drafted tokens: a few rows, each with the sinks of its own sequence
            every = pairs.keep(chosen)
            weights, _ = every.probabilities(slice(0, sinks.shape[1]))
            weights, freed = calibrate_probabilities(weights, sinks[chosen], self.beta)
            new = weights @ every.value
            if call.rows is not None:
                index = call.rows[every.sample].clamp(min=0)
                new, freed = new.gather(1, index[..., None].expand(-1, -1, new.shape[-1])), freed.gather(1, index)
        self._count(call, freed, mine)
        return output.index_put(mine, torch.where(freed[..., None] > 0, new.to(output.dtype), output[mine]))

    def probabilities(self, call: AttentionCall, probabilities: Tensor) -> Tensor:
        """The weight form: `calibrate_probabilities` on all rows of the asked heads."""
        if self.beta == 1:
            return probabilities
        self._check(call)
        pairs = self._pairs(call)
        sinks = self._find_sinks(call, pairs, probabilities)
        sinks = sinks[:, None] if sinks.dim() == 2 else sinks
        weights, freed = calibrate_probabilities(probabilities, sinks.unflatten(0, probabilities.shape[:2]), self.beta)
        self._count(
            call, freed.flatten(0, 1), (pairs.sample, torch.arange(len(pairs), device=freed.device) % freed.shape[1])
        )
        return weights

    def _pairs(self, call: AttentionCall) -> HeadPairs:
        if self.only_in_sample is None:
            return HeadPairs.of(call)
        mine = [(sample, head) for sample, (layer, head) in enumerate(self.only_in_sample) if layer == call.layer]
        sample, head = torch.tensor(mine, dtype=torch.long, device=call.query.device).view(-1, 2).unbind(1)
        return HeadPairs(call, sample, head)

    # ---- which keys are sinks

    def _late(self, columns: ColumnStatistics) -> Tensor:
        return columns.late_sinks(self.alpha, self.threshold, self.exempt_first)

    def _find_sinks(self, call: AttentionCall, pairs: HeadPairs, weights: Tensor | None) -> Tensor:
        """Sinks of each pair by key slot: ``(N, Tk)``, or ``(N, Tq, Tk)`` where each row has its own."""
        if self.only_in_sample is not None:
            return self._late(column_statistics(pairs))
        running = self._running(call)
        shape = (call.query.shape[0], len(call.head_list))
        if call.phase == "decode" and self.sinks == "prefill":
            assert running.frozen is not None
            return running.at_slots(running.frozen, call).flatten(0, 1)
        if call.verification is not None:
            return self._sinks_of_drafts(call, pairs, running, weights)
        new = column_statistics(pairs) if weights is None else _statistics_of(call, weights)
        running.add(new.view(*shape), call)
        running.frozen = self._late(running.total)
        return running.at_slots(running.frozen, call).flatten(0, 1)

    def _running(self, call: AttentionCall) -> RunningColumns:
        """The statistics of the sequences in this call's cache."""
        tree = call.verification
        past = int(call.past) if tree is None else int(tree.lengths.max())
        running: RunningColumns | None = call.memory.get("columns")
        if running is None:
            if call.phase == "decode":
                raise RuntimeError(
                    f"layer {call.layer}: AttentionCalibration meets a cache that was filled without it. Attach it "
                    "before the prompt is run (and generate with disable_compile=True on a static cache)."
                )
            running = call.memory["columns"] = RunningColumns(call, past)
            return running
        if past < running.length:
            raise RuntimeError(
                f"layer {call.layer}: the cache was cropped from {running.length} to {past} tokens (by an assistant?); "
                "AttentionCalibration cannot take back what the removed rows gave to their keys. Generate without an "
                "assistant, or draft with heedful.generate."
            )
        if past > running.length and self.sinks == "running":
            raise RuntimeError(
                f"layer {call.layer}: AttentionCalibration has seen {running.length} of {past} cached tokens; running "
                'statistics need every row. Keep it attached from the prompt on, or use sinks="prefill".'
            )
        if tree is None:
            running.follow(call)
        return running

    def _sinks_of_drafts(
        self, call: AttentionCall, pairs: HeadPairs, running: RunningColumns, weights: Tensor | None
    ) -> Tensor:
        """Each drafted row is the last row of its own sequence: what is accepted so far, its ancestors, and itself."""
        with torch.no_grad():
            given, visible = _rows_of(call, pairs, weights, None)
            tree, rows = call.verification, visible.shape[1]
            lineage = visible[..., tree.start : tree.start + rows] & call.real_rows()[pairs.sample, None]
            room = visible.shape[2] - running.length
            sums, counts = (
                pad(x.flatten(0, 1), (0, room))[:, None] for x in (running.total.sums, running.total.counts)
            )
            columns = ColumnStatistics(
                sums + lineage.to(given.dtype) @ given,
                counts + (lineage.to(given.dtype) @ visible.to(given.dtype)).long(),
                torch.maximum(running.total.reach.flatten()[:, None], visible.sum(-1)),
            )
        self._pending = [entry for entry in self._pending if entry[1] is not running]
        self._pending.append((call, running, weights))
        return self._late(columns)

    def accept(self, verification: Verification, paths: Sequence[Sequence[int]]) -> None:
        """Adds the accepted rows of a verification to the running statistics of their samples."""
        longest = max((len(path) for path in paths), default=0)
        if longest:
            table = torch.tensor([[*path, *[-1] * (longest - len(path))] for path in paths])
            for call, running, weights in self._pending:
                rows = table.to(call.query.device)
                given, visible = _rows_of(call, HeadPairs.of(call), weights, rows)
                running.add_path(given, visible, rows, verification)
        self._pending.clear()

    # ---- refusals and figures

    def _check(self, call: AttentionCall) -> None:
        where = f"layer {call.layer}: AttentionCalibration"
        if call.sinks is not None:
            raise ValueError(
                f"{where} moves mass within rows that sum to 1, but this model's softmax has a learned sink that takes "
                "a share of every row. Such models have no excess attention to calibrate: leave the part out."
            )
        if call.dropout and call.module.training:
            raise ValueError(
                f"{where} does not know which weights dropout removes; call model.eval() or set the dropout to 0."
            )

    def _check_others(self, call: AttentionCall) -> None:
        """The grouped form writes outputs anew: refuses edits of the same heads that it would undo."""
        site = site_of(call.module)
        before = True
        for other in [] if site is None else site.selected():
            if other.part is self and before:
                before = False
                continue
            where = f"layer {call.layer}: AttentionCalibration"
            name = type(other.part).__name__
            common = other.heads is None or not set(other.heads).isdisjoint(call.head_list)
            if isinstance(other.part, Kernel) and common and not other.part.has_probabilities:
                raise ValueError(
                    f"{where} needs softmax attention, but the kernel {name} has none. Give them other layers=."
                )
            if not (isinstance(other.part, Edit) and common):
                continue
            stages = stages_of(other.part)
            if stages & {"logits", "probabilities"}:
                raise ValueError(
                    f"{where} would undo what {name} does to the same heads' weights; "
                    'use form="weights", or other heads=.'
                )
            if "outputs" in stages and (before or other.part is self):
                raise ValueError(
                    f"{where} would undo what {name} did to the same heads' outputs before it; attach "
                    "AttentionCalibration first (and once), or give them other heads=."
                )

    @torch.no_grad()
    def _count(self, call: AttentionCall, freed: Tensor, mine: tuple[Tensor, Tensor]) -> None:
        """Adds up the mass that left sinks, ``freed (n, R)`` of the pairs ``mine``, by query head."""
        if torch.compiler.is_compiling():
            return
        sample, place = mine
        heads = torch.tensor(call.head_list, device=freed.device)
        valid = call.real_rows()
        if call.rows is not None:
            valid = valid.gather(1, call.rows.clamp(min=0)) & (call.rows >= 0)
        if call.layer not in self._figures:
            zeros = torch.zeros(call.query.shape[1], device=freed.device)
            self._figures[call.layer] = zeros, zeros.long()
        moved, rows = self._figures[call.layer]
        moved.index_add_(0, heads[place], (freed * valid[sample]).sum(1).to(moved.dtype))
        rows[heads] += valid.sum()


def _rows_of(
    call: AttentionCall, pairs: HeadPairs, weights: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and visible keys ``(N, R, Tk)`` of the rows ``(B, R)`` (None: all), taken from ``weights`` if given."""
    if weights is None:
        pairs = HeadPairs(call, pairs.sample, pairs.head, rows)
        return pairs.probabilities(slice(0, pairs.query.shape[1]))
    call = call.at(call.heads, rows)
    visible = call.visible().expand(*weights.shape[:2], -1, -1)
    if rows is not None:
        index = rows.clamp(min=0)[:, None, :, None]
        weights = weights.gather(2, index.expand(-1, weights.shape[1], -1, weights.shape[3]))
    return (weights * visible).flatten(0, 1), visible.flatten(0, 1)


@torch.no_grad()
def _statistics_of(call: AttentionCall, weights: Tensor) -> ColumnStatistics:
    """Column statistics of weights ``(B, heads, Tq, Tk)`` that somebody else has computed."""
    valid = call.real_rows()[:, None, :, None]
    visible = (call.visible() & valid).expand(weights.shape)
    return ColumnStatistics((weights * valid).sum(2), visible.sum(2), visible.sum(-1).amax(-1))


def _heads(heads: Any, layers: Sequence[int] | None) -> Any:
    """Heads as the seam takes them: None, a list of heads, or a dict {layer: heads} from pairs or a mask."""
    if heads is None:
        return None
    if isinstance(heads, Tensor):
        if heads.dtype != torch.bool or heads.dim() != 2:
            raise ValueError(
                f"a heads tensor must be a boolean mask (layers, heads), not {tuple(heads.shape)} {heads.dtype}"
            )
        heads = [tuple(pair) for pair in heads.nonzero().tolist()]
    else:
        heads = list(heads)
        if heads and not any(hasattr(head, "__len__") for head in heads):
            return [int(head) for head in heads]
    try:
        pairs = sorted({(int(layer), int(head)) for layer, head in heads})
    except (TypeError, ValueError) as error:
        raise ValueError(
            "heads must be a list of heads, a list of (layer, head) pairs, a boolean mask or a HeadSet"
        ) from error
    return {
        layer: [head for other, head in pairs if other == layer]
        for layer in dict.fromkeys(layer for layer, _ in pairs)
        if layers is None or layer in layers
    }
