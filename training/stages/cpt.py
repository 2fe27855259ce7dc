"""Continued pretraining (sections 3.3.1 and 4.1): text, pictures and videos in one mixture.

It recovers after conversion what the model could do before. Shares are by samples, as the paper
gives them; the tokens that each kind came to are noted beside. Losses on held-out documents of each
kind are measured before and after (`probe.py`).
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol, get_args

from internvideo3.training.documents import Document
from internvideo3.training.loop import Stage, Totals, Work, own_indices, together
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Cpt, Modality
from internvideo3.training.stages.sft import supervised_works


class Mixed(Protocol):
    """Documents of several kinds, by index."""

    def taught(self, index: int) -> Document:
        """The document."""


class CptStage(Stage):
    """Cross-entropy on texts and captions."""

    def __init__(self, options: Cpt, captions: Mixed, group: Processes) -> None:
        self.options = options
        self.captions = captions
        self.group = group
        self.bfloat16 = options.bfloat16

    def works(self, step: int, policy: Policy) -> tuple[list[Work], Totals]:
        """The documents of the step, whatever their kind, in rows."""
        indices = own_indices(self.options, step, self.group)
        taught = together(self.group, lambda: [self.captions.taught(i) for i in indices])
        samples, tokens = Counter[Modality](), Counter[Modality]()
        for document in taught:
            samples[document.kind] += 1
            tokens[document.kind] += len(document)
        works = supervised_works(taught, self.options, policy, self.group)
        noted: Totals = {}
        for kind in get_args(Modality):
            noted |= {
                f"{kind}_samples": (samples[kind], 0.0), f"{kind}_tokens": (tokens[kind], 0.0),
            }  # fmt: skip
        return works, noted
