"""Needles in a haystack: prompts whose answer stands at a known place of a long text, and a model's recall on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from heedful.interp.answers import answer_prompts
from heedful.seam import Edit, Kernel, Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATEMENT = "The secret number of {name} is {value}."
QUESTION = "What is the secret number of {name}? The secret number of {name} is"

_FIRST_NAMES = (
    "Alfonzo", "Beatrix", "Casimir", "Delphine", "Evander", "Fabiola", "Gustavo", "Hortensia", "Isidore", "Jacinta",
    "Kaspar", "Lucretia", "Mordecai", "Nerissa", "Octavio", "Perpetua", "Quentin", "Rosamund", "Sylvester", "Theodora",
)  # fmt: skip
_LAST_NAMES = (
    "Applegarth", "Brockway", "Cattermole", "Dunwoody", "Entwistle", "Fairweather", "Gathercole", "Hargreave",
    "Inchbald", "Jessop", "Kettlewell", "Lovelock", "Micklethwait", "Nettleship", "Osgood", "Pomfret", "Quarles",
    "Ravenscroft", "Satterthwaite", "Thistlewood",
)  # fmt: skip
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s)")


@dataclass(frozen=True)
class Needle:
    """A fact to hide in a text, and the question about it.

    Args:
        statement: the sentence that is put into the text.
        question: the end of the prompt; the model's next words should be the answer.
        answer: how the prompt goes on, with its leading space where there should be one (``" 48213"``). Without the
            spaces around it, it must occur in the statement: its tokens there are what a head has to find and copy.
    """

    statement: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.answer.strip():
            raise ValueError("the answer of a needle is empty")
        if self.answer.strip() not in self.statement:
            raise ValueError(f"the answer {self.answer.strip()!r} does not occur in the statement {self.statement!r}")

    @classmethod
    def draw(
        cls, rng: np.random.Generator, *, avoid: str = "", statement: str = STATEMENT, question: str = QUESTION
    ) -> Needle:
        """A new fact: a name of two uncommon words and a number of five digits, none of which occurs in ``avoid``."""
        for _ in range(1000):
            words = [str(rng.choice(_FIRST_NAMES)), str(rng.choice(_LAST_NAMES))]
            value = str(rng.integers(10_000, 100_000))
            if not any(word in avoid for word in [*words, value]):
                name = " ".join(words)
                return cls(
                    statement.format(name=name, value=value), question.format(name=name, value=value), f" {value}"
                )
        raise ValueError("the text contains every name that a needle could have; pass needles=")


@dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """One prompt: its token ids, and where in them the answer stands.

    Args:
        needle: the fact.
        input_ids: ``(T,)`` int64, special tokens such as BOS included.
        answer_ids: ``(n,)`` int64: the tokens that the right continuation consists of.
        columns: ``(k,)`` int64: indices into ``input_ids`` of the answer's tokens inside the statement; tokens of
            white space alone are not among them.
        length: tokens of prompt and answer that were asked for. depth: share of the text before the needle that was
            asked for.
    """

    needle: Needle
    input_ids: Tensor
    answer_ids: Tensor
    columns: Tensor
    length: int
    depth: float


class _Haystack:
    """A text with its token boundaries, to cut windows of so many tokens from."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        self.text, self.begin, self.end = text, offsets[:, 0], offsets[:, 1]
        sentences = np.searchsorted(self.begin, [match.end() for match in _SENTENCE_END.finditer(text)])
        self.sentences = np.concatenate([[0], sentences])

    def __len__(self) -> int:
        return len(self.begin)

    def window(self, start: int, size: int) -> str:
        return self.text[self.begin[start] : self.end[start + size - 1]] if size > 0 else ""

    def draw(self, rng: np.random.Generator, size: int) -> int:
        """The first token of a window of ``size`` tokens that begins with a sentence, if the text has such a one."""
        last = len(self) - size
        starts = self.sentences[self.sentences <= last]
        return int(rng.choice(starts)) if len(starts) > 1 else int(rng.integers(last + 1))


def _insert(window: str, statement: str, depth: float) -> tuple[str, int]:
    """The window with the statement after the last sentence end before ``depth``, and where the statement begins."""
    target = round(depth * len(window))
    if depth >= 1:
        place = len(window)
    else:
        place = max((match.end() for match in _SENTENCE_END.finditer(window) if match.end() <= target), default=0)
    before, after = window[:place], window[place:]
    if before:
        before += " "
    if after and not after[0].isspace():
        after = " " + after
    return before + statement + after, len(before)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids with the tokenizer's special tokens in front (BOS, unless the text brings its own), and their offsets."""
    own_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    encoding = tokenizer(
        text,
        add_special_tokens=not own_bos,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids, offsets, special = encoding["input_ids"], encoding["offset_mapping"], encoding["special_tokens_mask"]
    while ids and special[-1] and not own_bos:  # an EOS that some tokenizers append would end the prompt
        ids, offsets, special = ids[:-1], offsets[:-1], special[:-1]
    return ids, offsets


def _locate(text: str, offsets: Sequence[tuple[int, int]], begin: int, end: int) -> list[int]:
    """Indices of the tokens that overlap ``text[begin:end]`` with more than white space."""
    return [
        index
        for index, (left, right) in enumerate(offsets)
        if max(left, begin) < min(right, end) and text[max(left, begin) : min(right, end)].strip()
    ]


def _build(tokenizer: Any, window: str, needle: Needle, length: int, depth: float, prompt_format: str) -> NeedlePrompt:
    context, statement_at = _insert(window, needle.statement, depth)
    prompt = prompt_format.replace("{question}", needle.question).replace("{context}", context)
    begin = prompt.index(context) + statement_at + needle.statement.index(needle.answer.strip())
    ids, offsets = _encode(tokenizer, prompt)
    whole, _ = _encode(tokenizer, prompt + needle.answer)
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        raise ValueError(
            f"the prompt's tokens change when the answer {needle.answer!r} follows; "
            "let the question end with a word and the answer begin with a space"
        )
    columns = _locate(prompt, offsets, begin, begin + len(needle.answer.strip()))
    return NeedlePrompt(
        needle, torch.tensor(ids), torch.tensor(whole[len(ids) :]), torch.tensor(columns), length, depth
    )


def needle_prompts(
    tokenizer: Any,
    haystack: str | None = None,
    needles: Sequence[Needle] | None = None,
    *,
    lengths: Sequence[int] = (512, 1024),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    instances: int = 2,
    seed: int = 0,
    statement: str = STATEMENT,
    question: str = QUESTION,
    prompt_format: str = "{context}\n\n{question}",
) -> list[NeedlePrompt]:
    """Builds needle-in-a-haystack prompts: ``instances`` for every length and depth, each with its own window of the
    haystack.

    The needle stands after the sentence end nearest before the asked depth; the prompt and its answer together have
    exactly the asked length wherever the tokenizer allows it (else a token or two less). Needle and answer are
    located by character offsets, never by searching ids.

    Args:
        tokenizer: a fast Hugging Face tokenizer. Its special tokens are used, so BOS stands first in models that have
            one.
        haystack: running text, at least as long as the longest prompt, that contains none of the needles' answers.
            Default: the held-out prose that comes with the package.
        needles: the facts to hide, used in turn. Default: a new one for each prompt, worded by ``statement`` and
            ``question``.
        lengths: tokens of prompt and answer. depths: shares of the text before the needle, 0 (start) to 1 (end).
        instances: prompts a cell of (length, depth).
        seed: fixes windows and new needles; a cell's prompts do not depend on which other cells are asked for.
        statement, question: wordings of new needles, with ``{name}`` and (statement) ``{value}``.
        prompt_format: what the model reads, with ``{context}`` and ``{question}``. For a chat model, apply the chat
            template to a message that holds these two and pass the text.

    Raises:
        ValueError: the tokenizer has no offsets, the haystack is too short or contains an answer, a length is too
            short.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no character offsets; load a fast tokenizer (use_fast=True)")
    if not lengths or not depths or instances < 1:
        raise ValueError("lengths and depths must not be empty, instances must be at least 1")
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths are shares of the text, 0 to 1, got {list(depths)}")
    if "{context}" not in prompt_format or "{question}" not in prompt_format:
        raise ValueError(f"prompt_format must contain {{context}} and {{question}}, got {prompt_format!r}")
    if needles is not None and not needles:
        raise ValueError("needles is empty; pass None for new ones")
    if haystack is None:
        from heedful import zoo

        haystack = zoo.excerpt()
    hay = _Haystack(tokenizer, haystack)

    prompts: list[NeedlePrompt] = []
    for length in lengths:
        for depth in depths:
            for instance in range(instances):
                rng = np.random.default_rng([seed, length, round(depth * 1_000_000), instance])
                fixed = needles[len(prompts) % len(needles)] if needles is not None else None
                prompts.append(_fit(tokenizer, hay, fixed, length, depth, rng, statement, question, prompt_format))
    return prompts


def _fit(
    tokenizer: Any, hay: _Haystack, needle: Needle | None, length: int, depth: float, rng: np.random.Generator,
    statement: str, question: str, prompt_format: str,
) -> NeedlePrompt:  # fmt: skip
    """One prompt of ``length`` tokens, answer included: the window is made longer or shorter until it fits."""
    if len(hay) < length:
        raise ValueError(
            f"the haystack has {len(hay)} tokens, too few for a prompt of {length}; pass a longer haystack"
        )
    for _ in range(50):
        start = hay.draw(rng, length)
        window = hay.window(start, length)
        drawn = needle or Needle.draw(rng, avoid=window, statement=statement, question=question)
        if drawn.answer.strip() not in window:
            break
    else:
        raise ValueError(f"the haystack contains the answer {drawn.answer.strip()!r}; choose another needle or text")

    room = length
    best = None
    for _ in range(8):
        prompt = _build(tokenizer, hay.window(start, room), drawn, length, depth, prompt_format)
        excess = len(prompt.input_ids) + len(prompt.answer_ids) - length
        if excess <= 0:
            best = prompt
        if excess == 0:
            break
        room = min(room - excess, length)
        if room < 1:
            raise ValueError(
                f"needle and question alone take {length - room} tokens or more; lengths must be above {length}"
            )
    if best is None:
        raise ValueError(f"could not fit a prompt into {length} tokens; choose another length")
    return best


def choose_prompts(
    tokenizer: Any,
    prompts: Sequence[NeedlePrompt] | None,
    haystack: str | None = None,
    needles: Sequence[Needle] | None = None,
    **options: Any,
) -> list[NeedlePrompt]:
    """The ready prompts, or new ones from the other arguments; both is a ValueError."""
    if prompts is None:
        return needle_prompts(tokenizer, haystack, needles, **options)
    if haystack is not None or needles is not None or options:
        raise ValueError("prompts are ready; leave out haystack, needles and the options of needle_prompts")
    return list(prompts)


@dataclass(frozen=True, eq=False)
class NeedleRecall:
    """What a model answered.

    Args:
        passed: ``(N,)`` bool. responses: the N decoded answers.
        lengths: ``(N,)`` int64, tokens. depths: ``(N,)`` float64, shares.
    """

    passed: Tensor
    responses: list[str]
    lengths: Tensor
    depths: Tensor

    @property
    def recall(self) -> float:
        """The share of prompts answered rightly."""
        return self.passed.double().mean().item()

    def grid(self) -> tuple[Tensor, list[int], list[float]]:
        """Recall by length and depth: ``(lengths, depths)`` float32 (nan where nothing was asked), and the two axes."""
        lengths, depths = sorted(set(self.lengths.tolist())), sorted(set(self.depths.tolist()))
        cells = torch.full((len(lengths), len(depths)), torch.nan)
        for row, length in enumerate(lengths):
            for column, depth in enumerate(depths):
                chosen = (self.lengths == length) & (self.depths == depth)
                if chosen.any():
                    cells[row, column] = self.passed[chosen].float().mean()
        return cells, lengths, depths

    def __str__(self) -> str:
        cells, lengths, depths = self.grid()
        lines = [f"recall {self.recall:.0%} of {len(self.passed)}", "length " + "".join(f"{d:>7.0%}" for d in depths)]
        lines += [
            f"{n:<7}" + "".join(f"{c:>7.0%}" for c in row) for n, row in zip(lengths, cells.tolist(), strict=True)
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def plot(self) -> Figure:
        """A length x depth heat map of recall. Returns the figure, shows nothing.

        Raises:
            ImportError: matplotlib is not there (``pip install heedful[plot]``); ``print(recall)`` needs none.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'heedful[plot]', or print the recall") from error
        cells, lengths, depths = self.grid()
        figure = Figure(figsize=(2 + 0.6 * len(lengths), 1.4 + 0.4 * len(depths)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("0.8")
        image = axes.imshow(cells.T.numpy(), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="tokens", ylabel="depth of the needle", title=f"Recall {self.recall:.0%}")
        figure.colorbar(image)
        return figure


def needle_recall(
    model: Any,
    tokenizer: Any,
    haystack: str | None = None,
    needles: Sequence[Needle] | None = None,
    *,
    parts: Sequence[Kernel | Edit | Probe] = (),
    prompts: Sequence[NeedlePrompt] | None = None,
    variant: str = "decode",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    prefill_chunk_size: int | None = None,
    cache_implementation: str = "dynamic",
    progress: Callable[[int, int], None] | None = None,
    **prompt_options: Any,
) -> NeedleRecall:
    """The needle-in-a-haystack test: how often the model finds a fact again that was hidden in a long text.

    A prompt is passed when more than half of the answer's words stand in the response (ROUGE-1 recall; for a single
    number: when the number is right). A teacher-forced prompt is passed when every answer token has the highest logit.

    Args:
        model: a causal language model of transformers, on any device. tokenizer: its fast tokenizer.
        haystack, needles, **prompt_options: as in :func:`needle_prompts` (``lengths``, ``depths``, ``instances``,
            ``seed``, ...).
        parts: parts of heedful to attach meanwhile, for example ``[ablate_heads(scores.top(5))]``.
        prompts: ready prompts instead of those arguments.
        variant: "decode" answers greedily, one token a step, after a prefill without the last prompt token.
            "teacher-forced" feeds prompt and answer at once: for a single number the same verdict from one forward,
            unless a part treats prefill and decode differently.
        batch_size: prompts a forward; prompts of unequal length are padded on the left.
        max_new_tokens: tokens to decode (decode variant). Default: as many as the answer has. A response ends early
            at an end-of-sequence token and at a line break.
        prefill_chunk_size: feed the prompt in chunks of this many tokens (decode variant). Default: at once.
        cache_implementation: "dynamic" or "static" (decode variant).
        progress: called with (prompts done, prompts in all) after each batch.

    Example:
        >>> import heedful
        >>> model, tokenizer = heedful.zoo.load("classics-20m")
        >>> print(heedful.interp.needle_recall(model, tokenizer, lengths=(512,), instances=1))
    """
    prompts = choose_prompts(tokenizer, prompts, haystack, needles, **prompt_options)
    passed = torch.zeros(len(prompts), dtype=torch.bool)
    responses = [""] * len(prompts)
    for batch in answer_prompts(
        model, tokenizer, prompts, parts=parts, variant=variant, batch_size=batch_size, max_new_tokens=max_new_tokens,
        prefill_chunk_size=prefill_chunk_size, cache_implementation=cache_implementation, progress=progress,
    ):  # fmt: skip
        for index, answer in zip(batch.indices, batch.answers, strict=True):
            passed[index], responses[index] = answer.passed, answer.response
    lengths, depths = ([getattr(prompt, name) for prompt in prompts] for name in ("length", "depth"))
    return NeedleRecall(passed, responses, torch.tensor(lengths), torch.tensor(depths, dtype=torch.float64))
