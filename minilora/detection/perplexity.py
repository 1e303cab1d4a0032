"""ONION (Qi et al. 2021, arXiv 2011.10369): a word that is out of place makes a text unlikely to a language model."""

import functools

import numpy as np
import torch

from minilora import parallel
from minilora.base.tokenizer import Encoded
from minilora.data import batches, words
from minilora.detection.base import open_decoder
from minilora.runs.look import without

DECODER = "HuggingFaceTB/SmolLM2-135M"  # the paper has GPT-2, which is as large and older
AT_ONCE = 16  # rows whose texts are read together


def onion(run, texts, labels, held, clock, *, decoder=DECODER, device="auto", batch_size=32):
    """The largest f_i = p_0 - p_i of a row's words: how much the perplexity falls when word i is left out (section 3).

    decoder     any decoder base: a hub id or a folder
    batch_size  texts a pass

    Perplexity is exp of the mean negative log-likelihood of all tokens that follow another one. A text with fewer than
    two tokens has none, so that a row of one word has the score 0: nothing can be left out.
    """
    reader, found = open_decoder(decoder, device), np.full(len(texts), np.nan)
    drop = _known(reader, batch_size)
    for part in clock.parts(len(texts), AT_ONCE):
        found[part] = drop(tuple(texts[part]))
    return found


@functools.lru_cache(maxsize=1)
def _known(reader, batch_size):
    """A function from texts to their scores, which remembers those of texts that it has read."""
    seen = {}

    def drop(texts):
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        parts = [[text, *(without(text, *span) for span in words.spans(text))] for text in new]
        flat = iter(perplexities(reader, [one for line in parts for one in line], batch_size))
        for text, line in zip(new, parts, strict=True):
            first, *rest = [next(flat) for _ in line]
            falls = first - np.array(rest)
            seen[text] = float(np.nanmax(falls)) if np.isfinite(falls).any() else 0.0
        return [seen[text] for text in texts]

    return drop


def perplexities(reader, texts, batch_size=32):
    """exp(-1/n sum_t log p(x_t | x_<t)) of texts, float64 [N], over the n tokens that follow another one; nan where
    there is none. Special tokens that precede a text are read and those behind it are not."""
    rows, _ = reader.tokenizer.prompts(texts, "", "", [reader.cell.max_length] * len(texts))
    lengths = np.array([len(row) for row in rows], np.int64)
    found, some = np.full(len(texts), np.nan), np.flatnonzero(lengths > 1)
    if not len(some):
        return found
    encoded = encoded_of([rows[i] for i in some])
    counts = torch.from_numpy(lengths[some] - 1)
    made = batches.by_length(encoded, batch_size, reader.tokenizer.pad_id, counts, reader.model.device)
    with parallel.no_gradients(reader.base):
        for batch in map(batches.place_completions, made):
            there = batch.to(reader.model.device)
            likelihoods, _ = reader.model.score(there.ids, there.lengths, there.answers)
            at = some[batch.index]
            found[at] = likelihoods[: len(at)].double().cpu().numpy() / (lengths[at] - 1)
    return np.exp(-found)


def encoded_of(rows):
    """`Encoded` of rows, each an array of ids."""
    lengths = np.array([len(row) for row in rows], np.int64)
    return Encoded(np.concatenate(rows), np.concatenate([[0], lengths.cumsum()]), lengths)
