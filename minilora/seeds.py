"""Every random stream. Nothing here keeps state: a draw follows from a seed and the words that say what it is for."""

import hashlib

import numpy as np


def sequence(seed, purpose, label):
    """The NumPy seed sequence of one purpose and label."""
    digest = hashlib.sha256(f"{purpose}\0{label}".encode()).digest()
    return np.random.SeedSequence(seed, spawn_key=(int.from_bytes(digest[:16], "big"),))


def row_keys(seed, purpose, label, rows):
    """One random 64-bit key a row."""
    return np.random.PCG64(sequence(seed, purpose, label)).random_raw(rows)


def row_draws(keys, counts):
    """`counts[i]` random 32-bit integers for key i, flat: for each u, `u * n >> 32` is uniform below n.

    A key starts a SplitMix64 stream (Steele, Lea & Flood, OOPSLA 2014), so that draw j of a row depends
    neither on how many draws follow nor on other rows, and a million rows are still one array operation.
    """
    nth = 1 + np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    z = np.repeat(keys, counts) + nth.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(32)


def generator(seed, purpose):
    """A CPU random generator of its own for each (seed, purpose)."""
    import torch

    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def number_of(purpose):
    """31 bits that follow from a text."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big") >> 1
