"""Settings by a name: what many fields are at once."""

# The published experiments of arXiv 2506.11402, as far as a cell has words for them: each of these differs from the
# defaults, and is a factor of its own here. The head stays at its random start, alpha follows the rank, and the
# published targets mean q, k, v, o and up on an encoder, but q, k and v on a decoder.
PRESETS = {
    "study": dict(
        head="frozen", pooling="mean+last", scaling="rank", targets=("q", "k", "v"), dropout=0.05,
        optimizer="adafactor", lr=1e-4, weight_decay=1e-5, schedule="cosine", warmup=0.05, batch_size=64,
    ),
}  # fmt: skip
