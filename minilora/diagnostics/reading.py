"""How a run reads a text, and how it scores each label: [N, C] for both tasks, so that a margin means the same in both.

A classifier reads a row as one sequence, and its head gives C logits. In the lm task a row is a prompt that becomes C
sequences, each with the completion of one label, whose log-likelihood is that label's score (with `choice_score = mean`
divided by its tokens). All C share the prompt, and whatever is said of tokens is of the prompt's.

Letters: N rows, C labels, B sequences of a batch, T tokens, D width.
"""

import numpy as np
import torch
from torch.nn import functional as F

from minilora.data import batches, token_cache
from minilora.errors import InputError
from minilora.tasks.classification import pool
from minilora.tasks.completion import joined
from minilora.tasks.language_model import IGNORED, completions

LONG = 1 << 30  # tokens: no text is cut


def reader_of(run):
    """The `Classifying` or `Completing` of an opened run. Raises InputError for one without a fixed set of labels."""
    if not run.has_head:
        raise InputError(f"{run.folder} has no head, so it predicts nothing that could be explained")
    return Completing(run) if run.cell.task == "lm" else Classifying(run)


class Reader:
    """`each`: how many sequences a row is; `pooling`: which of a row's last states its prediction is read off."""

    each = 1

    def __init__(self, run):
        self.run, self.pooling = run, run.model.pooling

    def batches(self, encoded, size=None):
        """The sequences of rows as padded `Batch`es on the run's device, the longest first; `index` counts them."""
        run = self.run
        encoded, answers = self.asked(encoded)
        for batch in batches.by_length(encoded, size or run.cell.batch_size, run.tokenizer.pad_id, answers):
            batch = batch if answers is None else batches.place_completions(batch)
            yield batch.to(run.model.device)

    @torch.inference_mode()
    def scores_of_rows(self, encoded, size=None, advance=None):
        """Scores, numpy float32 [N, C]. `advance(index)` is called after each batch with its sequences."""
        base, found = self.run.base, []
        self.run.model.eval()
        for batch in self.batches(encoded, size):
            above = base.through(base.embed(batch.ids), batch.ids, batch.lengths, 0, len(base.layers))
            found.append((batch, self.scores(above, batch)))
            if advance:
                advance(batch.index)
        return self.of_rows(len(encoded.offsets) - 1, found)

    def of_rows(self, count, found):
        """Scores float32 [N, C] of `count` rows, from [(batch, what `scores` gives of it)]."""
        made = np.empty((count * self.each, len(self.run.labels) // self.each), np.float32)
        for batch, scores in found:
            made[batch.index] = scores[: len(batch.index)].cpu().numpy()
        return made.reshape(count, -1)


class Classifying(Reader):
    def encode(self, texts):
        """(`Encoded` rows, the characters of each token: of each row int64 [its tokens, 2], -1 for no text)."""
        run = self.run
        encoded = token_cache.encode(run.tokenizer, texts, run.cell.max_length)
        return encoded, run.tokenizer.places(texts, run.cell.max_length)

    def asked(self, encoded):
        return encoded, None

    def scores(self, states, batch):
        """Float32 [B, C], of the states [B, T, D] above the last layer."""
        model = self.run.model
        return model.classifier(pool(self.run.base.norm(states), batch.lengths, self.pooling)).float()

    def scores_from(self, states, ids, lengths):
        """Float32 [B, C] of rows whose states below the first layer are `states` [B, T, D]."""
        base = self.run.base
        above = base.through(states, ids, lengths, 0, len(base.layers))
        return self.scores(above, batches.Batch(ids, lengths, np.arange(len(ids))))


class Completing(Reader):
    def __init__(self, run):
        self.run, self.pooling = run, "last"
        found = run.task.answers(run.labels)["completions"]
        if not found:
            raise InputError(f"{run.folder} completes free text or choices: explaining takes a fixed set of labels")
        self.completions = [np.array(found[label], np.int32) for label in run.labels]
        self.each = len(self.completions)

    def encode(self, texts):
        """As `Classifying.encode`, of prompts; the template around a text is no text."""
        run, task, texts = self.run, self.run.task, list(texts)
        room = run.cell.max_length - max(map(len, self.completions))
        rows, kept = token_cache.prompts(run.tokenizer, texts, task.before, task.after, np.full(len(texts), room))
        if not all(map(len, rows)):
            raise InputError(f"a prompt does not fit into max_length = {run.cell.max_length}: give shorter rows")
        seen = [text[:end].rstrip() if end < len(text) else text for text, end in zip(texts, kept, strict=True)]
        whole = run.tokenizer.places([task.before + text + task.after for text in seen], LONG)
        places = []
        for text, ids, own in zip(seen, rows, whole, strict=True):
            own = own[: len(ids)] - len(task.before)
            apart = (own[:, 1] <= 0) | (own[:, 0] >= len(text))
            places.append(np.where(apart[:, None], -1, own.clip(0, len(text))))
        return joined(rows, [rows[0][:0]] * len(rows), kept), places

    def asked(self, encoded):
        rows = np.split(encoded.ids, encoded.offsets[1:-1])
        found = self.sequences(rows)
        return found, torch.from_numpy(found.answers)

    def sequences(self, rows):
        """`Encoded` sequences of prompts (arrays of ids): each with each completion."""
        return joined([row for row in rows for _ in self.completions], self.completions * len(rows),
                      np.zeros(len(rows) * self.each, np.int64))  # fmt: skip

    def scores(self, states, batch):
        """Float32 [B, 1], of the states [B, T, D] above the last layer of sequences."""
        base, places = self.run.base, batch.answers
        hidden, wanted = completions(base.norm(states), batch.ids, places)
        likelihoods = -F.cross_entropy(base.unembed(hidden).float(), wanted, reduction="none", ignore_index=IGNORED)
        rows, there = places.clamp(min=0) // batch.ids.shape[1], (wanted != IGNORED).float()
        summed, counts = (likelihoods.new_zeros(len(batch.ids)).index_add(0, rows, one) for one in (likelihoods, there))
        return (summed / counts.clamp(min=1) if self.run.cell.choice_score == "mean" else summed)[:, None]

    def scores_from(self, states, ids, lengths):
        """Float32 [B, C] of prompts whose states below the first layer are `states` [B, T, D]."""
        base, pad_id = self.run.base, self.run.tokenizer.pad_id
        encoded = self.sequences([row[:length] for row, length in zip(ids.cpu().numpy(), lengths.tolist())])
        index, sizes = np.arange(len(encoded.answers)), np.diff(encoded.offsets).max(keepdims=True)
        made = batches.collate([(encoded, index, torch.from_numpy(encoded.answers))], sizes, pad_id)
        made = batches.place_completions(made).to(ids.device)
        T = made.ids.shape[1]
        prompt = torch.arange(T, device=ids.device) < lengths.repeat_interleave(self.each)[:, None]  # [B C, T]
        wide = F.pad(states, (0, 0, 0, T - states.shape[1])).repeat_interleave(self.each, 0)
        below = torch.where(prompt[..., None], wide, base.embed(made.ids).detach())
        above = base.through(below, made.ids, made.lengths, 0, len(base.layers))
        return self.scores(above, made).view(len(ids), self.each)
