"""Damaged checkpoints, configurations, tokenizers, adapters and files of rows, and sick hubs, in limited processes.

python -m tests.campaigns.fuzz KIND SEED FIRST FOLDER     the cases of one kind from FIRST on, a line of JSON for each

Each kind has a process of its own, whose address space is limited to 1 GiB more than it had after a good case. A case
may use the good file's text, but must end: as a result, or as an InputError of one line, in SLOWEST seconds of its
process. A process that dies, or says nothing for HANG seconds, is counted as wrong and started again behind that case.
"""

import gzip
import json
import os
import random
import resource
import select
import subprocess
import sys
import time
from pathlib import Path

ROOM = 1 << 30
SLOWEST, HANG = 10.0, 60.0  # seconds: of the process, and of the clock, since the machine may be busy
AT_ONCE = 60  # cases of a kind before the next kind's turn


# --- what is damaged


def checkpoint(kind, folder):
    """`use` of a base; weights, configuration, shard and index are changed as the suite does."""
    import test_fuzz
    from conftest import tiny_bert
    from safetensors.torch import load_file, save_file

    tiny_bert(folder)
    if kind in ("shard", "index"):
        tensors = load_file(folder / "model.safetensors")
        names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
        for start, name in enumerate(names):
            save_file(dict(list(tensors.items())[start::2]), folder / name)
        places = {tensor: names[number % 2] for number, tensor in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (folder / "model.safetensors").unlink()
    name, change = test_fuzz.KINDS[kind]
    return [folder / name], change, lambda: test_fuzz.use(folder)


def tokenizer(kind, folder):
    """Tokenizers of three kinds; a text with words, accents, emoji and none of its characters is encoded."""
    import test_fuzz
    import tokenizers
    from conftest import VOCABULARY
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    from minilora.base.tokenizer import load

    folder.mkdir(exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    settings = {"do_lower_case": True, "pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 30}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    corpus = [" ".join(VOCABULARY[5:]), "the film is great, a bad plot: nah\u00efve caf\u00e9 \u2603"] * 3
    if kind == "vocabulary":
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
        paths = [folder / "vocab.txt", folder / "tokenizer_config.json"]
    else:
        if kind == "wordpiece":
            made = tokenizers.BertWordPieceTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)})
        elif kind == "bpe":
            made = tokenizers.Tokenizer(models.BPE())
            made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            made.post_processor = processors.ByteLevel()
            trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
            made.train_from_iterator(corpus, trainer)
        else:
            made = tokenizers.Tokenizer(models.Unigram())
            made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="[UNK]",
                                              show_progress=False)  # fmt: skip
            made.train_from_iterator(corpus, trainer)
        made.save(str(folder / "tokenizer.json"))
        paths = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    texts = ["the film is great", "Caf\u00e9 \u2603 \U0001f600", "x" * 300, " "]

    def change(draw, data):
        if kind == "vocabulary" and data[:1] != b"{":
            return test_fuzz.damage(draw, data, len(data))
        return test_fuzz.text(draw, data)

    return paths, change, lambda: load(folder).encode(texts, 30)


def adapter(kind, folder):
    """An adapter as a run writes it: PEFT's configuration and tensors, our head, and the run's own factors."""
    import test_fuzz
    from conftest import tiny_bert

    import minilora
    from minilora.base import model
    from minilora.cell import Cell
    from minilora.lora import storage

    tiny_bert(folder / "tiny")
    rows = [
        (f"the film is {word} {i}", label)
        for i in range(10)
        for word, label in (("great", "positive"), ("dull", "negative"))
    ]
    cell = Cell(model=str(folder / "tiny"), steps=1, test_rows=4, batch_size=4, max_length=16, rank=2)
    minilora.train(cell, folder / "run", rows=rows)
    own = folder / "run" / "adapter"
    if kind == "factors":
        names, where = [folder / "run" / "factors.safetensors"], folder / "run"
    else:
        names = [own / "adapter_config.json", own / "adapter_model.safetensors", own / "head.json"]
        where = own

    def change(draw, data):
        return (test_fuzz.text if data[:1] == b"{" else test_fuzz.weights)(draw, data)

    return names, change, lambda: storage.load(where, model.load(folder / "tiny"))


def rows(kind, folder):
    """A file of rows of one format, plain or packed."""
    import test_fuzz
    from conftest import FILMS, as_csv, as_jsonl, parquet_bytes

    from minilora.data.rows import load_rows

    name, packed = kind.removesuffix(".gz"), kind.endswith(".gz")
    table = [(f"{text} {i}", label) for i in range(8) for text, label in FILMS]
    columns = {"text": [text for text, _ in table], "label": [int(label == "pos") for _, label in table]}
    content = {
        "csv": as_csv(table).encode(),
        "tsv": as_csv([(text.split("\n")[0], label) for text, label in table], delimiter="\t").encode(),
        "jsonl": as_jsonl(table).encode(), "parquet": parquet_bytes(columns, {"label": {"names": ["neg", "pos"]}}),
    }[name]  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / f"rows.{kind}"
    path.write_bytes(gzip.compress(content) if packed else content)

    def change(draw, data):
        if packed and draw.random() < 0.5:
            return gzip.compress(inner(draw, gzip.decompress(data)))
        return inner(draw, data)

    def inner(draw, data):
        if name == "jsonl" and draw.random() < 0.5 and data.startswith(b"{"):
            lines = data.splitlines()
            at = draw.randrange(len(lines))
            lines[at] = test_fuzz.spoil(draw, lines[at]).encode("utf-8", "surrogatepass")
            return b"\n".join(lines)
        return test_fuzz.damage(draw, data, len(data))

    return [path], change, lambda: load_rows(path)


CHECKPOINTS = dict.fromkeys(["weights", "shard", "index", "config"], checkpoint)
TOKENIZERS = dict.fromkeys(["vocabulary", "wordpiece", "bpe", "unigram"], tokenizer)
ADAPTERS = dict.fromkeys(["adapter", "factors"], adapter)
ROWS = dict.fromkeys(["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"], rows)
KINDS = CHECKPOINTS | TOKENIZERS | ADAPTERS | ROWS


# --- the process that meets them


def damaged(kind, seed, first, folder):
    """Yield (number, function that meets the case), and put the good files back after each."""
    paths, change, use = KINDS[kind](kind, folder)
    good = [path.read_bytes() for path in paths]
    use()
    yield None, use
    number = first
    while True:
        draw = random.Random(f"{seed} {kind} {number}")
        at = draw.randrange(len(paths))
        bad = change(draw, good[at])
        replace(paths[at], bad)
        yield number, use
        replace(paths[at], good[at])
        number += 1


def replace(path, content):
    path.unlink(missing_ok=True)  # not written over: the old one may still be mapped
    path.write_bytes(content)


def sick_hubs(kind, seed, first, folder):
    """Yield (number, function that fetches from a hub with one or two random sick answers)."""
    from hub_server import SICK_FILES, SICK_LISTINGS, HubServer
    from huggingface_hub import constants

    from minilora import hub

    hub.PATIENCE_SECONDS, hub.SLOW_SECONDS, hub.LISTING_BYTES, hub.FILE_BYTES = 3, 1, 4 << 20, 8 << 20
    os.environ |= {"HF_TOKEN": "hf_secret", "NO_PROXY": "127.0.0.1"}
    sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))  # between tries
    number = first
    with HubServer() as server:
        constants.ENDPOINT = server.url.replace("//", "//someone:PASSW0RD@")
        constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_OFFLINE = False
        content = {"config.json": b"{}", "model.safetensors": bytes(5000)}
        server.put("owner/model", content)
        chosen = list(content)
        for number in range(first - 1, 10**9):
            draw = random.Random(f"{seed} hub {number}")
            constants.HF_HUB_CACHE = str(folder / str(number))
            server.sick.clear()
            if number >= first:
                for _ in range(draw.choice([1, 1, 2])):
                    part = draw.choice(["/api/", "/tree/", "/resolve/", "config.json", "/revision/"])
                    answers = SICK_LISTINGS if part in ("/api/", "/revision/") else SICK_FILES
                    server.sick[part] = answers[draw.choice(list(answers))]

            def use():
                got = hub.fetch("owner/model", lambda names: chosen)
                if {name: (got / name).read_bytes() for name in chosen} != content:
                    raise AssertionError(f"other content from {[*server.sick]}")

            yield (number if number >= first else None), use


def worker(kind, seed, first, folder):
    """Print a line for each case before and after it."""
    from minilora.errors import InputError

    cases = (sick_hubs if kind == "hub" else damaged)(kind, seed, first, folder)
    for number, use in cases:
        if number is None:
            use()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of libraries write there
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
            continue
        print(json.dumps([number]), flush=True)
        began, why, what = time.process_time(), None, "used"
        try:
            use()
        except InputError as error:
            what, text = "refused", str(error)
            if "\n" in text or len(text) > 1500:
                why = f"a message of {len(text)} characters: {text[:150]!r}"
            elif "PASSW0RD" in text or "hf_secret" in text:
                why = f"a secret: {text[:300]}"
        except BaseException as error:  # a panic of a library is no Exception
            why = f"{type(error).__name__}: {error}"[:300]
        if not why and time.process_time() - began > SLOWEST:
            why = f"{time.process_time() - began:.0f} s"
        print(json.dumps([number, what, why]), flush=True)


# --- the campaign


def run(folder, seed, end, first=0, cases=10**9, only=None, kinds=KINDS):
    kinds = [kind for kind in kinds if not only or kind in only]
    counts = {kind: {"kind": kind, "cases": 0, "used": 0, "refused": 0, "wrong": 0} for kind in kinds}
    following, wrong = dict.fromkeys(kinds, first), []
    while kinds and (time.monotonic() < end or not all(count["cases"] for count in counts.values())):
        for kind in list(kinds):
            if time.monotonic() > end and counts[kind]["cases"]:
                continue
            most = min(AT_ONCE * (1 + counts[kind]["cases"] // AT_ONCE), first + cases - following[kind])
            for number, what, why in answers(folder, kind, seed, following[kind], most, end):
                following[kind], count = number + 1, counts[kind]
                count["cases"] += 1
                count["wrong" if why else what] += 1
                if why:
                    wrong.append(f"fuzz {kind} {number} (seed {seed}): {why}")
                    print(wrong[-1], file=sys.stderr, flush=True)  # a campaign may be stopped
            if following[kind] >= first + cases:
                kinds.remove(kind)
    return list(counts.values()), wrong


def command(kind, seed, first, place):
    """The command line of a process that meets the cases of a kind from `first` on, in the folder `place`."""
    return [sys.executable, "-m", f"{__package__}.fuzz", kind, str(seed), str(first), str(place)]


def answers(folder, kind, seed, first, most, end):
    """Yield (number, used or refused, what was wrong or None) of at most `most` cases, from one process."""
    place = folder / f"{kind}-{first}"
    place.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    process = subprocess.Popen(
        command(kind, seed, first, place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    number, done = None, 0
    try:
        while done < most:
            if not select.select([process.stdout], [], [], HANG)[0]:
                yield first if number is None else number, None, f"no end after {HANG:.0f} s"
                return
            line = process.stdout.readline()
            if not line:
                if number is None:
                    raise RuntimeError(f"{kind}: {process.stderr.read().decode()[-2000:]}")
                yield number, None, f"the process died: {process.wait()}"
                return
            number, *found = json.loads(line)
            if found:
                done += 1
                yield number, *found
                if time.monotonic() > end and done >= 3:
                    return
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def run_hub(folder, seed, end, first=0, cases=10**9, only=None):
    return run(folder, seed, end, first, cases, only, kinds=["hub"])


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
