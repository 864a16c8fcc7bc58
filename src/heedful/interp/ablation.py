"""Taking heads out: four ways to replace what a head says, and what that does to recall."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heedful.interp.answers import Forward, inference
from heedful.interp.head_scores import HeadScores
from heedful.interp.needles import NeedlePrompt, choose_prompts, needle_recall
from heedful.seam import AttentionCall, Edit, Probe, attach

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("zero", "mean", "uniform", "resample")
_STEPS = {"prefill": "prefill", "decode": "decode", "both": None, "all": None}


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """What the heads of a model say on ordinary text: the reference that "mean" and "resample" replace a head's
    output with.

    Args:
        samples: ``{layer: (S, H, D)}`` float32: outputs of all heads at S token positions drawn at random.
        mean: ``{layer: (H, D)}`` float32: the mean over all ``n`` positions.
        n: token positions the means are taken over.
    """

    samples: dict[int, Tensor]
    mean: dict[int, Tensor]
    n: int


class _Collect(Probe):
    def __init__(self, layers: Iterable[int] | None, rows: Tensor) -> None:
        super().__init__(layers=layers, rows=rows)
        self.seen: dict[int, Tensor] = {}

    def outputs(self, call: AttentionCall, output: Tensor) -> None:
        real = call.rows >= 0 if call.rows is not None else output.new_ones(output.shape[0], output.shape[2]).bool()
        self.seen[call.layer] = output.transpose(1, 2)[real].float().cpu()  # (positions, H, D)


def head_outputs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Iterable[int] | None = None,
    samples: int = 512,
    batch_size: int = 4,
    seed: int = 0,
) -> HeadOutputs:
    """Measures what each head says (before the output projection) on given text: the mean, and samples of it.

    Args:
        input_ids: ``(N, T)`` int64, BOS included where the model has one. attention_mask: ``(N, T)``; padding does
            not count.
        layers: default all. samples: positions kept a layer, drawn without repeats, at most as many as there are.
        batch_size: rows a forward. seed: fixes the draw.

    Example:
        >>> import heedful
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> ids = tokenizer([heedful.zoo.excerpt()[:4000]], return_tensors="pt").input_ids
        >>> reference = heedful.interp.head_outputs(model, ids)
        >>> part = heedful.interp.ablate_heads([(3, 1)], mode="mean", reference=reference)
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (rows, tokens), got {tuple(input_ids.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    generator = torch.Generator().manual_seed(seed)
    layers = list(layers) if layers is not None else None
    keep = min(samples, int(mask.sum()))
    chosen = torch.randperm(int(mask.sum()), generator=generator)[:keep].sort().values
    sums: dict[int, Tensor] = {}
    kept: dict[int, list[Tensor]] = {}
    n = 0
    for ids, real in zip(input_ids.split(batch_size), mask.split(batch_size), strict=True):
        probe = _Collect(layers, real.bool())
        with inference(model), attach(model, probe):
            Forward(model)(ids.to(model.device), real.to(model.device), 1, use_cache=False)
        positions = int(real.sum())
        here = chosen[(chosen >= n) & (chosen < n + positions)] - n
        for layer, seen in probe.seen.items():
            sums[layer] = sums.get(layer, 0) + seen.double().sum(0)
            kept.setdefault(layer, []).append(seen[here])
        n += positions
    return HeadOutputs(
        {layer: torch.cat(rows) for layer, rows in kept.items()},
        {layer: (total / n).float() for layer, total in sums.items()},
        n,
    )


def _by_layer(heads: Iterable[Sequence[float]]) -> dict[int, list[int]]:
    """``{layer: [head, ...]}`` of pairs, or of the triples of ``HeadScores.top``."""
    chosen: dict[int, list[int]] = {}
    for entry in heads:
        if len(entry) not in (2, 3):
            raise ValueError(f"heads must be (layer, head) pairs or the triples of HeadScores.top, got {entry!r}")
        layer, head = int(entry[0]), int(entry[1])
        if head not in chosen.setdefault(layer, []):
            chosen[layer].append(head)
    return chosen


class _UniformAttention(Edit):
    """A query of 0 gives every visible key the same logit."""

    def queries_keys(self, call: AttentionCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query), key


class _Zero(Edit):
    def outputs(self, call: AttentionCall, output: Tensor) -> Tensor:
        return torch.zeros_like(output)


class _Mean(Edit):
    def __init__(self, reference: HeadOutputs, **selectors: Any) -> None:
        super().__init__(**selectors)
        self.reference = reference

    def outputs(self, call: AttentionCall, output: Tensor) -> Tensor:
        mean = self.reference.mean[call.layer][list(call.head_list)].to(output)
        return mean[:, None].expand_as(output)


class _Resample(Edit):
    """The draw depends on seed, layer and token position alone: not on batch size, padding, chunks or caches."""

    PERIOD = 8191  # positions after which the draws begin again: a prime, so that they fall out of step with any text

    def __init__(self, reference: HeadOutputs, seed: int, **selectors: Any) -> None:
        super().__init__(**selectors)
        self.reference = reference
        generator = torch.Generator().manual_seed(seed)
        self.draws = {
            layer: torch.randint(len(samples), (self.PERIOD,), generator=generator)
            for layer, samples in sorted(reference.samples.items())
        }

    def outputs(self, call: AttentionCall, output: Tensor) -> Tensor:
        samples = self.reference.samples[call.layer][:, list(call.head_list)]  # (S, heads, D)
        if call.positions is None:
            raise ValueError(
                f"layer {call.layer}: resample needs token positions, and this model hands none; use mode='mean'"
            )
        index = self.draws[call.layer].to(output.device)[call.positions.expand(output.shape[0], -1) % self.PERIOD]
        return samples.to(output)[index].transpose(1, 2)  # (B, R, heads, D) -> (B, heads, R, D)


def ablate_heads(
    heads: Iterable[Sequence[float]],
    mode: str = "zero",
    *,
    phase: str = "both",
    reference: HeadOutputs | None = None,
    seed: int = 0,
) -> Edit:
    """Takes heads out of a model while it is attached: what they write to the residual stream is replaced.

    - "zero": the head says nothing; the same as zeroing its columns of the output projection.
    - "mean": the head says the same everywhere, its mean over a reference text.
    - "uniform": the head attends to all visible keys alike, so it says the mean of their values. This is what the
      released code of the retrieval-head paper does when it "masks" a head (and there in decoding only).
    - "resample": the head says what it said at some other position of a reference text, drawn by ``seed``.

    Other heads are untouched, those that share the key-value head too.

    Example:
        >>> import heedful
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> scores = heedful.interp.retrieval_scores(model, tokenizer, lengths=(512,))
        >>> with heedful.attach(model, heedful.interp.ablate_heads(scores.top(3))):
        ...     print(heedful.interp.needle_recall(model, tokenizer, lengths=(512,)))

    Cost:
        Nothing beside the forward: no attention weights are computed, the model's own kernel runs. "mean" and
        "resample" need one pass over a reference text first (:func:`head_outputs`).

    When not to use:
        To show what a head does by zeroing alone: a zero is itself out of distribution, so compare with "mean" or
        "resample". Without a control: other heads may matter as much, see
        :func:`recall_without_heads`. To make a model faster: the head is computed all the same.

    Paper:
        "Retrieval Head Mechanistically Explains Long-Context Factuality", Wenhao Wu, Yizhong Wang, Guangxuan Xiao,
        Hao Peng, Yao Fu, arXiv 2404.15574 (uniform, decode).

    Args:
        heads: ``(layer, head)`` pairs of query heads, or what ``HeadScores.top`` returns.
        mode: "zero", "mean", "uniform" or "resample".
        phase: "prefill", "decode" or "both" ("all" is the same). A decode call has one query row and a cache that
            holds tokens.
        reference: from :func:`head_outputs`; needed by "mean" and "resample".
        seed: of "resample".

    Returns:
        An :class:`~heedful.Edit` for :func:`heedful.attach`.

    Raises:
        ValueError: no heads, an unknown mode or phase, no reference, or one that lacks a layer.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if phase not in _STEPS:
        raise ValueError(f"phase must be one of {tuple(_STEPS)}, got {phase!r}")
    chosen = _by_layer(heads)
    if not chosen:
        raise ValueError("heads is empty: there is nothing to ablate")
    selectors: dict[str, Any] = {"heads": chosen, "steps": _STEPS[phase]}
    if mode == "zero":
        return _Zero(**selectors)
    if mode == "uniform":
        return _UniformAttention(**selectors)
    if reference is None:
        raise ValueError(f"mode={mode!r} needs reference=heedful.interp.head_outputs(model, input_ids)")
    missing = sorted(set(chosen) - set(reference.mean))
    if missing:
        raise ValueError(f"the reference lacks layers {missing}; measure them with head_outputs(layers=...)")
    return _Mean(reference, **selectors) if mode == "mean" else _Resample(reference, seed, **selectors)


@dataclass(frozen=True, eq=False)
class HeadRemoval:
    """Recall of a model without its best retrieval heads, and without as many other heads.

    Args:
        recall: with all heads.
        without_retrieval_heads: ``{k: recall}`` without the k heads of the highest score.
        without_random_heads: ``{k: [recall of each draw]}`` without k heads drawn from the non-retrieval heads.
        n: prompts.
    """

    recall: float
    without_retrieval_heads: dict[int, float]
    without_random_heads: dict[int, list[float]]
    n: int

    @property
    def random_median(self) -> dict[int, float]:
        """``{k: median recall of the draws}``, nan without draws. A mean would hide that draws are all or nothing: one
        head that the retrieval heads build on is enough to end recall."""
        return {k: median(draws) if draws else math.nan for k, draws in self.without_random_heads.items()}

    def __str__(self) -> str:
        lines = [f"recall on {self.n} prompts: {self.recall:.0%}", "heads removed  retrieval  random: median (draws)"]
        for k, recall in self.without_retrieval_heads.items():
            draws = ", ".join(f"{draw:.0%}" for draw in self.without_random_heads[k])
            control = f"{self.random_median[k]:.0%} ({draws})" if draws else "-"
            lines.append(f"{k:>13}  {recall:>9.0%}  {control}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def plot(self) -> Figure:
        """Recall by heads removed, retrieval heads against every draw of others. Returns the figure, shows nothing.

        Raises:
            ImportError: matplotlib is not there (``pip install heedful[plot]``); ``print(removal)`` needs none.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'heedful[plot]', or print the result") from error
        figure = Figure(figsize=(4.5, 3), layout="constrained")
        axes = figure.add_subplot()
        ks = [0, *self.without_retrieval_heads]
        axes.plot(ks, [self.recall, *self.without_retrieval_heads.values()], "o-", label="retrieval heads")
        medians = [self.recall, *self.random_median.values()]
        axes.plot(ks, medians, "s--", color="grey", label="random other heads (median)")
        for k, draws in self.without_random_heads.items():
            axes.plot([k] * len(draws), draws, ".", color="grey", alpha=0.5)
        axes.set(xlabel="heads removed", ylabel="needle recall", ylim=(-0.03, 1.03), xticks=ks)
        axes.legend()
        return figure


def recall_without_heads(
    model: Any,
    tokenizer: Any,
    scores: HeadScores,
    haystack: str | None = None,
    *,
    counts: Sequence[int] = (1, 2, 3),
    draws: int = 3,
    mode: str = "zero",
    phase: str = "both",
    reference: HeadOutputs | None = None,
    seed: int = 0,
    prompts: Sequence[NeedlePrompt] | None = None,
    variant: str = "decode",
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **prompt_options: Any,
) -> HeadRemoval:
    """The paper's causal test: recall without the k best retrieval heads against recall without k random other heads.

    The random heads are drawn from those under ``scores.threshold``, by seed, ``draws`` times, and one draw is the
    same for all prompts; a smaller k takes the first heads of the same draw. All conditions answer the same prompts.

    Args:
        scores: from :func:`retrieval_scores`.
        counts: the k's. draws: random draws a k; 0 leaves the control out.
        mode, phase, reference: as in :func:`ablate_heads`; ``seed`` is also that of the draws (seed, seed + 1, ...).
        haystack, prompts, variant, batch_size, **prompt_options: as in :func:`needle_recall`. The prompts' own seed is
            ``seed + 1``, so they are not the ones that gave the scores.
        progress: called with (conditions done, conditions in all).

    Raises:
        ValueError: too few heads for a count; "teacher-forced" with a phase other than "both" (it has no decode calls).
    """
    if variant == "teacher-forced" and _STEPS.get(phase, "") is not None:
        raise ValueError("a teacher-forced run has no decode calls; use variant='decode', or phase='both'")
    if prompts is None:
        prompt_options.setdefault("seed", seed + 1)
    prompts = choose_prompts(tokenizer, prompts, haystack, **prompt_options)
    ranked = scores.top(None)
    if not counts or min(counts) < 1 or max(counts) > len(ranked):
        raise ValueError(f"counts must lie between 1 and the {len(ranked)} heads that have a score, got {list(counts)}")
    controls = [scores.random_heads(max(counts), seed=seed + draw) for draw in range(draws)]
    total = 1 + len(counts) * (1 + draws)
    done = 0

    def run(heads: Sequence[Sequence[float]]) -> float:
        nonlocal done
        parts = [ablate_heads(heads, mode, phase=phase, reference=reference, seed=seed)] if heads else []
        recall = needle_recall(
            model, tokenizer, parts=parts, prompts=prompts, variant=variant, batch_size=batch_size
        ).recall
        done += 1
        if progress is not None:
            progress(done, total)
        return recall

    base = run([])
    without = {k: run(ranked[:k]) for k in counts}
    control = {k: [run(heads[:k]) for heads in controls] for k in counts}
    return HeadRemoval(base, without, control, len(prompts))
