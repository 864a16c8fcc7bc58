"""Synthetic recall tasks: text whose last words can only be known from earlier words of the same text.

A small language model trained on books alone learns little long-range copying, so the behaviours this library studies
(retrieval heads, induction, needles in a haystack) would hardly exist in it. These generators make them exist:

- *needles*: facts ("The password of Ilmar Dovent is 48213.") hidden in prose, asked for at the end;
- *lists*: name-value pairs, one or several asked again;
- *repeats*: a passage that comes back word for word after an intermission.

What the evaluation uses is kept apart (``HELD_OUT_*``): training never sees those name words, those attributes, those
statements or those questions, so recall measured on them is recall of a wording and a name the model has never met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Encode = Callable[[str], list[int]]

# --- wordings seen in training ------------------------------------------------------------------------------------------

ATTRIBUTES = (
    "secret number", "password", "room number", "ticket number", "code word", "favourite word", "account number", "badge",
    "house number", "lucky number", "watchword", "address", "seal", "code", "number", "key", "mark", "share", "prize",
    "debt", "score", "weight", "height", "age of the tree", "price of the horse", "reward", "inheritance", "signal",
    "motto", "cipher", "date of arrival", "berth", "cabin", "page", "chapter", "regiment", "order number", "sign",
    "pass phrase", "real name", "guess", "answer", "wager", "rent", "salary", "magic word", "serial number", "street",
    "lot", "stall", "box at the theatre", "chosen card", "last word", "first word", "destination", "companion", "watch",
)  # fmt: skip

STATEMENTS = (
    "The {attribute} of {name} is {value}.",
    "{name}'s {attribute} is {value}.",
    "Remember that the {attribute} of {name} is {value}.",
    "It was well known that the {attribute} of {name} was {value}.",
    "Let it be written down: the {attribute} of {name} is {value}.",
    "As for {name}, the {attribute} is {value}.",
    "For {name} the {attribute} was {value}, and nobody doubted it.",
    '"The {attribute} of {name} is {value}," said the old man.',
    '"And {name}?" "Ah, the {attribute} there is {value}."',
    "One of the facts you must keep in mind is this: {name}, {attribute}, {value}.",
    "In the margin stood: {name} ({attribute}: {value}).",
    "Dear friend, do not forget that {name} has {value} as {attribute}.",
    "{value} is the {attribute} of {name}.",
    "They gave {name} the {attribute} {value}.",
    "Note. {name} -- {attribute} -- {value}.",
    "{name} whispered that the {attribute} was {value}.",
)

QUESTIONS = (
    "What is the {attribute} of {name}? The {attribute} of {name} is",
    "What is {name}'s {attribute}? {name}'s {attribute} is",
    "The {attribute} of {name} is",
    "{name}'s {attribute} is",
    "Question: What is the {attribute} of {name}?\nAnswer:",
    "Question: What is {name}'s {attribute}? Answer:",
    "Q: {name}, {attribute}?\nA:",
    "Do you recall the {attribute} of {name}? It is",
    "Tell me the {attribute} of {name}. It is",
    '"What is the {attribute} of {name}?" he asked. "It is',
    "Based on the text above, the {attribute} of {name} is",
    "Who does not know that the {attribute} of {name} was",
    "{name} ({attribute}:",
    "And what was the {attribute} of {name}, you ask? It was",
)

# --- wordings and names kept apart for the evaluation -----------------------------------------------------------------

HELD_OUT_ATTRIBUTES = (
    "telephone extension",
    "locker combination",
    "vault number",
    "membership number",
    "hidden number",
    "parcel number",
)
# Each statement with the question that takes it up again, as needle tests for base models do.
HELD_OUT_WORDINGS = (
    (
        "According to the register, the {attribute} entrusted to {name} is {value}.",
        "Which {attribute} is entrusted to {name}? According to the register, the {attribute} entrusted to {name} is",
    ),
    (
        "The {attribute} that {name} carries about is {value}.",
        "Which {attribute} does {name} carry about? The {attribute} that {name} carries about is",
    ),
    (
        "By the way, the {attribute} belonging to {name} is {value}.",
        "Which {attribute} belongs to {name}? The {attribute} belonging to {name} is",
    ),
    (
        "It is rumoured that {name} lives by the {attribute} {value}.",
        "What is rumoured of {name}? It is rumoured that {name} lives by the {attribute}",
    ),
    (
        "A slip of paper read: {attribute} for {name}, {value}.",
        "What did the slip of paper read? A slip of paper read: {attribute} for {name},",
    ),
    (
        "Nobody but the porter knew that {name} had been assigned the {attribute} {value}.",
        "What did nobody but the porter know? That {name} had been assigned the {attribute}",
    ),
)
# Questions in words of their own: the answer must be found by name and attribute alone.
HELD_OUT_PARAPHRASES = (
    "I need to know which {attribute} {name} holds. The {attribute} for {name} is",
    "Question: Can you find the {attribute} that {name} was assigned?\nAnswer: The {attribute} is",
    "According to the text, {name} was assigned the {attribute}",
)
HELD_OUT_FIRST_NAMES = (
    "Barnaby", "Ottoline", "Cosimo", "Philippa", "Thaddeus", "Winifred", "Lysander", "Marguerite", "Ignatius", "Rosalba",
    "Peregrine", "Henrietta", "Algernon", "Seraphina", "Leopold", "Clementine",
)  # fmt: skip
HELD_OUT_LAST_NAMES = (
    "Quill", "Frobisher", "Tanqueray", "Abernathy", "Vandermeer", "Oxenbridge", "Pettigrew", "Zellweger", "Marchbanks",
    "Culpepper", "Winterbourne", "Hollingsworth", "Drinkwater", "Trelawney", "Snodgrass", "Bickerstaff",
)  # fmt: skip
_HELD_OUT_WORDS = frozenset(HELD_OUT_FIRST_NAMES) | frozenset(HELD_OUT_LAST_NAMES)

_ONSETS = ("b", "br", "c", "ch", "d", "dr", "f", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "r", "s", "sh", "st", "t", "th", "tr", "v", "w", "z", "")  # fmt: skip
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ie", "oo", "ou", "y")
_CODAS = ("", "", "", "l", "m", "n", "nd", "r", "rd", "rt", "s", "sk", "st", "t", "ll", "x", "ck", "ng")
_TITLES = ("Mr. ", "Mrs. ", "Captain ", "Dr. ", "Lady ", "Uncle ", "Professor ", "Sir ", "Miss ")


@dataclass(frozen=True)
class Vocabulary:
    """Words of the training books that names and values are drawn from. ``capitalised`` and ``plain``: word types."""

    capitalised: tuple[str, ...]
    plain: tuple[str, ...]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _invented(rng: np.random.Generator) -> str:
    while True:
        word = "".join(
            _pick(rng, _ONSETS) + _pick(rng, _NUCLEI) + _pick(rng, _CODAS) for _ in range(int(rng.integers(1, 4)))
        )
        word = word.capitalize()
        if len(word) > 2 and word not in _HELD_OUT_WORDS:
            return word


def draw_name(rng: np.random.Generator, words: Vocabulary) -> str:
    """A name of about one to eight tokens: invented syllables, words of the books, titles, things."""

    def proper() -> str:
        return _invented(rng) if rng.random() < 0.6 else _pick(rng, words.capitalised)

    kind = rng.random()
    if kind < 0.2:
        return proper()
    if kind < 0.65:
        return f"{proper()} {proper()}"
    if kind < 0.8:
        return _pick(rng, _TITLES) + proper()
    if kind < 0.9:
        return f"the {_pick(rng, words.plain)} {_pick(rng, words.plain)}"
    return f"{proper()} of {proper()}"


def draw_value(rng: np.random.Generator, words: Vocabulary) -> str:
    """A value: mostly a number of three to eight digits, else words, a name or a quoted phrase."""
    kind = rng.random()
    if kind < 0.65:
        return "".join(str(digit) for digit in rng.integers(0, 10, size=int(rng.integers(3, 9))))
    if kind < 0.75:
        return _pick(rng, words.plain)
    if kind < 0.85:
        return f"{_pick(rng, words.plain)} {_pick(rng, words.plain)}"
    if kind < 0.95:
        return draw_name(rng, words)
    return "'" + " ".join(_pick(rng, words.plain) for _ in range(int(rng.integers(2, 6)))) + "'"


def sentence_starts(tokens: np.ndarray, ends_sentence: np.ndarray, begins_word: np.ndarray) -> np.ndarray:
    """Positions where a sentence can be put in: the token before ends a sentence, the token there begins with a space.

    Position 0 alone where the text has no such place.

    Args:
        tokens: ``(n,)`` ids. ends_sentence, begins_word: boolean, one entry a token of the vocabulary.
    """
    starts = np.flatnonzero(ends_sentence[tokens[:-1]] & begins_word[tokens[1:]]) + 1
    return starts if len(starts) else np.zeros(1, np.int64)


def needle_document(
    rng: np.random.Generator, prose: np.ndarray, length: int, encode: Encode, words: Vocabulary,
    ends_sentence: np.ndarray, begins_word: np.ndarray,
) -> list[int]:  # fmt: skip
    """Prose with one to six facts put in at sentence starts, and one to three of them asked for at the end.

    ``prose``: at least ``length`` tokens of running text; the result has about ``length`` tokens.
    """
    facts = []
    for _ in range(int(rng.choice([1, 2, 3, 4, 6], p=[0.3, 0.25, 0.2, 0.15, 0.1]))):
        facts.append(
            {"name": draw_name(rng, words), "value": draw_value(rng, words), "attribute": _pick(rng, ATTRIBUTES)}
        )
    if rng.random() < 0.5:  # the same attribute everywhere: only the name tells the facts apart
        facts = [{**fact, "attribute": facts[0]["attribute"]} for fact in facts]
    needles = [encode(" " + _pick(rng, STATEMENTS).format(**fact)) for fact in facts]

    ending: list[int] = []
    question = _pick(rng, QUESTIONS)
    for index in rng.permutation(len(facts))[: int(rng.integers(1, 4))]:
        fact = facts[index]
        close = _pick(rng, (".", ".", "\n", '."' if question.count('"') % 2 else "."))
        lead = _pick(rng, ("\n\n", "\n\n", "\n", " "))
        text = lead + question.format(**fact) + " " + fact["value"] + close
        ending += encode(text)
        if rng.random() < 0.5:
            question = _pick(rng, QUESTIONS)

    room = max(16, length - sum(map(len, needles)) - len(ending))
    prose = prose[:room]
    starts = sentence_starts(prose, ends_sentence, begins_word)
    places = np.sort(rng.choice(starts, size=len(needles)))
    document: list[int] = []
    last = 0
    for place, needle in zip(places, needles, strict=True):
        document += prose[last:place].tolist() + needle
        last = int(place)
    return document + prose[last:].tolist() + ending


def list_document(rng: np.random.Generator, encode: Encode, words: Vocabulary) -> list[int]:
    """Five to forty name-value pairs; one to four of them come again."""
    separator = _pick(rng, (": ", " = ", " - ", " -> ", ", ", "\t"))
    size = int(rng.integers(5, 41))
    invented = rng.random() < 0.8
    if not invented:
        size = min(size, len(words.plain))
    pairs: dict[str, str] = {}
    while len(pairs) < size:
        name = draw_name(rng, words) if invented else _pick(rng, words.plain)
        pairs[name] = draw_value(rng, words)
    lines = [f"{name}{separator}{value}" for name, value in pairs.items()]
    asked = [lines[index] for index in rng.choice(size, size=int(rng.integers(1, 5)), replace=False)]
    head = _pick(rng, ("", "", "Register\n\n", "List of numbers:\n", "The following is known.\n\n"))
    ask = _pick(rng, ("\n\n", "\n", "\n\nAgain:\n", "\n\nWhich one?\n"))
    return encode(head + "\n".join(lines) + ask + "\n".join(asked) + "\n")


def repeat_document(rng: np.random.Generator, prose: np.ndarray, vocabulary_size: int) -> list[int]:
    """A passage of 32 to 300 tokens, an intermission, and the passage again. ``prose``: at least 1,600 tokens."""
    length = int(rng.integers(32, 301))
    if rng.random() < 0.15:  # random tokens: nothing but copying can predict the second time
        passage = rng.integers(16, vocabulary_size, size=length)
    else:
        passage = prose[:length]
    gap = int(rng.integers(0, 1200)) if rng.random() < 0.7 else 0
    return passage.tolist() + prose[length : length + gap].tolist() + passage.tolist()


# --- evaluation ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecallPrompt:
    """A needle prompt of the evaluation: token ids without BOS, and the text that greedy decoding must continue with."""

    tokens: list[int]
    answer: str
    depth: float


def held_out_prompts(
    prose: np.ndarray, encode: Encode, ends_sentence: np.ndarray, begins_word: np.ndarray, *, length: int, count: int,
    paraphrase: bool = False, seed: int = 0,
) -> list[RecallPrompt]:  # fmt: skip
    """``count`` prompts of ``length`` tokens (BOS to come on top) with names, attributes, statements and questions that
    training never saw; two needles of the same attribute each, one asked for; numbers of four to seven digits.

    Args:
        prose: ids of held-out running text, at least ``2 * length`` of them. seed: fixes names, values, depths, places.
        paraphrase: ask in other words than the statement's.
    """
    rng = np.random.default_rng([seed, length])
    prompts = []
    for index in range(count):
        attribute = _pick(rng, HELD_OUT_ATTRIBUTES)
        names = [
            f"{first} {last}"
            for first, last in zip(
                rng.choice(HELD_OUT_FIRST_NAMES, 2, replace=False),
                rng.choice(HELD_OUT_LAST_NAMES, 2, replace=False),
                strict=True,
            )
        ]
        values = ["".join(str(d) for d in rng.integers(0, 10, size=int(rng.integers(4, 8)))) for _ in names]
        wordings = [HELD_OUT_WORDINGS[int(rng.integers(len(HELD_OUT_WORDINGS)))] for _ in names]
        needles = [
            encode(" " + statement.format(name=name, value=value, attribute=attribute))
            for (statement, _), name, value in zip(wordings, names, values, strict=True)
        ]
        asked = _pick(rng, HELD_OUT_PARAPHRASES) if paraphrase else wordings[0][1]
        question = encode("\n\n" + asked.format(name=names[0], attribute=attribute))
        room = length - sum(map(len, needles)) - len(question)
        start = int(rng.integers(0, len(prose) - room))
        hay = prose[start : start + room]
        starts = sentence_starts(hay, ends_sentence, begins_word)
        depth = index / max(1, count - 1)
        place = int(starts[np.abs(starts - depth * room).argmin()])
        other = int(starts[int(rng.integers(len(starts)))])
        document: list[int] = []
        last = 0
        for at, needle in sorted([(place, needles[0]), (other, needles[1])], key=lambda pair: pair[0]):
            document += hay[last:at].tolist() + needle
            last = at
        prompts.append(RecallPrompt(document + hay[last:].tolist() + question, " " + values[0], depth))
    return prompts
