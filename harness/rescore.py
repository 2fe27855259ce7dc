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
        StoreError: not a run directory, no samples in it, answers in parts that are not merged, or
            it cannot be written.
    """
    run = read_run(root)
    suites = suites_of(root)
    if not suites:
        raise StoreError(f"{root} has no samples yet. Run `internvideo3 eval --out {root}` first.")
    with RunStore.open(root, run) as store:
        for suite in suites:
            verdicts = judgements(root, suite)
            rows = list(store.answered(suite).values())
            for index, row in enumerate(rows):
                rows[index] = _again(suite, row, verdicts)
            store.rewrite(suite, rows)
            write_submission(root, suite, rows)
            order, result = [row["id"] for row in rows], suite_result(suite, rows)
            del rows  # `finish` reads them back
            store.finish(suite, order, result)
        return store.results()


def _again(suite: str, row: Row, verdicts: Mapping[str, Row]) -> Row:
    """A record with today's scores, and with the verdict of a judge where one was recorded."""
    benchmark = row.get("benchmark") or suite
    return apply(row | score_fields(benchmark, scored_doc(row), row["prediction"]), verdicts)
