"""`internvideo3 score`: score the stored answers of a run again. No torch, no lmms-eval."""

from pathlib import Path

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
            rows = list(store.answered(suite).values())
            again = [
                row
                | score_fields(row.get("benchmark") or suite, scored_doc(row), row["prediction"])
                for row in rows
            ]
            store.rewrite(suite, again)
            store.finish(suite, [row["id"] for row in again], suite_result(suite, again))
            write_submission(root, suite, again)
        return store.results()
