"""Mutated files of rows, each from its seed: all must be read, or refused in one line, in seconds and little memory.

python tests/data_fuzz.py 0 2000      the seeds from 0 to 1999, in this many processes as are needed
"""

import gzip
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

SECONDS, BYTES = 10, 1 << 30  # that a file may take
KINDS = ("csv", "tsv", "jsonl", "json", "parquet", "csv.gz", "tsv.gz", "jsonl.gz", "json.gz")
TEXTS = (
    "a good film",
    'he said "no"',
    "电影 好看",
    "two; parts, and\u00a0more",
    "e\u0301 \U0001f44d\U0001f3fd",
    "12:30",
    "'",
)
PIECES = (
    b'"', b'""', b"\0", b"\r", b"\n\n", b"\t", b";", b",", b"\xef\xbb\xbf", b"\xff", b"\xc3", b"\\ud800", b"[" * 70_000,
    b"{" * 3000, b"9" * 5000, b"NaN", b"-Infinity", b"null", b"1e999", b'{"text": "a", "text": "b"}', b"\x1f\x8b",
    b"PAR1", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x80\x80\x80\x80\x80\x01", b"label", b"text", b" " * 100,
    b"]", b"}",
)  # fmt: skip
NOTES = (b"null", b"{", b'{"info": null}', b'{"info": {"features": {"label": {"names": 3}}}}', b"[" * 100_000, b"\xff")


def made(draw, kind):
    """The bytes of a good file of a kind, not packed."""
    rows = [
        (f"{draw.choice(TEXTS)} {place}", draw.choice(("pos", "neg", "x y"))) for place in range(draw.randint(2, 40))
    ]
    if kind == "parquet":
        return parquet(draw, rows)
    if "json" in kind:
        labels = draw.choice((("pos", "neg"), (0, 1.0, "1"), (True, False), ("pos", None, "neg"), (0.5, 1)))
        records = [{"text": text, "label": draw.choice(labels)} for text, _ in rows]
        return ("\n".join(map(json.dumps, records)) if kind == "jsonl" else json.dumps(records)).encode()
    sign = "\t" if kind == "tsv" else draw.choice(",;\t")
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row] for row in rows]
    cells = [("text", "label"), *(draw.choice(pair) for pair in zip(rows, quoted, strict=True))]
    return "".join(sign.join(row) + draw.choice(("\n", "\n", "\r\n")) for row in cells).encode()


def parquet(draw, rows):
    import pyarrow as pa
    from pyarrow import parquet

    texts, names = [text for text, _ in rows], [label for _, label in rows]
    numbers = pa.array([draw.choice((0, 1, -1, 7)) for _ in rows])
    label = draw.choice((
        lambda: pa.array(names), lambda: pa.array(names).dictionary_encode(), lambda: numbers,
        lambda: numbers.cast(pa.timestamp(draw.choice(("s", "ns")))), lambda: numbers.cast(pa.decimal128(30, 2)),
        lambda: pa.array([[name] for name in names]), lambda: pa.array([{"a": name} for name in names]),
        lambda: pa.array([name.encode() for name in names]), lambda: pa.nulls(len(names)),
        lambda: pa.array([draw.choice((name, None)) for name in names]),
    ))()  # fmt: skip
    text = pa.array(texts) if draw.random() < 0.8 else pa.array([one.encode() for one in texts])
    note = draw.choice((*NOTES, b'{"info": {"features": {"label": {"names": ["x", "y"]}}}}'))
    table = pa.table({"text": text, "label": label}).replace_schema_metadata({b"huggingface": note})
    stream = io.BytesIO()
    parquet.write_table(
        table, stream, compression=draw.choice(("none", "snappy", "zstd", "gzip")), use_dictionary=draw.random() < 0.5,
        data_page_version=draw.choice(("1.0", "2.0")), row_group_size=draw.choice((3, 1000)),
        write_statistics=draw.random() < 0.5,
    )  # fmt: skip
    return stream.getvalue()


def changed(draw, content):
    """Some bytes changed, cut out, doubled, moved or put in; in Parquet often in its footer."""
    content = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 2, 8))):
        if not content:
            break
        start = draw.randrange(len(content))
        if content[-4:] == b"PAR1" and draw.random() < 0.5:
            start = max(0, len(content) - 1 - int(draw.expovariate(1 / 200)))
        stop = min(len(content), start + draw.choice((1, 1, 4, 30, 400)))
        how = draw.randrange(6)
        if how == 0:
            content[start] = draw.randrange(256)
        elif how == 1:
            del content[start:stop]
        elif how == 2:
            content[start:start] = content[start:stop] * draw.choice((1, 1, 50))
        elif how == 3:
            content[start:start] = draw.choice(PIECES)
        elif how == 4:
            del content[start:]
        else:
            content[start:stop] = draw.choice(PIECES)[: stop - start]
    return bytes(content)


def mutant(seed):
    """(name, bytes) of a file; the same for the same seed."""
    draw = random.Random(seed)
    kind = draw.choice(KINDS)
    content = changed(draw, made(draw, kind.removesuffix(".gz")))
    if kind.endswith(".gz"):
        if draw.random() < 0.15:  # a bomb: it packs a thousandfold
            piece = draw.choice(
                (b"a", b'"', b"[", b"{}\n", b"[],", b'{"a":1},', b"\n", b"a,b\n", b'{"text":"a","label":1}\n')
            )
            place = draw.randint(0, len(content))
            content = content[:place] + piece * ((100 << 20) // len(piece)) + content[place:]
        content = gzip.compress(content, 6, mtime=0)
        if draw.random() < 0.5:
            content = changed(draw, content)
    return f"{seed}.{kind}", content


def read(path, seed):
    """What became of a file: "read", or the refusal."""
    from minilora.data.rows import load_rows, train_test
    from minilora.errors import InputError

    how = {"free": bool(seed & 1), "bad_rows": ("refuse", "skip")[seed >> 1 & 1]}
    try:
        if seed % 3:
            load_rows(path, **how)
        else:
            train_test(path, test_rows=2, **how)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000, f"not one line: {str(error)[:200]!r}"
        return f"refused {error}"
    return "read"


def peak():
    """This process's largest resident memory in bytes; what getrusage has may be its parent's."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def child(start, stop):
    """Read the mutants of these seeds one after the other, a line each; a hang ends the process."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(start, stop):
            name, content = mutant(seed)
            path = Path(folder) / name
            path.write_bytes(content)
            del content
            print(seed, name, end=" ", flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor, whatever else the machine does
            signal.alarm(20 * SECONDS)
            try:
                outcome = read(path, seed)
            except Exception:
                outcome = f"FAULT {traceback.format_exc(limit=-3)!r}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            print(ascii(outcome.replace(str(path), "FILE")), flush=True)
            path.unlink()
            if peak() > BYTES:
                print("memory", flush=True)
                return


def campaign(start, count):
    """Read the mutants of `count` seeds: (counts of outcomes, faults as lines). Each process is replaced as it ends."""
    outcomes, faults, stop = Counter(), [], start + count
    while start < stop:
        command = [sys.executable, __file__, "child", str(start), str(stop)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            words = line.split(maxsplit=2)
            if words[0] == "memory":
                faults.append(f"over {BYTES >> 20} MiB: {start - 1}")
                continue
            start = int(words[0]) + 1
            outcome = words[2].strip("'\"").split()[0] if len(words) > 2 else "FAULT"
            outcomes[outcome] += 1
            if outcome == "FAULT":
                faults.append(line if len(words) > 2 else f"{line}: the process ended with {done.returncode}")
        if not done.stdout:
            faults.append(done.stderr[-2000:])
            break
    return outcomes, faults


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(int(sys.argv[2]), int(sys.argv[3]))
    else:
        found, wrong = campaign(int(sys.argv[1]), int(sys.argv[2]))
        print(dict(found), *wrong, sep="\n")
        sys.exit(bool(wrong))
