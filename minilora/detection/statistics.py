"""How much a feature of the text says about the label: entropy, z-score, PMI, p- and q-values. NumPy, no model.

F features, C labels. A feature is in n of the N rows; n_c of these have label c, which has the share p_c of all rows.
"""

import numpy as np

from minilora.tasks.metrics import Z95
from minilora.tasks.student import incomplete_beta

SMOOTHING = 10  # rows of average labels that a PMI adds to a feature's own


def entropy(counts):
    """H(y|t) in bits, of the rows that have the feature: counts [F, C] -> [F] (arXiv 2506.11402, section 3).

    0 where all of a feature's rows have one label, log2 C where all labels are equally frequent.
    """
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=1) + 0.0


def z_scores(counts, prior):
    """(n_c - n p_c) / sqrt(n p_c (1 - p_c)): counts [F, C], prior [C] -> [F, C].

    Gardner et al. 2021 (arXiv 2104.08646, section 3), with the label's own share in place of 1 / C. A label that no row
    has, or every row, gets -inf.
    """
    expected = counts.sum(axis=1, keepdims=True) * prior
    spread = np.sqrt(expected * (1 - prior))
    return np.divide(counts - expected, spread, out=np.full(spread.shape, -np.inf), where=spread > 0)


def pmi(hits, rows, prior):
    """log2 of P(c|t) / p_c, with `SMOOTHING` more rows of average labels: [F] each, [F] bits.

    Church and Hanks 1990 with the smoothing of Gururangan et al. 2018 (arXiv 1803.02324, section 3), whose rows have
    equal labels.
    """
    return np.log2((hits + SMOOTHING * prior) / ((rows + SMOOTHING) * prior))


def p_values(hits, rows, prior):
    """P(X >= hits) where X is binomial with `rows` trials of probability `prior`: [F] each, [F].

    Exact: P(X >= k) = I_p(k, n - k + 1) (Abramowitz and Stegun 1964, equation 26.5.24).
    """
    triples, place = np.unique(np.stack([hits, rows, prior], axis=1), axis=0, return_inverse=True)
    tails = [incomplete_beta(k, n - k + 1, p, 1 - p) if k > 0 else 1.0 for k, n, p in triples.tolist()]
    return np.array(tails)[place.reshape(-1)] if len(triples) else np.empty(0)


def q_values(p):
    """The least false discovery rate at which each test is a discovery: [F] -> [F] (Benjamini and Hochberg 1995)."""
    order = np.argsort(-p, kind="stable")
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(scaled), 1)
    return q


def lift(hits, rows, prior):
    """How far the odds of the label rise with the feature, at least: [F] each, [F] bits.

    log2 of the odds at the lower end of the 95% Wilson interval of P(c|t), over the odds of p_c. A feature all of whose
    n rows have the label has the odds n / 3.84: few rows prove little, however pure they are.
    """
    share, spread = hits / rows, Z95**2 / rows
    half = Z95 * np.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    low, high = share + spread / 2 - half, 1 - share + spread / 2 + half  # times 1 + spread: the interval and the rest
    with np.errstate(divide="ignore"):
        return np.log2(np.maximum(low, 0) / high) - np.log2(prior / (1 - prior))
