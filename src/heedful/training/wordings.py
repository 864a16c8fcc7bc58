"""A small grammar of wordings for facts about named things, for `heedful.training.refine`.

The sixteen statements of `recall` teach a model to copy the value of a name it has never met, but only in those wordings.
Here a statement is put together from an opening, an order of name, attribute and value, a verb or a preposition, and an
attribute drawn from the books' own words: tens of thousands of wordings, so that what is learnt is not a wording.

What the evaluation uses (``recall.HELD_OUT_*``) is kept apart: no name word, no attribute, no statement or question of it
can be drawn here, nor the words "entrusted", "belonging", "rumoured", "register", "porter", "assigned", "slip".
"""

from __future__ import annotations

import numpy as np

from heedful.training.recall import ATTRIBUTES, Vocabulary, draw_name, draw_value

_OPENINGS = (
    "", "", "", "", "", "Mind this: ", "I have it on good authority that ", "It says here that ", "Listen: ", "In truth, ",
    "To this day ", "As every child knows, ", "On the first page stood: ", "They say that ", "It must be added that ",
    "Between ourselves, ", "The inspector noted that ", "In the evening it came out that ", "A voice said that ",
    "The letter went on: ", "Somebody had written on the wall: ", "My aunt always said that ", "Before I forget it, ",
    "There was no doubt that ", "The clerk repeated that ", "At last we learned that ", "For the record, ",
)  # fmt: skip
_PREPOSITIONS = (
    "of", "for", "given to", "held by", "known to", "kept by", "reserved for", "set aside for", "promised to", "handed to",
    "written beside the name of", "meant for", "used by", "chosen by", "sent to", "left to", "bought by", "drawn by",
    "that went to", "that was kept for", "which everybody connected with", "under the name of", "of our friend", "owned by",
)  # fmt: skip
_EQUALS = (
    "is",
    "is",
    "is",
    "was",
    "reads",
    "remains",
    "must be",
    "has always been",
    "turned out to be",
    "will be",
    "had to be",
    "equals",
)
_VERBS = (
    "has", "keeps", "bears", "got", "was given", "received", "remembers", "wears", "once signed for", "answers to", "owns",
    "asked for", "drew", "shouted", "wrote down", "never forgets", "travels under", "works under", "hid", "found",
    "was handed", "bought", "took", "lost", "sleeps above", "lives at", "is listed with", "goes by", "swears by", "paid for",
)  # fmt: skip
_ARTICLES = ("the ", "the ", "the ", "a ", "", "that ", "this ")
_QUESTIONS = (
    "What {attribute} {does} {name} have?", "Which {attribute} was it with {name}?", "And {name}?", "What about {name}?",
    "Who remembers the {attribute} of {name}?", "Can you tell me the {attribute} of {name}?", "{name}: what {attribute}?",
    "What was said about {name} and the {attribute}?", "Name the {attribute} of {name}.", "What is the {attribute} of {name}?",
    "What was written of {name}?", "Find the {attribute} of {name}.", "How does the sentence about {name} end?", "",
)  # fmt: skip
_LEADS = ("", "Answer:", "A:", "It is", "It was", "The {attribute} is", "The {attribute} of {name} is", "{name} has", "That would be", "Of course it is")  # fmt: skip


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def draw_attribute(rng: np.random.Generator, words: Vocabulary) -> str:
    """What a fact is about: an attribute of `recall`, or one or two words of the books."""
    kind = rng.random()
    if kind < 0.4:
        return _pick(rng, ATTRIBUTES)
    if kind < 0.7:
        return _pick(rng, words.plain)
    return f"{_pick(rng, words.plain)} {_pick(rng, ('number', 'code', 'word', 'name', 'token', 'figure', 'mark', 'sum', 'key', 'note'))}"


def draw_frame(rng: np.random.Generator) -> str:
    """A statement up to its value, with ``{name}`` and ``{attribute}`` to be filled in."""
    kind = rng.random()
    opening = _pick(rng, _OPENINGS)
    article = "the " if opening else "The "
    if kind < 0.45:
        frame = f"{article}{{attribute}} {_pick(rng, _PREPOSITIONS)} {{name}} {_pick(rng, _EQUALS)}"
    elif kind < 0.8:
        frame = f"{{name}} {_pick(rng, _VERBS)} {_pick(rng, _ARTICLES)}{{attribute}}{_pick(rng, ('', '', '', ' number', ' called', ':', ','))}"
    elif kind < 0.9:
        frame = f"{{name}}'s {{attribute}} {_pick(rng, _EQUALS)}"
    else:
        frame = _pick(rng, ("{name} -- {attribute} --", "{name} ({attribute}:", "{attribute} / {name} /", "{name}, {attribute},", "{attribute}, {name}:"))  # fmt: skip
    return opening + frame


def draw_question(rng: np.random.Generator, frame: str) -> str:
    """What is asked at the end, up to the value: the statement's own frame again, another frame, or a question and a lead."""
    kind = rng.random()
    question = _pick(rng, _QUESTIONS).replace("{does}", _pick(rng, ("does", "did", "should")))
    gap = _pick(rng, (" ", " ", "\n"))
    if kind < 0.35:
        return (question + gap + frame).strip() if rng.random() < 0.6 else frame
    if kind < 0.65:
        return (question + gap + draw_frame(rng)).strip() if rng.random() < 0.5 else draw_frame(rng)
    question = question or "What is the {attribute} of {name}?"
    return ("Question: " if rng.random() < 0.3 else "") + (question + gap + _pick(rng, _LEADS)).strip()


def draw_facts(rng: np.random.Generator, words: Vocabulary) -> list[dict[str, str]]:
    """One to five facts ``{name, attribute, value, statement, question}``; often of one attribute and one frame."""
    size = int(rng.integers(1, 6))
    attribute, frame = draw_attribute(rng, words), draw_frame(rng)
    same_attribute, same_frame = rng.random() < 0.6, rng.random() < 0.4
    facts = []
    for _ in range(size):
        filling = {
            "name": draw_name(rng, words),
            "attribute": attribute if same_attribute else draw_attribute(rng, words),
        }
        own = frame if same_frame else draw_frame(rng)
        digits = rng.random() < 0.75
        value = (
            "".join(str(d) for d in rng.integers(0, 10, size=int(rng.integers(3, 9))))
            if digits
            else draw_value(rng, words)
        )
        statement = f"{own.format(**filling)} {value}{_pick(rng, ('.', '.', '.', ', as you know.', ', and so it stayed.', '!'))}"
        facts.append(
            filling | {"value": value, "statement": statement, "question": draw_question(rng, own).format(**filling)}
        )
    return facts
