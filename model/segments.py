"""Softmax attention over the segments of a cache, merged by log-sum-exp.

Axes: B batch, b batch of a segment (B, or 1 when all rows of the batch share it), K stored heads,
G query heads per stored head, H = K G, T new tokens (queries), M queries of one stored head,
N cached tokens, W width of a key, V width of a value, S = b K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from internvideo3.kernels.choice import HALVES
from internvideo3.kernels.latent_prefill.dispatch import latent_prefill
from internvideo3.model.cache import Part

MAX_SCORES = 1 << 26
"""Scores held at once where torch computes them; longer inputs are taken in runs of queries."""

FUSED_WIDTH = 256
"""Widest keys that torch's fused kernels take; wider ones would make it hold all scores at once."""

BLOCK = 16384
"""Cached tokens whose keys and values are rebuilt and attended to at once, so that a prefill's
scratch does not grow with the context."""

Rebuild = Callable[[Part], tuple[Tensor, Tensor]]
"""What is cached of some tokens to keys [b, K, N, W'] and values [b, K, N, V]."""


def attend_blocks(
    q_BKGTW: Tensor, parts: list[Part], scale: float, rebuild: Rebuild | None = None
) -> Tensor:
    """Softmax attention over several segments, block by block, merged by log-sum-exp.

    Without gradients only; parts may be causal, or masked. Equal to `attend` on what `rebuild`
    makes of the parts, with keys and values of `BLOCK` tokens at a time. Of several blocks the
    sum is kept in float32: rounded after each of 48 blocks (768K tokens), bfloat16 would be four
    times as far from the truth as one that is rounded once.

    Returns:
        [B, K, G, T, V].
    """
    T = q_BKGTW.shape[3]
    found: tuple[Tensor, Tensor] | None = None
    for part in parts:
        cached = part.cached
        # A causal part: what was cached before is seen by all queries, the own tokens by some.
        past = cached - T if part.causal else cached
        cuts = [(start, min(start + BLOCK, past), False) for start in range(0, past, BLOCK)]
        if part.causal:
            cuts.append((past, cached, True))
        for start, stop, causal in cuts:
            stretch = part.cut(start, stop)
            tensors = stretch.pair() if rebuild is None else rebuild(stretch)
            block = Part(tensors, stretch.mask_BxTN, causal, part.latent)
            attend_to = _attend_block if block.mask_BxTN is None else _attend_in_runs
            new = attend_to(q_BKGTW, block, scale)
            found = new if found is None else _merge_into(found, new)
    assert found is not None, "a step always has its own tokens to attend to"
    return found[0].to(q_BKGTW.dtype)


def attend(q_BKGTW: Tensor, parts: list[Part], scale: float) -> Tensor:
    """Softmax attention over several segments, merged by log-sum-exp.

    Each part holds keys [b, K, N, W] and values [b, K, N, V]. With b = 1 and B > 1 the batch is
    folded into the queries, so that the shared segment is read once and never expanded. Rows of a
    smaller rank (`Part.latent`) meet the query's first columns and its rotary ones.

    Returns:
        [B, K, G, T, V].
    """
    B, K, G, T, W = q_BKGTW.shape
    one = parts[0] if len(parts) == 1 and parts[0].latent is None else None
    whole = one is not None and one.copies == B and W <= FUSED_WIDTH and not one.compressed
    # On a CPU the fused kernels take masks too, and are faster than scores that are held.
    masked = one is not None and one.mask_BxTN is not None and q_BKGTW.device.type == "cpu"
    if goes_by_blocks(parts, T) and W <= FUSED_WIDTH and not (whole and masked):
        return attend_blocks(q_BKGTW, parts, scale)
    if one is not None and whole:
        return _attend_whole(q_BKGTW, one, scale)
    if any(part.compressed for part in parts):
        return _attend_stretches(q_BKGTW, parts, scale)
    cached = sum(part.cached for part in parts)
    run = max(1, MAX_SCORES // (B * K * G * cached))
    if run >= T:
        return _merge([_attend_part(q_BKGTW, part, scale) for part in parts])
    outs: list[Tensor] = []
    for start in range(0, T, run):
        stop = min(start + run, T)
        cut = [_query_rows(part, start, stop, T) for part in parts]
        q_run = q_BKGTW[..., start:stop, :]
        outs.append(_merge([_attend_part(q_run, part, scale) for part in cut]))
    return torch.cat(outs, dim=3)


def goes_by_blocks(parts: list[Part], new_tokens: int) -> bool:
    """Whether attention is taken block by block: several queries, no gradients.

    A single short part under a mask is not: torch's fused kernels take it whole.
    """
    masked = any(part.mask_BxTN is not None for part in parts)
    short = len(parts) == 1 and parts[0].cached <= BLOCK
    return new_tokens > 1 and not torch.is_grad_enabled() and not (masked and short)


def _attend_stretches(q_BKGTW: Tensor, parts: list[Part], scale: float) -> Tensor:
    """`attend` over rows some of which are compressed.

    Each is decoded once, a block at a time, and forgotten.
    """
    found: tuple[Tensor, Tensor] | None = None
    for part in parts:
        starts = range(0, part.cached, BLOCK) if part.compressed else ()
        cuts = [part.cut(start, min(start + BLOCK, part.cached)) for start in starts] or [part]
        for cut in cuts:
            decoded = replace(cut, tensors=cut.pair(), compressed=False)
            new = _attend_in_runs(q_BKGTW, decoded, scale)
            found = new if found is None else _merge_into(found, new)
    assert found is not None, "a step always has its own tokens to attend to"
    return found[0].to(q_BKGTW.dtype)


def _attend_in_runs(q_BKGTW: Tensor, block: Part, scale: float) -> tuple[Tensor, Tensor]:
    """`_attend_part` in runs of queries, so that it holds `MAX_SCORES` scores at most."""
    T = q_BKGTW.shape[3]
    run = max(1, MAX_SCORES // (q_BKGTW[..., 0, 0].numel() * block.cached))
    found = [
        _attend_part(
            q_BKGTW[..., start : start + run, :], _query_rows(block, start, start + run, T), scale
        )
        for start in range(0, T, run)
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, dim=3), torch.cat(lses, dim=3)


def _attend_whole(q_BKGTW: Tensor, part: Part, scale: float) -> Tensor:
    """Attention over a single segment by torch's fused kernels; [B, K, G, T, V]."""
    K, T = q_BKGTW.shape[1], q_BKGTW.shape[3]
    if T == 1 and part.mask_BxTN is None:
        # One query sees everything: a head's group is then a sequence of queries to its keys.
        k_BKNW, v_BKNV = part.pair()
        q_BKGW = q_BKGTW.squeeze(3)
        out_BKGV = functional.scaled_dot_product_attention(q_BKGW, k_BKNW, v_BKNV, scale=scale)
        return out_BKGV.unsqueeze(3)
    out: Tensor = _attend_causal(q_BKGTW.flatten(1, 2), part, scale).unflatten(1, (K, -1))
    return out


def _query_rows(part: Part, start: int, stop: int, new_tokens: int) -> Part:
    """The part as queries `start` to `stop` of `new_tokens` see it."""
    mask = part.mask_BxTN
    if part.causal:
        mask = _causal_mask(new_tokens, part.cached, part.tensors[0].device)
    if mask is None:
        return part
    # A mask of one row is seen by all queries.
    rows = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
    return replace(part, mask_BxTN=rows, causal=False)


def _merge(found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Merges outputs [B, K, G, T, V] of several segments by their log-sum-exp [B, K, G, T]."""
    outs = [out for out, _ in found]
    if len(outs) == 1:
        return outs[0]
    lse_PBKGT = torch.stack([lse for _, lse in found])
    # A padding query may see nothing at all; the clamp gives it zeros, not NaN.
    total_BKGT = lse_PBKGT.logsumexp(0).clamp_min(torch.finfo(lse_PBKGT.dtype).min)
    weight_PBKGT1 = (lse_PBKGT - total_BKGT).exp()[..., None]
    return (weight_PBKGT1 * torch.stack(outs)).sum(0).to(outs[0].dtype)


def _attend_block(q_BKGTW: Tensor, block: Part, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over one block: output [B, K, G, T, V] and log-sum-exp [B, K, G, T].

    Either every query sees every key, and then those of a key/value head are one long sequence of
    queries (of all rows of the batch, if they share the block); or query t sees keys up to t.
    """
    if block.latent is not None:
        return _attend_nested(_attend_block, q_BKGTW, block, scale)
    k_bNKW, v_bNKV = (t.transpose(1, 2) for t in block.pair())
    B, K, G, T, _ = q_BKGTW.shape
    if block.causal:
        q_BTHW = q_BKGTW.flatten(1, 2).transpose(1, 2)
        out_BTHV, lse_BHT = latent_prefill(q_BTHW, k_bNKW, v_bNKV, scale=scale, offset=0)
        return out_BTHV.transpose(1, 2).unflatten(1, (K, G)), lse_BHT.unflatten(1, (K, G))
    b = k_bNKW.shape[0]
    fold = B // b
    q_bKMW = q_BKGTW.transpose(0, 1)[None] if fold > 1 else q_BKGTW
    q_bKMW = q_bKMW.reshape(b, K, fold * G * T, -1)
    out_bMKV, lse_bKM = latent_prefill(
        q_bKMW.transpose(1, 2), k_bNKW, v_bNKV, scale=scale, offset=None
    )
    out = out_bMKV.transpose(1, 2).unflatten(2, (fold, G, T))
    lse = lse_bKM.unflatten(2, (fold, G, T))
    if fold > 1:
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    return out[:, :, 0], lse[:, :, 0]


def _attend_nested(
    whole: Callable[[Tensor, Part, float], tuple[Tensor, Tensor]],
    q_BKGTW: Tensor,
    part: Part,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`whole` on rows whose latents are the first `part.latent` coordinates of the query's.

    As if the rows had zeros in the coordinates that they lack; of the output only the latent
    columns count, and those are as wide as the query's.
    """
    assert part.latent is not None
    kept, width = part.latent, q_BKGTW.shape[-1]
    rope = part.width - kept
    q_cut = torch.cat([q_BKGTW[..., :kept], q_BKGTW[..., width - rope :]], dim=-1)
    out, lse = whole(q_cut, replace(part, latent=None), scale)
    return functional.pad(out[..., :kept], (0, width - kept)), lse


def _merge_into(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merges two outputs [B, K, G, T, V] by their log-sum-exp [B, K, G, T]; a's may be overwritten.

    Returns:
        The merged output, in float32 at least, and its log-sum-exp.
    """
    lse = torch.logaddexp(a[1], b[1])
    safe = lse.clamp_min(torch.finfo(lse.dtype).min)
    of_a, of_b = ((x[1] - safe).exp()[..., None] for x in (a, b))
    kept = a[0].to(torch.promote_types(a[0].dtype, torch.float32))
    return kept.mul_(of_a).addcmul_(b[0], of_b), lse


def _attend_part(q_BKGTW: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over one segment: normalised output [B,K,G,T,V] and log-sum-exp [B,K,G,T]."""
    if part.latent is not None:
        return _attend_nested(_attend_part, q_BKGTW, part, scale)
    k_bKNW, v_bKNV = part.pair()
    B, K, G, T, W = q_BKGTW.shape
    b, N, V = k_bKNW.shape[0], k_bKNW.shape[2], v_bKNV.shape[3]
    fold = B // b
    q_bKMW = q_BKGTW.permute(1, 0, 2, 3, 4) if fold > 1 else q_BKGTW
    q_bKMW = q_bKMW.reshape(b, K, fold * G * T, W)
    mask = _causal_mask(T, N, q_bKMW.device) if part.causal else part.mask_BxTN
    if mask is None:
        out, lse = _attend_unmasked(q_bKMW, k_bKNW, v_bKNV, scale)
    else:
        # [B or 1, 1, T, N] -> [b, 1, fold or 1, 1, T, N]
        mask = mask[:, None, None] if fold == 1 else mask[None, None]
        scores = _scores(q_bKMW, k_bKNW, scale).view(b, K, fold, G, T, N)
        out, lse = _softmax(_masked(scores, mask).view(b, K, -1, N), v_bKNV)
    out, lse = out.view(b, K, fold, G, T, V), lse.view(b, K, fold, G, T)
    if fold > 1:
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    return out[:, :, 0], lse[:, :, 0]


def _attend_unmasked(
    q_bKMW: Tensor, k_bKNW: Tensor, v_bKNV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Every query sees every key: output [b, K, M, V] and log-sum-exp [b, K, M]."""
    if q_bKMW.device.type != "cpu" or torch.is_grad_enabled():
        return _softmax(_scores(q_bKMW, k_bKNW, scale), v_bKNV)
    # torch's CPU flash attention; only the operator itself hands out the log-sum-exp.
    width = v_bKNV.shape[3]
    v_bKNW = _widened(v_bKNV, k_bKNW.shape[3])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_bKMW, lse_bKM = flash(q_bKMW, k_bKNW, v_bKNW, scale=scale)
    return out_bKMW[..., :width], lse_bKM


def _scores(q_bKMW: Tensor, k_bKNW: Tensor, scale: float) -> Tensor:
    """Scaled scores [b, K, M, N], in float32 at least.

    In bfloat16, whose steps are 1/8 from 16 on, weights would be wrong by up to 6 %.
    """
    if q_bKMW.dtype not in HALVES:
        return torch.matmul(q_bKMW * scale, k_bKNW.mT)
    if q_bKMW.device.type == "cpu" or torch.is_grad_enabled():
        return torch.matmul(q_bKMW.float() * scale, k_bKNW.float().mT)
    # On a GPU the sums are float32 anyway; this form, which has no gradient, hands them out.
    k_SWN = k_bKNW.flatten(0, 1).mT
    scores_SMN = torch.bmm(q_bKMW.flatten(0, 1), k_SWN, out_dtype=torch.float32)
    scores_bKMN: Tensor = scores_SMN.mul_(scale).unflatten(0, q_bKMW.shape[:2])
    return scores_bKMN


def _softmax(scores_bKMN: Tensor, v_bKNV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted values [b, K, M, V] and log-sum-exp [b, K, M].

    A query that sees nothing gets zeros and -inf, and so weight 0 in a merge.
    """
    lowest = torch.finfo(scores_bKMN.dtype).min
    top_bKM1 = scores_bKMN.detach().amax(-1, keepdim=True).clamp_min(lowest)
    weights_bKMN = (scores_bKMN - top_bKM1).exp_()
    total_bKM1 = weights_bKMN.sum(-1, keepdim=True)
    lse_bKM = (total_bKM1.log() + top_bKM1)[..., 0]
    out_bKMV = torch.matmul(weights_bKMN.to(v_bKNV.dtype), v_bKNV)
    # By the total in float32: rounded, it would be wrong for all values of a query alike.
    scaled_bKMV = out_bKMV / total_bKM1.clamp_min(torch.finfo(lse_bKM.dtype).tiny)
    return scaled_bKMV.to(out_bKMV.dtype), lse_bKM


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.to(scores.dtype)


def _causal_mask(new_tokens: int, cached: int, device: torch.device) -> Tensor:
    """Boolean [1, 1, T, N]: query t sees tokens up to N - T + t."""
    queries = torch.arange(cached - new_tokens, cached, device=device)
    return (torch.arange(cached, device=device) <= queries[:, None])[None, None]


def _attend_causal(q_BHTW: Tensor, part: Part, scale: float) -> Tensor:
    """Attention of several queries over a single segment by torch's fused kernels; [B, H, T, V]."""
    k_BKNW, v_BKNV = part.pair()
    T, N, groups = q_BHTW.shape[2], k_BKNW.shape[2], q_BHTW.shape[1] // k_BKNW.shape[1]
    mask = part.mask_BxTN
    if part.causal and T != N:
        mask = _causal_mask(T, N, q_BHTW.device)
    width = v_BKNV.shape[3]
    if q_BHTW.device.type == "cpu":
        # torch has a flash kernel for CPU, but for keys and values of one width only.
        v_BKNV = _widened(v_BKNV, k_BKNW.shape[3])
    return functional.scaled_dot_product_attention(
        q_BHTW,
        _repeat_heads(k_BKNW, groups),
        _repeat_heads(v_BKNV, groups),
        attn_mask=mask,
        is_causal=part.causal and T == N,
        scale=scale,
    )[..., :width]


def _widened(x: Tensor, width: int) -> Tensor:
    """Zeros added to the last axis; no copy if there is nothing to add."""
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


def _repeat_heads(x_BKNW: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return x_BKNW
    if x_BKNW.shape[1] == 1:
        return x_BKNW.expand(-1, groups, -1, -1)
    return x_BKNW[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
