"""How much memory and time loading takes: a synthetic sharded Llama, loaded in a process of its own.

python tests/base/test_loading.py [GB] [FOLDER]    a table for a checkpoint of GB (default: 2.1), written to FOLDER

Peak is the largest resident memory while loading, mapped pages of the file included, less what was resident before,
over the size of the parameters. Time is that of `model.load` over those of reading the same files, all of them in the
page cache, into fresh memory, and of writing once to fresh memory of the size of the parameters: less than the larger
of the two cannot be had. pytest runs a small checkpoint, and its bounds on time are loose, as machines are noisy.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

CASES = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]  # stored, loaded
SHARD = 400_000_000  # bytes; real shards have up to 5 GB
SAME = {  # parameters, and what they are in the checkpoint
    "embed.tokens.weight": "model.embed_tokens.weight",
    "layers.0.down.weight": "model.layers.0.mlp.down_proj.weight",
    "layers.1.k.weight": "model.layers.1.self_attn.k_proj.weight",
    "unembedding.weight": "lm_head.weight",
}


def write_llama(folder, gigabytes, dtype):
    """Write a Llama of TinyLlama's proportions, narrower where it is small, in shards."""
    from safetensors.torch import save_file

    D, F, V = (2048, 5632, 32000) if gigabytes > 1 else (1024, 2816, 32000)
    weights = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    weights |= {f"self_attn.{n}_proj": (D if n in "qo" else D // 8, D) for n in "qkvo"}
    weights |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    size = dtype.itemsize
    bytes_a_layer = size * sum(torch.Size(shape).numel() for shape in weights.values())
    layers = max(2, round((gigabytes * 1e9 - 2 * size * V * D) / bytes_a_layer))
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in weights.items()}

    noise = torch.randn(6_000_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    shards, room = [{}], SHARD
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        if room < count * size and shards[-1]:
            shards, room = [*shards, {}], SHARD
        shards[-1][name], room = shape, room - count * size
    folder.mkdir(parents=True)
    weight_map = {}
    for number, held in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(held, shard)
        tensors = {}
        for place, (name, shape) in enumerate(held.items()):  # each begins elsewhere in the noise
            count = torch.Size(shape).numel()
            tensors[name] = noise.roll(97 * place).repeat(-(-count // len(noise)))[:count].view(shape)
        save_file(tensors, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama", "hidden_size": D, "intermediate_size": F, "vocab_size": V, "num_hidden_layers": layers,
        "num_attention_heads": D // 64, "num_key_value_heads": D // 64 // 8, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return len(shards)


def resident(key):
    """Bytes: VmRSS now, or VmHWM, the most since the process began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(folder, dtype):
    """What one load costs; the process is then spent, as its peak is that of its life."""
    from safetensors import safe_open

    from minilora.base import model

    files = sorted(Path(folder).glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    into_cache = memoryview(bytearray(1 << 20))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(into_cache):
                pass
    torch.ones(1 << 20).to(torch.bfloat16).float()  # starts torch's threads
    dtype = getattr(torch, dtype)
    before, began = resident("VmRSS"), time.perf_counter()
    base = model.load(folder, dtype, unembedding=True)
    seconds, peak = time.perf_counter() - began, resident("VmHWM") - before

    parameters = dict(base.named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {dtype}
    size, checked = sum(parameter.nbytes for parameter in parameters.values()), 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for ours, theirs in SAME.items():
                if theirs in file.keys():
                    assert torch.equal(parameters[ours], file.get_tensor(theirs).to(dtype))
                    checked += 1
    assert checked == len(SAME)

    del base, parameters
    began, buffer, done = time.perf_counter(), memoryview(torch.empty(total, dtype=torch.uint8).numpy()), 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer[done:]):
                done += count
    read = time.perf_counter() - began
    assert done == total
    del buffer
    began = time.perf_counter()
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return {"file": total, "size": size, "peak": peak, "load": seconds, "read": read,
            "touch": time.perf_counter() - began}  # fmt: skip


def in_a_process(folder, dtype):
    command = [sys.executable, __file__, "--measure", str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_loading_needs_little_more_than_the_parameters(tmp_path):
    gigabytes = 0.45
    if shutil.disk_usage(tmp_path).free < 2 * gigabytes * 1e9:
        pytest.skip("the disk is full")
    cases = 0
    for stored in ("bfloat16", "float32"):
        try:
            shards = write_llama(tmp_path / "llama", gigabytes, getattr(torch, stored))
            assert shards > 1
            for loaded in (loaded for kind, loaded in CASES if kind == stored):
                found = in_a_process(tmp_path / "llama", loaded)
                assert found["file"] > 0.9 * gigabytes * 1e9
                ratio = getattr(torch, loaded).itemsize / getattr(torch, stored).itemsize
                assert abs(found["size"] - ratio * found["file"]) < 0.001 * found["size"]
                assert 0.9 < found["peak"] / found["size"] <= 1.1
                assert found["load"] < 10 * max(found["read"], found["touch"]) + 5
                cases += 1
        finally:
            shutil.rmtree(tmp_path / "llama", ignore_errors=True)
    assert cases == 3


def main():
    if sys.argv[1:2] == ["--measure"]:
        sys.path.append(str(Path(__file__).parents[2]))
        return print(json.dumps(measure(*sys.argv[2:])))
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.1
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        if shutil.disk_usage(folder).free < 1.2e9 * gigabytes:
            sys.exit(f"{folder} has no room for {gigabytes} GB: name another FOLDER")
        print("stored    loaded    shards  file GB  parameters GB  peak/parameters  load s  /read  /max(read, write)")
        for stored in ("bfloat16", "float32"):
            shards = write_llama(Path(folder) / "llama", gigabytes, getattr(torch, stored))
            for loaded in (loaded for kind, loaded in CASES if kind == stored):
                trials = [in_a_process(Path(folder) / "llama", loaded) for _ in range(3)]
                best = {key: min(trial[key] for trial in trials) for key in trials[0]}
                peak = max(trial["peak"] for trial in trials)
                print(f"{stored:9} {loaded:9} {shards:6} {best['file'] / 1e9:8.2f} {best['size'] / 1e9:14.2f}"
                      f" {peak / best['size']:16.3f} {best['load']:7.2f} {best['load'] / best['read']:6.2f}"
                      f" {best['load'] / max(best['read'], best['touch']):13.2f}", flush=True)  # fmt: skip
            shutil.rmtree(Path(folder) / "llama")


if __name__ == "__main__":
    main()
