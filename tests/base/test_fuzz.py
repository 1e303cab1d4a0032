"""Thousands of damaged checkpoints: each loads and computes, or is refused as an InputError, in little time and memory.

python tests/base/test_fuzz.py KIND FIRST COUNT FOLDER...    cases of one kind on the checkpoint in each FOLDER, as JSON

Every case is drawn from its kind and number alone, so that a failure can be run again. The cases run in a process of
their own, where the address space is limited: a crash ends that process, and an allocation of gigabytes fails in it.
Left out: data.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # as a program it has no conftest.py
from minilora.base import families, model, tokenizer  # noqa: E402
from minilora.errors import InputError  # noqa: E402

ROOM = 400 << 20  # bytes of address space beyond what a good load needed
SLOWEST = 10.0  # seconds a case, on a busy machine
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "Q9", "", None, 7]


def hostile(draw, good=1):
    """A JSON value, as text, in the place of `good`: often of its type, often huge."""
    number = good if isinstance(good, (int, float)) else 1
    return draw.choice([
        "0", "1", "2", "-1", "-0", "7", "1024", "1e3", "0.5", "1e308", "1e999", "NaN", "Infinity", "-Infinity",
        str(2**31 - 1), str(2**31), str(2**53 + 1), str(2**63 - 1), str(2**63), str(2**64), "9" * 400, "9" * 5000,
        json.dumps(number + 1), json.dumps(number - 1), json.dumps(number * 2), json.dumps(-number),
        json.dumps(number * 100_000), "null", "true", "false", '""', '"x"', '"1"', '"\\ud800"', '"\\u0000"', '"../x"',
        json.dumps("long" * 5000), "[]", "[1, null]", "[[2]]", "{}", '{"x": {"y": []}}', "[" * 60 + "]" * 60,
        "[" * 20_000 + "]" * 20_000, '{"type": "linear", "factor": -1}', '{"rope_type": "yarn", "factor": 1e300}',
        '{"x": 1, "x": 2}', "[1,", "nul",
    ])  # fmt: skip


def places(value, path=()):
    """The paths of all values inside a JSON value, outermost first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def spoil(draw, text):
    """The JSON object in `text` with one value replaced, removed, renamed, doubled or added."""
    value = json.loads(text)
    path = draw.choice(list(places(value)) or [()])
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    how, mark = draw.choice(["replace"] * 6 + ["remove", "rename", "double", "add"]), "?mark?"
    if not path:
        return hostile(draw)
    good = owner[path[-1]]
    if how == "remove":
        del owner[path[-1]]
    elif how == "replace" or isinstance(owner, list):
        owner[path[-1]] = mark
    elif how == "rename":
        owner[draw.choice(["", "x", str(path[-1]) + "x", "model_type", "__metadata__"])] = owner.pop(path[-1])
    elif how == "double":
        key = json.dumps(str(path[-1]))
        owner[mark] = 0
        text = json.dumps(value)
        return text.replace(f'"{mark}": 0', f"{key}: {draw.choice([json.dumps(good), hostile(draw, good)])}")
    else:
        owner[draw.choice(["x", "rope_scaling", "is_decoder", "quantization_config", "head_dim", "auto_map"])] = mark
    return json.dumps(value).replace(f'"{mark}"', hostile(draw, good))


def damage(draw, data, stop):
    """`data` with some bytes before `stop` changed, removed or doubled, or cut."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(min(stop, len(data)) or 1)
        how = draw.choice(["bit", "byte", "remove", "double", "cut", "swap"])
        if how == "bit":
            data[at : at + 1] = bytes(byte ^ 1 << draw.randrange(8) for byte in data[at : at + 1])
        elif how == "byte":
            data[at : at + 1] = draw.choice([b"\0", b"\xff", b"{", b"}", b'"', b",", b"9", b"-", b"[", b"\\", b"\n"])
        elif how == "remove":
            del data[at : at + draw.choice([1, 2, 8, 100])]
        elif how == "double":
            data[at:at] = data[at : at + draw.choice([1, 8, 100])]
        elif how == "cut":
            del data[draw.randrange(len(data) + 1) :]
        else:
            other = draw.randrange(min(stop, len(data)) or 1)
            data[at : at + 4], data[other : other + 4] = data[other : other + 4], data[at : at + 4]
    return bytes(data)


def weights(draw, data):
    """A damaged safetensors file."""
    first = 8 + int.from_bytes(data[:8], "little")
    header, body = data[8:first], data[first:]
    how = draw.choice(["bytes", "bytes", "length", "cut", "more", "json", "tensor", "tensor", "tensor"])
    if how == "bytes":
        return damage(draw, data, draw.choice([8, 100, first]))
    if how == "length":
        length = draw.choice(
            [0, 1, len(header) - 1, len(header) + 1, len(data), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1]
        )
        return length.to_bytes(8, "little") + header + body
    if how == "cut":
        return data[: draw.randrange(len(data))]
    if how == "more":
        return data + bytes(draw.choice([1, 8, 4096]))
    if how == "json":
        text = spoil(draw, header).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + body
    tensors = json.loads(header)
    name, other = draw.choices([name for name in tensors if name != "__metadata__"], k=2)
    change = draw.choice(
        ["dtype", "same kind", "shape", "flat", "offsets", "shift", "swap", "remove", "rename", "huge"]
    )
    entry = tensors[name]
    if change == "dtype":
        entry["dtype"] = draw.choice(DTYPES)
    elif change == "same kind":  # the right number of bytes in another type
        entry["dtype"] = draw.choice(["I32", "U32", "F32"])
    elif change == "shape":
        entry["shape"] = draw.choice(
            [[], [0], entry["shape"][::-1], [1, *entry["shape"]], [-1], [2**32, 2**32], [1] * 99]
        )
    elif change == "flat":
        count = 1
        for size in entry["shape"]:
            count *= size
        entry["shape"] = [count]
    elif change == "offsets":
        entry["data_offsets"] = draw.choice(
            [[0, 0], tensors[other]["data_offsets"], entry["data_offsets"][::-1], [0, 2**63]]
        )
    elif change == "shift":
        entry["data_offsets"] = [at + draw.choice([-4, 4, 8]) for at in entry["data_offsets"]]
    elif change == "swap":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif change == "remove":
        del tensors[name]
    elif change == "rename":
        tensors[draw.choice(["", "x", other, name + ".x", "__metadata__"])] = tensors.pop(name)
    else:
        tensors["x"] = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + body


def text(draw, data):
    """A damaged JSON file."""
    if draw.random() < 0.2:
        return damage(draw, data, len(data))
    return spoil(draw, data).encode("utf-8", "surrogatepass")


KINDS = {
    "weights": ("model.safetensors", weights),
    "shard": ("model-00002-of-00002.safetensors", weights),
    "index": ("model.safetensors.index.json", text),
    "config": ("config.json", text),
    "tokenizer": ("tokenizer.json", text),
    "settings": ("tokenizer_config.json", text),
}


def use(folder, kind=""):
    """Load a base and let it compute a short row; or load a tokenizer and encode some texts."""
    if kind in ("tokenizer", "settings"):
        tokenizer.load(folder).encode(["", "The film, good it's 2024\n", "a" * 99, "Naïve 中文 🎬 <s>"], 32)
        return
    base = model.load(folder)
    ids = torch.ones(1, min(5, base.spec.positions), dtype=torch.int64)
    base(ids, torch.tensor([ids.shape[1]]))


def run(kind, first, count, folders):
    """What happened to cases `first` to `first + count`, by folder."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for folder in folders:
        use(folder, kind)  # what it imports and allocates once
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    return {folder: run_one(kind, range(first, first + count), folder) for folder in folders}


def run_one(kind, numbers, folder):
    name, change = KINDS[kind]
    path = Path(folder) / name
    good = path.read_bytes()
    counts, failed, slowest = {"loaded": 0, "refused": 0}, [], 0.0
    for number in numbers:
        bad = change(random.Random(f"{kind} {number}"), good)
        path.unlink()  # not written over: the old one may still be mapped
        path.write_bytes(bad)
        began = time.perf_counter()
        try:
            use(folder, kind)
            counts["loaded"] += 1
        except InputError:
            counts["refused"] += 1
        except BaseException as error:  # the tokenizers' library panics
            failed.append(f"{kind} {number}: {type(error).__name__}: {error}"[:300])
        slowest = max(slowest, time.perf_counter() - began)
    path.unlink()
    path.write_bytes(good)
    return counts | {"failed": failed, "slowest": slowest}


def in_a_process(kind, count, *folders):
    """(loaded, refused) of each folder, after the checks that hold for all."""
    command = [sys.executable, __file__, kind, "0", str(count), *map(str, folders)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {folder: result["failed"] for folder, result in found.items() if result["failed"]} == {}
    assert len(found) == len(folders) and max(result["slowest"] for result in found.values()) < SLOWEST
    assert all(result["loaded"] + result["refused"] == count for result in found.values())
    return [(result["loaded"], result["refused"]) for result in found.values()]


linux = pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited as Linux does it")


@linux
@pytest.mark.parametrize("kind, count", [("weights", 1000), ("shard", 500), ("index", 500)])
def test_damaged_weights_load_or_are_refused(tiny_folder, kind, count):
    if kind != "weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(tiny_folder / "model.safetensors")
        halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
        names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            save_file(half, tiny_folder / name)
        index = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
        (tiny_folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (tiny_folder / "model.safetensors").unlink()
    [(loaded, refused)] = in_a_process(kind, count, tiny_folder)
    assert loaded > 0 and refused > count // 2


@linux
def test_damaged_configurations_load_or_are_refused(tmp_path):
    import zoo

    for family, entry in zoo.FAMILIES.items():
        zoo.build(family, next(iter(entry.cases)), tmp_path / family)
    counts = in_a_process("config", 80, *(tmp_path / family for family in zoo.FAMILIES))
    assert len(counts) == len(families.FAMILIES) >= 18
    assert min(loaded for loaded, _ in counts) > 10 and min(refused for _, refused in counts) > 10


@linux
@pytest.mark.parametrize("kind, count", [("tokenizer", 150), ("settings", 150)])
def test_damaged_tokenizers_load_or_are_refused(tmp_path, kind, count, monkeypatch):
    from test_words import TOKENIZERS

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for rules, made in TOKENIZERS.items():
        (tmp_path / rules).mkdir()
        made.save(str(tmp_path / rules / "tokenizer.json"))
        named = {"wordpiece": "BertTokenizer", "bytes": "RobertaTokenizer", "pieces": "LlamaTokenizer"}[rules]
        added = {str(made.get_vocab_size()): {"content": "<e>", "special": True}}
        settings = {"tokenizer_class": named, "do_lower_case": True, "add_prefix_space": False, "legacy": False,
                    "eos_token": "<e>", "additional_special_tokens": ["<x>"],
                    "added_tokens_decoder": added}  # fmt: skip
        (tmp_path / rules / "tokenizer_config.json").write_text(json.dumps(settings))
    counts = in_a_process(kind, count, *(tmp_path / rules for rules in TOKENIZERS))
    assert len(counts) == 3 and min(loaded for loaded, _ in counts) > 10 and min(refused for _, refused in counts) > 10


def test_auto_map_is_never_followed(tiny_folder):
    """A configuration that names code beside it: nothing of that is opened, and the base is what it would be."""
    config = json.loads((tiny_folder / "config.json").read_text())
    expected = dict(model.load(tiny_folder).named_parameters())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "trust_remote_code": True,
               "architectures": ["Model"], "custom_pipelines": {"x": {"impl": "evil.Pipe"}}}  # fmt: skip
    (tiny_folder / "config.json").write_text(json.dumps(config))
    for name in ("evil.py", "__init__.py", "config.py", "modeling.py", "torch.py"):
        (tiny_folder / name).write_text(f"open({str(tiny_folder / 'it ran')!r}, 'w')")
    os.mkfifo(tiny_folder / "Model.py")  # opening it would never end
    found = dict(model.load(tiny_folder).named_parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tiny_folder / "it ran").exists() and "evil" not in sys.modules


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
