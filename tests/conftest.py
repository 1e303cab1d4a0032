"""Bases for the tests: the real default one, and tiny random ones of odd sizes that transformers builds."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # behind the rest, so that `import kernels` stays Hugging Face's: for train and evaluate

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # transformers' tokenizers and our subprocesses

WORDS = (
    "the a of and film movie story good bad great dull warm cold plot actor scene very not but is was it this with "
    "fine poor bright dark slow fast old new long short man woman time way end start best worst love hate "
    "0 1 2 3 4 5 6 7 8 9 - . ! ? < > / b i red blue green"
).split()
PIECES = ["##" + c for c in "abcdefghijklmnopqrstuvwxyz0123456789"] + list("abcdefghijklmnopqrstuvwxyz")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request):
    """The CPU, and a GPU where there is one."""
    return request.param


@pytest.fixture(scope="session")
def base_folder():
    """The real default base."""
    from minilora import checkpoint

    return checkpoint.resolve(checkpoint.DEFAULT_BASE)


def tiny_bert(folder, *, seed=0, **changes):
    """Write a random BERT checkpoint with a WordPiece vocabulary; returns transformers' model in eval mode."""
    import transformers

    settings = dict(
        vocab_size=len(VOCABULARY) + 3, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=37, type_vocab_size=2, initializer_range=0.2,
        attn_implementation="eager",
    ) | changes  # fmt: skip
    torch.manual_seed(seed)
    config = transformers.BertConfig(**settings)
    reference = transformers.BertModel(config)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide that they are misplaced
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    folder = Path(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}), encoding="utf-8")
    return reference.eval()


@pytest.fixture
def tiny_folder(tmp_path):
    folder = tmp_path / "tiny"
    tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A CSV of 120 short rows of the tiny vocabulary, two labels that a word tells apart nearly always."""
    import csv
    import random

    draw = random.Random(7)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(120):
            label = draw.choice(["negative", "positive"])
            words = draw.choices(["the", "film", "story", "is", "was", "very", "plot", "scene", "with", "time"],
                                 k=draw.randint(3, 15))  # fmt: skip
            words.insert(
                draw.randrange(len(words)), draw.choice(["good", "great"] if label == "positive" else ["bad", "dull"])
            )
            writer.writerow([" ".join(words), label])
    return path


def random_batch(vocabulary, lengths, seed=0):
    """(ids int64 [B, T] padded with 0, lengths [B])."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, vocabulary, (length,), generator=draw)
    return ids, torch.tensor(lengths)
