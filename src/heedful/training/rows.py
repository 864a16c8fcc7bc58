"""Training text: documents out of a file, encoded and packed into rows of one length."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

#: A document in pieces, each with whether a drafter learns from it.
Pieces = list[tuple[str, bool]]
_AT_ONCE = 64  # texts that are encoded together


def read_documents(data: str | Path) -> list[str]:
    """The documents of a ``.txt`` file (one) or a ``.jsonl`` file (one a line), as text: see `read_pieces`."""
    return ["".join(text for text, _ in pieces) for pieces in read_pieces(data)]


def read_pieces(data: str | Path) -> list[Pieces]:
    """The documents of a ``.txt`` file (one) or a ``.jsonl`` file (one a line).

    A line may have ``text``, or ``question`` and ``answer``, or ``turns``, or ``messages`` / ``conversations`` (a list of
    ``{content}`` or ``{value}``), or ``prompt`` and ``answer``, of which only the answer is learnt from (`self_distill`
    writes these).

    Raises:
        ValueError: there is no such file, it is empty, or a line has none of these.
    """
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"no training text {path}: give a .txt or .jsonl file")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        documents: list[Pieces] = [[(text, True)]]
    else:
        documents = [
            _document(line, f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    documents = [pieces for pieces in documents if any(learnt and text.strip() for text, learnt in pieces)]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def _document(line: str, where: str) -> Pieces:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if isinstance(item.get("text"), str):
        return [(item["text"], True)]
    if isinstance(item.get("prompt"), str) and isinstance(item.get("answer"), str):
        return [(item["prompt"], False), (item["answer"], True)]
    if "question" in item and "answer" in item:
        return [(f"Question: {item['question']}\nAnswer: {item['answer']}\n", True)]
    turns = item.get("turns") or item.get("messages") or item.get("conversations")
    if isinstance(turns, list) and turns:
        said = "\n".join(t if isinstance(t, str) else str(t.get("content", t.get("value", ""))) for t in turns)
        return [(said, True)]
    raise ValueError(
        f"{where}: no 'text', 'question' and 'answer', 'prompt' and 'answer', 'turns', 'messages' or 'conversations'"
    )


class PackedRows:
    """Rows of ``length`` tokens out of one stream of documents with an EOS after each; a BOS first where the tokenizer has one.

    A row is a pure function of ``(seed, step, place in the batch)``: a resumed run, or one on more processes, reads the same.
    """

    def __init__(
        self, documents: Iterable[str | Pieces], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
    ) -> None:
        pieces: list[tuple[str, bool, bool]] = []  # a text, whether it is learnt, whether its document ends with it
        for document in documents:
            parts = [(document, True)] if isinstance(document, str) else document
            pieces += [(text, counts, i + 1 == len(parts)) for i, (text, counts) in enumerate(parts)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream: list[np.ndarray] = []
        learnt: list[np.ndarray] = []
        for ids, (_, counts, last) in zip(_encoded(tokenizer, [text for text, *_ in pieces]), pieces, strict=True):
            stream.append(np.array([*ids, *end] if last else ids, dtype=np.int64))
            learnt.append(np.full(len(ids), counts))
            learnt.append(np.full(len(end) if last else 0, True))
        self.first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.stream = np.concatenate([np.zeros(0, dtype=np.int64), *stream])
        self.learnt = np.concatenate([np.zeros(0, dtype=bool), *learnt])
        self._cut(length, seed)

    def _cut(self, length: int, seed: int) -> None:
        self.size, self.seed = length - len(self.first), seed
        if len(self.stream) <= self.size:
            raise ValueError(
                f"the text has {len(self.stream)} tokens, too few for rows of {length}: give more text or a smaller length"
            )

    def of(self, length: int, seed: int) -> PackedRows:
        """Other rows of the same text, which is not encoded again."""
        rows = copy.copy(self)
        rows._cut(length, seed)
        return rows

    def batch(self, step: int, places: Iterable[int]) -> Tensor:
        """Token ids ``(places, length)``."""
        return self.with_labels(step, places)[0]

    def with_labels(self, step: int, places: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Token ids ``(places, length)``, and the same with -100 where nothing is to be learnt."""
        rows, labels = [], []
        for place in places:
            start = int(np.random.default_rng([self.seed, step, place]).integers(len(self.stream) - self.size))
            there = slice(start, start + self.size)
            rows.append([*self.first, *self.stream[there].tolist()])
            labels.append([*self.first, *np.where(self.learnt[there], self.stream[there], -100).tolist()])
        return torch.tensor(rows), torch.tensor(labels)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    """The token ids of each text. Fast tokenizers take many at once, on all cores; some at a time, since lists are large."""
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    if not getattr(tokenizer, "is_fast", False):
        yield from (cast(list[int], tokenizer(text, **options)["input_ids"]) for text in texts)
        return
    for start in range(0, len(texts), _AT_ONCE):
        yield from cast(list[list[int]], tokenizer(list(texts[start : start + _AT_ONCE]), **options)["input_ids"])


def rows_of(data: str | Path | PackedRows, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> PackedRows:
    """Rows of a file's text, or of a text that has been encoded already."""
    if isinstance(data, PackedRows):
        return data.of(length, seed)
    return PackedRows(read_pieces(data), tokenizer, length, seed)
