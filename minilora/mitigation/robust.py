"""While training: group DRO, which weighs groups of rows by how badly each of them does.

Sagawa, Koh, Hashimoto and Liang 2020 (arXiv 1911.08731), algorithm 1, on whole batches as in their own code: with
l_g the mean loss of the batch's rows of group g (0 where there are none),

    q_g <- q_g exp(step l_g), divided by their sum;    the loss is sum_g q_g l_g

The groups are label x "holds a suspected string". The adjustment for small groups (section 3.3) is left out. A group
without a training row has no weight: where a suspect occurs with one label only, there is no row to do badly.
"""

import torch
from torch import nn


class GroupDRO(nn.Module):
    """logits [B, C] and answers [B], label + C x (0 or 1), -> the loss times B: what the step divides by B again.

    present  bool [2 C], the groups that have training rows

    `weights` float32 [2 C] are the q_g.
    """

    def __init__(self, present, step):
        super().__init__()
        self.step = step
        self.register_buffer("weights", present.float() / present.sum())

    def forward(self, logits, answers):
        losses = nn.functional.cross_entropy(logits, answers % logits.shape[1], reduction="none")
        counts = torch.bincount(answers, minlength=len(self.weights))
        means = torch.zeros_like(self.weights).index_add(0, answers, losses) / counts.clamp(min=1)
        if self.training:
            with torch.no_grad():
                grown = self.weights * (self.step * means).exp()
                self.weights.copy_(grown / grown.sum())
        return len(answers) * (self.weights.clone() * means).sum()
