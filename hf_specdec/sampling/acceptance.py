"""The acceptance rules: which drafts stay, and the one token that the target adds.

Pure functions on tensors; nothing here knows about models, caches or text. `reference.py` does the same in plain loops,
and tests compare the two. Letters as in Leviathan et al. 2023: p is the target's distribution, q the
draft's, γ the draft length.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """The outcome of one verification.

    Attributes:
        tokens: `[rows, γ + 1]`. Row r commits `tokens[r, : accepted[r] + 1]`: its accepted drafts and the target's own
            token. Later entries are meaningless.
        accepted: `[rows]`, how many drafts each row keeps, 0..γ.
        valid: `[rows]` bool, False if the target's scores were not a distribution (NaN, +inf, or all -inf).
    """

    tokens: Tensor
    accepted: Tensor
    valid: Tensor


def accept_greedy(draft_tokens: Tensor, draft_lengths: Tensor, scores: Tensor) -> Verdict:
    """Keep drafts as long as they equal the target's argmax.

    Args:
        draft_tokens: `[rows, γ]` int64.
        draft_lengths: `[rows]`, how many drafts of each row count (rows may have fewer than γ).
        scores: `[rows, γ + 1, vocab]` float32, the target's processed scores at each position.
    """
    best, tokens = scores.max(dim=-1)  # [rows, γ + 1]
    accepted = _prefix_length(draft_tokens == tokens[:, :-1], draft_lengths)
    return Verdict(tokens, accepted, _valid(torch.isfinite(best), accepted))


def accept_sampled(draft_tokens: Tensor, draft_lengths: Tensor, q: Tensor | None, scores: Tensor) -> Verdict:
    """Speculative sampling (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2), for all rows at once.

    Keep draft x with probability min(1, p(x) / q(x)); after the first rejection draw from norm(max(p - q, 0)); after
    γ acceptances draw the bonus token from p. The committed tokens are distributed exactly as the target's samples.

    Args:
        draft_tokens: `[rows, γ]` int64.
        draft_lengths: `[rows]`, how many drafts of each row count.
        q: `[rows, γ, vocab]` float32, the distributions that the drafts were actually drawn from; `None` for
            deterministic drafts, whose q is one-hot.
        scores: `[rows, γ + 1, vocab]` float32, the target's processed scores; p is their softmax.
    """
    p = scores.softmax(dim=-1)
    gamma = draft_tokens.shape[1]
    rows = torch.arange(len(p), device=p.device)

    p_draft = p[:, :gamma].gather(-1, draft_tokens[..., None]).squeeze(-1)  # [rows, γ]
    q_draft = torch.ones_like(p_draft) if q is None else q.gather(-1, draft_tokens[..., None]).squeeze(-1)
    u = torch.rand_like(p_draft)
    accepted = _prefix_length(u * q_draft < p_draft, draft_lengths)  # u < p / q, without dividing by zero

    p_own = p[rows, accepted]  # [rows, vocab]
    q_own = torch.zeros_like(p_own)  # after the last draft nothing was rejected: the residual is p itself
    if gamma:
        rejected = (accepted < draft_lengths)[:, None]
        index = accepted.clamp(max=gamma - 1)
        if q is None:
            q_own.scatter_(-1, draft_tokens[rows, index][:, None], rejected.to(p.dtype))
        else:
            q_own = torch.where(rejected, q[rows, index], q_own)
    own = draw(residual(p_own, q_own).nan_to_num(nan=1.0))

    tokens = torch.cat([draft_tokens, own], dim=1).scatter(1, accepted[:, None], own)
    return Verdict(tokens, accepted, _valid(~p.sum(dim=-1).isnan(), accepted))


def accept_block(draft_tokens: Tensor, draft_lengths: Tensor, q: Tensor | None, scores: Tensor) -> Verdict:
    """Block verification (Sun et al. 2025, Algorithm 2), for all rows at once. It keeps no fewer drafts.

    Keep the longest prefix of i drafts for which u_i < h_i. With P_0 = 1 and P_i = min(1, P_{i-1} p(x_i) / q(x_i)), and
    Z_i the sum of max(P_i p - q, 0) at the position after draft i, h_i is Z_i / (Z_i + 1 - P_i), and P_i after the last
    draft. Then draw from norm(max(P_i p - q, 0)), or from p after the last draft.

    Args, and the distribution of the committed tokens: as for `accept_sampled`.
    """
    gamma = draft_tokens.shape[1]
    if gamma == 0 or q is None:  # with deterministic drafts both rules accept equally many
        return accept_sampled(draft_tokens, draft_lengths, q, scores)
    p = scores.softmax(dim=-1)
    rows = torch.arange(len(p), device=p.device)
    p_draft = p[:, :gamma].gather(-1, draft_tokens[..., None]).squeeze(-1)  # [rows, γ]
    q_draft = q.gather(-1, draft_tokens[..., None]).squeeze(-1)
    prefix = [torch.ones_like(p_draft[:, 0])]
    for i in range(gamma):
        prefix.append((prefix[-1] * p_draft[:, i] / q_draft[:, i]).clamp(max=1))
    kept = torch.stack(prefix, dim=1)  # [rows, γ + 1], P_0 .. P_γ

    over = (kept[:, :gamma, None] * p[:, :gamma] - q).clamp(min=0).sum(dim=-1)[:, 1:]  # [rows, γ - 1], Z_1 .. Z_{γ-1}
    # Where p = q both Z and 1 - P are 0, and so is the next u - h.
    more = torch.where(over > 0, over / (over + 1 - kept[:, 1:gamma]), (kept[:, 1:gamma] >= 1).to(over.dtype))
    index = torch.arange(1, gamma + 1, device=p.device)
    is_last = index == draft_lengths[:, None]
    h = torch.where(is_last, kept[:, 1:], torch.nn.functional.pad(more, (0, 1)))
    holds = (torch.rand_like(h) < h) & (index <= draft_lengths[:, None])
    accepted = (holds * index).amax(dim=1)

    p_own, scale = p[rows, accepted], kept[rows, accepted]
    rejected = (accepted < draft_lengths)[:, None]
    q_own = torch.where(rejected, q[rows, accepted.clamp(max=gamma - 1)], 0.0)
    own = draw(residual(torch.where(rejected, scale[:, None] * p_own, p_own), q_own).nan_to_num(nan=1.0))
    tokens = torch.cat([draft_tokens, own], dim=1).scatter(1, accepted[:, None], own)
    return Verdict(tokens, accepted, _valid(~p.sum(dim=-1).isnan(), accepted))


def draw(p: Tensor) -> Tensor:
    """`[rows, 1]`: a token drawn from each row's distribution `[rows, vocab]`, never one of probability 0.

    CPUs use inversion: `torch.multinomial` draws a random number for each token of the vocabulary, which takes ten
    times as long. (CUDA does not, because its sums over a row are not deterministic.)
    """
    if p.device.type != "cpu":
        return torch.multinomial(p, num_samples=1)
    up_to = p.cumsum(dim=-1, dtype=torch.float64)
    u = torch.rand(len(p), 1, dtype=torch.float64) * up_to[:, -1:]
    return torch.searchsorted(up_to, u, right=True)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(p - q, 0)) over the last axis; p itself if that is zero everywhere (p = q up to rounding)."""
    difference = (p - q).clamp(min=0)
    total = difference.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, difference / total, p)


def _prefix_length(keep: Tensor, lengths: Tensor) -> Tensor:
    """The number of leading True among the first `lengths[row]` entries of each row of `keep` `[rows, γ]`."""
    if keep.shape[1] == 0:
        return lengths.new_zeros(len(keep))
    within = torch.arange(keep.shape[1], device=keep.device) < lengths[:, None]
    return (keep & within).long().cumprod(dim=1).sum(dim=1)


def _valid(valid: Tensor, accepted: Tensor) -> Tensor:
    """Whether `valid` `[rows, γ + 1]` is True at every position that the row's outcome depends on."""
    if valid.shape[1] == 1:
        return valid[:, 0]
    used = torch.arange(valid.shape[1], device=valid.device) <= accepted[:, None]
    return (valid | ~used).all(dim=1)
