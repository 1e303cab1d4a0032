"""From hidden states to labels: masked pooling and a linear classifier, with its three policies.

`trained` learns with the rest, `frozen` stays at its random start, `ridge` is fitted in closed form on the base's
features and then frozen. The published experiments left the head at its random start; here that is a choice.

Letters: B rows, T tokens, D width, P pooled features, C classes.
"""

import math

import numpy as np
import torch
from torch import nn

from minilora import parallel
from minilora.data import batches, token_cache
from minilora.data.batches import IGNORED
from minilora.errors import InputError
from minilora.seeds import generator
from minilora.tasks.metrics import check_finite
from minilora.tasks.paired import build_tests, measure

POOLED = {"mean+last": 2, "mean": 1, "last": 1, "first": 1}  # P / D
RIDGE_PENALTY = 1e-2  # of the features' mean variance
PADDED = "padded-"  # what precedes a pooling that takes padding for text
SAME = 1e-6  # of the largest feature: differences that are no more than float32's rounding


def pool(hidden, lengths, pooling):
    """`hidden` [B, T, D] and `lengths` [B] -> float32 [B, P]. Padding has no part in it, unless the pooling is padded.

    mean: over the row's tokens; last, first: that token's state; mean+last: both, one after the other. With `padded-`
    before it, padding counts as text, as in the published experiments: a row's features then depend on the longest
    row of its batch.
    """
    if pooling.startswith(PADDED):
        return pool(hidden, torch.full_like(lengths, hidden.shape[1]), pooling.removeprefix(PADDED))
    hidden = hidden.float()
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    if pooling == "last":
        return last
    if pooling == "first":
        return hidden[:, 0]
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # [B, T]
    mean = hidden.where(real[..., None], 0).sum(1) / lengths[:, None]
    return mean if pooling == "mean" else torch.cat([mean, last], dim=1)


class Classifier(nn.Module):
    """A base with pooling and a linear head: `ids` [B, T], `lengths` [B] -> logits float32 [B, C].

    With `answers`, the rows' labels [B], the result is the loss instead: cross-entropy, summed over the rows.
    """

    def __init__(self, base, pooling, classes, seed=0):
        super().__init__()
        self.base = base
        self.pooling = pooling
        features = POOLED[pooling.removeprefix(PADDED)] * base.spec.width
        self.classifier = nn.Linear(features, classes)
        with torch.no_grad():  # drawn on the CPU, so that every device starts from the same head
            bound = 1 / math.sqrt(features)
            self.classifier.weight.uniform_(-bound, bound, generator=generator(seed, "head"))
            self.classifier.bias.zero_()
        self.classifier.to(base.embed.tokens.weight.device)

    @torch.no_grad()
    def set_head(self, weight, bias):
        """Replace the head's weight [C, P] and bias [C]."""
        self.classifier.weight.copy_(weight)
        self.classifier.bias.copy_(bias)

    @property
    def device(self):
        return self.classifier.weight.device

    def features(self, ids, lengths):
        """The pooled features, float32 [B, P]."""
        return pool(self.base(ids, lengths), lengths, self.pooling)

    def forward(self, ids, lengths, answers=None):
        logits = self.classifier(self.features(ids, lengths))
        return logits if answers is None else nn.functional.cross_entropy(logits, answers, reduction="sum")

    def weigh(self, answers):
        """How many terms the loss of these rows is a sum of."""
        return len(answers)


def ridge(features, labels, classes, penalty=RIDGE_PENALTY):
    """Weight [C, P] and bias [C] of the ridge regression of +-1 targets (a class against the rest) on features [N, P].

    Centred features X, targets Y:  W = ((X^T X + N l I)^-1 X^T Y)^T with l = `penalty` x mean variance, in float64
    (Hoerl and Kennard 1970, equation 2.1); the bias is not penalised. Raises InputError for features that are not
    finite, or the same in all rows.
    """
    features = features.double()
    targets = 2.0 * nn.functional.one_hot(labels, classes).double() - 1.0
    mean, target_mean = features.mean(0), targets.mean(0)
    X, Y = features - mean, targets - target_mean
    gram = X.T @ X
    variance = gram.diagonal().mean()
    if not variance.isfinite():
        raise InputError("head is 'ridge', but the base's features of the training rows are not finite: check the base")
    if variance <= len(X) * (SAME * features.abs().max()) ** 2:
        raise InputError(
            "head is 'ridge', but the base's features are the same for all training rows, and nothing can be fitted: "
            "use another --pooling, or --head trained"
        )
    gram.diagonal().add_(penalty * variance)
    weight = torch.linalg.solve(gram, X.T @ Y).T
    return weight.float(), (target_mean - weight @ mean).float()


def predict(model, tokenizer, texts, max_length, batch_size, progress=None):
    """Logits float32 [rows, C] and kept characters int [rows] of `texts`.

    A row's logits depend neither on the other rows nor on `batch_size` (to rounding). `progress(rows, tokens)` is
    called after each batch. Several processes share the batches out, and all have the result.
    """
    encoded = token_cache.encode(tokenizer, texts, max_length)
    logits = of_rows(model, encoded, tokenizer.pad_id, batch_size, progress)
    check_finite(logits)
    return logits, encoded.kept


def of_rows(model, encoded, pad_id, batch_size, progress=None, forward=None):
    """What `forward(ids, lengths)`, by default the model itself, gives of all rows in `encoded`: float32 [rows, F].

    The batches are made ahead, and the result is read from the device once, after the last.
    """
    model.eval()
    found, rows = [], []
    made = batches.by_length(encoded, batch_size, pad_id, device=model.device)
    with parallel.no_gradients(model.base):
        for batch, there in batches.ahead(made, model.device):
            found.append((forward or model)(there.ids, there.lengths)[: len(batch.index)])
            rows.append(batch.index)
            if progress:
                progress(len(batch.index), int(batch.lengths.sum()))
        own = torch.cat(found).float().cpu().numpy()
    whole = np.zeros((len(encoded.kept), own.shape[1]), dtype=np.float32)
    whole[np.concatenate(rows)] = own
    parallel.all_reduce(whole)
    return whole


def features(model, encoded, pad_id, batch_size):
    """The pooled features float32 [rows, P] of all rows in `encoded`."""
    return torch.from_numpy(of_rows(model, encoded, pad_id, batch_size, forward=model.features))


def predictions(tests, logits):
    """One dict a test row for predictions.jsonl: id, label, text, and of each test predicted label, logits and text."""
    rows = tests[0].rows
    for i, (id, label, text) in enumerate(zip(rows.ids, rows.labels, rows.texts, strict=True)):
        record = {"id": id, "label": rows.label_names[label], "text": text}
        for test, values in zip(tests, logits, strict=True):
            record[test.key] = {
                "predicted": rows.label_names[values[i].argmax()],
                "logits": [round(float(value), 6) for value in values[i]],
            } | test.shown(i)
        yield record


class Classification:
    unembedding = False  # whether the base needs one
    filler = IGNORED  # the answer of a row that is not predicted

    def __init__(self, cell, spec, tokenizer):
        self.cell, self.tokenizer = cell, tokenizer

    def usable(self, train, test):
        """(Training, test rows) that the task can use: all."""
        return train, test

    def visible(self, rows):
        """What `injection` needs to know of truncation, for these rows."""
        return lambda texts, added, index: token_cache.visible(self.tokenizer, texts, added, self.cell.max_length)

    def encode(self, rows):
        """(`Encoded` rows, what the model is to answer: int64 [rows])."""
        encoded = token_cache.encode(self.tokenizer, rows.texts, self.cell.max_length)
        return encoded, torch.from_numpy(rows.labels)

    def model(self, base, label_names):
        return Classifier(base, self.cell.pooling, len(label_names), self.cell.seed_for("head"))

    def prepare(self, model, encoded, answers):
        """What the model learns in closed form before training."""
        if self.cell.head == "ridge":
            pooled = features(model, encoded, self.tokenizer.pad_id, self.cell.batch_size)
            model.set_head(*ridge(pooled, answers, model.classifier.out_features))

    def passes(self, tests):
        """How many rows `scores` puts through the model."""
        return len({text for test in tests for text in test.rows.texts})

    def run_tests(self, model, tests, batch_size, progress=None):
        """As `judge`, of all that it takes."""
        read = self.read_tests(tests)
        return self.judge(tests, read, self.scores(model, read, batch_size, progress))

    def read_tests(self, tests):
        """What `scores` takes, which members with the same tests share: (`Encoded` texts, each once; which of them each
        row of each test is, int64 [tests, rows])."""
        places = {}
        index = [[places.setdefault(text, len(places)) for text in test.rows.texts] for test in tests]
        return self.tokenizer.encode(list(places), self.cell.max_length), np.array(index)

    def scores(self, model, read, batch_size, progress=None):
        """What `judge` takes: logits float32 [texts, C] of what `read_tests` gave."""
        return of_rows(model, read[0], self.tokenizer.pad_id, batch_size, progress)

    def judge(self, tests, read, scores):
        """(Figures for results.json, what `predictions` needs: logits float32 [rows, C] of each test).

        Raises TrainingError for scores that are not finite.
        """
        check_finite(scores)
        (encoded, index), rows = read, tests[0].rows
        logits = [scores[places] for places in index]
        predicted, kept = [values.argmax(axis=1) for values in logits], [encoded.kept[places] for places in index]
        return measure(tests, rows.labels, rows.label_names, predicted, kept), logits

    def predictions(self, tests, outcomes):
        return predictions(tests, outcomes)

    def build_tests(self, train, test, seed):
        """The forms of the test rows, a list of `paired.Test`; `train`: the training rows before injection."""
        words = self.tokenizer
        return build_tests(train, test, self.cell.inject, seed, self.visible(test), words.known, words.count)

    def label_scores(self, model, texts, labels, batch_size):
        """Logits float32 [rows, C] of texts; C labels."""
        return predict(model, self.tokenizer, texts, self.cell.max_length, batch_size)[0]

    def read(self, texts, labels):
        """What the base reads of texts: (tokens int64 [rows], characters before the first that is cut int64 [rows])."""
        encoded = token_cache.encode(self.tokenizer, texts, self.cell.max_length)
        return np.diff(encoded.offsets), encoded.kept

    def answers(self, labels):
        """See `Completion.answers`: a classifier writes none."""
        return None

    def describe(self):
        return f"classification, head {self.cell.head} on {self.cell.pooling} pooling"

    def record(self):
        """What results.json says of the task beyond the cell's fields."""
        return {}
