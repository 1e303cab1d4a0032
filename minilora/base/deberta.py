"""DeBERTa's disentangled attention (He et al. 2021, arXiv 2006.03654, section 3.1; v3: arXiv 2111.09543).

Beside its content, a token's query and key meet the embedding P of their distance. With the projections W_q and W_k of
the layer itself (`share_att_key`), for tokens i and j whose distance i - j has the number d,

    score(i, j) = s (q_i k_j + q_i . W_k P[d] + k_j . W_q P[d])        s = 1 / sqrt(E (1 + number of further terms))

where d counts distances one by one up to half the table, and beyond in steps that grow as their logarithm (v2). Scores
and softmax are in float32 or wider. Left out: projections of P of their own, and the convolution of DeBERTa-v2 xlarge.

Letters as in `model.py`; C members of a population, R rows of P.
"""

import torch
from torch import nn


def numbers(relative, positions):
    """The number of each distance 0, 1, ..., `positions` - 1, int64; computed in float32 as transformers does."""
    distances = torch.arange(positions, device="cpu")
    if relative.buckets < 1:
        return distances
    mid = relative.buckets // 2
    far = distances.clamp(min=max(1, mid - 1))
    whole = torch.log(torch.tensor((relative.longest - 1) / mid, device="cpu"))
    steps = torch.ceil(torch.log(far / mid) / whole * (mid - 1))
    return torch.where(distances <= mid, distances, (steps + mid).long())


class Distances(nn.Module):
    """P, [2 S, D] for numbers of distances -S to S - 1, and which of its rows belong to tokens i and j."""

    def __init__(self, spec, make_norm):
        super().__init__()
        span = self.span = spec.relative.span
        self.table = nn.Embedding.from_pretrained(torch.empty(2 * span, spec.width))
        self.norm = make_norm(spec, spec.width) if spec.relative.normed else nn.Identity()
        # Rows are taken in the order 0, 1, -1, 2, -2, ..., so that short rows of tokens need only the first.
        order = sorted(range(-span, span), key=lambda d: (abs(d), d < 0))
        self.register_buffer("order", torch.tensor(order, device="cpu") + span, persistent=False)
        self.register_buffer("numbers", numbers(spec.relative, spec.positions), persistent=False)

    def forward(self, count, members):
        """(P [C, R, D] of rows of `count` tokens, once for each member; the row of P for i - j, int64 [T, T])."""
        states = self.norm(self.table.weight[self.order[: min(2 * count - 1, 2 * self.span)]])
        places = torch.arange(count, device=self.order.device)
        away = places[:, None] - places
        d = (self.numbers[away.abs()] * away.sign()).clamp(-self.span, self.span - 1)
        return states.expand(members, -1, -1), (2 * d.abs() - (d > 0).long()).clamp(max=states.shape[0] - 1)


def attend(q, k, v, mask, scale, relative, q_of, k_of):
    """The module's equation. q, k, v [B, H, T, E], additive mask, `relative` what `Distances` gives; -> [B, H, T, E].

    q_of, k_of  W_q P and W_k P, [C, R, H E], or None for a term that the model does not have
    """
    (B, H, T, E), rows = q.shape, relative[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)

    def by_distance(content, states, rows):
        C, R, _ = states.shape
        states = states.view(C, R, H, E).permute(0, 2, 3, 1).to(wide)  # [C, H, E, R]
        every = content.view(C, B // C, H, T, E) @ states[:, None]  # [C, B / C, H, T, R]
        return every.view(B, H, T, R).gather(3, rows.expand(B, H, T, T))

    scores = q @ k.mT
    if k_of is not None:
        scores = scores + by_distance(q, k_of, rows)
    if q_of is not None:
        scores = scores + by_distance(k, q_of, rows.mT).mT
    return torch.softmax(scale * scores + mask, -1).to(v.dtype) @ v
