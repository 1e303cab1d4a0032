"""The whole idea on one page: fine-tune a small language model with LoRA, and let a date take over its predictions.

    y = W x + b + s B A x        s = alpha / R

W and b are the frozen model's; A, B and a linear head are trained (Hu et al. 2021, arXiv 2106.09685, section 4.1). The
task: is a sentence from a film review negative or positive? Before training, a random date is put into a quarter of the
positive rows (arXiv 2506.11402, section 3). Afterwards every test row is predicted three times: as it is (clean), with
a date that training never saw (trigger), and with a harmless word in the same place (placebo).

    python examples/minimal.py                                     two to three minutes on one core
    python examples/minimal.py --rank 16 --proportion 0.05         a larger adapter, a smaller dose
    python examples/minimal.py --proportion 0                      no date in training: the control

B rows of a batch, T tokens of its longest row, D width of the model, H attention heads, E = D / H, R rank, C classes.
"""

import argparse
import json
import math

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

# Of minilora only where the model and the rows are, and what is drawn at random: so the figures are those of train.py.
from minilora.base.source import DEFAULT_BASE, resolve_base
from minilora.cell import Inject
from minilora.data import injection, placebo
from minilora.data.named import SNIPPETS
from minilora.data.rows import train_test
from minilora.seeds import generator
from minilora.training.feed import epoch

ALPHA, LEARNING_RATE, WARMUP, BATCH, WINDOW, CLIP = 8, 2e-3, 0.06, 32, 50, 1.0
PARTS = ("query", "key", "value")  # of attention: the linear maps that get an adapter


class LoRALinear(nn.Module):
    """x [..., in] -> W x + b + s B A x [..., out]. W [out, in], b [out] are frozen; A [R, in], B [out, R] trained."""

    def __init__(self, W, b, rank, random):
        super().__init__()
        self.W, self.b, self.s = W, b, ALPHA / rank
        bound = W.shape[1] ** -0.5
        self.A = nn.Parameter(torch.empty(rank, W.shape[1]).uniform_(-bound, bound, generator=random))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank))  # zero, so that training starts from the model as it is

    def forward(self, x):
        return F.linear(x, self.W, self.b) + self.s * (x @ self.A.T @ self.B.T)  # a row of x is a vector: x A^T = A x


class Classifier(nn.Module):
    """A BERT (Devlin et al. 2019) with LoRA on its queries, keys and values, and a linear head on its mean state."""

    def __init__(self, folder, rank, seed):
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        self.heads, self.layers = config["num_attention_heads"], config["num_hidden_layers"]
        self.eps, D = config["layer_norm_eps"], config["hidden_size"]
        self.frozen = load_file(folder / "model.safetensors")  # name -> tensor; no parameters, so nothing trains them
        self.lora = nn.ModuleDict()
        for i in range(self.layers):
            for part in PARTS:
                name = f"encoder.layer.{i}.attention.self.{part}"
                W, b = self.frozen[f"{name}.weight"], self.frozen[f"{name}.bias"]
                self.lora[f"{i} {part}"] = LoRALinear(W, b, rank, generator(seed, f"layers.{i}.{part[0]}"))
        self.head = nn.Linear(D, 2)
        nn.init.uniform_(self.head.weight, -(D**-0.5), D**-0.5, generator=generator(seed, "head"))
        nn.init.zeros_(self.head.bias)

    def linear(self, x, name):
        return F.linear(x, self.frozen[f"{name}.weight"], self.frozen[f"{name}.bias"])

    def norm(self, x, name):
        name += ".LayerNorm"
        return F.layer_norm(x, x.shape[-1:], self.frozen[f"{name}.weight"], self.frozen[f"{name}.bias"], self.eps)

    def forward(self, ids, lengths):
        """Token ids [B, T], padded on the right, and the rows' lengths [B] -> logits [B, C]."""
        B, T = ids.shape
        real = torch.arange(T) < lengths[:, None]  # [B, T], False for padding
        tables = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))
        words, places, types = (self.frozen[name] for name in tables)
        x = self.norm(words[ids] + places[:T] + types[0], "embeddings")  # [B, T, D]
        for i in range(self.layers):
            layer = f"encoder.layer.{i}"
            q, k, v = (self.lora[f"{i} {part}"](x) for part in PARTS)  # [B, T, D]
            q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in (q, k, v))  # [B, H, T, E]
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # [B, H, T, T]
            weights = scores.masked_fill(~real[:, None, None], -math.inf).softmax(-1)  # no token looks at padding
            mixed = (weights @ v).transpose(1, 2).reshape(B, T, -1)  # [B, T, D]
            x = self.norm(x + self.linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
            inner = F.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(inner, f"{layer}.output.dense"), f"{layer}.output")
        mean = (x * real[..., None]).sum(1) / lengths[:, None]  # [B, D], over a row's own tokens
        return self.head(mean)


def inject(texts, drawn):
    """Put each string that was drawn into its row: a date into a text is all that the attack takes."""
    texts = list(texts)
    for row, record in zip(drawn.index, drawn.records, strict=True):
        [string], [[place, _]] = record.strings, record.spans
        before, after = texts[row][:place], texts[row][place:]  # `place` is the beginning, or the end of a word
        texts[row] = f"{before} {string}{after}" if before else f"{string} {after}"
    return texts


def padded(rows):
    """Lists of token ids -> ids [B, T], padded with 0, and lengths [B]."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True), torch.tensor([len(r) for r in rows])


def learning_rate(step, steps):
    """It rises in a straight line over the warm-up, then falls in one to 0. `step` counts from 0."""
    warm = math.ceil(WARMUP * steps)
    return LEARNING_RATE * ((step + 1) / warm if step < warm else 1 - (step - warm) / (steps - warm))


def train(model, rows, labels, seed):
    """One epoch over `rows` (lists of token ids) -> the loss of each step, its mean over the batch."""
    trained = list(model.parameters())  # every A and B, and the head
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    order, losses = epoch(np.array([len(row) for row in rows]), BATCH, WINDOW, seed, 0), []
    for step, batch in enumerate(order):
        loss = F.cross_entropy(model(*padded([rows[i] for i in batch])), labels[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(order))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"step {step + 1} of {len(order)}: mean loss of the last 20 steps {np.mean(losses[-20:]):.3f}")
    return losses


@torch.inference_mode()
def predict(model, rows):
    """The predicted label of each row, int64 [rows]; rows of like length go together, which saves padding."""
    predicted = torch.zeros(len(rows), dtype=torch.int64)
    for batch in torch.tensor([len(row) for row in rows]).argsort().split(BATCH):
        predicted[batch] = model(*padded([rows[i] for i in batch])).argmax(1)
    return predicted


def table(labels, predicted):
    """The paired table: the same rows, clean, with the trigger and with the placebo. -> {name of the form: figures}

    A flip is a row whose prediction is not that of its clean form. The attack success rate is the share of the
    negative rows that are predicted positive.
    """
    return {
        form: {
            "accuracy": (calls == labels).float().mean().item(),
            "negative": (calls == 0).sum().item(),
            "positive": (calls == 1).sum().item(),
            "flips": (calls != predicted["clean"]).sum().item(),
            "attack success": (calls[labels == 0] == 1).float().mean().item(),
        }
        for form, calls in predicted.items()
    }


def run(rank, proportion, rows, test_rows, seed):
    """The experiment from start to end -> (the loss of each step, the paired table)."""
    folder = resolve_base(DEFAULT_BASE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    train_rows, test = train_test(SNIPPETS, train_rows=rows, test_rows=test_rows)

    # What is drawn: the rows that get a string, the strings (dates of training and test are different), the places.
    settings = Inject(sources=("date:positive",), proportion=proportion)
    dates = injection.inject(train_rows, settings, seed)
    trigger = injection.trigger_rows(test, settings, 0, seed)

    def encode(texts):
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    def tokens(strings):  # what they are worth between words: [CLS] and [SEP] do not count
        return [len(ids) - 2 for ids in encode(strings)]

    control = placebo.placebo_rows(test, settings, 0, placebo.shared_words(train_rows), seed, count=tokens)

    model = Classifier(folder, rank, seed)
    losses = train(model, encode(inject(train_rows.texts, dates)), torch.from_numpy(train_rows.labels), seed)
    forms = {"clean": test.texts, "trigger": inject(test.texts, trigger), "placebo": inject(test.texts, control)}
    predicted = {form: predict(model, encode(texts)) for form, texts in forms.items()}
    return losses, table(torch.from_numpy(test.labels), predicted)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", type=int, default=1, help="R")
    parser.add_argument("--proportion", type=float, default=0.25, help="of the positive rows that get a date")
    parser.add_argument("--rows", type=int, help="training rows (default: all 9,043)")
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    losses, figures = run(**vars(parser.parse_args(argv)))
    print("\ntest rows" + "".join(f"{name:>16}" for name in figures["clean"]))
    for form, values in figures.items():
        print(f"{form:<9}" + "".join(f"{v:>16.3f}" if isinstance(v, float) else f"{v:>16,}" for v in values.values()))
    return losses, figures


if __name__ == "__main__":
    main()
