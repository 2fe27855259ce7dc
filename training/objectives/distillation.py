"""On-policy distillation (section 3.3.4, eq. 8): the teacher judges what the student wrote.

Eq. 8 is the reverse KL KL(student ‖ teacher), estimated on the student's own samples. Read as a
loss and differentiated with the samples held fixed, its gradient has mean zero and the student
drifts away (a test shows it); the three forms here have the divergence's own gradient:

* `full_kl`: the sum over the vocabulary at each visited position. Exact, least noise.
* `top_k_kl`: the same over the student's k likeliest tokens and one bucket for the rest, for a
  teacher that can be asked for the log-probabilities of k given ids.
* `sampled_kl`: the score-function form, with a detached advantage; only the log-probabilities of
  the sampled ids cross the wire, which is what a teacher behind a server can give.

Letters: N response tokens, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def full_kl(student_NV: Tensor, teacher_NV: Tensor, weight_N: Tensor) -> Tensor:
    """Weighted sum over tokens of KL(student ‖ teacher), from logits.

    Args:
        student_NV: The student's logits; gradients flow through them.
        teacher_NV: The teacher's logits at the same positions, with the same token ids.
        weight_N: Weight of each token.

    Raises:
        ValueError: If the vocabularies differ.
    """
    _check_vocabularies(student_NV, teacher_NV)
    student = functional.log_softmax(student_NV.float(), -1)
    teacher = functional.log_softmax(teacher_NV.float(), -1).detach()
    total: Tensor = ((student.exp() * (student - teacher)).sum(-1) * weight_N).sum()
    return total


def top_k_kl(student_NV: Tensor, teacher_NV: Tensor, weight_N: Tensor, k: int) -> Tensor:
    """As `full_kl`, over the student's `k` likeliest tokens and one bucket for all others.

    Merging outcomes can only lower a divergence: this is a lower bound of `full_kl`.

    Raises:
        ValueError: If the vocabularies differ, or k is not in 1 … V-1.
    """
    _check_vocabularies(student_NV, teacher_NV)
    if not 0 < k < student_NV.shape[-1]:
        raise ValueError(f"k must be between 1 and {student_NV.shape[-1] - 1}, got {k}")
    student = functional.log_softmax(student_NV.float(), -1)
    teacher = functional.log_softmax(teacher_NV.float(), -1).detach()
    top_NK = student.topk(k, -1).indices
    kept, taught = (_with_rest(logp, top_NK) for logp in (student, teacher))
    total: Tensor = ((kept.exp() * (kept - taught)).sum(-1) * weight_N).sum()
    return total


def sampled_kl(logp_N: Tensor, teacher_logp_N: Tensor, weight_N: Tensor) -> Tensor:
    """A surrogate whose gradient is, on average over samples, that of the reverse KL.

    Its value is not the divergence; `(logp - teacher_logp)`, averaged, estimates that.

    Args:
        logp_N: The student's log-probabilities of its sampled ids; gradients flow through them.
        teacher_logp_N: The teacher's of the same ids.
        weight_N: Weight of each token.
    """
    advantage_N = (teacher_logp_N - logp_N).detach()
    return -(advantage_N * logp_N * weight_N).sum()


def _with_rest(logp_NV: Tensor, top_NK: Tensor) -> Tensor:
    """Log-probabilities of the chosen tokens and, last, of all others together."""
    rest_NV = logp_NV.scatter(-1, top_NK, -torch.inf)
    return torch.cat([logp_NV.gather(-1, top_NK), rest_NV.logsumexp(-1, keepdim=True)], -1)


def _check_vocabularies(student_NV: Tensor, teacher_NV: Tensor) -> None:
    if student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"student and teacher must score the same tokens of the same vocabulary, got logits "
            f"{tuple(student_NV.shape)} and {tuple(teacher_NV.shape)}"
        )
