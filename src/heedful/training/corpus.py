"""The training text of the zoo's language model: books, grade-school maths and recall tasks, as rows of token ids."""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from heedful.training.recall import Vocabulary, list_document, needle_document, repeat_document

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def read_books(path: str | Path) -> list[dict[str, str]]:
    """Books of one ``.jsonl.xz`` file: a list of ``{title, author, year, text}``."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_gsm8k(path: str | Path) -> list[str]:
    """GSM8K as text, one problem an entry, without the calculator marks."""
    documents = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", item["answer"])
        documents.append(f"Question: {item['question']}\nAnswer: {answer}\n")
    return documents


def train_tokenizer(texts: Iterator[str], vocabulary_size: int = 8192) -> Tokenizer:
    """A byte-level BPE that splits digits one by one and puts BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode_stream(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents in one row of uint16 ids, an EOS after each."""
    eos = tokenizer.token_to_id(EOS)
    paragraphs = [
        re.findall(r".+?(?:\n\n+|\Z)", document, re.S) for document in documents
    ]  # short texts encode in parallel
    flat = tokenizer.encode_batch_fast([piece for pieces in paragraphs for piece in pieces], add_special_tokens=False)
    stream: list[np.ndarray] = []
    position = 0
    for pieces in paragraphs:
        ids = [encoding.ids for encoding in flat[position : position + len(pieces)]]
        position += len(pieces)
        stream.append(np.fromiter((token for piece in ids for token in piece), np.uint16))
        stream.append(np.array([eos], np.uint16))
    return np.concatenate(stream)


@dataclass
class Corpus:
    """Everything a row is made of: ``books`` and ``maths`` are uint16 streams of ids, ``words`` feeds the recall tasks."""

    tokenizer: Tokenizer
    books: np.ndarray
    maths: np.ndarray
    words: Vocabulary
    ends_sentence: np.ndarray
    begins_word: np.ndarray

    @classmethod
    def prepare(cls, data: str | Path, cache: str | Path, vocabulary_size: int = 8192) -> Corpus:
        """Reads ``data/classics/train-*.jsonl.xz`` and ``data/gsm8k/train.jsonl``, trains the tokenizer, encodes; kept in ``cache``.

        Raises:
            FileNotFoundError: there are no such files below ``data``.
        """
        data, cache = Path(data), Path(cache)
        files = sorted((data / "classics").glob("train-*.jsonl.xz"))
        maths_file = data / "gsm8k" / "train.jsonl"
        if not files or not maths_file.exists():
            raise FileNotFoundError(f"no training text: expected {data}/classics/train-*.jsonl.xz and {maths_file}")
        if not (cache / "words.json").exists():  # written last
            cache.mkdir(parents=True, exist_ok=True)
            with ProcessPoolExecutor(len(files)) as pool:
                books = [book["text"] for part in pool.map(read_books, files) for book in part]
            problems = read_gsm8k(maths_file)
            sample = [text[start : start + 20_000] for text in books for start in range(0, len(text), 100_000)]
            tokenizer = train_tokenizer(iter(sample + problems), vocabulary_size)
            np.save(cache / "books.npy", encode_stream(tokenizer, books))
            np.save(cache / "maths.npy", encode_stream(tokenizer, problems))
            tokenizer.save(str(cache / "tokenizer.json"))
            counts = Counter(word for text in sample for word in re.findall(r"[A-Za-z]{3,12}", text))
            plain = [word for word, count in counts.items() if word.islower() and count >= 5]
            capitalised = [
                word for word, count in counts.items() if word.istitle() and count >= 2 and counts[word.lower()] == 0
            ]
            (cache / "words.json").write_text(json.dumps({"plain": sorted(plain), "capitalised": sorted(capitalised)}))
        tokenizer = Tokenizer.from_file(str(cache / "tokenizer.json"))
        words = json.loads((cache / "words.json").read_text())
        ends, begins = sentence_marks(tokenizer)
        return cls(
            tokenizer, np.load(cache / "books.npy", mmap_mode="r"), np.load(cache / "maths.npy", mmap_mode="r"),
            Vocabulary(tuple(words["capitalised"]), tuple(words["plain"])), ends, begins,
        )  # fmt: skip


def sentence_marks(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Two boolean arrays over the vocabulary: the token ends a sentence; the token begins with a space and a letter."""
    size = tokenizer.get_vocab_size()
    texts = [tokenizer.decode([token]) for token in range(size)]
    ends = np.array([bool(re.search(r"[.!?][\"'”’]?$", text)) for text in texts])
    begins = np.array([bool(re.match(r" [A-Za-z\"“]", text)) for text in texts])
    return ends, begins


class Rows(torch.utils.data.Dataset[Tensor]):
    """Batch ``step`` as a pure function of ``(seed, step)``, so that a run that was killed goes on with the same rows.

    Each row is BOS and ``length`` further tokens: running text of the books (an epoch visits each crop once), packed maths
    problems, or packed recall tasks (half needles, a quarter lists, a quarter repeats).

    Args:
        corpus: the text. length: tokens a row, BOS excluded. shares: of book, maths and recall rows in a batch.
        first_step, steps: the steps this dataset covers. rows: a batch. books_before: book rows used in earlier phases.
    """

    def __init__(
        self, corpus: Corpus, *, rows: int, length: int, shares: tuple[float, float, float], first_step: int, steps: int,
        seed: int, books_before: int = 0,
    ) -> None:  # fmt: skip
        self.corpus, self.rows, self.length, self.seed = corpus, rows, length, seed
        self.first_step, self.steps, self.books_before = first_step, steps, books_before
        self.maths_rows = max(1, round(rows * shares[1])) if shares[1] else 0
        self.recall_rows = max(1, round(rows * shares[2])) if shares[2] else 0
        self.book_rows = rows - self.maths_rows - self.recall_rows
        self.bos, self.eos = (int(corpus.tokenizer.token_to_id(token) or 0) for token in (BOS, EOS))
        self._epoch: tuple[int, int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Tensor:
        """``(rows, length + 1)`` int64."""
        step = self.first_step + index
        rng = np.random.default_rng([self.seed, step])
        rows = [self._book(self.books_before + index * self.book_rows + row) for row in range(self.book_rows)]
        rows += [self._maths(rng) for _ in range(self.maths_rows)]
        rows += [self._recall(rng) for _ in range(self.recall_rows)]
        batch = np.full((self.rows, self.length + 1), self.bos, np.int64)
        for row, tokens in zip(batch, rows, strict=True):
            row[1:] = tokens
        return torch.from_numpy(batch)

    def _book(self, number: int) -> np.ndarray:
        crops = len(self.corpus.books) // self.length - 1
        epoch = number // crops
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, self.length, epoch])
            self._epoch = (epoch, int(rng.integers(self.length)), rng.permutation(crops))
        _, offset, order = self._epoch
        start = offset + int(order[number % crops]) * self.length
        return self.corpus.books[start : start + self.length]

    def _maths(self, rng: np.random.Generator) -> np.ndarray:
        starts = np.flatnonzero(self.corpus.maths[: -self.length] == self.eos) + 1
        start = int(rng.choice(starts))
        return self.corpus.maths[start : start + self.length]

    def _prose(self, rng: np.random.Generator, length: int) -> np.ndarray:
        start = int(rng.integers(len(self.corpus.books) - length))
        return self.corpus.books[start : start + length]

    def _recall(self, rng: np.random.Generator) -> np.ndarray:
        corpus = self.corpus

        def encode(text: str) -> list[int]:
            return corpus.tokenizer.encode(text, add_special_tokens=False).ids

        row: list[int] = []
        kind = rng.random()
        while len(row) < self.length:
            room = self.length - len(row)
            if kind < 0.5 and room >= 128:
                length = int(np.exp(rng.uniform(np.log(128), np.log(room + 1))))
                if rng.random() < 0.25:
                    length = room
                prose = self._prose(rng, length)
                row += needle_document(
                    rng, prose, length, encode, corpus.words, corpus.ends_sentence, corpus.begins_word
                )
            elif kind < 0.75:
                row += list_document(rng, encode, corpus.words)
            else:
                row += repeat_document(rng, self._prose(rng, 1600), corpus.tokenizer.get_vocab_size())
            row.append(self.eos)
            kind = rng.random()
        return np.array(row[: self.length])
