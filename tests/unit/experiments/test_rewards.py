"""Reward functions: bounds, signs, and the toy grammar's check."""

from __future__ import annotations

from itertools import islice

import pytest

from experiments import toy
from experiments.rewards import NEGATIVE, POSITIVE, cheerful_story, grammar, mood, sentiment
from realloc.functions import Sample


def sample(response: str, finished: bool = True) -> Sample:
    return Sample(id=0, prompt="one day", response=response, finished=finished)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The happy dog loved the park.", 2),
        ("The SAD cat hated it!", -2),
        ("The dog saw a table.", 0),
        ("It was not happy, never sad.", 0),
        ("She didn't smile", -1),
        ("sadness unlovely", 0),
        ("", 0),
    ],
)
def test_mood_counts_words_and_minds_negations(text: str, expected: int) -> None:
    assert mood(text) == expected


def test_sentiment_grows_with_the_mood_and_stays_within_one() -> None:
    texts = ["sad " * 500, "sad sad", "sad", "table", "happy", "happy happy", "happy " * 500]
    scores = list(sentiment([sample(text) for text in texts]))
    assert scores == sorted(scores)
    assert len(set(scores)) == len(scores)
    assert scores[3] == 0.0
    assert scores[0] > -1.0
    assert scores[-1] < 1.0
    assert scores[4] == pytest.approx(0.25)  # 1 / sqrt(1 + 15)


def test_only_the_response_counts() -> None:
    assert sentiment([Sample(id=0, prompt="sad sad", response="happy", finished=True)])[0] > 0


def test_no_word_is_both_positive_and_negative() -> None:
    assert not POSITIVE & NEGATIVE


def test_the_lexicon_knows_the_moods_of_the_toy_language_and_nothing_else_of_it() -> None:
    glad, gloomy = (
        {word for slot in toy.MOOD_SLOTS.values() for word in slot[mood].split()}
        for mood in (toy.GLAD, toy.GLOOMY)
    )
    assert glad <= POSITIVE
    assert gloomy <= NEGATIVE
    assert not (set(toy.vocabulary()) - glad - gloomy) & (POSITIVE | NEGATIVE)


def test_grammar_is_the_share_of_allowed_sentences() -> None:
    good = "the dog was happy again ."
    assert not toy.is_sentence(good)  # it lacks its "and"
    story = "they danced together . the park was lovely ."
    responses = [story, f"{story} the the dog .", f"{story} the dog", "", "happy happy happy", ". . ."]
    assert list(grammar([sample(r) for r in responses])) == pytest.approx([1.0, 2 / 3, 2 / 3, 0.0, 0.0, 0.0])


def test_toy_stories_are_grammatical_and_neutral_on_average() -> None:
    stories = list(islice(toy.stories(seed=5), 1000))
    samples = [sample(s.story.removeprefix(s.prompt)) for s in stories]
    assert set(grammar(samples)) == {1.0}
    scores = sentiment(samples)
    assert abs(sum(scores) / len(scores)) < 0.05
    assert max(scores) > 0.7
    assert min(scores) < -0.7


def test_a_cheerful_story_must_be_one() -> None:
    happy, nonsense = cheerful_story([sample("they danced together ."), sample("danced danced danced")])
    assert 0 < happy <= 1
    assert -2 <= nonsense < 0
