"""Bases and rows made up on the spot: a published base's shape with random weights, for machines without network.

Speed depends only on the shape; accuracy means nothing here.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minilora import files
from minilora.base import families, model
from minilora.data.named import SNIPPETS
from minilora.data.rows import load_rows

from . import alone

# config.json of meta-llama/Llama-3.2-1B and of sentence-transformers/all-MiniLM-L6-v2, as far as it has a part here.
LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
WORDS = 20000  # of a made-up vocabulary at most


def write_base(folder, config, dtype, device, seed=0):
    """A checkpoint folder with the config.json `config`, random weights and a tokenizer of words."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True)
    spec = families.read_spec(config)
    family = families.find(spec.family)
    with torch.device("meta"):
        base = model.Base(spec)
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, parameter in base.named_parameters():
        module, _, leaf = name.rpartition(".")
        if isinstance(base.get_submodule(module), (nn.Linear, nn.Embedding)) and leaf == "weight":
            value = 0.02 * torch.randn(parameter.shape, generator=generator, dtype=dtype, device=device)
        else:  # norms and biases as training starts them
            value = torch.full(parameter.shape, float(leaf == "weight"), dtype=dtype)
        tensors[f"{family.place(module, spec).module}.{leaf}"] = value.cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files.write_json(folder / "config.json", config)
    (write_words if spec.causal else write_pieces)(folder, spec.vocabulary)
    return folder


def write_words(folder, vocabulary):
    """A tokenizer of words `w0`, `w1`, ..., a token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = [*SPECIAL.values(), *(f"w{number}" for number in range(min(WORDS, vocabulary - len(SPECIAL))))]
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(tokens)}, SPECIAL["unk_token"])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {key: SPECIAL[key] for key in ("pad_token", "unk_token")}
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)


def write_pieces(folder, vocabulary):
    """BERT's tokenizer with the commonest words of the default data, and single characters."""
    texts = load_rows(SNIPPETS).texts
    characters = sorted({character for text in texts for character in text.lower() if character.isascii()} - {" "})
    pieces = characters + [f"##{character}" for character in characters]
    words = Counter(word for text in texts for word in text.lower().split() if word.isalpha() and len(word) > 1)
    room = vocabulary - len(SPECIAL) - len(pieces)
    tokens = [*SPECIAL.values(), *pieces, *(word for word, _ in words.most_common(min(WORDS, room)))]
    files.write_text(folder / "vocab.txt", "\n".join(tokens) + "\n")
    files.write_text(folder / "tokenizer_config.json", json.dumps({"do_lower_case": True}))


def write_rows(path, rows, length, vocabulary, seed=0, labels=("one", "other")):
    """A CSV of rows of `length` random words of `write_words`, of the two labels in turn."""
    draw = np.random.default_rng(seed)
    words = draw.integers(0, min(WORDS, vocabulary - len(SPECIAL)), (rows, length))
    lines = [
        " ".join(f"w{word}" for word in row) + "," + labels[number % 2] for number, row in enumerate(words)
    ]
    files.write_text(path, "\n".join(["text,label", *lines]) + "\n")
    return path


def main(argv):
    """`python -m benchmarks.standin NAME FOLDER OUT BEGAN`: write the stand-in NAME into FOLDER/NAME."""
    from . import smoke

    name, folder, out, _ = argv
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = {"llama": LLAMA, "bert": BERT, "tiny-llama": smoke.LLAMA, "tiny-bert": smoke.BERT}[name]
    write_base(Path(folder) / name, config, torch.bfloat16 if "llama" in name else torch.float32, device)
    files.write_json(out, {})


if __name__ == "__main__":
    alone.begin()
    main(sys.argv[1:])
