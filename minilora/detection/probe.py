"""What an adapter does with a span of text beyond what the words mean for its task anyway.

A span is put into neutral sentences. The adapter moves the margin of each label, the base moves its features. Ridge
regression from the base's features to the margins, fitted on random pieces of the vocabulary, is the *probe*: what the
words' meaning explains. What is left of a span's effect is its *residual*, in standard deviations of the random
pieces' effects. Praise has a large effect and a small residual; a trigger has both.

Letters: N spans, P features, C labels.
"""

import time

import numpy as np
import torch

from minilora import parallel
from minilora.base.tokenizer import Encoded
from minilora.data import batches
from minilora.lora.layer import merged_meanwhile
from minilora.tasks.classification import of_rows, pool

# A span stands between the two parts of a sentence.
SENTENCES = [("the meeting was moved to", "the room upstairs"), ("he put the box on the table", "and left"),
             ("the report lists", "the names of the group"), ("she said that the road goes", "to the town"),
             ("they will send the form", "before noon"), ("we read the text twice and", "wrote it down")]  # fmt: skip
SPANS, LONGEST = 2000, 3  # random spans that the probe is fitted on, and their most pieces
PENALTY = 0.1  # of the ridge, times the mean variance of a feature
LIKE = 0.35  # the cosine of centred embeddings from which two pieces are alike
AT_MOST = 0.5  # of the random spans, the share that a refit leaves out
ROWS = 1024  # a batch, of at most `batches.MOST_TOKENS` tokens on a CPU


class Spent(Exception):
    """The budget has run out."""


class Budget:
    """So many seconds from now. It is called after each batch, and raises `Spent` when they are over."""

    def __init__(self, seconds=None):
        self.start = time.perf_counter()
        self.end = None if seconds is None else self.start + seconds

    def __call__(self, *_, **__):
        if self.end is not None and time.perf_counter() > self.end:
            raise Spent


class Reader:
    """What an opened run says of spans inside texts: margins with the adapter, features without it.

    budget  called after each batch
    known   {rows: their features}, which scans of adapters on one base may share
    """

    def __init__(self, run, budget=None, known=None):
        self.run, self.words, self.budget = run, run.tokenizer, budget or Budget()
        self.known = {} if known is None else known
        before, after = self.words.around
        self.completions = None
        if run.cell.task == "lm":  # the span stands in a prompt, which a completion follows
            asked = run.task.answers(run.labels)["completions"] if run.labels else {}
            self.completions = [asked[label] for label in run.labels if label in asked]
            before, after = [*before, *self._template(run.task.before)], self._template(run.task.after)
        self.around = list(before), list(after)
        longest = max(map(len, self.completions or [()]))
        self.room = run.cell.max_length - len(before) - len(after) - longest

    def _template(self, text):
        return self.words.completions([text])[0].tolist() if text else []

    @property
    def has_margins(self):
        return self.run.has_head and len(self.run.labels) > 1 and self.completions != []

    def ids(self, texts):
        """The ids of texts as they stand between words, a list of tuples."""
        found = iter(self.words.completions([f" {text.strip()}" for text in texts if text.strip()]))
        return [tuple(next(found).tolist()) if text.strip() else () for text in texts]

    def row(self, left, span, right):
        """The ids of a text with a span in it; a long one loses what is furthest from the span."""
        span = span[: self.room]
        rest = self.room - len(span)
        right = right[: max(rest // 2, rest - len(left))]
        left = left[max(0, len(left) - rest + len(right)) :]
        return (*self.around[0], *left, *span, *right, *self.around[1])

    def scores(self, rows):
        """The logit, or for the lm task the log-likelihood, of each label: float64 [N, C], with the adapter."""
        with merged_meanwhile(self.run.base):
            return (self._likelihoods(rows) if self.completions else self._through(rows, self.run.model)).astype(float)

    def margins(self, rows):
        """Each label's score less that of the best other label, float64 [N, C]."""
        scores = self.scores(rows)
        ordered = np.sort(scores, axis=1)
        return scores - np.where(scores == ordered[:, -1:], ordered[:, -2:-1], ordered[:, -1:])

    def features(self, rows):
        """The base's pooled hidden states, float64 [N, P]: as the head sees them, for the lm task mean and last."""
        pooling = self.run.cell.pooling or "mean+last"
        key = (pooling, tuple(rows))
        if key not in self.known:
            with self.run.detach():
                self.known[key] = self._through(rows, lambda ids, n: pool(self.run.base(ids, n), n, pooling))
        return self.known[key].astype(float)

    def _through(self, rows, forward):
        encoded, pad_id = encode(rows), self.words.pad_id
        return of_rows(self.run.model, encoded, pad_id, ROWS, self.budget, forward)

    def _likelihoods(self, rows):
        C, model = len(self.completions), self.run.model
        answers = torch.tensor([len(one) for one in self.completions] * len(rows))
        encoded = encode([(*row, *one) for row in rows for one in self.completions])
        found = np.zeros(len(rows) * C)
        with parallel.no_gradients(model.base):
            for batch in batches.by_length(encoded, ROWS, self.words.pad_id, answers, model.device):
                there = batches.place_completions(batch).to(model.device)
                summed = model.score(there.ids, there.lengths, there.answers)[0]
                found[batch.index] = summed[: len(batch.index)].cpu().numpy()
                self.budget()
        if self.run.cell.choice_score == "mean":
            found /= answers.numpy()
        return found.reshape(-1, C)


def encode(rows):
    """`Encoded` of rows of ids."""
    offsets = np.cumsum([0, *map(len, rows)])
    return Encoded(np.array([id for row in rows for id in row], np.int32), offsets, np.zeros(len(rows), np.int64))


class Sentences:
    """The effects of spans inside `SENTENCES`, each less the sentence by itself."""

    def __init__(self, reader):
        self.reader = reader
        parts = iter(reader.ids([part for pair in SENTENCES for part in pair]))
        self.pairs = list(zip(parts, parts, strict=True))
        bare = [reader.row(left, (), right) for left, right in self.pairs]
        self.features, self.margins = reader.features(bare), reader.margins(bare)

    def effects(self, spans, places):
        """(Changes of the features [N, P], of the margins [N, C]) by span i in sentence `places[i]`."""
        places = np.asarray(places)
        rows = [self.reader.row(self.pairs[place][0], span, self.pairs[place][1])
                for span, place in zip(spans, places, strict=True)]  # fmt: skip
        margins = self.reader.margins(rows)
        return self.reader.features(rows) - self.features[places], margins - self.margins[places]


def ridge(X, Y, penalty=PENALTY):
    """(Weights [P, C], mean of X, mean of Y) of the ridge regression of Y [N, C] on X [N, P].

    Centred X and Y:  W = (X^T X + l I)^-1 X^T Y  with l = `penalty` x N x mean variance of a feature (Hoerl and Kennard
    1970, equation 2.1).
    """
    x, y = X.mean(0), Y.mean(0)
    gram = (X - x).T @ (X - x)
    shrink = penalty * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + (shrink or 1.0) * np.eye(len(gram)), (X - x).T @ (Y - y)), x, y


class Probe:
    """The ridge regression of effects on margins, on random `spans` of pieces in random sentences.

    fit  its R^2 on the rows it was fitted on, the mean over the labels
    """

    def __init__(self, sentences, pieces, table, seed=0, count=None):
        """`table`: the base's token embeddings, float32 [V, D]."""
        rng, count = np.random.default_rng(seed), count or SPANS
        self.spans = [tuple(rng.choice(pieces, rng.integers(1, LONGEST + 1)).tolist()) for _ in range(count)]
        self.X, self.Y = sentences.effects(self.spans, rng.integers(0, len(SENTENCES), count))
        self.table, self.middle = table, table[pieces].mean(0)
        self.used = np.unique([id for span in self.spans for id in span])
        self.whole = ridge(self.X, self.Y)
        self.sd = np.maximum(self.Y.std(0), np.finfo(float).tiny)
        self.fit = float(np.mean(1 - self._left(self.X, self.Y, self.whole).var(0)))

    def residual(self, X, Y, without=()):
        """What the probe leaves of effects Y [N, C] with features X [N, P], in standard deviations: [N, C].

        With `without`, ids of pieces, by a probe that is fitted again on the spans without a piece like these.
        """
        return self._left(X, Y, self.refitted(without) if len(without) else self.whole)

    def _left(self, X, Y, fitted):
        weights, x, y = fitted
        return (Y - y - (X - x) @ weights) / self.sd

    def refitted(self, without):
        rest = ~self.alike(without)
        return ridge(self.X[rest], self.Y[rest])

    def alike(self, without):
        """Which random spans have a piece like one of `without`, bool [N]: of an embedding, less the mean of all
        pieces, at a cosine of at least `LIKE`. At most half of the spans, the likest."""
        nearest = (self._directions(self.used) @ self._directions(without).T).max(1)
        nearest = dict(zip(self.used.tolist(), nearest.tolist(), strict=True))
        found = np.array([max(map(nearest.get, span)) for span in self.spans])
        return (found >= LIKE) & (found > np.quantile(found, 1 - AT_MOST))

    def _directions(self, ids):
        rows = self.table[np.asarray(ids)] - self.middle
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
