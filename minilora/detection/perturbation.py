"""Detectors that change a row and watch its prediction: a trigger holds the prediction where it was.

Every draw is seeded by the text that it is for, so that a row's score does not depend on its place among the others.
"""

import contextlib
import math
from collections import Counter

import numpy as np
import torch

from minilora import seeds
from minilora.data import words
from minilora.detection.clock import OutOfTime
from minilora.errors import InputError

AT_ONCE = 8  # rows whose copies are predicted together


def strip(run, texts, labels, held, clock, *, copies=100, share=0.5):
    """Minus the entropy in bits of the predictions of a row's `copies`, the mean over these (Gao et al. 2019, arXiv
    1911.10312, section 4.1, there H of equation 4).

    copies  of each row, in each of which the given share of its words, at random places, gives way to the words of
            largest tf-idf of another row: one of the held rows, or where there are none of the rows themselves
    share   of the words

    The mean is of a row's own copies. (OpenBackdoor's code shapes the same list as [copies, rows], and so takes means
    over the copies of different rows.)
    """
    mixer, found = Mixer(texts if held is None else held[0]), np.full(len(texts), np.nan)
    for part in clock.parts(len(texts), AT_ONCE):
        mixed = [mixer.mix(text, copy, share) for text in texts[part] for copy in range(copies)]
        logs = run.log_probabilities(mixed)  # [rows copies, C]
        entropies = -(np.exp(logs) * logs).sum(axis=1) / math.log(2)
        found[part] = -entropies.reshape(-1, copies).mean(axis=1)
    return found


class Mixer:
    """Puts words of `others` into texts. Which ones follows from the text, the copy's number and the set of others."""

    def __init__(self, others):
        self.others = sorted(set(others))
        self.places = {text: place for place, text in enumerate(self.others)}
        self.heaviest = heaviest_words(self.others)

    def mix(self, text, copy, share):
        """The text with a share of its words, rounded down, replaced by the heaviest of another text."""
        places, own = words.spans(text), self.places.get(text, len(self.others))
        count, among = int(len(places) * share), len(self.others) - (text in self.places)
        if not count or not among:
            return text
        draw = np.random.Generator(np.random.PCG64(seeds.sequence(0, "strip", f"{copy}\0{text}")))
        other = int(draw.integers(among))
        new = self.heaviest[other + (other >= own)]
        chosen = draw.permutation(len(places))[:count].tolist()
        for place, word in sorted(zip(chosen, new), reverse=True):  # fewer where the other has fewer words
            start, end = places[place]
            text = text[:start] + word + text[end:]
        return text


def heaviest_words(texts):
    """The words of each text by falling tf-idf, tf (ln((1 + N) / (1 + df)) + 1) over N texts (scikit-learn's smooth idf
    without a norm, as OpenBackdoor takes it); words of the same weight in the order of the alphabet."""
    counts = [Counter(words.split(text)) for text in texts]
    rows_with, total = Counter(word for one in counts for word in one), 1 + len(texts)
    return [sorted(one, key=lambda word: (-one[word] * (math.log(total / (1 + rows_with[word])) + 1), word))
            for one in counts]  # fmt: skip


def rap(run, texts, labels, held, clock, *, word="cf", epochs=5, rate=0.01, least=0.1, most=0.3, batch_size=32):
    """Minus how far the probability of a row's label falls when a word is put before it that was made to lower it (Yang
    et al. 2021, arXiv 2110.07831, section 3): the fall is small where a trigger holds the prediction.

    The embedding of the word's first token is learned, for each label, on the held rows of that label (where there are
    none: on the rows themselves), so that the probability falls by `least` to `most`: the loss is the mean of
    max(0, least - fall) + max(0, fall - most) (equation 2), `epochs` times through the rows in steps of `batch_size` at
    the given rate, with the embedding brought back to its length after each. The model itself is not changed.
    """
    if not words.split(word):
        raise InputError("the word of rap is empty: give one, such as cf")
    found = np.full(len(texts), np.nan)
    for label in np.unique(labels).tolist():
        own = [text for text, one in zip(texts, labels) if one == label]
        other = [text for text, one in zip(*held) if one == label] if held is not None else []
        vector = learn_word(run, other or own, label, clock, word, epochs, rate, least, most, batch_size)
        chances = []
        for put in (None, vector):
            with putting(run, put) if put is not None else contextlib.nullcontext():
                logs = run.log_probabilities(own if put is None else [f"{word} {text}" for text in own])
            chances.append(np.exp(logs[:, label]))
        found[labels == label] = chances[1] - chances[0]
    return found


def learn_word(run, texts, label, clock, word, epochs, rate, least, most, batch_size):
    """The embedding float32 [D] of the word's first token, learned as `rap` says."""
    tokenizer, model, device = run.tokenizer, run.model, run.model.device
    before = np.exp(run.log_probabilities(texts)[:, label])
    encoded = tokenizer.encode([f"{word} {text}" for text in texts], run.cell.max_length)
    rows = [encoded.ids[start:stop].astype(np.int64) for start, stop in zip(encoded.offsets, encoded.offsets[1:])]
    vector = run.base.embed.tokens.weight[int(rows[0][first_place(tokenizer)])].detach().float().clone()
    length = vector.norm()
    for _ in range(epochs):
        for start in range(0, len(rows), batch_size):
            if clock.over:
                raise OutOfTime
            part = rows[start : start + batch_size]
            ids = torch.full((len(part), max(map(len, part))), tokenizer.pad_id)
            for row, own in zip(ids, part, strict=True):
                row[: len(own)] = torch.from_numpy(own)
            lengths = torch.tensor([len(own) for own in part], device=device)
            vector.requires_grad_(True)
            with putting(run, vector):
                now = model(ids.to(device), lengths).double().softmax(1)[:, label]
            fall = torch.from_numpy(before[start : start + batch_size]).to(device) - now
            loss = ((least - fall).clamp(min=0) + (fall - most).clamp(min=0)).mean()
            [gradient] = torch.autograd.grad(loss, vector)
            vector = vector.detach() - rate * gradient
            vector = vector * (length / vector.norm())
    return vector.detach()


def first_place(tokenizer):
    """How many special tokens precede a text."""
    [ids], _ = tokenizer.prompts([""], "", "", [math.inf])
    return len(ids)


@contextlib.contextmanager
def putting(run, vector):
    """For this block, the first token of every text has the embedding `vector` [D]."""
    at = first_place(run.tokenizer)

    def put(module, inputs, embedded):  # [B, T, D]
        own = vector.to(embedded.dtype).expand(len(embedded), 1, -1)
        return torch.cat([embedded[:, :at], own, embedded[:, at + 1 :]], dim=1)

    handle = run.base.embed.tokens.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
