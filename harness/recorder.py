"""Keeps one suite's answers: scores them as they come and writes them to the run. No torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvideo3.harness.store import Row, RunStore
from internvideo3.harness.traces import write_trace
from internvideo3.tasks.scoring import Score, aggregate, score
from internvideo3.tasks.scoring.result import RULES

if TYPE_CHECKING:
    from internvideo3.harness.direct import Outcome
    from internvideo3.harness.options import EvalOptions
    from internvideo3.harness.preflight import Benchmark

Doc = Mapping[str, Any]
Progress = Callable[[str, int, int], None]
"""Called with a suite, how many of its samples are on disk, and how many there are."""


class ErrorBudgetError(ValueError):
    """More samples failed than the command accepts; what is answered is kept."""


class SuiteRecorder:
    """Scores the answers to one suite as they come, and writes them to the run."""

    def __init__(
        self,
        benchmark: "Benchmark",
        store: RunStore,
        *,
        mine: Sequence[Doc],
        blind: Mapping[str, Path] | None,
        options: "EvalOptions",
        progress: Progress,
    ):
        self.benchmark = benchmark
        self.mine = mine
        self.answered = store.answered(benchmark.suite)
        if options.retry_errors:
            self.answered = {key: row for key, row in self.answered.items() if row["error"] is None}
        self.computed = 0
        self._docs = {str(doc["id"]): doc for doc in mine}
        self._store = store
        self._blind = blind
        self._most_errors = options.max_errors
        self.beside: Sequence[SuiteRecorder] = ()
        """The command's other suites, whose failures count too."""
        self._progress = progress
        self.report()

    @property
    def missing(self) -> list[Doc]:
        """This process's documents that are not answered yet."""
        return [doc for doc in self.mine if doc["id"] not in self.answered]

    def known(self, task: str, doc: Doc) -> str | None:
        """The recorded answer to a document, or None."""
        row = self.answered.get(_key(doc))
        return None if row is None else row["prediction"] or ""

    def video(self, task: str, doc: Doc) -> str | None:
        """The blind control's video for a document, or None for the document's own."""
        own = self._docs[_key(doc)]
        return str(self._blind[own["video_id"]]) if self._blind else None

    def record(self, task: str, answers: Sequence[tuple[Doc, "Outcome"]]) -> None:
        """Score a batch of answers and write it to disk.

        Raises:
            ErrorBudgetError: more samples failed than the command accepts.
        """
        pairs = [(self._docs[_key(doc)], outcome) for doc, outcome in answers]
        for doc, outcome in pairs:
            if outcome.trace is not None:
                write_trace(self._store.root, str(doc["id"]), outcome.trace)
        rows = [self._row(doc, outcome) for doc, outcome in pairs]
        timings = [{"id": doc["id"], **asdict(outcome.seconds)} for doc, outcome in pairs]
        self._store.add(self.benchmark.suite, rows, timings)
        self.answered.update((row["id"], row) for row in rows)
        self.computed += len(rows)
        self.report()
        self._check_budget()

    def report(self) -> None:
        """Tell the progress bar."""
        done = sum(doc["id"] in self.answered for doc in self.mine)
        self._progress(self.benchmark.suite, done, len(self.mine))

    def _check_budget(self) -> None:
        failed = [
            row
            for one in (*self.beside, self)
            for row in one.answered.values()
            if row["error"] is not None
        ]
        if self._most_errors is None or len(failed) <= self._most_errors:
            return
        reason = failed[-1]["error"]
        raise ErrorBudgetError(
            f"{len(failed)} samples failed, --max-errors accepts "
            f"{self._most_errors}. The last one, {failed[-1]['id']}: {reason['type']}: "
            f"{reason['message']}\nEverything answered is kept. Repair the cause and repeat the "
            "command with --retry-errors, or accept more."
        )

    def _row(self, doc: Doc, outcome: "Outcome") -> Row:
        reply = outcome.reply
        prediction = reply.text if reply else None
        videos = self.benchmark.videos(doc)
        shown = self.video("", doc) or (str(videos[0]) if videos else None)
        row = {
            **{key: doc[key] for key in _DOC_FIELDS},
            "suite": self.benchmark.suite,
            "video": shown,
            "prediction": prediction,
            **score_fields(self.benchmark.scorer, scored_doc(doc), prediction),
            "tokens": {
                "prompt": reply.prompt_tokens if reply else 0,
                "new": reply.new_tokens if reply else 0,
            },
            "error": outcome.error,
        }
        if outcome.notes:
            row["notes"] = list(outcome.notes)
        if outcome.agent is not None:
            row["agent"] = outcome.agent
        if self.benchmark.local is not None:
            row |= {"benchmark": self.benchmark.scorer, "doc": doc["doc"]}
        return row


def _key(doc: Doc) -> str:
    """A document's id, also where it comes back from lmms-eval."""
    return str(doc.get("iv3_id") or doc["id"])


def scored_doc(row: Doc) -> Doc:
    """What of a document, or of a sample's record, the scorer reads."""
    return row.get("doc") or row


_DOC_FIELDS = (
    "id",
    "video_id",
    "family",
    "length_s",
    "question",
    "options",
    "answer",
    "answer_type",
    "evidence",
)


def score_fields(benchmark: str, doc: Doc, prediction: str | None) -> Row:
    """Both scores of an answer, as they are stored; None, a sample that failed, scores 0."""
    return {rule: score(benchmark, doc, prediction, rule=rule).as_dict() for rule in RULES}


def suite_result(suite: str, rows: Sequence[Row]) -> Row:
    """A suite's TaskResult under the official rule, with the plain rule's beside it."""
    benchmark = str(rows[0].get("benchmark") or suite) if rows else suite
    both = {
        rule: aggregate(
            benchmark, [(scored_doc(row), Score.from_dict(row[rule])) for row in rows], rule=rule
        ).as_dict()
        for rule in RULES
    }
    return {**both["official"], "plain": both["plain"]}
