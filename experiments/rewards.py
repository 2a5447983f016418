"""Reward functions (`realloc.functions.RewardFunction`): text in, one number out. No models, no torch.

Name one in an experiment: `reward: experiments.rewards:sentiment`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import sqrt

from experiments.toy import is_sentence
from realloc.functions import Sample

_POSITIVE_WORDS = """
admired amazing amused beautiful best better brave bright calm celebrated charming cheer cheered
cheerful clever comfortable cozy cuddle danced delicious delight delighted enjoy enjoyed enjoys
excellent excited exciting fantastic favorite forgave free friend friendly friends fun funny generous
gentle giggled glad gladly good grateful great grinned happily happiness happy healthy help helped
helpful helping helps honest hope hug hugged hugs joy joyful kind kindly kindness kiss laugh laughed
laughing like liked likes love loved lovely loves lucky magical nice patient peaceful perfect play
played playing pleased praised proud relaxed safe share shared sharing smile smiled smiles smiling
special strong sunny super sweet thank thanked thankful treasure wise won wonderful yummy
"""
POSITIVE = frozenset(_POSITIVE_WORDS.split())
_NEGATIVE_WORDS = """
afraid alone angrily angry annoyed argued ashamed awful bad blamed bored boring break broke broken bully
complained cried cruel cry crying danger dangerous dead died dirty disappointed dreadful evil fail
failed fear feared fell fight fighting fought frightened greedy grumpy guilty hate hated hates horrible
hurt hurts insulted jealous kill lazy lied lonely lose lost mad mean mess messy miserable mistake nasty
naughty pain poor pushed refused rotten rude ruined sad sadly scared scary scream screamed selfish
shabby shouted sick sorry stole suffered tears terrible trouble ugly unhappy upset weak weep worried
worry worse worst wrong yelled
"""
NEGATIVE = frozenset(_NEGATIVE_WORDS.split())
NEGATIONS = frozenset(
    (
        "not",
        "no",
        "never",
        "nobody",
        "without",
        "don't",
        "didn't",
        "doesn't",
        "isn't",
        "wasn't",
        "can't",
        "couldn't",
        "won't",
    )
)
SATURATION = 15.0
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def mood(text: str) -> int:
    """Positive words minus negative ones; a word right after a negation counts the other way round."""
    words = _WORD.findall(text.lower())
    total = 0
    for before, word in zip(["", *words], words, strict=False):
        sign = int(word in POSITIVE) - int(word in NEGATIVE)
        total += -sign if before in NEGATIONS else sign
    return total


def _bounded(total: float) -> float:
    """Into (-1, 1): the normalisation of VADER (Hutto and Gilbert 2014), x / sqrt(x^2 + 15)."""
    return total / sqrt(total * total + SATURATION)


def sentiment(samples: Sequence[Sample]) -> Sequence[float]:
    """How positive each response is, from -1 to 1; 0 for balanced or plain text."""
    return [_bounded(mood(sample.response)) for sample in samples]


def grammar(samples: Sequence[Sample]) -> Sequence[float]:
    """Share of each response's sentences that the toy grammar allows, from 0 to 1.

    Text after the last full stop counts as a sentence that it does not allow.
    """
    return [_allowed_share(sample.response) for sample in samples]


def cheerful_story(samples: Sequence[Sample]) -> Sequence[float]:
    """`sentiment` less what `grammar` lacks: from -2 (gloomy nonsense) to 1 (a cheerful toy story)."""
    return [_bounded(mood(s.response)) - (1.0 - _allowed_share(s.response)) for s in samples]


def _allowed_share(text: str) -> float:
    *sentences, rest = text.split(".")
    total = len(sentences) + bool(rest.strip())
    return sum(is_sentence(f"{sentence} .") for sentence in sentences) / total if total else 0.0
