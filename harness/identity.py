"""What decides a model's answers, as short digests: for caches that must not serve another's.

The files a model was loaded from may have changed since, and a model need not have any; so its
weights are read in memory. Equal weights are equal on every device.
"""

import hashlib
from typing import Any

import torch

from internvideo3.harness import provenance

_ANSWERING = (
    *("harness/agent", "harness/agentic.py", "harness/direct.py", "harness/lmms.py"),
    *("kernels", "model", *provenance.DECODING),
)
"""Our code between a question and its answer."""
_DIGITS = 16


def weights_in_memory(model: Any) -> str:
    """Digest of a model's class, configuration and weights; reads all of them.

    Args:
        model: a model of transformers.
    """
    found = hashlib.sha256(type(model).__name__.encode())
    for settings in (model.config, getattr(model, "generation_config", None)):
        found.update((settings.to_json_string() if settings is not None else "").encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()[:_DIGITS]


def processor_in_memory(processor: Any) -> str:
    """Digest of what makes ids and pixels of a prompt: tokenizer, chat template, picture sizes."""
    parts = (
        processor.to_json_string(),
        str(processor.chat_template),
        processor.tokenizer.backend_tokenizer.to_str(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_DIGITS]


def code() -> str:
    """Digest of our code that answers, and of the versions of what it computes with."""
    versions = sorted(provenance.packages().items())
    whole = f"{provenance.code_digest(_ANSWERING)} {versions}"
    return hashlib.sha256(whole.encode()).hexdigest()[:_DIGITS]
