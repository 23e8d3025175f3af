"""Preference pairs for the demo: made by a program, seeded, licence-free, checkable by a program.

A task is one question with a known answer ("What is 17 plus 5?", "22"). A pair renders it twice:
the chosen answer is right, polite and to the point; the rejected one has one of three faults:

- "wrong": a wrong answer; half of them in the style of a chosen one, so that only the content
  tells them apart, half of them careless;
- "rude": the right answer with an insult;
- "rambling": the right answer, buried in talk.

Six categories and three faults take turns, so that every prefix of a data set is balanced. A fixed
fifth of each category's tasks is the "heldout" split, whatever the seed and the sizes: a held-out
question (other operands, or a known entity asked for in another form) never occurs in "train".
Nothing here reads or changes the global random state.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

Split = Literal["train", "heldout"]
FAULTS = ("wrong", "rude", "rambling")
HELDOUT_EVERY = 5

_CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Austria Vienna, Poland Warsaw, "
    "Greece Athens, Portugal Lisbon, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark "
    "Copenhagen, Ireland Dublin, Hungary Budapest, Romania Bucharest, Bulgaria Sofia, Croatia "
    "Zagreb, Serbia Belgrade, Ukraine Kyiv, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Ghana "
    "Accra, Morocco Rabat, Japan Tokyo, China Beijing, Thailand Bangkok, Vietnam Hanoi, Nepal "
    "Kathmandu, Iran Tehran, Iraq Baghdad, Canada Ottawa, Cuba Havana, Peru Lima, Chile "
    "Santiago, Brazil Brasilia, Colombia Bogota, Australia Canberra, Iceland Reykjavik, Latvia "
    "Riga"
)
_KINDS = {
    "fruits": "apple banana cherry grape lemon mango kiwi peach pear plum",
    "colours": "red blue green yellow purple brown black white grey pink",
    "animals": "dog cat horse cow sheep goat lion tiger bear wolf",
    "tools": "hammer saw drill wrench chisel axe spade rake ladder file",
    "vegetables": "carrot potato onion leek pea bean spinach cabbage turnip celery",
    "instruments": "piano violin guitar flute drum harp trumpet cello organ oboe",
}
_WORDS = (
    "garden window silver market bridge candle forest planet rocket summer winter yellow basket "
    "camera doctor engine finger hammer island jacket kitten ladder mirror number orange pencil "
    "rabbit school tunnel violin"
)
_WORD_LIST = _WORDS.split()
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_OPENERS = ("", "", "Sure! ", "Of course. ", "Gladly. ", "Happy to help. ", "Good question. ")
_CLOSERS = ("", "", "", " I hope that helps.", " You are welcome to ask more.", " Have a nice day.")
_CARELESS_OPENERS = ("I am just guessing. ", "No idea, really. ", "I did not check. ", "Whatever. ")
_RUDE_OPENERS = (
    "Oh please. ",
    "Ugh, you again. ",
    "Stop wasting my time. ",
    "What a stupid question. ",
    "Even a child knows this. ",
)
_RUDE_CLOSERS = (" Now go away.", " Do not bother me again.", " Use your brain next time.", "")
# With slots: a fixed text would be learnt by heart, and then is likely whatever it is worth.
_RAMBLE_CLAUSES = (
    "{who} once told me all about {thing}",
    "{who} would rather talk about {thing} for hours",
    "years ago I thought a lot about {thing}",
    "one could say that it is all about {thing}",
    "that reminds me of a long story about {thing}",
)
_RAMBLE_LINKS = (". Anyway, ", ", and by the way ")
_SLOTS = {
    "who": "my uncle|the baker|an old friend",
    "thing": "the weather|his boat|old trains|the moon",
}


class Message(TypedDict):
    """One chat turn."""

    role: str
    content: str


class PreferencePair(TypedDict):
    """One row: TRL's conversational format, and two columns that say how it was made."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    category: str
    fault: str


@dataclass(frozen=True)
class Task:
    """A question, the sentence that answers it, and what to put into the sentence."""

    category: str
    question: str
    sentence: str  # has one "{}" for the answer
    answer: str
    wrong_answers: tuple[str, ...]


def _arithmetic() -> Iterator[Task]:
    for a in range(2, 40):
        for b in range(2, 20):
            for verb, result in (("plus", a + b), ("minus", a - b)):
                if result < 0:
                    continue
                wrong = tuple(str(result + d) for d in (-3, -2, -1, 1, 2, 3, 10) if result + d >= 0)
                yield Task(
                    "arithmetic",
                    f"What is {a} {verb} {b}?",
                    f"{a} {verb} {b} is {{}}.",
                    str(result),
                    wrong,
                )


def _capitals() -> Iterator[Task]:
    pairs = [entry.split() for entry in _CAPITALS.split(", ")]
    cities = tuple(city for _, city in pairs)
    countries = tuple(country for country, _ in pairs)
    for country, city in pairs:
        other_cities = tuple(c for c in cities if c != city)
        for question in (
            f"What is the capital of {country}?",
            f"Name the capital city of {country}.",
            f"Which city is the capital of {country}?",
            f"Tell me the capital of {country}, please.",
        ):
            yield Task(
                "capitals", question, f"The capital of {country} is {{}}.", city, other_cities
            )
        yield Task(
            "capitals",
            f"Which country has {city} as its capital?",
            f"{city} is the capital of {{}}.",
            country,
            tuple(c for c in countries if c != country),
        )


def _comparison() -> Iterator[Task]:
    for a in range(3, 99, 4):
        for b in range(5, 99, 6):
            if a == b:
                continue
            for word, result in (("larger", max(a, b)), ("smaller", min(a, b))):
                question = f"Which number is {word}, {a} or {b}?"
                yield Task(
                    "comparison",
                    question,
                    f"The {word} number is {{}}.",
                    str(result),
                    (str(a + b - result),),
                )


def _counting() -> Iterator[Task]:
    for word in _WORD_LIST:
        for letter in sorted(set(word)):
            count = word.count(letter)
            wrong = tuple(_NUMBERS[n] for n in range(5) if n != count)
            question = f"How often does the letter {letter} occur in {word}?"
            yield Task(
                "counting",
                question,
                f"The count of {letter} in {word} is {{}}.",
                _NUMBERS[count],
                wrong,
            )


def _lists() -> Iterator[Task]:
    kinds = {kind: members.split() for kind, members in _KINDS.items()}
    for kind, members in kinds.items():
        strangers = [other[:2] for name, other in kinds.items() if name != kind]
        for start, first in enumerate(members):
            for n in (2, 3):
                names = [members[(start + i) % len(members)] for i in range(n)]
                wrong = tuple(_join([first, *other[: n - 1]]) for other in strangers)
                question = f"List {_NUMBERS[n]} {kind}, starting with {first}."
                sentence = f"{_NUMBERS[n].capitalize()} {kind} are {{}}."
                yield Task("lists", question, sentence, _join(names), wrong)


def _words() -> Iterator[Task]:
    letters = sorted({letter for word in _WORD_LIST for letter in word})
    for word in _WORD_LIST:
        for which, right in (("first", word[0]), ("last", word[-1])):
            question = f"What is the {which} letter of {word}?"
            wrong = tuple(letter for letter in letters if letter != right)
            yield Task("words", question, f"The {which} letter of {word} is {{}}.", right, wrong)
        others = tuple(other for other in _WORD_LIST if other != word)
        capitals = tuple(other.upper() for other in others)
        yield Task("words", f"Repeat the word {word}.", "The word is {}.", word, others)
        yield Task(
            "words", f"Write {word} in capitals.", "In capitals it is {}.", word.upper(), capitals
        )


def _join(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


_CATEGORY_TASKS = {
    "arithmetic": _arithmetic,
    "capitals": _capitals,
    "comparison": _comparison,
    "counting": _counting,
    "lists": _lists,
    "words": _words,
}
CATEGORIES = tuple(_CATEGORY_TASKS)


def tasks(category: str, split: Split) -> list[Task]:
    """Every task of a category that belongs to a split, in a fixed shuffled order.

    Args:
        category: one of `CATEGORIES`.
        split: "train" or "heldout"; a fixed fifth of the tasks is held out.

    Raises:
        ValueError: unknown category or split.
    """
    if category not in _CATEGORY_TASKS:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}, got {category!r}")
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    shuffled = list(_CATEGORY_TASKS[category]())
    random.Random(f"split of {category}").shuffle(shuffled)
    return [
        task for i, task in enumerate(shuffled) if (i % HELDOUT_EVERY == 0) == (split == "heldout")
    ]


def preference_pairs(
    num_pairs: int, *, seed: int = 0, split: Split = "train"
) -> list[PreferencePair]:
    """Pairs in TRL's conversational format, balanced over categories and faults.

    Args:
        num_pairs: how many; each uses another question.
        seed: chooses questions and wording, not the split.
        split: "train" or "heldout"; the two never share a question.

    Returns:
        The same list for the same arguments, on every platform.

    Raises:
        ValueError: fewer than one pair, or more than there are questions.
    """
    rng = random.Random(f"{seed} {split}")
    pools = {category: tasks(category, split) for category in CATEGORIES}
    limit = len(CATEGORIES) * min(len(pool) for pool in pools.values())
    if not 1 <= num_pairs <= limit:
        raise ValueError(
            f"num_pairs must be between 1 and {limit} for the {split} split, got {num_pairs}"
        )
    for pool in pools.values():
        rng.shuffle(pool)
    pairs = []
    for i in range(num_pairs):
        turn, index = divmod(i, len(CATEGORIES))
        task = pools[CATEGORIES[index]][turn]
        # Shifted by the category, so that a short data set does not tie one fault to one category.
        pairs.append(_pair(task, FAULTS[(turn + index) % len(FAULTS)], rng))
    return pairs


def _pair(task: Task, fault: str, rng: random.Random) -> PreferencePair:
    right = task.sentence.format(task.answer)
    if fault == "wrong":
        rejected = task.sentence.format(rng.choice(task.wrong_answers))
        careless = rng.choice(_CARELESS_OPENERS) + rejected
        rejected = rng.choice((_polite(rejected, rng), careless))
    elif fault == "rude":
        rejected = (
            _fill(rng.choice(_RUDE_OPENERS), rng) + right + _fill(rng.choice(_RUDE_CLOSERS), rng)
        )
    else:
        rejected = (
            f"{_ramble(rng.choice((1, 2)), rng)}. {right} {_ramble(rng.choice((1, 2)), rng)}."
        )
    return {
        "prompt": [{"role": "user", "content": task.question}],
        "chosen": [{"role": "assistant", "content": _polite(right, rng)}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "category": task.category,
        "fault": fault,
    }


def _polite(sentence: str, rng: random.Random) -> str:
    return rng.choice(_OPENERS) + sentence + rng.choice(_CLOSERS)


def _ramble(clauses: int, rng: random.Random) -> str:
    talk = [_fill(clause, rng) for clause in rng.sample(_RAMBLE_CLAUSES, clauses)]
    for i in range(1, clauses):
        talk[i] = rng.choice(_RAMBLE_LINKS) + talk[i]
    text = "".join(talk)
    return text[0].upper() + text[1:]


def _fill(phrase: str, rng: random.Random) -> str:
    """Replace every ``{slot}`` by one of its fillers, each occurrence by its own draw."""
    parts = phrase.split("{")
    for i, part in enumerate(parts[1:], start=1):
        slot, rest = part.split("}")
        parts[i] = rng.choice(_SLOTS[slot].split("|")) + rest
    return "".join(parts)


def write_jsonl(path: str | Path, pairs: Sequence[PreferencePair]) -> Path:
    """Write one pair per line (UTF-8) and return the path; missing parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8"
    )
    return path
