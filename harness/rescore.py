"""`internvideo3 score`: score the stored answers of a run again. No torch, no lmms-eval."""

from collections.abc import Mapping
from pathlib import Path

from internvideo3.harness.judgements import apply, judgements
from internvideo3.harness.recorder import score_fields, scored_doc, suite_result
from internvideo3.harness.store import Row, RunStore, StoreError, read_run, suites_of
from internvideo3.harness.submission import write_submission


def rescore(root: Path) -> Row:
    """Score every stored answer of a run with the scorers of today; rewrites what changed.

    Args:
        root: the run directory.

    Returns:
        The results by suite.

    Raises:
        StoreError: not a run directory, no samples in it, or it cannot be written.
    """
    run = read_run(root)
    suites = suites_of(root)
    if not suites:
        raise StoreError(f"{root} has no samples yet. Run `internvideo3 eval --out {root}` first.")
    with RunStore.open(root, run) as store:
        for suite in suites:
            verdicts = judgements(root, suite)
            again = [_again(suite, row, verdicts) for row in store.answered(suite).values()]
            store.rewrite(suite, again)
            store.finish(suite, [row["id"] for row in again], suite_result(suite, again))
            write_submission(root, suite, again)
        return store.results()


def _again(suite: str, row: Row, verdicts: Mapping[str, Row]) -> Row:
    """A record with today's scores, and with the verdict of a judge where one was recorded."""
    benchmark = row.get("benchmark") or suite
    return apply(row | score_fields(benchmark, scored_doc(row), row["prediction"]), verdicts)
