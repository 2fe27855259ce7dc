"""Can a question be answered without its video? An audit of the world's text-only priors.

For every suite and family it draws questions (no pixels), lets several blind guessers learn from
one half of the videos and answer the other half, both ways round, and compares the best of them
with chance. Guessers for options: the most frequent position, the most often right option text,
and a log-linear model over words of the question, of the option and of its rivals. Guessers for
numbers and spans: the best constant, alone and for each word of the question.

Chance is `1 / options` for a choice. For a number it is what the best constant would score if every
answer that occurs were equally frequent; for a span it is the best constant span, so that only what
the *words* add counts as a leak there.
"""

from __future__ import annotations

import operator
import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from internvideo3.tasks.scoring.numeric import mean_relative_accuracy
from internvideo3.tasks.scoring.world import RELATIVE_FAMILIES
from internvideo3.tasks.world.questions import Question, questions
from internvideo3.tasks.world.scenes import draw_video
from internvideo3.tasks.world.suites import SUITES, Suite

MOST_GAIN: Final = 0.03
"""The bar: no prior may beat chance by more."""
AUDIT_SEED: Final = 5 * 10**12
"""Audited videos belong to no split."""

_FEATURES: Final = 1 << 14
_STEPS: Final = 60
_L2: Final = 2.0

Gains = NDArray[np.float64]
Asked = list[tuple[int, Question]]
"""Questions, each with the index of its video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What blind guessing reaches on one family of one suite."""

    suite: str
    family: str
    questions: int
    chance: float
    guessers: dict[str, float]
    """Guesser → mean score on questions it did not learn from."""
    standard_error: float
    """Of one guesser's score, in the same unit."""

    @property
    def best(self) -> str:
        """The guesser with the highest score."""
        return max(self.guessers, key=self.guessers.__getitem__)

    @property
    def gain(self) -> float:
        """How far the best guesser is above chance."""
        return self.guessers[self.best] - self.chance

    @property
    def leaks(self) -> bool:
        """Whether the gain is over the bar."""
        return self.gain > MOST_GAIN

    def line(self) -> str:
        """One line of text."""
        return (
            f"{'LEAK' if self.leaks else 'ok  '} {self.suite:16s} {self.family:14s} "
            f"n {self.questions:6d}  chance {100 * self.chance:5.1f}  best blind "
            f"{100 * self.guessers[self.best]:5.1f} ({self.best})  gain {100 * self.gain:+5.1f} "
            f"± {100 * self.standard_error:.1f} points"
        )


def audit(
    suites: Sequence[str] | None = None,
    *,
    least: int = 5000,
    progress: Callable[[Finding], None] | None = None,
) -> list[Finding]:
    """Audit every family of the suites.

    Args:
        suites: Names of suites; all where it is None.
        least: Questions to draw for each family at least.
        progress: Called with each finding as it is made.
    """
    findings = []
    for name in suites or SUITES:
        for family, asked in sorted(_draw(SUITES[name], least).items()):
            finding = audit_family(name, family, asked)
            findings.append(finding)
            if progress is not None:
                progress(finding)
    return findings


def _draw(suite: Suite, least: int) -> dict[str, Asked]:
    """At least so many questions of each family, drawn as the suite draws its own."""
    found: dict[str, Asked] = {family: [] for family in suite.families}
    lengths, weights = list(suite.lengths), list(suite.lengths.values())
    index = 0
    while short := [family for family in suite.families if len(found[family]) < least]:
        if index > 100 * least:
            raise ValueError(f"{suite.name}: too few questions of {short} in {index} videos")
        seed = AUDIT_SEED + suite.seed_block * 10**6 + index
        rng = random.Random(f"audit/{seed}")
        spec = draw_video(seed, rng.choices(lengths, weights)[0], suite.profile)
        for question in questions(spec, rng, short, suite.questions_per_video):
            found[question.family].append((index, question))
        index += 1
    return found


def audit_family(suite: str, family: str, asked: Asked) -> Finding:
    """Audit the questions of one family.

    Args:
        suite: Name for the report.
        family: Name for the report.
        asked: Questions of one answer type, each with the index of its video.
    """
    if asked[0][1].options is not None:
        chance = float(np.mean([1 / len(q.options or ()) for _, q in asked]))
        guessers = {
            "position": _cross_fit(asked, _by_position),
            "content": _cross_fit(asked, _by_content),
            "words": _by_words(asked),
        }
    else:
        candidates = _candidates(asked)
        chance = _even_chance(asked, candidates)
        guessers = {
            "constant": _cross_fit(asked, lambda a, b: _by_constant(a, b, candidates)),
            "words": _cross_fit(asked, lambda a, b: _constant_by_word(a, b, candidates)),
        }
    means = {name: float(scores.mean()) for name, scores in guessers.items()}
    spread = max(float(scores.std()) for scores in guessers.values())
    return Finding(
        suite=suite,
        family=family,
        questions=len(asked),
        chance=means["constant"] if asked[0][1].answer_type == "span" else chance,
        guessers=means,
        standard_error=spread / len(asked) ** 0.5,
    )


def _cross_fit(asked: Asked, guess: Callable[[Asked, Asked], Gains]) -> Gains:
    """Scores of all questions, each guessed from the half that does not hold its video."""
    one, other = _halves(asked)
    return np.concatenate([guess(one, other), guess(other, one)])


def _halves(asked: Asked) -> tuple[Asked, Asked]:
    """Questions of even and of odd videos."""
    return [pair for pair in asked if pair[0] % 2 == 0], [pair for pair in asked if pair[0] % 2]


def _by_position(known: Asked, asked: Asked) -> Gains:
    letters = Counter(question.answer_letter for _, question in known)
    best = letters.most_common(1)[0][0]
    return np.array([float(question.answer_letter == best) for _, question in asked])


def _by_content(known: Asked, asked: Asked) -> Gains:
    """Picks the option that was right in the largest share of the questions that offered it."""
    right = Counter(question.answer for _, question in known)
    offered = Counter(option for _, question in known for option in question.options or ())
    rate = {option: (right[option] + 1) / (offered[option] + 4) for option in offered}
    return np.array(
        [
            float(max(q.options or (), key=lambda option: rate.get(option, 0.25)) == q.answer)
            for _, q in asked
        ]
    )


def _by_words(asked: Asked) -> Gains:
    """A softmax over the options whose logits are sums of hashed feature weights."""
    tables = [_table(half) for half in _halves(asked)]
    scores = []
    for known, (features_NOF, right_N) in zip(tables, reversed(tables), strict=True):
        weights = _fit(*known)
        picked_N: NDArray[np.int64] = weights[features_NOF].sum(-1).argmax(1)
        scores.append(np.asarray(picked_N == right_N, np.float64))
    return np.concatenate(scores)


def _table(asked: Asked) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Feature numbers `[questions, options, features]`, padded with the idle 0, and the answers."""
    rows = [_question_features(question) for _, question in asked]
    width = max(len(features) for row in rows for features in row)
    features_NOF = np.zeros((len(rows), max(map(len, rows)), width), np.int64)
    for n, row in enumerate(rows):
        for o, features in enumerate(row):
            features_NOF[n, o, : len(features)] = features
    right = [(q.options or ()).index(q.answer) for _, q in asked]
    return features_NOF, np.array(right)


def _question_features(question: Question) -> list[list[int]]:
    """Feature numbers of each option."""
    options = question.options or ()
    words = question.question.lower().strip("?").split()
    parts = [option.split() for option in options]
    ranked = sorted(options, key=lambda text: (len(text), text))
    table = []
    for place, option in enumerate(options):
        rivals = [part for o, other in enumerate(parts) if o != place for part in other]
        names: list[tuple[str | int, ...]] = [
            ("place", place),
            ("text", option),
            ("rank", ranked.index(option)),
        ]
        for part in parts[place]:
            names += [("part", part), ("shared", rivals.count(part)), ("asked", part in words)]
            names += [("rival", part, rival) for rival in rivals]
            names += [("word", part, word) for word in words]
        names += [("where", place, word) for word in words]
        table.append([_number(name) for name in dict.fromkeys(names)])
    return table


@cache
def _number(name: tuple[str | int, ...]) -> int:
    """A feature's number, 1 and up; the same in every process, which `hash` is not."""
    return 1 + zlib.crc32(repr(name).encode()) % (_FEATURES - 1)


def _fit(features_NOF: NDArray[np.int64], right_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights by full-batch Adam on the cross entropy with L2; weight 0 stays 0 (padding)."""
    weights, mean, square = np.zeros(_FEATURES), np.zeros(_FEATURES), np.zeros(_FEATURES)
    rows = np.arange(len(right_N))
    for step in range(1, _STEPS + 1):
        logits_NO = weights[features_NOF].sum(-1)
        p_NO = np.exp(logits_NO - logits_NO.max(1, keepdims=True))
        p_NO /= p_NO.sum(1, keepdims=True)
        p_NO[rows, right_N] -= 1.0
        spread = np.repeat(p_NO.ravel(), features_NOF.shape[2])
        gradient = np.bincount(features_NOF.ravel(), spread, _FEATURES) + _L2 * weights
        gradient[0] = 0.0
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        scale = np.sqrt(square / (1 - 0.99**step)) + 1e-8
        weights = weights - 0.05 * mean / (1 - 0.9**step) / scale
    return weights


def _candidates(asked: Asked) -> list[str]:
    """Answers worth guessing: all numbers that occur, or a grid of spans."""
    if asked[0][1].answer_type == "number":
        return sorted({question.answer for _, question in asked})
    grid = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
    return [f"{a} - {b}" for a in grid for b in grid if a < b]


def _scores(asked: Asked, candidates: Sequence[str]) -> NDArray[np.float64]:
    """Score of every candidate on every question, `[questions, candidates]`."""
    answers = [question.answer for _, question in asked]
    if asked[0][1].answer_type == "span":
        return _iou(_spans(answers)[:, None], _spans(candidates)[None])
    relative = asked[0][1].family in RELATIVE_FAMILIES
    rule = mean_relative_accuracy if relative else operator.eq
    rows = {
        answer: [float(rule(float(guess), float(answer))) for guess in candidates]
        for answer in set(answers)
    }
    return np.array([rows[answer] for answer in answers])


def _spans(texts: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[float(part) for part in text.split(" - ")] for text in texts])


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    overlap = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
    overlap = np.maximum(overlap, 0.0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - overlap
    return np.asarray(overlap / union)


def _even_chance(asked: Asked, candidates: Sequence[str]) -> float:
    """Score of the best constant if all answers that occur were equally frequent."""
    scores_NC = _scores(asked, candidates)
    answers = np.array([question.answer for _, question in asked])
    by_answer = [scores_NC[answers == answer].mean(0) for answer in sorted(set(answers))]
    return float(np.mean(by_answer, axis=0).max())


def _by_constant(known: Asked, asked: Asked, candidates: Sequence[str]) -> Gains:
    best = int(_scores(known, candidates).mean(0).argmax())
    return _scores(asked, candidates)[:, best]


def _constant_by_word(known: Asked, asked: Asked, candidates: Sequence[str]) -> Gains:
    """For each question the best constant of the word in it that promises most."""
    known_NC = _scores(known, candidates)
    rows: dict[str, list[int]] = defaultdict(list)
    for n, (_, question) in enumerate(known):
        for word in set(question.question.split()):
            rows[word].append(n)
    overall = known_NC.mean(0)
    # Shrunk towards the whole, so that a rare word does not promise by luck.
    means = {word: (known_NC[r].sum(0) + 30 * overall) / (len(r) + 30) for word, r in rows.items()}
    best = {word: (float(mean.max()), int(mean.argmax())) for word, mean in means.items()}
    fallback = (float(overall.max()), int(overall.argmax()))
    picked = [
        max(best.get(word, fallback) for word in question.question.split())[1]
        for _, question in asked
    ]
    return _scores(asked, candidates)[np.arange(len(asked)), picked]
