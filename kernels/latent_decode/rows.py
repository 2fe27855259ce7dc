"""Cached latent rows as a decode kernel reads them: contiguous or paged, bfloat16 or fp8.

Axes: B sequences, b = B or 1 (a run that all sequences share), T tokens, N pages of a sequence,
P pages of a pool, W row width, R rank, S rotary columns.
"""

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
WIDEST_TAIL = 128
"""Columns of a kernel's second tile: a rotary key of all frequencies of a head."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A run of cached rows ``[c | k_rope]`` of one rank; a sequence attends to all its runs."""

    rows_bTW: torch.Tensor
    """Rows; with ``pages_BN`` a pool ``[P, page, W]``; with ``scale_bT`` the latent alone, fp8."""
    lengths_B: torch.Tensor
    """Valid tokens of each sequence, int32 on the device."""
    rank: int
    """Latent columns. A rank below the query's is nested in it: its columns are the first ones."""
    rope_bTS: torch.Tensor | None = None
    """The rotary keys of fp8 rows, in the query's dtype (a pool, if paged)."""
    scale_bT: torch.Tensor | None = None
    """What the latent of fp8 rows was divided by, one float32 a row (a pool, if paged)."""
    pages_BN: torch.Tensor | None = None
    """Page of the pool that holds tokens ``[i * page, (i + 1) * page)``, int32."""

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have in this run."""
        tokens = self.rows_bTW.shape[1]
        return tokens if self.pages_BN is None else tokens * self.pages_BN.shape[1]

    @property
    def width(self) -> int:
        """Columns of a whole row."""
        tail = 0 if self.rope_bTS is None else self.rope_bTS.shape[-1]
        return self.rows_bTW.shape[-1] + tail


def quantize(rows_bTW: torch.Tensor, lengths_B: torch.Tensor, rank: int) -> Rows:
    """Rows with the latent in fp8 (e4m3), scaled row by row to its largest value.

    The rotary key keeps its dtype: its rotation is exact to the position, and it is an eighth of
    the row.
    """
    latent_bTR = rows_bTW[..., :rank].float()
    # A row of zeros (spare room) keeps scale 1, not 0 / 0.
    top_bT = latent_bTR.abs().amax(-1)
    scale_bT = torch.where(top_bT > 0, top_bT / FP8_LARGEST, 1.0)
    return Rows(
        rows_bTW=(latent_bTR / scale_bT[..., None]).to(FP8),
        lengths_B=lengths_B,
        rank=rank,
        rope_bTS=rows_bTW[..., rank:].contiguous(),
        scale_bT=scale_bT,
    )
