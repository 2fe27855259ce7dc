"""Peak resident memory of `convert`, planned and measured: `make memory-report`.

The plan counts what every phase holds beside the source's weights, from the sizes in its
configuration; it is checked against a conversion by the same code, measured phase by phase with the
kernel's own peak counter, and then read for Qwen3-VL-8B.

    python -m internvideo3.harness.conversion_memory --source FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvideo3.harness import provenance
from internvideo3.harness.calibration import HELD_OUT_TEXT
from internvideo3.harness.convert import ConvertCommand, convert_checkpoint
from internvideo3.harness.store import write_json
from internvideo3.model.checkpoint import read_json, resolve_checkpoint, weight_files
from internvideo3.model.conversion.recording import HEAD_TOKENS, RECOMPUTE_ABOVE_BYTES

SHARD_BYTES = 2 * 10**9
"""Of a written checkpoint: one shard's copy is held while it is written."""
LIMIT_ABOVE_WEIGHTS = 4 * 2**30
"""Most bytes above one copy of an 8B model's weights."""
SQUARES = 16
"""Float64 matrices [E, E] of a layer's statistics and plan at once: sums, covariance, metric, its
eigenvectors and roots, residual map, and what products leave."""
DOUBLE, FLOAT, ITEM = 8, 4, 2
"""Bytes of a number; weights are bfloat16."""


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
    words = HEAD_TOKENS * size.words * (3 * FLOAT + size.item)
    # Scores of one key/value head's group in float32: probabilities, gradients, products.
    scores = 6 * (H // size.kv_heads) * T * T * FLOAT
    statistics = SQUARES * E * E * DOUBLE
    layers = size.layers * own_parameters(size) * size.item
    # Gram matrix, its penalty, their sum and the solver's copy; right side, solution, its copy.
    refit = (4 * (H * D) ** 2 + 3 * H * D * X) * DOUBLE
    hidden = size.batches * T * X * size.item
    forward = per_token * T * size.item + H * T * T * FLOAT
    shard = min(SHARD_BYTES, size.parameters * size.item)
    return {
        "calibration pass": activations + words + hidden // size.batches,
        "statistics": statistics + scores,
        "layers": layers + statistics + max(refit, scores),
        "held-out data": layers + hidden + forward + words,
        "writing": layers + shard,
    }


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


def measured(source: str, work: Path, tokens: int, documents: int) -> dict[str, Any]:
    """Converts a source by the code of the command, and watches memory."""
    import transformers  # noqa: F401  # what is imported later is no part of a conversion

    texts = work / "calibration.txt"
    whole = HELD_OUT_TEXT.read_text(encoding="utf-8").split("\f")
    texts.write_text("\f".join(whole[:documents]), encoding="utf-8")
    before = resident_bytes()
    peaks = Peaks()
    convert_checkpoint(
        ConvertCommand(
            source=source,
            out=work / "converted",
            calibration=(texts,),
            held_out=texts,
            tokens=tokens,
        ),
        peaks.progress,
    )
    peaks.progress("writing", 1, 1)
    return {"before": before, "peaks": peaks.found}


def size_of(source: str, tokens: int, batches: int) -> Size:
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
    )


def large_plan(size: Size) -> dict[str, Any]:
    """The plan of an 8B model, held against the limit."""
    planned = plan(size)
    return {
        "size": size.__dict__,
        "weights": size.parameters * size.item,
        "planned_above_weights": planned,
        "limit_above_weights": LIMIT_ABOVE_WEIGHTS,
        "met_by_plan": max(planned.values()) <= LIMIT_ABOVE_WEIGHTS,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures, plans, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="bfloat16 checkpoint of a text model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--tokens", type=int, default=512, help="longest calibration text")
    parser.add_argument("--documents", type=int, default=3, help="calibration texts")
    given = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="internvideo3-memory-"))
    try:
        found = measured(given.source, work, given.tokens, given.documents)
    finally:
        shutil.rmtree(work)
    size = size_of(given.source, given.tokens, given.documents)
    weights = size.parameters * size.item
    planned = plan(size)
    commit, dirty = provenance.revision()
    command = ["python", "-m", "internvideo3.harness.conversion_memory", *sys.argv[1:]]
    report = {
        "what": "peak resident memory of a conversion, in bytes",
        "command": shlex.join(command),
        "commit": commit,
        "dirty": dirty,
        "made_at": provenance.now(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "source": given.source,
        "size": size.__dict__,
        "weights": weights,
        "resident_before": found["before"],
        "measured_above_weights": {
            step: peak - found["before"] - weights for step, peak in found["peaks"].items()
        },
        "planned_above_weights": planned,
        "qwen3_vl_8b": large_plan(QWEN3_VL_8B),
        "qwen3_vl_8b_official": large_plan(replace(QWEN3_VL_8B, released=True)),
    }
    write_json(given.out, report)


if __name__ == "__main__":
    main()
