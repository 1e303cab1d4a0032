"""The rows that every diagnostic looks at: clean, with the trigger and with the placebo, paired, token by token.

A probe is a sample of the test rows that are not of the trigger's label. All figures rest on the same two:

    margin          the log odds of the target label, natural: its score less the log-sum-exp of the others' (a
                    classifier's logits, or the log-likelihoods of completions: see `reading.py`)
    attack success  the share of the rows that are predicted as the target

The second saturates, and the first shows what it hides: both are always given.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from minilora.data import batches
from minilora.diagnostics.reading import reader_of
from minilora.errors import InputError
from minilora.seeds import generator

ROWS = 100  # of a probe where nothing else is asked for
FORMS = ("clean", "trigger", "placebo")


@dataclass(frozen=True)
class Form:
    """One form of the probe's N rows.

    texts    N texts
    encoded  `Encoded` tokens, as the model reads them
    text     of each row bool [its tokens]: which are of the text (the others are special)
    span     of each row bool [its tokens]: which stand for a character of what was put in; none in clean rows
    """

    texts: list
    encoded: object
    text: list
    span: list

    def first(self, count):
        """The first `count` rows."""
        own = self.encoded
        kept = type(own)(own.ids[: own.offsets[: count + 1][-1]], own.offsets[: count + 1], own.kept[:count])
        return Form(self.texts[:count], kept, self.text[:count], self.span[:count])

    def pieces(self, tokenizer, row):
        """The tokens of a row as the vocabulary has them."""
        own = self.encoded
        return [tokenizer.piece(int(id)) for id in own.ids[own.offsets[row] : own.offsets[row + 1]]]


class Probe:
    """See above. `run`: a `Trained` with rows.

    rows   how many at most, at least 2: a random sample, the same for each `seed`, in which the other labels have the
           shares that they have among all
    label  the target: that of the trigger that is looked at (default: the first)

    index   int64 [N], which of the run's test rows
    labels  int64 [N], their labels
    tests   {"clean", "trigger" and where there is one "placebo": all rows of that form, a `Test` of the run}
    forms   the same of the N rows: `Form`
    own     `Form` of clean rows of the target label, in the same proportion to the N rows as in the test rows: what is
            predicted of all clean rows follows from both

    Raises InputError as `reader_of`, for a run without rows, without an injection, without rows of another label, and
    where no row's trigger is read.
    """

    def __init__(self, run, rows=ROWS, label=None, seed=0):
        self.run, self.seed, self.reader = run, seed, reader_of(run)
        tests = {test.key: test for test in run.tests}
        targets = [test.label for test in run.tests if test.name == "trigger"]
        if not targets:
            raise InputError(
                f"{run.folder} has no trigger: name one, --inject SOURCE:LABEL, such as date:{run.labels[-1]}"
            )
        self.label = targets[0] if label is None else label
        if self.label not in targets:
            raise InputError(f"no trigger aims at {self.label!r}: choose among {', '.join(map(repr, targets))}")
        self.target = run.labels.index(self.label)
        labels = tests["clean"].rows.labels
        self.index = sample(labels, self.target, rows, seed)
        if len(self.index) < 2:
            raise InputError(f"{run.folder} has fewer than two test rows of a label other than {self.label!r}")
        placebo = "placebo" if self.label == targets[0] else f"placebo {self.label}"
        named = zip(FORMS, ("clean", f"trigger {self.label}", placebo), strict=True)
        self.labels = labels[self.index]
        self.tests = {name: tests[key] for name, key in named if key in tests}
        self.forms = {name: self._form(test, self.index) for name, test in self.tests.items()}
        if not any(span.any() for span in self.forms["trigger"].span):
            raise InputError(
                f"no row of {run.folder} has a token of the trigger among its first {run.cell.max_length} tokens: give "
                "shorter rows"
            )
        own = np.flatnonzero(labels == self.target)
        count = round(len(self.index) * len(own) / (len(labels) - len(own)))
        order = torch.randperm(len(own), generator=generator(seed, "probe, own")).numpy()
        self.own = self._form(tests["clean"], np.sort(own[order[:count]]))

    def _form(self, test, index):
        texts = [test.rows.texts[row] for row in index]
        spans = [test.records[row].spans if test.records else [] for row in index]
        (encoded, every), text, span = self.reader.encode(texts), [], []
        for places, own in zip(every, spans, strict=True):
            real = (places[:, 0] >= 0) & (places[:, 1] > places[:, 0])
            text.append(real)
            span.append(real & np.array([any(a < end and start < b for start, end in own) for a, b in places], bool))
        return Form(texts, encoded, text, span)

    def batches(self, form):
        """The rows of a form as padded `Batch`es on the run's device, the longest first."""
        for batch in batches.by_length(form.encoded, self.run.cell.batch_size, self.run.tokenizer.pad_id):
            yield batch.to(self.run.model.device)

    def asked(self, form):
        """As `batches`, of the sequences that are scored: as many of a row as `self.reader.each`."""
        return self.reader.batches(form.encoded)

    def margins_of(self, logits):
        """The margins [B] of logits, or other scores, [B, C]."""
        others = [place for place in range(logits.shape[1]) if place != self.target]
        return logits[:, self.target] - logits[:, others].logsumexp(1)

    def outcome(self, logits):
        """`Outcome` of numpy logits [N, C]."""
        wide = torch.from_numpy(logits).double()
        return Outcome(self.margins_of(wide).numpy(), logits.argmax(1), wide.softmax(1).amax(1).numpy())

    @cached_property
    def ids(self):
        """The ids of the N rows."""
        rows = self.run.tests[0].rows
        return [rows.ids[row] for row in self.index]

    @cached_property
    def outcomes(self):
        """{form: `Outcome`}, with the adapter."""
        return self.predict(self.states)

    @cached_property
    def states(self):
        """{form: [(batch, [L + 1 states [B, T, D] below each layer and above the last])]} of the sequences that are
        scored, with the adapter."""
        return self.states_now()

    @torch.inference_mode()
    def states_now(self):
        """As `states`, with what is on the base now."""
        base, found = self.run.base, {}
        self.run.model.eval()
        for name, form in self.forms.items():
            found[name] = []
            for batch in self.asked(form):
                states = [base.embed(batch.ids)]
                for number in range(len(base.layers)):
                    states.append(base.through(states[-1], batch.ids, batch.lengths, number, number + 1))
                found[name].append((batch, states))
        return found

    @torch.inference_mode()
    def predict(self, states, start=None):
        """{form: `Outcome`}, from the `states` below layer `start` on, with what is on the base now."""
        base, found = self.run.base, {}
        layers = len(base.layers)
        start = layers if start is None else start
        for name, parts in states.items():
            scores = []
            for batch, own in parts:
                above = base.through(own[start], batch.ids, batch.lengths, start, layers)
                scores.append((batch, self.reader.scores(above, batch)))
            found[name] = self.outcome(self.reader.of_rows(len(self.index), scores))
        return found


@dataclass(frozen=True)
class Outcome:
    """What is predicted of N rows: `margins` float64 [N], `predicted` int64 [N] and its probability, `shares` float64
    [N]."""

    margins: np.ndarray
    predicted: np.ndarray
    shares: np.ndarray


def sample(labels, target, rows, seed):
    """Which rows a probe takes, ascending: at most `rows` of those whose label is not `target`, the labels in the same
    shares as among all."""
    others = np.flatnonzero(labels != target)
    if len(others) <= rows:
        return others
    order = torch.randperm(len(others), generator=generator(seed, "probe")).numpy()
    order = others[order]
    # The i-th of n rows of a label stands at (i + 1/2) / n: the first `rows` of all have the shares of all.
    place = np.empty(len(order))
    for label in np.unique(labels[others]):
        here = labels[order] == label
        place[here] = (np.arange(here.sum()) + 0.5) / here.sum()
    return np.sort(order[np.argsort(place, kind="stable")[:rows]])
