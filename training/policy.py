"""A model on packed rows: what policy, reference and teacher passes share.

`Policy.forward` is the only entry, so that FSDP2 gathers the root's weights (embeddings, head)
around everything that uses them.

Letters: T tokens of a row, t those of this process, N supervised tokens, n those of this process,
W text width, V vocabulary, P processes that share a row, F frames (temporal patches), v vision
tokens of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from internvideo3.model.attention import RowAttention
from internvideo3.model.prerope import PreropeAttention
from internvideo3.model.recompute import recompute as recompute_activations
from internvideo3.model.vision import Encoded
from internvideo3.training.attention import GQA_NAME, Backend, PackedAttention, Sharing
from internvideo3.training.objectives.linear_cross_entropy import IGNORE, chunk_tokens
from internvideo3.training.packing import Pack

Objective = Callable[[Tensor, Tensor], Tensor]
"""(hidden states `[N,W]` that predict the supervised tokens, output embeddings `[V,W]`) → loss."""

BARRED_LOGIT = -1e9
"""Finite, so that probability times log-probability of a barred id is 0 and not NaN."""


class Policy(nn.Module):
    """A Qwen3-VL, GQA or M²LA, on packed rows."""

    def __init__(
        self,
        model: Any,
        *,
        train_vision: bool = False,
        recompute: bool = False,
        backend: Backend = "segments",
        sharing: Sharing | None = None,
    ) -> None:
        """Prepare a model for packed rows.

        Args:
            model: A Qwen3-VL for conditional generation, GQA or M²LA.
            train_vision: Whether the vision tower learns.
            recompute: Recompute each layer's activations in the backward pass.
            backend: Of the attention; all have the same numbers.
            sharing: The processes among which rows are divided.

        Raises:
            ValueError: The attention of the model cannot run on packed rows.
        """
        super().__init__()
        self.model = model
        self.train_vision = train_vision
        self.backend = backend
        self.sharing = sharing
        _check_attention(model)
        model.model.visual.requires_grad_(train_vision)
        if recompute:
            recompute_activations(model)

    def beside(self, model: Any) -> Policy:
        """Another model, not trained, on the same rows in the same way."""
        other = Policy(model.eval(), backend=self.backend, sharing=self.sharing)
        return other.requires_grad_(False)

    def copied(self, dtype: torch.dtype | None = None) -> Policy:
        """A copy as it is now, not trained.

        Args:
            dtype: Of its weights, None for the same. What is no weight, such as rotary frequencies,
                stays as it is: in bf16 they would be other positions.
        """
        other = self.beside(deepcopy(self.model))
        for weight in other.parameters() if dtype is not None else ():
            weight.data = weight.data.to(dtype)
        return other

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def forward(self, pack: Pack, objective: Objective) -> Tensor:
        """Run a row and apply an objective to what predicts its supervised tokens."""
        inner, config = self.model.model, self.model.config
        pack = pack if self.sharing is None else pack.padded(self.sharing.count)
        mine = self._part(len(pack.ids_T))
        visual_T = (pack.ids_T == config.video_token_id) | (pack.ids_T == config.image_token_id)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_vision):
            seen = self._see(pack, visual_T)
        visual_1t = visual_T[None, mine]
        embeds_1tW = inner.language_model.embed_tokens(pack.ids_T[None, mine])
        tokens_vW = seen.tokens_VX.to(embeds_1tW.dtype)
        hidden_1tW = inner.language_model(
            inputs_embeds=embeds_1tW.masked_scatter(visual_1t[..., None], tokens_vW),
            # Of no use, but of a form that transformers passes on: it would make T² numbers.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds_1tW.device),
            position_ids=pack.positions_3T[:, None, mine],
            visual_pos_masks=visual_1t,
            deepstack_visual_embeds=list(seen.deepstack),
            use_cache=False,
            packed=PackedAttention(pack.document_T, pack.branch_T, self.backend, self.sharing),
        ).last_hidden_state
        told_T = pack.labels_T != IGNORE
        hidden_NW = self._whole(hidden_1tW[0, told_T[mine]], told_T)
        return objective(hidden_NW, self.model.lm_head.weight)

    def _part(self, tokens: int) -> slice:
        """This process's tokens of a row."""
        if self.sharing is None:
            return slice(0, tokens)
        each = tokens // self.sharing.count
        return slice(self.sharing.rank * each, (self.sharing.rank + 1) * each)

    def _whole(self, hidden_nW: Tensor, told_T: Tensor) -> Tensor:
        """Hidden states of all supervised tokens of the row, from each process's own."""
        if self.sharing is None:
            return hidden_nW
        counts = told_T.view(self.sharing.count, -1).sum(1).tolist()
        longest = max(counts)
        padded = functional.pad(hidden_nW, (0, 0, 0, longest - len(hidden_nW)))
        parts_PnW = self.sharing.gathered(padded, 0).split(longest)
        return torch.cat([part[:n] for part, n in zip(parts_PnW, counts, strict=True)])

    def _see(self, pack: Pack, visual_T: Tensor) -> Encoded:
        """What fills this process's vision tokens, in their order.

        The tower attends within a frame only: processes that share a row each run it on some
        neighbouring frames, and then have the vision tokens dealt to where they lie in the row.
        """
        grids_N3 = pack.grid_thw.cpu()
        if self.sharing is None or not len(grids_N3):
            return self._run_tower(pack.pixels, grids_N3)
        frames_F3, owner_F = frame_owners(grids_N3, self.sharing.count)
        patches_F = frames_F3.prod(1)
        held_P = torch.zeros(self.sharing.count, dtype=torch.long)
        held_P.index_add_(0, owner_F, patches_F)
        first = int(held_P[: self.sharing.rank].sum())
        pixels = pack.pixels[first : first + int(held_P[self.sharing.rank])]
        seen = self._run_tower(pixels, frames_F3[owner_F == self.sharing.rank])
        levels = (seen.tokens_VX, *seen.deepstack)
        merged = self.model.config.vision_config.spatial_merge_size**2
        wanted_P = visual_T.view(self.sharing.count, -1).sum(1)
        # One exchange for the tokens and what DeepStack adds to them.
        mine = self.sharing.dealt(
            torch.cat(levels, 1), (held_P // merged).tolist(), wanted_P.tolist()
        )
        tokens_vW, *deepstack = mine.split([level.shape[1] for level in levels], 1)
        return Encoded(tokens_vW, tuple(deepstack))

    def _run_tower(self, pixels: Tensor, grids_N3: Tensor) -> Encoded:
        """The vision tower on some frames, in one call whatever they are.

        Without frames it sees one grey picture, of which nothing is used: processes that share the
        tower's weights gather them together, so each must call it once for a row.
        """
        visual = self.model.model.visual
        if not len(grids_N3):
            side = visual.spatial_merge_size
            grey = torch.zeros(side * side, visual.patch_embed.proj.weight[0].numel())
            return self._run_tower(grey, torch.tensor([[1, side, side]])).slice(0, 0)
        grids = torch.stack(_joined(grids_N3)).to(visual.device)
        out = visual(pixels.to(visual.device, visual.dtype), grid_thw=grids, return_dict=True)
        return Encoded(out.pooler_output, tuple(out.deepstack_features))


def frame_owners(grids_N3: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Frames of a row, and which of so many processes sees each.

    A frame belongs to the process in whose equal part of the row's patches its middle lies, so
    that no process has more than one frame beyond its part; one may have none.

    Args:
        grids_N3: Patches in time, height and width of each image or video.
        count: Processes that share the row.

    Returns:
        Grids of the single frames, `[F,3]`, and their owners, `[F]`, which never fall.
    """
    frames_F3 = grids_N3.repeat_interleave(grids_N3[:, 0], 0)
    frames_F3[:, 0] = 1
    patches_F = frames_F3.prod(1)
    # Twice the number of patches before each frame's middle: whole numbers do not round.
    middle_F = 2 * patches_F.cumsum(0) - patches_F
    return frames_F3, middle_F * count // (2 * patches_F.sum())


def token_logps(
    hidden_NW: Tensor,
    head_VW: Tensor,
    ids_N: Tensor,
    barred: Sequence[int],
    chunk: int | None = None,
) -> Tensor:
    """Log-probabilities `[N]` of given ids, a chunk of logits at a time.

    Args:
        hidden_NW: Hidden states that predict the ids.
        head_VW: Output embeddings.
        ids_N: The ids.
        barred: Ids that sampling never takes; their probability is 0 here too.
        chunk: Tokens projected at a time; None: `chunk_tokens` of the vocabulary.
    """
    size = chunk or chunk_tokens(len(head_VW))

    def some(hidden_CW: Tensor, ids_C: Tensor) -> Tensor:
        logits_CV = logits_of(hidden_CW, head_VW, barred)
        picked_C: Tensor = logits_CV.gather(-1, ids_C[:, None])[:, 0] - logits_CV.logsumexp(-1)
        return picked_C

    pieces = zip(hidden_NW.split(size), ids_N.split(size), strict=True)
    return torch.cat([checkpoint(some, h, i, use_reentrant=False) for h, i in pieces])


def logits_of(hidden_CW: Tensor, head_VW: Tensor, barred: Sequence[int]) -> Tensor:
    """Logits, float32, under which the barred ids have no probability.

    The product is in the precision of its factors also where others are in bf16, whose rounding
    would move a logit of 10 by 0.02: more than policies differ by from one update to the next.
    """
    with torch.autocast(hidden_CW.device.type, enabled=False):
        return barred_logits(functional.linear(hidden_CW, head_VW).float(), barred)


def barred_logits(logits_NV: Tensor, barred: Sequence[int]) -> Tensor:
    """Logits under which the barred ids have no probability."""
    where = torch.tensor(list(barred), dtype=torch.long, device=logits_NV.device)
    return logits_NV.index_fill(-1, where, BARRED_LOGIT)


def vision_ids(model: Any, processor: Any) -> tuple[int, ...]:
    """Ids that only a prompt may hold.

    A policy that samples one would be asked for features that do not exist at its next forward.
    """
    config, tokenizer = model.config, processor.tokenizer
    known = tokenizer.get_vocab()
    named = {
        config.image_token_id, config.video_token_id,
        config.vision_start_token_id, config.vision_end_token_id,
    }  # fmt: skip
    return tuple(sorted(named | {known[t] for t in ("<|vision_pad|>",) if t in known}))


def _check_attention(model: Any) -> None:
    """Let transformers' own attention find the packed one; M²LA finds it by itself."""
    text = model.model.language_model
    first = text.layers[0].self_attn
    if isinstance(first, PreropeAttention):
        raise ValueError(
            "the row form `prerope` does not train: its rows hold no rotary key. Convert with the "
            "row form `latent` or `released`."
        )
    if not isinstance(first, RowAttention):
        text.config._attn_implementation = GQA_NAME


def _joined(grids_N3: Tensor) -> list[Tensor]:
    """Neighbouring grids of one frame size as one long video.

    The tower attends within a temporal patch only, so this changes nothing but the number of grids
    whose positions it computes one by one.
    """
    joined: list[Tensor] = []
    for grid_3 in grids_N3:
        if joined and torch.equal(joined[-1][1:], grid_3[1:]):
            joined[-1] = torch.cat([joined[-1][:1] + grid_3[:1], grid_3[1:]])
        else:
            joined.append(grid_3)
    return joined
