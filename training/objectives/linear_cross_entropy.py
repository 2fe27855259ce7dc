"""Cross-entropy of a vocabulary projection without ever holding all logits.

At 256K tokens and 151,936 entries the logits alone would take 80 GB in bf16. Here one chunk of
tokens at a time is projected, and its gradients are taken at once, in the forward pass: the memory
is one chunk of logits beside the gradients, and the arithmetic is that of the plain way.

Letters: N tokens, W hidden width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100
LOGIT_BYTES = 32 << 20
"""Float32 logits of one chunk; a few temporaries of this size exist at a time."""
FEWEST_TOKENS = 256
"""Of a chunk: with fewer, a GPU would read the head's weights for longer than it multiplies."""
MOST_TOKENS = 1024
"""Of a chunk, as in the released SFT (OpenGVLab/InternVideo@3965eef)."""


def chunk_tokens(vocabulary: int) -> int:
    """Tokens projected at a time, wherever logits of a whole vocabulary are made."""
    return min(MOST_TOKENS, max(FEWEST_TOKENS, LOGIT_BYTES // (4 * vocabulary)))


def linear_cross_entropy(
    hidden_NW: Tensor, head_VW: Tensor, labels_N: Tensor, weight_N: Tensor, chunk: int | None = None
) -> Tensor:
    """Weighted sum over tokens of the cross-entropy of `hidden @ head.T`.

    Differentiable once, in `hidden_NW` and `head_VW`.

    Args:
        hidden_NW: Last hidden states.
        head_VW: Output embeddings.
        labels_N: Next token of each position, `IGNORE` where there is none.
        weight_N: Weight of each token's loss.
        chunk: Tokens projected at a time; None: `chunk_tokens` of the vocabulary.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: If shapes do not belong together.
    """
    if not len(hidden_NW) == len(labels_N) == len(weight_N):
        raise ValueError(
            f"hidden, labels and weight differ in length: {len(hidden_NW)}, {len(labels_N)}, "
            f"{len(weight_N)}"
        )
    told_N = labels_N != IGNORE
    return told_cross_entropy(hidden_NW[told_N], head_VW, labels_N[told_N], weight_N[told_N], chunk)


def told_cross_entropy(
    hidden_NW: Tensor, head_VW: Tensor, labels_N: Tensor, weight_N: Tensor, chunk: int | None = None
) -> Tensor:
    """As `linear_cross_entropy`, where every token has a label."""
    size = chunk or chunk_tokens(len(head_VW))
    total: Tensor = _ChunkedCrossEntropy.apply(hidden_NW, head_VW, labels_N, weight_N, size)
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Takes both gradients while a chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NW: Tensor,
        head_VW: Tensor,
        labels_N: Tensor,
        weight_N: Tensor,
        chunk: int,
    ) -> Tensor:
        wanted, head_wanted = ctx.needs_input_grad[:2]
        total = hidden_NW.new_zeros((), dtype=torch.float32)
        grad_NW = torch.empty_like(hidden_NW) if wanted else None
        grad_VW = torch.zeros_like(head_VW, dtype=torch.float32) if head_wanted else None
        for start in range(0, len(hidden_NW), chunk):
            part = slice(start, start + chunk)
            x_CW, labels_C, weight_C = hidden_NW[part], labels_N[part], weight_N[part].float()
            logits_CV = functional.linear(x_CW, head_VW).float()
            scale_C = logits_CV.logsumexp(-1)
            picked_C = logits_CV.gather(-1, labels_C[:, None])[:, 0]
            total += ((scale_C - picked_C) * weight_C).sum()
            # d loss / d logits = weight (softmax - one-hot), written over the logits themselves.
            delta_CV = logits_CV.sub_(scale_C[:, None]).exp_().mul_(weight_C[:, None])
            delta_CV.scatter_add_(-1, labels_C[:, None], -weight_C[:, None])
            delta_CV = delta_CV.to(head_VW.dtype)
            if grad_NW is not None:
                grad_NW[part] = delta_CV @ head_VW
            if grad_VW is not None:
                grad_VW.addmm_(delta_CV.T.to(grad_VW.dtype), x_CW.to(grad_VW.dtype))
        ctx.save_for_backward(grad_NW, None if grad_VW is None else grad_VW.to(head_VW.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_NW, grad_VW = ctx.saved_tensors
        return (
            None if grad_NW is None else grad_NW * upstream.to(grad_NW.dtype),
            None if grad_VW is None else grad_VW * upstream.to(grad_VW.dtype),
            None,
            None,
            None,
        )
