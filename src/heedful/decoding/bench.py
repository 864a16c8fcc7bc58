"""Decoding speed by the protocol of Spec-Bench: batch size 1, greedy, wall time with prefill, every contestant in one run.

The contestants take turns question by question, in rotating order, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, quantiles
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heedful.decoding.drafter import Drafter
from heedful.decoding.generate import generate
from heedful.decoding.stats import DecodingStats
from heedful.decoding.support import model_device, without_cudnn_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Spec-Bench's own grouping: everything that is not one of these is a category of MT-bench.
_SPEC_BENCH = ("translation", "summarization", "qa", "math_reasoning", "rag")
BASELINE = "transformers generate"
PLAIN = "heedful, plain loop"
# Two logits this close count as a tie when one output has the one token and another output the other.
_NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the group it is reported in."""

    category: str
    prompt: str


def read_questions(path: str | Path, per_category: int | None = None) -> list[Question]:
    """Reads Spec-Bench's ``question.jsonl`` (``category``, ``turns``; the first turn is the prompt), one category after another in turn.

    Args:
        path: JSON lines. MT-bench's categories are put together as ``mt_bench``.
        per_category: questions of each category, the first ones. Default: all.

    Raises:
        ValueError: a line is not a question, or there are none.
        OSError: the file cannot be read.
    """
    groups: dict[str, list[Question]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            prompt, category = item["turns"][0], str(item.get("category", "questions"))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a question with 'turns': {error!r}") from None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{path}, line {number}: the first turn is no text")
        if "question_id" in item and category not in _SPEC_BENCH:
            category = "mt_bench"
        groups.setdefault(category, []).append(Question(category, prompt))
    if not groups:
        raise ValueError(f"{path} holds no questions")
    return interleaved([questions[:per_category] for questions in groups.values()])


def interleaved(groups: Sequence[Sequence[Question]]) -> list[Question]:
    """One of each group in turn: however early a run is stopped, the groups are as good as equally large."""
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


@dataclass(slots=True)
class Answer:
    """One contestant's run on one question."""

    category: str
    tokens: int
    seconds: float
    identical: bool
    fork_gap: float | None = None  # where it forked from the baseline: by how much the two tokens' logits differ
    stats: DecodingStats | None = None


@dataclass(slots=True)
class DecodeBenchmark:
    """What `bench_decode` measured.

    Attributes:
        answers: for each contestant its runs, in the order of the questions. The first contestant is the baseline.
        setting: model, device, dtype, threads, tokens asked for, versions.
    """

    answers: dict[str, list[Answer]]
    setting: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values: for each contestant overall and by category, and the setting."""
        categories = list(dict.fromkeys(answer.category for answer in next(iter(self.answers.values()))))
        return {
            "setting": dict(self.setting),
            "contestants": {
                name: self._figures(name) | {"by_category": {c: self._figures(name, c) for c in categories}}
                for name in self.answers
            },
        }

    def speedup(self, name: str, over: str = BASELINE, category: str | None = None) -> float:
        """Ratio of the mean speeds, as Spec-Bench defines it."""
        return self._speed(name, category) / self._speed(over, category)

    def table(self) -> str:
        """A markdown table: speeds, speed-ups, and what drafting did."""
        lines = [
            "| | tokens/s | speed-up (95 %) | over the plain loop | tokens a step | draft / verify / commit ms "
            "| identical | forks in 1,000 tokens | of them near ties |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name in self.answers:
            f = self._figures(name)
            low, high = f["speedup_95"]
            step = f.get("milliseconds_per_step")
            times = "" if step is None else " / ".join(f"{step[part]:.2f}" for part in ("draft", "verify", "commit"))
            lines.append(
                f"| {name} | {f['tokens_per_second']:.1f} | {f['speedup']:.2f} ({low:.2f}-{high:.2f}) "
                f"| {self.speedup(name, PLAIN) if PLAIN in self.answers else float('nan'):.2f} "
                f"| {f.get('tokens_per_step', 1.0):.2f} | {times} | {f['identical']}/{f['questions']} "
                f"| {f['fork_rate_per_1000_tokens']:.2f} | {f['near_ties']} |"
            )
        categories = list(dict.fromkeys(answer.category for answer in next(iter(self.answers.values()))))
        lines += [
            "",
            "| speed-up over " + BASELINE + " | " + " | ".join(categories) + " |",
            "|---" * (len(categories) + 1) + "|",
        ]
        for name in list(self.answers)[1:]:
            cells = [f"{self.speedup(name, category=c):.2f}" for c in categories]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if "baseline" in self.setting:
            lines += ["", f"Baseline: {self.setting['baseline']}."]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Speed-up over the baseline by category, a bar a contestant, with tokens a step in the legend. Needs matplotlib."""
        import matplotlib.pyplot as plt

        names = list(self.answers)[1:]
        categories = [*dict.fromkeys(answer.category for answer in next(iter(self.answers.values()))), "all"]
        figure, axes = plt.subplots(figsize=(2.5 + 1.3 * len(categories), 4.2), layout="constrained")
        width = 0.8 / max(1, len(names))
        for i, name in enumerate(names):
            heights = [self.speedup(name, category=None if c == "all" else c) for c in categories]
            steps = self._figures(name).get("tokens_per_step")
            label = name if steps is None else f"{name} ({steps:.2f} tokens a step)"
            axes.bar(
                [x + (i - (len(names) - 1) / 2) * width for x in range(len(categories))], heights, width, label=label
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(categories)), [c.replace("_", " ") for c in categories])
        axes.set_ylabel(f"times as fast as {next(iter(self.answers))}")
        axes.set_title(f"{self.setting.get('device', '')}, {self.setting.get('dtype', '')}, batch 1, greedy")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False, fontsize=8)
        return figure

    def _of(self, name: str, category: str | None) -> list[Answer]:
        return [answer for answer in self.answers[name] if category in (None, answer.category)]

    def _speed(self, name: str, category: str | None = None) -> float:
        return mean(answer.tokens / answer.seconds for answer in self._of(name, category))

    def _figures(self, name: str, category: str | None = None) -> dict[str, Any]:
        answers, baseline = self._of(name, category), self._of(next(iter(self.answers)), category)
        speeds = [answer.tokens / answer.seconds for answer in answers]
        pairs = [(a.tokens / a.seconds, b.tokens / b.seconds) for a, b in zip(answers, baseline, strict=True)]
        deciles = quantiles((a / b for a, b in pairs), n=10) if len(pairs) > 1 else [pairs[0][0] / pairs[0][1]] * 9
        gap = max((answer.fork_gap or 0.0 for answer in answers), default=0.0)
        figures: dict[str, Any] = {
            "questions": len(answers),
            "tokens": sum(answer.tokens for answer in answers),
            "seconds": sum(answer.seconds for answer in answers),
            "tokens_per_second": mean(speeds),
            "speedup": self.speedup(name, next(iter(self.answers)), category),
            "speedup_95": _bootstrap(pairs),
            "speedup_of_a_question": {"10%": deciles[0], "median": deciles[4], "90%": deciles[8]},
            "identical": sum(answer.identical for answer in answers),
            "forks": sum(not answer.identical for answer in answers),
            "fork_rate_per_1000_tokens": 1e3
            * sum(not answer.identical for answer in answers)
            / max(1, sum(answer.tokens for answer in answers)),
            "near_ties": sum(answer.fork_gap is not None and answer.fork_gap < self._tie() for answer in answers),
            "largest_fork_gap": gap if math.isfinite(gap) else None,
        }
        stats = [answer.stats for answer in answers if answer.stats is not None]
        if stats:
            steps = max(1, sum(s.steps for s in stats))
            entries = [emitted for s in stats for row in s.accepted for emitted in row]
            figures["tokens_per_step"] = sum(entries) / max(1, len(entries))
            figures["accepted_histogram"] = {str(n): entries.count(n) for n in sorted(set(entries))}
            figures["milliseconds_per_step"] = {
                part: 1e3 * sum(getattr(s, f"{part}_seconds") for s in stats) / steps
                for part in ("draft", "verify", "commit")
            }
            figures["prefill_seconds"] = sum(s.prefill_seconds for s in stats)
            figures["tokens_per_second_without_prefill"] = sum(entries) / max(
                1e-9, sum(s.decode_seconds for s in stats)
            )
        return figures

    def _tie(self) -> float:
        return _NEAR_TIE[getattr(torch, self.setting.get("dtype", "float32"))]


def bench_decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    drafters: Mapping[str, Drafter],
    *,
    max_new_tokens: int = 128,
    cold: Sequence[str] = (),
    time_limit: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    partial_result: Callable[[DecodeBenchmark], None] | None = None,
) -> DecodeBenchmark:
    """Times transformers' generate and prompt lookup, heedful's plain loop, and drafters, on the same questions.

    Greedy, batch size 1, wall time with prefill; three warm-up runs on the first question, after which drafters are cleared. On
    a GPU heedful's contestants also run once on a question of each further cache size, for which graphs are captured.
    Drafters keep what they learn from question to question, as in Spec-Bench. Every output is compared with generate's.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer. A prompt longer than the context leaves is cut at its beginning.
        questions: what to answer (`read_questions`).
        drafters: the drafters by name.
        max_new_tokens: tokens of each answer. Default 128.
        cold: names of drafters that are cleared before every question.
        time_limit: seconds after which no further question is begun. Default: none.
        progress: called with the questions done and their number.
        partial_result: called after each question with the figures so far, whose setting says that they are incomplete.

    Returns:
        The figures (`DecodeBenchmark`): ``table()`` for people, ``to_json()`` for machines.

    Raises:
        ValueError: there are no questions, or the model is one that the engine refuses.
    """
    if not questions:
        raise ValueError("there are no questions to answer")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}

    def transformers(ids: LongTensor, **more: Any) -> tuple[Tensor, None]:
        with without_cudnn_attention(ids.device):
            return cast(Any, model).generate(ids, **options, **more), None

    def ours(ids: LongTensor, drafter: Drafter | None) -> tuple[Tensor, DecodingStats]:
        result = generate(model, ids, drafter, **options)
        return result.sequences, result.stats

    runs: dict[str, Callable[[LongTensor], tuple[Tensor, DecodingStats | None]]] = {
        BASELINE: transformers,
        "transformers prompt lookup": lambda ids: transformers(ids, prompt_lookup_num_tokens=10),
        PLAIN: lambda ids: ours(ids, None),
        **{f"heedful, {name}": partial(ours, drafter=drafter) for name, drafter in drafters.items()},
    }
    context = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - max_new_tokens
    device = model_device(model)
    prompts = [_encode(tokenizer, question.prompt, context).to(device) for question in questions]
    for run in runs.values():
        for _ in range(3):
            run(prompts[0])  # type: ignore[arg-type]
    if device.type == "cuda":
        for ids in _by_cache_size(prompts, max_new_tokens, [None, *drafters.values()])[1:]:
            for name, run in runs.items():
                drafter = drafters.get(name.removeprefix("heedful, "))
                if name == PLAIN or drafter is not None:
                    run(ids)  # type: ignore[arg-type]
    for drafter in drafters.values():
        drafter.clear()

    answers: dict[str, list[Answer]] = {name: [] for name in runs}
    setting: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "complete": False,
        "protocol": "Spec-Bench: batch 1, greedy, three warm-ups on the first question, wall time with prefill, ratio of means",
        "baseline": "transformers' own generate with its defaults (dynamic cache, no compilation, one launch a kernel), the same "
        "model object and dtype; heedful's plain loop is the row without drafts, with the kernels that drafters use"
        + ("; without cuDNN's attention, which builds a plan for each new length" if device.type == "cuda" else ""),
    }
    result = DecodeBenchmark(answers, setting)
    began = perf_counter()
    for number, (question, ids) in enumerate(zip(questions, prompts, strict=True)):
        if time_limit is not None and number and perf_counter() - began > time_limit:
            break
        names = list(runs)
        names = names[number % len(names) :] + names[: number % len(names)]
        outputs: dict[str, tuple[Tensor, float, DecodingStats | None]] = {}
        for name in names:
            if name.removeprefix("heedful, ") in cold:
                drafters[name.removeprefix("heedful, ")].clear()
            started = perf_counter()
            sequences, stats = runs[name](ids)  # type: ignore[arg-type]
            if sequences.is_cuda:
                torch.cuda.synchronize(sequences.device)
            outputs[name] = (sequences, perf_counter() - started, stats)
        reference = outputs[BASELINE][0]
        for name in runs:
            sequences, seconds, stats = outputs[name]
            gap = None if torch.equal(sequences, reference) else fork_gap(model, sequences, reference)
            tokens = sequences.shape[1] - ids.shape[1]
            answers[name].append(Answer(question.category, tokens, seconds, gap is None, gap, stats))
        setting["questions"] = number + 1
        if progress is not None:
            progress(number + 1, len(questions))
        if partial_result is not None:
            partial_result(result)
    setting["complete"] = True
    return result


def _by_cache_size(prompts: Sequence[Tensor], max_new_tokens: int, drafters: Sequence[Drafter | None]) -> list[Tensor]:
    """The first prompt of each size of the drafters' caches in the graph engine; the first of all comes first."""
    from heedful.decoding.graph import capacity_for

    found: dict[tuple[int, ...], Tensor] = {}
    for ids in prompts:
        length = ids.shape[1] + max_new_tokens
        found.setdefault(tuple(capacity_for(length, drafter) for drafter in drafters), ids)
    return list(found.values())


@torch.no_grad()
def fork_gap(model: PreTrainedModel, sequences: Tensor, reference: Tensor) -> float:
    """Where two outputs ``(1, length)`` part: by how much the model's logits for the two tokens differ there."""
    shorter = min(sequences.shape[1], reference.shape[1])
    differing = (sequences[0, :shorter] != reference[0, :shorter]).nonzero()
    if len(differing) == 0:  # one output is a prefix of the other, which no tie explains: null in the JSON
        return float("inf")
    at = int(differing[0])
    logits = model(reference[:, :at], use_cache=False).logits[0, -1].float()
    return float((logits[sequences[0, at]] - logits[reference[0, at]]).abs())


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, context: int) -> Tensor:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return ids if ids.shape[1] <= context else torch.cat([ids[:, :1], ids[:, 1 - context :]], dim=1)


def _bootstrap(pairs: Sequence[tuple[float, float]], rounds: int = 1000) -> list[float]:
    """95 % interval of the ratio of means, questions drawn with replacement."""
    draw = random.Random(0)
    ratios = []
    for _ in range(rounds):
        sample = draw.choices(pairs, k=len(pairs))
        ratios.append(sum(a for a, _ in sample) / sum(b for _, b in sample))
    ratios.sort()
    return [ratios[int(0.025 * rounds)], ratios[int(0.975 * rounds)]]
