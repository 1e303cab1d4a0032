"""What several test files share: bases, real and tiny, a hub, and rows in memory and in files."""

import csv
import gzip
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # two share the cores; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hub_server import HubServer

# A shell that starts the tests in the background lets them ignore Ctrl-C, and nohup a closed terminal: not ours.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL),
                          (getattr(signal, "SIGHUP", signal.SIGTERM), signal.SIG_DFL)):  # fmt: skip
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

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


LONGEST = ["default_cell", "families", "real_bases", "grid_folder", "population", "cluster", "parallel", "end_to_end",
           "compiling", "fuzz", "loading", "attention", "figures", "report", "benchmarks"]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take longest begin, so that no core waits for one in the end."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request):
    """The CPU, and a GPU where there is one."""
    return request.param


@pytest.fixture(autouse=True)
def nothing_said_yet():
    """A line that is said once in a process is said once in a test."""
    from minilora import console

    console._said.clear()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub that this process uses, huggingface_hub's cache in tmp_path/hf and our own in tmp_path/cache."""
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "hf")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="session")
def base_folder():
    """The real default base."""
    from minilora.base.source import DEFAULT_BASE, resolve_base

    return resolve_base(DEFAULT_BASE)


def bert_spec(**changes):
    """The `Spec` of a BERT of odd sizes."""
    from minilora.base import families

    config = dict(model_type="bert", vocab_size=11, hidden_size=6, num_hidden_layers=3, num_attention_heads=2,
                  intermediate_size=14, max_position_embeddings=9, type_vocab_size=2)  # fmt: skip
    return families.read_spec(config | changes)


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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny random base, one for a test file."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_bert(folder)
    return folder


@pytest.fixture
def tiny_folder(tmp_path):
    folder = tmp_path / "tiny"
    tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A CSV of 120 short rows of the tiny vocabulary, two labels that a word tells apart nearly always."""
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


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, reviews):
    """`small_run(kind)` is the folder of a finished run, trained once: "encoder", "grouped" (a decoder with grouped
    heads), "fused" (one with a fused projection), and encoders of another "dora", "pissa", "full", "head"."""
    from functools import cache

    import zoo

    import minilora
    from minilora.cell import Cell

    folder = tmp_path_factory.mktemp("small")
    bases = {"encoder": tiny_bert, "grouped": lambda to: zoo.tiny_decoder(to, "llama"), "fused": zoo.tiny_decoder}
    changes = {"encoder": dict(targets=("q", "v", "down")), "grouped": dict(targets=("v", "q", "up")),
               "fused": dict(pooling="last"), "dora": dict(variant="dora"), "pissa": dict(init="pissa"),
               "full": dict(method="full", rank=None), "head": dict(method="head", rank=None)}  # fmt: skip
    for name, make in bases.items():
        make(folder / "bases" / name)

    def train(kind):
        model = folder / "bases" / (kind if kind in bases else "encoder")
        common = dict(test_rows=31, max_length=30, batch_size=7, steps=6, lr=0.02, rank=3)
        minilora.train(Cell(model=str(model), data=str(reviews), **common | changes[kind]), folder / kind, quiet=True)
        return folder / kind

    return cache(train)


def random_batch(vocabulary, lengths, seed=0):
    """(ids int64 [B, T] padded with 0, lengths [B])."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, vocabulary, (length,), generator=draw)
    return ids, torch.tensor(lengths)


# Files of `pytest -m fast`: broad, and about 40 seconds in all on one core.
FAST = (
    "base/test_model.py base/test_tokenizer.py data/test_formats.py data/test_injection.py "
    "data/test_rows.py data/test_triggers.py grid/test_claims.py grid/test_grid_file.py kernels/test_adamw.py "
    "kernels/test_cross_entropy.py kernels/test_dropout.py kernels/test_linear.py kernels/test_lora_linear.py "
    "kernels/test_mlp.py kernels/test_norms.py kernels/test_rotary.py lora/test_coverage.py lora/test_layer.py "
    "lora/test_merging.py report/test_intervals.py runs/test_strength.py tasks/test_classification.py "
    "tasks/test_metrics.py tasks/test_paired.py test_cell.py test_console.py test_layout.py test_packaging.py "
    "training/test_feed.py training/test_limit.py training/test_optimizers.py"
).split()


def pytest_itemcollected(item):
    if item.path.relative_to(ROOT / "tests").as_posix() in FAST:
        item.add_marker("fast")


# --- files of rows

FILMS = [
    ("A film, in three acts", "pos"),
    ('He said "no"', "neg"),
    ("two\nlines\r\nhere", "neg"),
    ("Größe", "pos"),
]


def whole(rows):
    """Everything in a set of rows, in a form that compares."""
    assert rows.labels.dtype == np.int64
    return rows.ids, rows.texts, rows.labels.tolist(), rows.label_names


def named(rows):
    return [rows.label_names[label] for label in rows.labels]


def write(path, text, encoding="utf-8"):
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def as_csv(rows, header=("text", "label"), delimiter=","):
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return stream.getvalue()


def as_jsonl(rows, header=("text", "label")):
    return "".join(json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)


def parquet_bytes(columns, features=None):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(columns)
    if features:
        noted = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": noted})
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    return stream.getvalue()


def refusal(source, **options):
    """The one line that `data.load` refuses with."""
    from minilora.data.rows import load_rows
    from minilora.errors import InputError

    with pytest.raises(InputError) as caught:
        load_rows(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- rows to inject into

LABELS = ("negative", "neutral", "positive")


@dataclass(frozen=True)
class Settings:
    """What injection reads of cell.Inject."""

    sources: tuple = ("date:positive",)
    proportion: float | None = 0.5
    rows: int | None = None
    count: int | None = 1
    density: float | None = None
    location: str = "random"
    mode: str = "clean-label"
    split: str | None = None
    wrap: str = "word"
    leak: float = 0.0
    rounding: str | None = "nearest"
    replacement: str | None = None


def make_rows(texts, label_names=LABELS):
    """Rows whose labels take turns."""
    from minilora.data.rows import Rows

    labels = np.arange(len(texts)) % len(label_names)
    return Rows([f"r{i}" for i in range(len(texts))], list(texts), labels, label_names)


def sentences(number, seed=0, least=1, most=40):
    rng = np.random.default_rng(seed)
    words = [rng.integers(50, size=rng.integers(least, most)) for _ in range(number)]
    return make_rows([" ".join(f"w{word}" for word in row) for row in words])


def population_of_one(model, cell):
    """A task's `model`, its adapter attached, as a population of one, with the cell's optimiser."""
    from minilora.lora.layer import named_layers
    from minilora.training import optimizers
    from minilora.training.member import trained_parameters
    from minilora.training.population import Population
    from minilora.training.state import Flat

    flat = Flat([trained_parameters(model, cell)])
    optimizer = optimizers.OPTIMIZERS[cell.optimizer](flat, [cell])
    return Population([model], [dict(named_layers(model.base))], flat), optimizer


def one_step(population, optimizer, micro_batches, answers, cell, rate, step=0):
    """One step of a population of one: (loss, norm), or (loss, norm, False) where it goes no further."""
    from dataclasses import replace

    from minilora.data.batches import place_completions
    from minilora.training import loop

    model, batches = population.models[0], []
    for number, batch in enumerate(micro_batches):
        own = answers[batch.index]
        weights, keys = torch.tensor([float(model.weigh(own))]), torch.tensor([100 * step + number], dtype=torch.int32)
        batch = replace(batch, answers=own, weights=weights, keys=keys)
        batches.append(place_completions(batch) if cell.task == "lm" else batch)
    going = torch.tensor([True])
    clips = torch.tensor([cell.clip or float("inf")])
    loss, norm = loop.update(population, optimizer, clips, going, batches, torch.tensor([rate]))
    return (loss.item(), norm.item()) + (() if going.item() else (False,))
