"""Peak resident memory of `convert`, planned and measured: `make memory-report`.

The plan counts what every phase holds beside the source's weights, from the sizes in its
configuration. It is held against conversions by the code of the command, watched phase by phase
with the kernel's own peak counter: of a small real model, and of random models that have a few
layers as large as an 8B model's; then it is read for Qwen3-VL-8B.

    python -m internvideo3.harness.conversion_memory --source FOLDER --preset half --out FILE.json
    python -m internvideo3.harness.conversion_memory --layers 2 --preset official --out FILE.json

A file keeps the cases of earlier calls.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from internvideo3.harness import provenance
from internvideo3.harness.calibration import HELD_OUT_TEXT
from internvideo3.harness.convert import ConvertCommand, convert_checkpoint
from internvideo3.harness.store import write_json
from internvideo3.model.checkpoint import read_json, resolve_checkpoint, weight_files
from internvideo3.model.conversion.converted import SHARD_BYTES
from internvideo3.model.conversion.memory import give_back
from internvideo3.model.conversion.recording import HEAD_TOKENS, RECOMPUTE_ABOVE_BYTES

log = logging.getLogger("internvideo3.conversion")

LIMIT_ABOVE_WEIGHTS = 4 * 10**9
"""Most bytes above one copy of an 8B model's weights, the libraries' own code included."""
SQUARES = 16
"""Float64 matrices [E, E] of a layer's statistics and plan at once: sums, covariance, metric, its
eigenvectors and roots, residual map, and what products leave."""
DOUBLE, FLOAT, ITEM = 8, 4, 2
"""Bytes of a number; weights are bfloat16."""
RANDOM_WORDS = 4096
"""Vocabulary of random models: their layers are what is measured."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What memory depends on."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    words: int
    parameters: int
    item: int
    """Bytes of a weight."""
    tokens: int
    """Of the longest calibration text."""
    batches: int
    row: int
    """Cached numbers per token and layer."""
    released: bool = False
    """Whether layers are in the released layout, which repeats what query heads share."""
    linear: bool = False
    """Whether a linear map replaces QK-norm."""


QWEN3_VL_8B = Size(
    width=4096, layers=36, heads=32, kv_heads=8, head_dim=128, mlp=12288, words=151936,
    parameters=8_767_123_696, item=ITEM, tokens=1024, batches=26, row=1024,
)  # fmt: skip
"""Qwen3-VL-8B-Instruct in bfloat16 with the shipped calibration set and preset `half`."""


def plan(size: Size) -> dict[str, int]:
    """Bytes above the weights, phase by phase."""
    X, T, D, H = size.width, size.tokens, size.head_dim, size.heads
    E = 2 * size.kv_heads * D
    per_token = 12 * X + 4 * size.mlp
    activations = per_token * T * size.item * size.layers
    if activations >= RECOMPUTE_ABOVE_BYTES:  # one layer's, and every layer's input
        activations = (per_token + size.layers * X) * T * size.item
    # Logits of both models, their log-probabilities, and what their divergence takes.
    words = HEAD_TOKENS * size.words * (6 * FLOAT + size.item)
    # Scores of one key/value head's group in float32: probabilities, gradients, products.
    scores = 6 * (H // size.kv_heads) * T * T * FLOAT
    statistics = SQUARES * E * E * DOUBLE
    layer = own_parameters(size) * size.item
    # The linear norm's projections, made and folded.
    norm = 2 * (H * D + E // 2) * X * DOUBLE if size.linear else 0
    # Gram matrix, its penalty, their sum and the solver's copy; right side, solution, its copy.
    refit = (4 * (H * D) ** 2 + 3 * H * D * X) * DOUBLE
    # Queries of both kinds, joined and copied; the output projection and its solver's copies.
    release = (6 * H * D * X + 3 * (H * D) ** 2) * DOUBLE if size.released else 0
    uncompressed = uncompressed_parameters(size) * size.item
    hidden = size.batches * T * X * size.item
    forward = per_token * T * size.item + H * T * T * FLOAT
    steps = {
        "calibration pass": activations + words + hidden // size.batches,
        "norm alone": norm + 2 * uncompressed + hidden + forward + words,
        "statistics": statistics + scores + norm,
        "layers": 2 * layer + statistics + norm + max(refit, release, scores),
        "held-out data": 2 * layer + hidden + forward + words,
        "writing": 2 * min(SHARD_BYTES, size.parameters * size.item),
    }
    if not size.linear:
        del steps["norm alone"]
    return steps


def uncompressed_parameters(size: Size) -> int:
    """Parameters of a layer whose norm alone is replaced: projections, and a row without loss."""
    keys = size.kv_heads * size.head_dim
    return (size.heads * size.head_dim + keys) * size.width + 4 * keys * keys


def own_parameters(size: Size) -> int:
    """Parameters of a converted layer that are not the source's own, one slot a frequency."""
    X, HD, rope = size.width, size.heads * size.head_dim, size.head_dim
    rank = size.row - rope
    if size.released:
        return 2 * HD * (X + 1) + size.row * (X + 1) + rank * 2 * HD + HD * X
    up = 2 * size.kv_heads * size.head_dim
    return HD * X + X + rank * (2 * up + 1) + rope * (size.heads + size.kv_heads)


class Peaks:
    """Peak resident memory of each phase of a conversion, by the kernel's counter."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        reset_peak()

    def progress(self, step: str, done: int, total: int) -> None:
        """To be called as a conversion advances; a phase ends with its last part."""
        self.found[step] = max(self.found.get(step, 0), peak_bytes())
        if done == total:
            reset_peak()


def peak_bytes() -> int:
    """Peak resident memory since the last reset (VmHWM)."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Resident memory now (VmRSS)."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Makes the present memory the peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def random_model(folder: Path, layers: int) -> Path:
    """A Qwen3 model of random weights with layers as large as Qwen3-VL-8B's, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from internvideo3.model.scale.build import load_processor

    large = QWEN3_VL_8B
    config = Qwen3Config(
        vocab_size=RANDOM_WORDS, hidden_size=large.width, intermediate_size=large.mlp,
        num_hidden_layers=layers, num_attention_heads=large.heads,
        num_key_value_heads=large.kv_heads, head_dim=large.head_dim, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_processor().tokenizer.save_pretrained(folder)
    return folder


def measured(source: str, work: Path, preset: str, tokens: int, documents: int) -> dict[str, Any]:
    """Converts a source by the code of the command, and watches memory."""
    texts = work / "calibration.txt"
    whole = HELD_OUT_TEXT.read_text(encoding="utf-8").split("\f")
    texts.write_text("\f".join(whole[:documents]), encoding="utf-8")
    given = ConvertCommand(
        source="scale:base",
        out=work / "first",
        preset=preset,
        calibration=(texts,),
        held_out=texts,
        tokens=32,
    )
    # Libraries are loaded when they are first used; they are no part of what grows with a model.
    convert_checkpoint(given)
    give_back()
    before = resident_bytes()
    peaks = Peaks()
    given = replace(given, source=source, out=work / "converted", tokens=tokens)
    convert_checkpoint(given, peaks.progress)
    peaks.progress("writing", 1, 1)
    return {"before": before, "peaks": peaks.found}


def size_of(source: str, preset: str, tokens: int, batches: int) -> Size:
    """Sizes of a text model's checkpoint."""
    path = resolve_checkpoint(source)
    config = read_json(path / "config.json")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return Size(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=config["intermediate_size"],
        words=config["vocab_size"],
        parameters=sum(file.stat().st_size for file in weight_files(path)) // ITEM,
        item=ITEM,
        tokens=tokens,
        batches=batches,
        row=kv_heads * head_dim,
        released=preset == "official",
        linear=preset == "official" and config["model_type"] != "llama",
    )


def case(source: str, work: Path, preset: str, tokens: int, documents: int) -> dict[str, Any]:
    """One conversion, measured and planned."""
    found = measured(source, work, preset, tokens, documents)
    size = size_of(source, preset, tokens, documents)
    weights = size.parameters * size.item
    above = {step: peak - found["before"] - weights for step, peak in found["peaks"].items()}
    planned = plan(size)
    return {
        "preset": preset,
        "size": asdict(size),
        "weights": weights,
        "libraries": found["before"],
        "measured_above_weights": {step: above[step] for step in planned},
        "planned_above_weights": planned,
    }


def large_plan(size: Size, libraries: int) -> dict[str, Any]:
    """The plan of an 8B model, held against the limit."""
    planned = plan(size)
    most = libraries + max(planned.values())
    return {
        "size": asdict(size),
        "weights": size.parameters * size.item,
        "planned_above_weights": planned,
        "most_above_weights_with_libraries": most,
        "limit_above_weights": LIMIT_ABOVE_WEIGHTS,
        "met_by_plan": most <= LIMIT_ABOVE_WEIGHTS,
    }


def header() -> dict[str, Any]:
    """What a file says before its cases."""
    return {"what": "peak resident memory of conversions, in bytes", "commands": [], "cases": {}}


def main(arguments: list[str] | None = None) -> None:
    """Measures one case, plans, and writes both into the file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", help="bfloat16 checkpoint of a text model")
    source.add_argument("--layers", type=int, help="make a random model of so many 8B layers")
    parser.add_argument("--preset", choices=("half", "official"), default="half")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--tokens", type=int, default=512, help="longest calibration text")
    parser.add_argument("--documents", type=int, default=1, help="calibration texts")
    given = parser.parse_args(arguments)
    report = read_json(given.out) if given.out.is_file() else header()
    commit, dirty = provenance.revision()
    with tempfile.TemporaryDirectory(prefix="internvideo3-memory-") as place:
        work = Path(place)
        name = given.source or f"{given.layers} layers of Qwen3-VL-8B's size, random"
        model = given.source or str(random_model(work / "source", given.layers))
        found = case(model, work, given.preset, given.tokens, given.documents)
        shutil.rmtree(work / "source", ignore_errors=True)
    command = ["python", "-m", "internvideo3.harness.conversion_memory", *sys.argv[1:]]
    if (line := shlex.join(command)) not in report["commands"]:
        report["commands"].append(line)
    report |= {
        "commit": commit,
        "dirty": dirty,
        "made_at": provenance.now(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
    }
    report["cases"][f"{name}, {given.preset}"] = found | {"commit": commit, "dirty": dirty}
    libraries = max(one["libraries"] for one in report["cases"].values())
    report["qwen3_vl_8b"] = large_plan(QWEN3_VL_8B, libraries)
    official = replace(QWEN3_VL_8B, released=True, linear=True)
    report["qwen3_vl_8b_official"] = large_plan(official, libraries)
    write_json(given.out, report)
    for line in lines(report):
        log.info("%s", line)


def lines(report: Mapping[str, Any]) -> list[str]:
    """The figures and whether the limit holds, in words."""
    found = []
    for name, one in report["cases"].items():
        most = max(one["measured_above_weights"].values())
        found.append(f"measured  {name}: {_gb(most)} above {_gb(one['weights'])} of weights")
    for name in ("qwen3_vl_8b", "qwen3_vl_8b_official"):
        one = report[name]
        verdict = "met" if one["met_by_plan"] else "NOT met"
        most = one["most_above_weights_with_libraries"]
        found.append(
            f"planned   {name}: {_gb(most)} above {_gb(one['weights'])} of weights, the libraries "
            f"included; at most {_gb(one['limit_above_weights'])}: {verdict}"
        )
    return found


def _gb(size: int) -> str:
    return f"{size / 10**9:.2f} GB"


if __name__ == "__main__":
    main()
