"""What each part of the conversion is worth on the scale model: `make conversion-ablation`.

The shipped GQA model is converted at half its cache with one choice changed at a time, without any
training, and answers a fixed random part of the scale world through `evaluate`, as the GQA model
does. Differences are paired by question. A row's figures are written when it is done, and rows that
are there are not computed again.

    python -m internvideo3.harness.conversion_ablation --root WORLD --work FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from internvideo3.harness import provenance
from internvideo3.harness.calibration import Batch, Reader, answer_labelled
from internvideo3.harness.conversion_report import plain_transmla
from internvideo3.harness.evaluate import evaluate
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.preflight import load_benchmark
from internvideo3.harness.store import write_json
from internvideo3.model.checkpoint import read_json, resolve_checkpoint
from internvideo3.model.conversion.convert import Job
from internvideo3.model.conversion.converted import save_converted
from internvideo3.model.conversion.divergence import Reference
from internvideo3.model.conversion.options import ConversionOptions, preset, share
from internvideo3.model.conversion.source import Source
from internvideo3.model.scale.build import load_processor
from internvideo3.reports.stats import Interval
from internvideo3.reports.summary import SUITE_ORDER, Summary, summarise_paths
from internvideo3.training.scale.convert_stage import calibration

log = logging.getLogger("internvideo3.conversion")

SOURCE = "scale:base"
CALIBRATION_VIDEOS = 48
"""As many as the shipped conversion was calibrated on, and the same ones."""
HELD_OUT_VIDEOS = 160
"""The next ones of the same stream: KL on their answers."""
SUBSET_SEED = 0
COUNTING, COUNTING_QUESTIONS = "counting", 250
"""More of world_long's counting questions: what the shipped conversion lost most."""
LIMIT_POINTS = 10.0
"""Most points of mean suite accuracy that preset `best` may lose before any training."""

Options = Callable[[Any], ConversionOptions]


@dataclass(frozen=True)
class Row:
    """One conversion."""

    what: str
    """What is changed, for readers."""
    options: Options
    part: str
    """Which table it belongs to: "parts", "choices" or "shapes"."""
    calibrated: str = "stage"
    """"stage": the shipped conversion's set; "answers": the same, answers alone supervised;
    "default": `internvideo3 convert`'s own."""
    counting: bool = False
    """Whether more counting questions are asked too."""


def _best(**changes: object) -> Options:
    return lambda text: preset("best", text).with_(**changes)


def _shared(cache_share: float, **changes: object) -> Options:
    return lambda text: share(text, cache_share).with_(**changes)


def _fixed_slots(**changes: object) -> Options:
    """One slot a frequency, as rows without importance need."""
    return lambda text: preset("best", text).with_(rope_slots=text.head_dim // 2, **changes)


ROWS: dict[str, Row] = {
    "best": Row("nothing: preset `best`", _best(), "parts", counting=True),
    "no aggregation": Row(
        "1. rotary aggregation: the heads' mean, one slot a frequency, no gain",
        _fixed_slots(mixing="mean", importance=False, gain=False),
        "parts",
    ),
    "no joint factorisation": Row(
        "2. joint factorisation: keys and values apart", _best(joint=False), "parts"
    ),
    "no adapters": Row("3. modality adapters", _best(adapters=False), "parts"),
    "no budget": Row("4. budget by layer: the same rank in all", _best(tempered=False), "parts"),
    "linear norm": Row(
        "5. exact norm: learned linear norm", _best(norm="linear", norm_fit="affine"), "parts"
    ),
    "equation 7": Row(
        "5. exact norm: equation 7's constant", _best(norm="linear", norm_fit="constant"), "parts"
    ),
    "vision budget": Row(
        "4. budget by modality: vision tokens at three quarters of text's rank, the same bytes",
        _best(vision_rank_share=0.75),
        "parts",
        counting=True,
    ),
    "vision auto": Row(
        "4. budget by modality: the ratio of the least divergence",
        _best(vision_rank_share=None),
        "parts",
        counting=True,
    ),
    "three eighths": Row(
        "`best` at 37.5 % of the cache", _shared(0.375, tempered=True), "shapes", counting=True
    ),
    "three eighths, vision auto": Row(
        "`best` at 37.5 % of the cache, budget by modality",
        _shared(0.375, tempered=True, vision_rank_share=None),
        "shapes",
        counting=True,
    ),
    "half": Row("preset `half`", lambda text: preset("half", text), "shapes", counting=True),
    **{
        f"{slots} slots": Row(
            f"`best` with {slots} rotary slots", _best(rope_slots=slots), "shapes", counting=True
        )
        for slots in (4, 8, 12, 20)
    },
    "shipped shape": Row(
        "the shipped model's shape: rank 48, 8 slots",
        lambda text: share(text, 0.5).with_(rope_slots=8),
        "shapes",
        counting=True,
    ),
    "official": Row(
        "preset `official`", lambda text: preset("official", text), "shapes", counting=True
    ),
    "prerope": Row(
        "preset `prerope`", lambda text: preset("prerope", text), "shapes", counting=True
    ),
    "small": Row(
        "preset `small`, a quarter", lambda text: preset("small", text), "shapes", counting=True
    ),
    "transmla": Row(
        "TransMLA's choices, our code", lambda text: plain_transmla(text, 0.5), "shapes"
    ),
    "real mixing": Row("complex mixing: real", _best(mixing="real"), "choices"),
    "no importance": Row(
        "importance of slots: one a frequency", _fixed_slots(importance=False), "choices"
    ),
    "no gain": Row("positional gain", _best(gain=False), "choices"),
    "balanced metric": Row(
        "Fisher metric: balanced norms", _best(metric="balanced"), "choices"
    ),
    "unweighted": Row("token weights", _best(token_weights=False), "choices"),
    "uncentred": Row("affine latent: uncentred", _best(centred=False), "choices"),
    "no refit": Row("output refit", _best(refit_output=False), "choices"),
    "answers": Row(
        "calibrated on answers alone", _best(), "choices", calibrated="answers", counting=True
    ),
    "default set": Row(
        "calibrated on the default set", _best(), "choices", calibrated="default", counting=True
    ),
}  # fmt: skip
"""In the order of their value."""


class Laboratory:
    """The source, its calibration sets, and the questions."""

    def __init__(self, root: Path, work: Path, questions: int) -> None:
        from transformers import AutoModelForImageTextToText

        self.root, self.work = root, work
        self.checkpoint = resolve_checkpoint(SOURCE)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            self.checkpoint, dtype=torch.float32
        )
        self.source = Source.of(model.eval())
        self.sets = self._calibration_sets()
        self.ids = subset(root, questions)
        self.counting = counting_questions(root)

    def _calibration_sets(self) -> dict[str, list[Batch]]:
        processor = load_processor()
        tokenizer = processor.tokenizer
        drawn: list[Batch] = list(calibration(processor, CALIBRATION_VIDEOS + HELD_OUT_VIDEOS))
        labelled = [answer_labelled(batch, tokenizer) for batch in drawn]
        self.held_out = Reference.of(self.source, labelled[CALIBRATION_VIDEOS:])
        reader = Reader(
            tokenizer=tokenizer,
            processor=processor,
            tokens=1024,
            loss=lambda batch: Reference.of(self.source, [batch]).source_loss(),
        )
        return {
            "stage": drawn[:CALIBRATION_VIDEOS],
            "answers": labelled[:CALIBRATION_VIDEOS],
            "default": reader.default(),
        }

    def answer(self, model: str, name: str, counting: bool) -> None:
        """Lets a model answer the questions; what is answered is kept."""
        asked: dict[str, tuple[tuple[str, ...], list[str]]] = {name: (SUITE_ORDER, self.ids)}
        if counting:
            asked[f"{name}-{COUNTING}"] = (("world_long",), self.counting)
        for run, (suites, ids) in asked.items():
            evaluate(
                EvalOptions(
                    model=model,
                    suites=suites,
                    out=self.runs / run,
                    root=self.root,
                    sample_ids=tuple(ids),
                    frame_cache=self.work / "frames",
                )
            )

    @property
    def runs(self) -> Path:
        """Where answers are."""
        return self.work / "runs"

    def row(self, name: str, row: Row) -> dict[str, Any]:
        """Figures of one conversion."""
        options = row.options(self.source.text)
        batches = self.sets[row.calibrated]
        job = Job.start(self.source, batches, options, self.work / f"set-{row.calibrated}")
        built = job.run()
        agreement = self.held_out.agreement(built.layers)
        folder = self.work / "checkpoints" / slug(name)
        shutil.rmtree(folder, ignore_errors=True)
        save_converted(self.source, built.layers, built.shape, folder)
        load_processor().save_pretrained(folder)
        self.answer(str(folder), slug(name), row.counting)
        return {
            "what": row.what,
            "part": row.part,
            "calibrated": row.calibrated,
            "options": asdict(options),
            "cache_share": built.cache_share,
            "ranks": [layer.rank for layer in built.reports],
            "vision_ranks": [layer.vision_rank for layer in built.reports],
            "rotary_slots": built.reports[0].rope_slots,
            "adapters": built.shape.adapters,
            "answers": asdict(agreement) | {"perplexity_ratio": agreement.perplexity_ratio},
            **self.scores(slug(name), row.counting),
        }

    def scores(self, run: str, counting: bool) -> dict[str, Any]:
        """Scores of a run and their differences from the source's."""
        found = compared(summarise_paths([self.runs / "base", self.runs / run]))
        if counting:
            pair = [self.runs / f"base-{COUNTING}", self.runs / f"{run}-{COUNTING}"]
            found[COUNTING] = compared(summarise_paths(pair))["suites"]["world_long"]
        return found


def slug(name: str) -> str:
    """A folder's name."""
    return name.replace(" ", "-")


def subset(root: Path, questions: int) -> list[str]:
    """Ids of at least so many questions of every suite: those of videos drawn at random."""
    ids: list[str] = []
    for suite in SUITE_ORDER:
        docs = load_benchmark(suite, root, "test", limit=None, sample_ids=()).docs
        by_video: dict[str, list[str]] = {}
        for doc in docs:
            by_video.setdefault(doc["video_id"], []).append(doc["id"])
        videos = sorted(by_video)
        random.Random(f"{SUBSET_SEED}/{suite}").shuffle(videos)
        taken: list[str] = []
        for video in videos:
            if len(taken) >= questions:
                break
            taken += by_video[video]
        ids += sorted(taken)
    return ids


def counting_questions(root: Path) -> list[str]:
    """Ids of random counting questions of the suite of long videos, one a video."""
    docs = load_benchmark("world_long", root, "test", limit=None, sample_ids=()).docs
    ids = [doc["id"] for doc in docs if doc["family"] == "count"]
    random.Random(f"{SUBSET_SEED}/{COUNTING}").shuffle(ids)
    return sorted(ids[:COUNTING_QUESTIONS])


def compared(summary: Summary) -> dict[str, Any]:
    """Two runs' scores per suite, and the second minus the first, in points."""
    first, second = (system.name for system in summary.systems)
    suites = {}
    for suite in summary.suites:
        difference = suite.comparisons[0].difference
        before, after = suite.cells[first].value, suite.cells[second].value
        assert before is not None and after is not None, "every question of the world has a score"
        suites[suite.name] = {
            "questions": difference.interval.n,
            "videos": difference.interval.clusters,
            "source": 100 * before,
            "converted": 100 * after,
            "difference": in_points(difference.interval),
        }
    pair = summary.suites[0].comparisons[0].name
    mean = summary.mean_difference(pair)
    return {"suites": suites, "mean_difference": mean and in_points(mean)}


def in_points(interval: Interval) -> dict[str, float]:
    """A difference and its 95 % interval, in points."""
    ends = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {name: 100 * value for name, value in ends.items()}


def measure(root: Path, work: Path, out: Path, wanted: Sequence[str], questions: int) -> None:
    """Computes the wanted rows that are not in the file."""
    laboratory = Laboratory(root, work, questions)
    report = read_json(out) if out.is_file() else header(laboratory)
    if report["questions"]["ids_sha256"] != digest(laboratory.ids):
        raise ValueError(f"{out} was measured on other questions; give another file, or delete it.")
    laboratory.answer(SOURCE, "base", counting=True)
    code = made_by()  # files may change while this runs
    for name in wanted:
        if name in report["rows"]:
            continue
        report["rows"][name] = laboratory.row(name, ROWS[name]) | code
        report["bar"] = bar(report["rows"])
        write_json(out, report)
        log.info("%s: %s", name, report["rows"][name]["mean_difference"])


def header(laboratory: Laboratory) -> dict[str, Any]:
    """What all rows share."""
    command = ["python", "-m", "internvideo3.harness.conversion_ablation", *sys.argv[1:]]
    return {
        "what": "conversion of the scale model at half the cache without any training",
        "label": "scale",
        "not_comparable": "a model of 1.5 million parameters on the scale world; no 8B model",
        "command": shlex.join(command),
        **made_by(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "source": SOURCE,
        "calibration_videos": CALIBRATION_VIDEOS,
        "held_out_videos": HELD_OUT_VIDEOS,
        "questions": {
            "split": "test",
            "seed": SUBSET_SEED,
            "drawn": "whole videos, per suite",
            "number": len(laboratory.ids),
            "ids_sha256": digest(laboratory.ids),
            COUNTING: len(laboratory.counting),
        },
        "rows": {},
    }


def made_by() -> dict[str, Any]:
    """The code that measured."""
    commit, dirty = provenance.revision()
    return {"commit": commit, "dirty": dirty, "made_at": provenance.now()}


def digest(ids: Sequence[str]) -> str:
    """SHA-256 of ids, one a line."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def bar(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Points that `best` loses in the mean over suites, and most that it may lose in any suite."""
    if "best" not in rows:
        return None
    row = rows["best"]
    lost = -row["mean_difference"]["mean"]
    worst = max(-suite["difference"]["mean"] for suite in row["suites"].values())
    return {
        "limit_points": LIMIT_POINTS,
        "mean_lost": lost,
        "most_lost_in_a_suite": worst,
        "met": worst <= LIMIT_POINTS,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures the rows."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="where the scale world is built")
    parser.add_argument("--work", type=Path, required=True, help="folder for unfinished work")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--questions", type=int, default=150, help="at least so many a suite")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    measure(given.root, given.work, given.out, given.rows, given.questions)


if __name__ == "__main__":
    main()
