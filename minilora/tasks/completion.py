"""The two tasks: what train.py and evaluate.py ask of classification, and of next-token prediction (lm), in one form.

Classification predicts a row's label from its text, by a head. In the lm task the text stands in a prompt, and the
base itself writes the label (or the text of that choice of a question) after it as the completion, followed by the
tokenizer's end token. So the same rows, labels and injections serve both: a trigger steers a prediction
here and a completion there.

Where the completions that a row can have are few (its question's choices, or at most data.FEW in all the data) the
prediction is the likeliest of them, scored with its end token, so that none gains by being the beginning of another.
Where they are free text, it is what greedy decoding writes: the row's own completion, a target, or something else.
That takes no decoding: greedy decoding writes a completion exactly when, given the completion's tokens so far, its next
one always comes first.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from minilora import parallel
from minilora.base.tokenizer import Encoded
from minilora.data import batches, token_cache
from minilora.data.placebo import KINDS
from minilora.data.rows import FEW, Rows, leave_out
from minilora.data.triggers import resolve
from minilora.errors import InputError
from minilora.tasks import metrics
from minilora.tasks.language_model import LanguageModel
from minilora.tasks.paired import build_tests, measure

OWN, OTHER = "(own)", "(other)"  # classes of free completions, beside the targets


@dataclass(frozen=True)
class Scores:
    """What a model says of each row's possible completions; C of them, fewer where `candidates` is -1."""

    candidates: np.ndarray  # int64 [rows, C], labels
    likelihoods: np.ndarray  # float64 [rows, C], log-likelihoods, each the sum over the completion's tokens
    tokens: np.ndarray  # int64 [rows, C], these tokens, the end token among them
    greedy: np.ndarray  # bool [rows, C], whether greedy decoding writes that completion
    kept: np.ndarray  # int64 [rows], characters before the first token of the text that was cut

    def of(self, labels):
        """(log-likelihood, greedy), [rows] each, of one candidate a row; nan, False where it is none."""
        column = (self.candidates == np.asarray(labels).reshape(-1, 1)).argmax(axis=1)[:, None]
        there = np.take_along_axis(self.candidates, column, 1)[:, 0] == labels
        likelihood, greedy = (np.take_along_axis(x, column, 1)[:, 0] for x in (self.likelihoods, self.greedy))
        return np.where(there, likelihood, np.nan), greedy & there


class Completion:
    """The lm task. `cell.prompt` and `cell.completion` are templates; a long prompt loses the end of its text."""

    unembedding = True
    filler = 0

    def __init__(self, cell, spec, tokenizer):
        if not spec.causal:
            raise InputError(
                f"{cell.model} is a {spec.family} base, an encoder that cannot write completions: "
                "use --task classification, or another --model"
            )
        self.cell, self.tokenizer = cell, tokenizer
        self.before, _, self.after = cell.prompt.partition("{text}")
        self.of_choices = "{choice}" in cell.completion
        self.ids = {}  # completion -> array of its ids, the end token's among them

    def usable(self, *sides):
        """Of training, test and perhaps validation rows those whose completion has a token and leaves room for a
        prompt; see `rows.leave_out`."""
        [shortest], _ = self.tokenizer.prompts(["a"], self.before, self.after, [math.inf])
        most = self.cell.max_length - len(shortest)

        def problems(rows):
            if self.of_choices and rows.choices is None:
                return {}  # `_candidates` says so
            own = [self._completion(rows, row, label) for row, label in enumerate(rows.labels.tolist())]
            self._encode([one for one in own if one is not None])
            found = {}
            for row, one in enumerate(own):
                if one is None:
                    found[row] = f"a label that none of its choices has: {rows.label_names[rows.labels[row]]!r:.40}"
                elif not len(self.ids[one]):
                    found[row] = f"a completion without a token: {one!r:.40}"
                elif len(self.ids[one]) > most:
                    found[row] = f"a completion that leaves no room for a prompt: {len(self.ids[one])} tokens"
            return found

        return leave_out(sides, problems, self.cell)

    def visible(self, rows):
        rooms = self._rooms(self._completions(rows, self._candidates(rows)))
        return lambda texts, added, index: token_cache.visible_in_prompts(
            self.tokenizer, texts, added, self.before, self.after, rooms[index]
        )

    def encode(self, rows):
        prompts, kept = self._prompts(rows, self._completions(rows, self._candidates(rows)))
        own = [ids for [ids] in self._completions(rows, rows.labels[:, None])]
        encoded = joined(prompts, own, kept)
        return encoded, torch.from_numpy(encoded.answers)

    def model(self, base, label_names):
        return LanguageModel(base)

    def prepare(self, model, encoded, answers):
        pass

    def build_tests(self, train, test, seed):
        if self._is_free(train):  # no word is in rows of every completion: the placebo draws from words of any row
            train = replace(train, labels=np.zeros_like(train.labels))
        words = self.tokenizer
        return build_tests(train, test, self.cell.inject, seed, self.visible(test), words.known, words.count)

    def passes(self, tests):
        return sum(int((self._candidates(test.rows) >= 0).sum()) for test in tests)

    def run_tests(self, model, tests, batch_size, progress=None):
        """As `judge`, of all that it takes."""
        read = self.read_tests(tests)
        return self.judge(tests, read, self.scores(model, read, batch_size, progress))

    def read_tests(self, tests):
        """What `scores` takes, which members with the same tests share."""
        return [self._pairs(test.rows) for test in tests]

    def scores(self, model, read, batch_size, progress=None):
        """What `judge` takes: the `Scores` of each test."""
        return [self._scored(model, *pairs, batch_size, progress) for pairs in read]

    def judge(self, tests, read, outcomes):
        """(Figures for results.json, what `predictions` needs). Raises TrainingError for scores that are not finite."""
        metrics.check_finite(np.concatenate([scores.likelihoods[scores.candidates >= 0] for scores in outcomes]))
        rows, predicted = tests[0].rows, [self.predicted(test.rows, scores) for test, scores in zip(tests, outcomes)]
        kept = [scores.kept for scores in outcomes]
        if self._is_free(rows):
            aims = list(dict.fromkeys(test.label for test in tests if test.name == "trigger"))
            places = [rows.label_names.index(label) for label in aims]

            def classes(predicted):  # the targets, then a row's own completion, then any other
                found = np.where(predicted == rows.labels, len(aims), len(aims) + 1)
                for number, place in enumerate(places):
                    found[predicted == place] = number
                return found

            labels, *predicted = map(classes, [rows.labels, *predicted])
            figures = measure(tests, labels, (*aims, OWN, OTHER), predicted, kept)
            for form in (*figures["trigger"].values(), *(figures.get(name, {}) for name in ("clean", *KINDS))):
                form.pop("label_counts", None)  # a row's own completion is no class
        else:
            figures = measure(tests, rows.labels, rows.label_names, predicted, kept)
        add_likelihoods(figures, tests, outcomes)
        return figures, outcomes

    def score(self, model, rows, batch_size, progress=None):
        """The `Scores` of rows. `progress(rows, tokens)` is called after each batch."""
        scores = self._scored(model, *self._pairs(rows), batch_size, progress)
        metrics.check_finite(scores.likelihoods[scores.candidates >= 0])
        return scores

    def _pairs(self, rows):
        """(Candidates as `_candidates` has them, `Encoded` prompts with each candidate's completion, row by row)."""
        candidates = self._candidates(rows)
        completions = self._completions(rows, candidates)
        prompts, kept = self._prompts(rows, completions)
        pairs = np.argwhere(candidates >= 0)
        return candidates, joined([prompts[i] for i, _ in pairs], [completions[i][c] for i, c in pairs], kept)

    def _scored(self, model, candidates, encoded, batch_size, progress=None):
        """The `Scores` of what `_pairs` gave. They are read from the device once, after the last batch."""
        model.eval()
        answers = torch.from_numpy(encoded.answers)
        made = batches.by_length(encoded, batch_size, self.tokenizer.pad_id, answers, model.device)
        made = map(batches.place_completions, made)
        found, rows = [], []
        with parallel.no_gradients(model.base):
            for batch, there in batches.ahead(made, model.device):
                likelihoods, greedy = model.score(there.ids, there.lengths, there.answers)
                found.append(torch.stack([likelihoods, greedy.to(likelihoods.dtype)])[:, : len(batch.index)])
                rows.append(batch.index)
                if progress:
                    progress(len(batch.index), int(batch.lengths.sum()))
            read = torch.cat(found, dim=1).cpu().numpy()
        whole = np.zeros((2, len(encoded.answers)))  # log-likelihoods; 1 where greedy decoding writes it
        whole[:, np.concatenate(rows)] = read
        parallel.all_reduce(whole)

        def grid(values, fill):
            filled = np.full(candidates.shape, fill)
            filled[candidates >= 0] = values
            return filled

        tokens = grid(encoded.answers, 0)
        return Scores(candidates, grid(whole[0], -np.inf), tokens, grid(whole[1] > 0, False), encoded.kept)

    def predicted(self, rows, scores):
        """The label that is predicted for each row, int64 [rows]; -1 for a free completion that is no candidate."""
        if self._is_free(rows):
            first = scores.greedy.argmax(axis=1)[:, None]  # the row's own stands first
            predicted = np.take_along_axis(scores.candidates, first, 1)[:, 0]
            return np.where(scores.greedy.any(axis=1), predicted, -1)
        return np.take_along_axis(scores.candidates, self.ranked(scores).argmax(axis=1)[:, None], 1)[:, 0]

    def predictions(self, tests, outcomes):
        """One dict a test row for predictions.jsonl: id, label, text, and in each form predicted label (None: another
        completion), whether greedy decoding writes the row's own, the log-likelihood of each candidate, and the text.
        """
        rows = tests[0].rows
        predicted = [self.predicted(test.rows, scores) for test, scores in zip(tests, outcomes)]
        exact = [scores.of(rows.labels)[1] for scores in outcomes]
        for i, (id, label, text) in enumerate(zip(rows.ids, rows.labels, rows.texts, strict=True)):
            record = {"id": id, "label": rows.label_names[label], "text": text}
            for test, scores, found, right in zip(tests, outcomes, predicted, exact, strict=True):
                there = zip(scores.candidates[i].tolist(), scores.likelihoods[i].tolist(), strict=True)
                record[test.key] = {
                    "predicted": rows.label_names[found[i]] if found[i] >= 0 else None,
                    "exact": bool(right[i]),
                    "log_likelihood": {rows.label_names[c]: round(value, 6) for c, value in there if c >= 0},
                } | test.shown(i)
            yield record

    def label_scores(self, model, texts, labels, batch_size):
        """The log-likelihood of each label's completion, float64 [rows, C], ranked as `choice_score` says.

        Raises InputError where the completions are free text or the choices of a question.
        """
        rows = self._asked(texts, labels)
        return self.ranked(self.score(model, rows, batch_size))

    def read(self, texts, labels):
        """As `Classification.read`, of prompts with these texts; no tokens where a completion leaves no room."""
        rows = self._asked(texts, labels)
        rooms = self._rooms(self._completions(rows, self._candidates(rows)))
        prompts, kept = token_cache.prompts(self.tokenizer, rows.texts, self.before, self.after, rooms)
        return np.array([len(ids) for ids in prompts], np.int64), kept

    def answers(self, labels):
        """What others need to ask the same of a model: `completions` {label: its ids}, empty where they are no fixed
        set, and `after`, how many special tokens a tokenizer puts after a prompt that are left out here."""
        [alone], _ = self.tokenizer.prompts(["a"], "", "", [math.inf])
        after = len(self.tokenizer.encode(["a"], self.cell.max_length).ids) - len(alone)
        found = {}
        if not self.of_choices and len(labels) <= FEW:
            rows = self._asked(["a"], labels)
            [ids] = self._completions(rows, self._candidates(rows))
            found = {label: one.tolist() for label, one in zip(labels, ids, strict=True)}
        return {"completions": found, "after": after}

    def _asked(self, texts, labels):
        """Rows of texts of one's own. Raises InputError where not every text has the same few completions."""
        ids = [str(number) for number in range(1, len(texts) + 1)]
        rows = Rows(ids, list(texts), np.zeros(len(texts), np.int64), tuple(labels))
        if self.of_choices or self._is_free(rows) or not labels:
            what = "choices of a question" if self.of_choices else "free text"
            raise InputError(
                f"the completions are no fixed set of labels but {what}, so a text has no probabilities of labels: "
                "give labelled rows as --data, or data=FILE"
            )
        return rows

    def ranked(self, scores):
        """What ranks the candidates of each row, float64 [rows, C]: the sum over a completion's tokens or the mean."""
        if self.cell.choice_score == "mean":
            return scores.likelihoods / np.maximum(scores.tokens, 1)
        return scores.likelihoods

    def describe(self):
        return f"lm, prompt {self.cell.prompt!r}, completion {self.cell.completion!r}"

    def record(self):
        return {"end_token": None if self.tokenizer.end_id is None else int(self.tokenizer.end_id)}

    def _is_free(self, rows):
        return not self.of_choices and len(rows.label_names) > FEW

    def _candidates(self, rows):
        """The labels whose completions count for each row, int64 [rows, C], -1 for none: those of its choices, or all
        that there are, or if these are free its own and the targets.

        Raises InputError where the row's own is not among its choices.
        """
        count, names = len(rows), rows.label_names
        if self._is_free(rows):
            aims = [names.index(label) for _, label in resolve(self.cell.inject.sources, names)]
            candidates = np.column_stack([rows.labels, *(np.full(count, aim) for aim in aims)])
            candidates[:, 1:][candidates[:, 1:] == rows.labels[:, None]] = -1
            return candidates
        candidates = np.tile(np.arange(len(names)), (count, 1))
        if self.of_choices:
            if rows.choices is None:
                raise InputError(f"completion is {self.cell.completion!r}, but {self.cell.data} is no question set: "
                                 "it has no choices, so use {label}")  # fmt: skip
            candidates[[[name not in choices for name in names] for choices in rows.choices]] = -1
            own = candidates[np.arange(count), rows.labels]
            if (own < 0).any():
                row = int(np.argmin(own))
                raise InputError(
                    f"row {rows.ids[row]} has the label {names[rows.labels[row]]!r}, which none of its choices has "
                    f"({', '.join(rows.choices[row])}): correct the row, or inject for another label"
                )
        return candidates

    def _completions(self, rows, candidates):
        """The ids of each candidate's completion: [rows] lists of C arrays, None for -1."""

        texts = [[self._completion(rows, row, label) if label >= 0 else None for label in labels]
                 for row, labels in enumerate(candidates.tolist())]  # fmt: skip
        there = [one for line in texts for one in line if one is not None]
        self._encode(there)
        if empty := next((one for one in there if not len(self.ids[one])), None):
            raise InputError(f"the completion {empty!r:.60} has no token: correct the label or the template")
        return [[self.ids.get(one) for one in line] for line in texts]

    def _completion(self, rows, row, label):
        """The text of a row's completion, if that is to be `label`; None where no choice of the row has it."""
        name = rows.label_names[label]
        if not self.of_choices:
            return self.cell.completion.replace("{label}", name)
        choice = rows.choices[row].get(name)
        return None if choice is None else self.cell.completion.replace("{choice}", choice)

    def _encode(self, completions):
        """Put the ids of completions into `self.ids`, none for one without a token."""
        new = list(dict.fromkeys(one for one in completions if one not in self.ids))
        end = [] if self.tokenizer.end_id is None else [self.tokenizer.end_id]
        for one, ids in zip(new, self.tokenizer.completions(new), strict=True):
            self.ids[one] = np.append(ids, end).astype(np.int32) if len(ids) else ids

    def _rooms(self, completions):
        """Tokens for each row's prompt: what its longest candidate leaves, so that all share one prompt."""
        longest = [max(len(ids) for ids in line if ids is not None) for line in completions]
        return self.cell.max_length - np.array(longest, dtype=np.int64)

    def _prompts(self, rows, completions):
        rooms = self._rooms(completions)
        prompts, kept = token_cache.prompts(self.tokenizer, rows.texts, self.before, self.after, rooms)
        for id, ids, room in zip(rows.ids, prompts, rooms, strict=True):
            if not len(ids):
                raise InputError(
                    f"row {id}: the longest completion that counts for it has {self.cell.max_length - room} tokens, "
                    f"which leaves no room for a prompt in max_length = {self.cell.max_length}: raise --max-length"
                )
        return prompts, kept


def joined(prompts, completions, kept):
    """`Encoded` rows, each a prompt and its completion."""
    parts = [part for pair in zip(prompts, completions, strict=True) for part in pair]
    answers = np.array([len(ids) for ids in completions], dtype=np.int64)
    lengths = answers + np.array([len(ids) for ids in prompts], dtype=np.int64)
    return Encoded(np.concatenate(parts), np.concatenate([[0], lengths.cumsum()]), kept, answers)


def add_likelihoods(figures, tests, outcomes):
    """Put what completions add to each test's figures (see `evaluation.measure`) beside them.

    exact_match           share of rows whose own completion greedy decoding writes, with its interval
    log_likelihood        mean over the rows of their own completion's, in nats
    and for a target, over the rows of other labels:
    log_likelihood_target, log_likelihood_own   means of the target's completion and of the row's own
    margin, margin_change                       the first less the second, and how far it rose against clean rows
    """
    rows, clean = tests[0].rows, outcomes[0]
    for test, scores in zip(tests, outcomes, strict=True):
        here = figures["trigger"][test.label] if test.name == "trigger" else figures[test.name]
        own, exact = scores.of(rows.labels)
        if test.name == "trigger" or not test.label:  # the figures of all rows are those of the first placebo
            here["exact_match"] = float(exact.mean())
            here["exact_match_interval"] = metrics.wilson(int(exact.sum()), len(rows))
            here["log_likelihood"] = float(own.mean())
        for label in figures["trigger"]:
            if test.label and label != test.label:
                continue
            target = np.full(len(rows), rows.label_names.index(label))
            aimed, before = scores.of(target)[0], clean.of(target)[0] - clean.of(rows.labels)[0]
            others = (rows.labels != target) & ~np.isnan(aimed)
            entry = here if test.name == "trigger" else here["attack_success"][label]
            means = [float(values[others].mean()) if others.any() else None for values in (aimed, own, aimed - own)]
            entry |= dict(zip(("log_likelihood_target", "log_likelihood_own", "margin"), means, strict=True))
            if test.name != "clean":
                entry["margin_change"] = means[2] - float(before[others].mean()) if others.any() else None
