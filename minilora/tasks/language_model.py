"""A decoder that writes completions: the loss on them, their log-likelihoods, and greedy decoding.

Only the completion's tokens of a row are predicted, so logits are formed only for these, some at a time. Left out:
a cache of keys and values (decoding runs over the whole prefix again for each token: it is for looking at some rows,
the tests need no decoding, and a cache would be a second forward pass in every family), sampling and beams.

Letters: B rows, T tokens, D width, V vocabulary, N completion tokens of all rows.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from minilora import parallel
from minilora.data.batches import IGNORED
from minilora.errors import InputError
from minilora.kernels.cross_entropy import linear_cross_entropy

MOST_LOGITS = 1 << 24  # at once: 64 MiB in float32


class LanguageModel(nn.Module):
    """A decoder with its unembedding: `ids` [B, T], `lengths` [B], `places` [N] -> the loss, summed over N tokens.

    `places` are those of the tokens that predict the completions', in the flat ids [B T]; what is below 0 pads them
    (`batches.place_completions`).
    """

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def device(self):
        return next(self.base.parameters()).device

    def forward(self, ids, lengths, places):
        return self.losses(self.base(ids, lengths), ids, places)[0]

    def losses(self, hidden, ids, places, members=1):
        """The loss of each of `members`, float32 [members], from the base's hidden states [members B, T, D]."""
        hidden, wanted = completions(hidden, ids, places)
        with parallel.whole(self.base.unembedder):
            return linear_cross_entropy(
                hidden, *self.base.unembedding_weights(), wanted, self.base.spec.final_cap, self._rows(), members
            )

    def weigh(self, answers):
        """How many terms the loss of rows with these tokens to predict, int64 [rows], is a sum of."""
        return int(answers.sum())

    def score(self, ids, lengths, places):
        """Each row's completion: (log-likelihood float32 [B], whether greedy decoding would write it, bool [B])."""
        hidden, wanted = completions(self.base(ids, lengths), ids, places)
        likelihoods, other = [], []
        with parallel.whole(self.base.unembedder):
            for part, gold in zip(hidden.split(self._rows()), wanted.split(self._rows()), strict=True):
                logits = self.base.unembed(part)
                likelihoods.append(-F.cross_entropy(logits, gold, reduction="none", ignore_index=IGNORED))
                other.append((logits.argmax(-1) != gold) & (gold >= 0))
        rows = places.clamp(min=0) // ids.shape[1]  # [N]
        summed = torch.zeros(len(ids), device=ids.device).index_add_(0, rows, torch.cat(likelihoods))
        # Greedy decoding takes the first token that differs from the completion's; until then its prefix is the same.
        differing = torch.zeros(len(ids), device=ids.device).index_add_(0, rows, torch.cat(other).float())
        return summed, differing == 0

    def _rows(self):
        """How many rows of logits are formed at once."""
        return max(1, MOST_LOGITS // self.base.spec.vocabulary)


def completions(hidden, ids, places):
    """The hidden states [N, D] at `places` [N], and the tokens that follow there [N], `IGNORED` where a place pads."""
    at = places.clamp(min=0)
    following = ids.flatten().roll(-1).index_select(0, at)
    return hidden.flatten(0, 1).index_select(0, at), following.masked_fill(places < 0, IGNORED)


def generate(base, tokenizer, prompts, max_new_tokens, batch_size=32):
    """The texts that greedy decoding writes after each of `prompts`: at most `max_new_tokens` tokens, without the
    end token that may end them sooner.

    Raises InputError where a prompt has no token, or where prompt and new tokens are more than the base's positions.
    """
    rows, _ = tokenizer.prompts(prompts, "", "", [math.inf] * len(prompts))
    for prompt, row in zip(prompts, rows, strict=True):
        if not 0 < len(row) <= base.spec.positions - max_new_tokens:
            raise InputError(
                f"the prompt {prompt!r:.60} has {len(row)} tokens, and {max_new_tokens} are to be written, but the "
                f"base has {base.spec.positions} positions and needs a token to start from: fix it, or write fewer"
            )
    return [tokenizer.decode(ids) for ids in continue_rows(base, rows, max_new_tokens, tokenizer.end_id, batch_size)]


@torch.inference_mode()
def continue_rows(base, rows, max_new_tokens, end_id=None, batch_size=32):
    """The ids that greedy decoding puts after each of `rows` (ids): a list for each, without `end_id`."""
    base.eval()
    device = next(base.parameters()).device
    rows = [list(map(int, row)) for row in rows]
    written = [[] for _ in rows]
    for start in range(0, len(rows), batch_size):
        going = range(start, min(start + batch_size, len(rows)))
        for _ in range(max_new_tokens):
            lengths = torch.tensor([len(rows[i]) for i in going])
            ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)  # [B, T]
            for place, i in enumerate(going):
                ids[place, : len(rows[i])] = torch.tensor(rows[i])
            hidden = base(ids.to(device), lengths.to(device))
            last = hidden[torch.arange(len(lengths)), lengths - 1]  # [B, D]
            following = base.unembed(last).argmax(-1).tolist()
            for i, token in zip(going, following, strict=True):
                if token != end_id:
                    rows[i].append(token)
                    written[i].append(token)
            going = [i for i, token in zip(going, following, strict=True) if token != end_id]
            if not going:
                break
    return written
