import random
import re
from collections import Counter

import pytest

from examples.synthetic import (
    CATEGORIES,
    FAULTS,
    preference_pairs,
    tasks,
    write_jsonl,
)

CAPITALS = {"France": "Paris", "Peru": "Lima", "Iceland": "Reykjavik", "Japan": "Tokyo"}


def text(pair, side):
    (message,) = pair[side]
    return message["content"]


def test_same_arguments_same_pairs_and_global_random_state_untouched():
    random.seed(5)
    state = random.getstate()
    first = preference_pairs(60, seed=3)
    assert random.getstate() == state
    random.random()
    assert preference_pairs(60, seed=3) == first
    assert preference_pairs(60, seed=4) != first


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pairs_are_balanced_distinct_and_well_formed(split):
    # 108 = 6 categories x 3 faults x 6: every combination equally often.
    pairs = preference_pairs(108, split=split)
    counts = Counter((pair["category"], pair["fault"]) for pair in pairs)
    assert set(counts) == {(c, f) for c in CATEGORIES for f in FAULTS}
    assert set(counts.values()) == {6}
    assert len({text(pair, "prompt") for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert text(pair, "chosen") != text(pair, "rejected")
        assert [pair[side][0]["role"] for side in ("prompt", "chosen", "rejected")] == [
            "user", "assistant", "assistant",
        ]  # fmt: skip


def test_no_question_is_in_both_splits_whatever_the_seeds():
    train = {text(p, "prompt") for seed in range(3) for p in preference_pairs(400, seed=seed)}
    heldout = {
        text(p, "prompt") for seed in range(3) for p in preference_pairs(120, split="heldout")
    }
    assert not train & heldout
    for category in CATEGORIES:
        questions = {task.question for task in tasks(category, "train")}
        others = {task.question for task in tasks(category, "heldout")}
        assert not questions & others
        assert 0.15 < len(others) / (len(questions) + len(others)) < 0.25


def expected(category, question):
    """The right answer, worked out from the question alone."""
    if category == "arithmetic":
        a, verb, b = re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", question).groups()
        return str(int(a) + int(b) if verb == "plus" else int(a) - int(b))
    if category == "comparison":
        word, *numbers = re.fullmatch(r"Which number is (\w+), (\d+) or (\d+)\?", question).groups()
        return str((max if word == "larger" else min)(map(int, numbers)))
    if category == "counting":
        letter, word = re.search(r"letter (\w) occur in (\w+)\?", question).groups()
        return ("zero", "one", "two", "three", "four")[word.count(letter)]
    if category == "words":
        word = re.search(r"(?:of|word|Write) (\w+?)(?: in capitals)?[.?]$", question).group(1)
        if "capitals" in question:
            return word.upper()
        return word[0] if "first" in question else word[-1] if "last" in question else word
    return None


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_chosen_is_right_and_wrong_is_wrong(split):
    checked = 0
    for pair in preference_pairs(120, seed=11, split=split):
        right = expected(pair["category"], text(pair, "prompt"))
        if right is None:
            continue
        checked += 1
        answer = re.compile(rf"\b{right}\b(?=\.)")
        assert answer.search(text(pair, "chosen")), pair
        assert bool(answer.search(text(pair, "rejected"))) == (pair["fault"] != "wrong"), pair
    assert checked == 80  # four of six categories


def test_capitals_and_lists_are_right():
    found = 0
    for split in ("train", "heldout"):
        for task in tasks("capitals", split):
            assert task.answer not in task.wrong_answers
            for country, city in CAPITALS.items():
                if country in task.question:
                    found += 1
                    assert task.answer == city
        for task in tasks("lists", split):
            first = re.search(r"starting with (\w+)", task.question).group(1)
            names = re.split(", | and ", task.answer)
            assert names[0] == first
            assert len(names) == len(set(names)) == (2 if "two" in task.question else 3)
            assert task.answer not in task.wrong_answers
    assert found == 4 * len(CAPITALS)  # four ways to ask for each


def test_wrong_answers_share_the_style_of_chosen_ones():
    # Otherwise the tone alone would give every pair away.
    wrong = [text(p, "rejected") for p in preference_pairs(300) if p["fault"] == "wrong"]
    careless = ("I am just", "No idea", "I did not", "Whatever")
    share = sum(answer.startswith(careless) for answer in wrong) / len(wrong)
    assert 0.35 < share < 0.65


@pytest.mark.parametrize(
    ("count", "split", "message"),
    [
        (0, "train", "between 1 and"),
        (10_000, "train", "between 1 and 576"),
        (3, "test", '"train" or "heldout"'),
    ],
)
def test_rejects(count, split, message):
    with pytest.raises(ValueError, match=message):
        preference_pairs(count, split=split)


def test_unknown_category():
    with pytest.raises(ValueError, match="arithmetic"):
        tasks("poetry", "train")


def test_write_jsonl_round_trip(tmp_path):
    from datasets import load_dataset

    pairs = preference_pairs(12)
    path = write_jsonl(tmp_path / "deep" / "train.jsonl", pairs)
    loaded = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert loaded.to_list() == pairs
