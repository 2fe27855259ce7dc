"""`internvideo3 judge`: what only a language model can score, asked of an endpoint that you name.

Nothing else in evaluation or scoring uses the network. A verdict is on disk before its answer
counts as asked (see `judgements.py`), so that an interrupted command goes on where it stopped, and
a judge that stays silent costs the questions under way. A server that is busy, restarts or drops a
connection is asked again, with waits that double (see `training/endpoint.py`).

What is asked, and how an answer is read, is in `tasks/benchmarks/verdicts.py`, with its sources.
The endpoint is asked at temperature 0 and without a penalty, so that a verdict can be repeated.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvideo3.harness.judgements import FOLDER, judgements, key, open_rows
from internvideo3.harness.store import Row, RunStore, append_rows, read_run, repair_rows, suites_of
from internvideo3.tasks.benchmarks.verdicts import Form, form_of
from internvideo3.training.endpoint import Endpoint, EndpointError

TIMEOUT_S = 60.0
"""Longest wait for one answer of a judge."""
WORKERS = 4
"""Questions that are asked at once."""
_HOPELESS = 3
"""Answers without a verdict, one after the other from the start, after which a judge is no use."""


class JudgeError(ValueError):
    """The endpoint cannot be used, or does not answer as a judge does."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a command did."""

    asked: int
    """Verdicts given now."""
    kept: int
    """Verdicts of earlier commands."""
    left: int
    """Answers that this judge cannot score."""
    others: Mapping[str, int]
    """How many of the kept verdicts were given by another judge, by its name."""
    unread: int
    """Answers of the judge that hold no verdict; they are asked for again by the next command."""


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A record that waits for a verdict."""

    suite: str
    row: Row
    form: Form


def judge(
    root: Path,
    whom: Endpoint,
    progress: Callable[[int, int], None],
    workers: int = WORKERS,
) -> Judged:
    """Ask for the verdicts that a run needs and does not have yet, and keep each at once.

    Args:
        root: the run directory.
        whom: whom to ask.
        progress: told how many verdicts there are, and how many are needed.
        workers: how many questions are asked at once.

    Raises:
        JudgeError: the endpoint stays silent, refuses, or its first answers hold no verdict; what
            was judged is kept.
        StoreError: `root` is no run, is in use, or cannot be written.
    """
    if not whom.url.startswith(("http://", "https://")):
        raise JudgeError(f"--endpoint {whom.url!r} is no http address.")
    run = read_run(root)
    with RunStore.open(root, run):
        suites = suites_of(root)
        for suite in suites:
            repair_rows(root / FOLDER / f"{suite}.jsonl")
        needed = [(suite, row, form_for(row)) for suite in suites for row in open_rows(root, suite)]
        known = {suite: judgements(root, suite) for suite in suites}
        waiting = [
            _Open(suite=suite, row=row, form=form)
            for suite, row, form in needed
            if form is not None and key(row) not in known[suite]
        ]
        kept_of = Counter(
            str(known[suite][key(row)]["judge"])
            for suite, row, form in needed
            if form is not None and key(row) in known[suite]
        )
        left = sum(form is None for _, _, form in needed)
        kept = kept_of.total()
        book = _Book(root=root, whom=whom, kept=kept, waiting=len(waiting), progress=progress)
        _ask_all(waiting, whom, workers, book)
    kept_of.pop(whom.model, None)
    return Judged(asked=book.given, kept=kept, left=left, others=kept_of, unread=book.unread)


class _Book:
    """Keeps verdicts as they come, from any thread, and counts them."""

    def __init__(
        self,
        *,
        root: Path,
        whom: Endpoint,
        kept: int,
        waiting: int,
        progress: Callable[[int, int], None],
    ):
        self.given = 0
        self.unread = 0
        self._pen = threading.Lock()
        self._root = root
        self._whom = whom
        self._kept = kept
        self._whole = kept + waiting
        self._progress = progress
        progress(kept, self._whole)

    def enter(self, one: _Open, said: str) -> None:
        """Write a verdict down.

        Raises:
            JudgeError: the judge's first answers hold no verdict.
        """
        value = one.form.read(said)
        with self._pen:
            if value is None:
                self.unread += 1
                self._check(said, one.form)
            else:
                verdict = {"key": key(one.row), "id": one.row["id"], "judge": self._whom.model}
                verdict |= {"said": said, "value": value}
                append_rows(self._root / FOLDER / f"{one.suite}.jsonl", [verdict])
                self.given += 1
            self._progress(self._kept + self.given + self.unread, self._whole)

    def silent(self, error: EndpointError) -> JudgeError:
        """The error of a judge that cannot be asked any more."""
        return JudgeError(
            f"{error}\n{self._kept + self.given} of {self._whole} verdicts are kept: repeat this "
            "command to ask for the others, or run `internvideo3 score` to count those there are."
        )

    def _check(self, said: str, form: Form) -> None:
        if self.unread == _HOPELESS and self.given == 0:
            raise JudgeError(
                f"The judge's first {self.unread} answers hold no verdict; the last one, "
                f"{said[:200]!r}, is {form.wanted}. Take another model."
            )


def _ask_all(waiting: list[_Open], whom: Endpoint, workers: int, book: _Book) -> None:
    """Ask several at once, each asker writing its verdict down before it takes the next question.

    When one fails for good no more are begun, and those under way are waited for.

    Raises:
        JudgeError: as `judge`.
    """
    over = threading.Event()

    def give(one: _Open) -> None:
        if over.is_set():
            return
        try:
            said = ask(whom, one.form)
        except EndpointError:
            over.set()
            raise
        book.enter(one, said)

    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="judge")
    try:
        for given in as_completed([pool.submit(give, one) for one in waiting]):
            given.result()
    except EndpointError as error:
        pool.shutdown(cancel_futures=True)
        raise book.silent(error) from error
    finally:
        pool.shutdown(cancel_futures=True)


def ask(whom: Endpoint, form: Form) -> str:
    """One answer of a judge.

    Raises:
        EndpointError: it cannot be reached, refuses, or answers in another form.
    """
    system = [{"role": "system", "content": form.system}] if form.system else []
    body = {
        "max_tokens": form.max_tokens,
        "temperature": 0,
        "messages": [*system, {"role": "user", "content": form.prompt}],
    }
    reply = whom.post("chat/completions", body)
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise EndpointError(f"{whom.url} answers in another form: {reply!r:.300}") from error
    if not isinstance(content, str):
        raise EndpointError(f"{whom.url} answers in another form: {reply!r:.300}")
    return content.strip()


def form_for(row: Mapping[str, Any]) -> Form | None:
    """The question to the judge about a record; None where there is none."""
    return form_of(str(row.get("benchmark")), row.get("doc") or {}, row["prediction"])
