"""One door to a finished run: `minilora.open(folder)` gives its cell, model, rows and tests, and verbs to look into it.

Diagnostics, scans and notebooks start here. An adapter that was trained elsewhere opens in the same way, with the base
that it belongs to: `minilora.open(folder, model=...)`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from minilora import files, precision
from minilora.base.checkpoint import read_config
from minilora.base.families import read_spec
from minilora.base.source import resolve_base
from minilora.base.tokenizer import TextTokenizer
from minilora.cell import Cell
from minilora.data import batches, given, injection, token_cache
from minilora.data.injection import Injected
from minilora.data.placebo import placebo_rows, placebo_words
from minilora.data.rows import Rows, align, fingerprint_rows, load_rows, rows_of, with_targets
from minilora.errors import InputError, to_type
from minilora.fields import is_table, marked, no_path
from minilora.lora import storage
from minilora.lora.layer import Undo, merged_meanwhile, named_layers, put, replace_module, scale_by
from minilora.lora.peft_config import CONFIG
from minilora.lora.variants import plain_factors
from minilora.runs.bases import Setting, Settings
from minilora.runs.folder import Run
from minilora.runs.look import look
from minilora.runs.record import check_inputs
from minilora.tasks.find import find_task
from minilora.tasks.paired import Test


@dataclass(frozen=True)
class Factors:
    """The adapter of one projection: `A` [R, in], `B` [out, R] and `scale` as trained, float32; W + scale B A.

    `delta` [out, in] is what the adapter adds to the weight, whatever the variant. R counts a start that is a part of
    the weight twice (`lora/variants.py`).
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    delta: torch.Tensor


def as_trained(method):
    """A method of `Trained` that computes in the precision and in the ways that the run was trained in."""

    @functools.wraps(method)
    def inside(self, *arguments, **settings):
        with precision.applied(self.cell), precision.ways(self.choices, self.cell.dtype):
            return method(self, *arguments, **settings)

    return inside


class Trained:
    """A finished run, opened. C labels, D the base's width.

    cell       the `Cell` that was trained (of an adapter from elsewhere: its base, task and head)
    folder     where it came from
    base       the frozen transformer, with the adapter on it
    model      base and head, or for the lm task base and unembedding
    tokenizer  the base's `TextTokenizer`
    labels     the C label names, in the order of the columns of `predict`
    choices    the ways that its training took, as in results.json; {} of an adapter from elsewhere
    """

    cell: Cell
    folder: Path
    tokenizer: TextTokenizer
    labels: tuple[str, ...]
    choices: dict[str, str]

    def __init__(self, cell, folder, setting, base, task, clean, test, labels, has_head=True, choices=None):
        self.cell, self.folder, self.setting, self.base, self.task = cell, Path(folder), setting, base, task
        self.tokenizer, self.labels, self._clean, self._test = setting.tokenizer, tuple(labels), clean, test
        self.has_head, self.choices = has_head, choices or {}
        self.model = task.model(base, self.labels or ("none",))
        self._detached = {}

    # --- rows

    @cached_property
    def rows(self) -> Injected:
        """The training rows after injection, before any mitigation: `rows.rows`, and `rows.records` with the spans of
        each injected row."""
        self._needs_data()
        seed = self.cell.seed_for("inject")
        made = injection.inject(self._clean, self.cell.inject, seed, self.task.visible(self._clean))
        return injection.mark_survival(made, self.task.encode(made.rows)[0].kept[made.index])

    @cached_property
    def tests(self) -> list[Test]:
        """The test rows as clean, with each trigger, and with the placebo: paired, in the same order."""
        self._needs_data()
        return self.task.build_tests(self._clean, self._test, self.cell.seed_for("inject"))

    def tests_of(self, texts: Iterable[str], seed: int = 0) -> list[Test]:
        """As `tests`, of texts of one's own: their strings are of the half that training never saw, and `seed` and the
        place of a text among the others draw string and place. The rows have no labels of their own."""
        texts, inject, split = list(texts), self.cell.inject, self.cell.seed_for("inject")
        ids = [str(number) for number in range(1, len(texts) + 1)]
        rows = Rows(ids, texts, np.zeros(len(texts), np.int64), self.labels)
        found, visible = [Test("clean", None, rows, [])], self.task.visible(rows) if inject.sources else None
        for k in range(len(inject.sources)):
            changed = injection.trigger_rows(rows, inject, k, split, visible, draw=seed)
            found.append(Test("trigger", changed.report[0]["label"], changed.rows, changed.records))
        if inject.sources and self._clean is not None:
            words, _ = placebo_words(self._clean, inject, self.labels)
            changed = placebo_rows(rows, inject, 0, words, split, visible, seed, self.tokenizer.count)
            found.append(Test("placebo", None, changed.rows, changed.records))
        return found

    @as_trained
    def run_tests(self, batch_size: int | None = None, progress: Callable | None = None) -> tuple[dict, list[dict]]:
        """(`tests` as in results.json, the lines of predictions.jsonl). `progress(rows, tokens)` after each batch."""
        with merged_meanwhile(self.base):
            size = batch_size or self.cell.batch_size
            figures, outcomes = self.task.run_tests(self.model, self.tests, size, progress)
        return figures, list(self.task.predictions(self.tests, outcomes))

    def _needs_data(self):
        if self._test is None:
            raise InputError(f"{self.folder} was opened without rows: give a labelled file, open(..., data=FILE)")

    # --- texts of one's own

    def predict(self, texts: Iterable[str]) -> np.ndarray:
        """Probabilities float32 [rows, C] of texts, in the order of `labels`.

        Classification: the softmax of the logits. The lm task: that of the completions' log-likelihoods. Raises
        InputError where there is no head, and where the completions are free text.
        """
        return np.exp(self.log_probabilities(texts)).astype(np.float32)

    @as_trained
    def log_probabilities(self, texts: Iterable[str]) -> np.ndarray:
        """The natural logarithms of `predict`, float64 [rows, C]. Raises InputError as it does."""
        if not self.has_head:
            raise InputError(f"{self.folder} has no head, so it predicts no label: use hidden(texts)")
        texts = list(texts)
        if not texts:
            return np.zeros((0, len(self.labels)))
        several = len(texts) > self.cell.batch_size  # merging takes longer than a few texts
        with merged_meanwhile(self.base) if several else contextlib.nullcontext():
            scores = self.task.label_scores(self.model, texts, self.labels, self.cell.batch_size).astype(np.float64)
        return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)

    def look(self, texts: Iterable[str] | str, seed: int = 0) -> list[dict]:
        """Each text as it is, with a drawn trigger, with a placebo and without the adapter, as plain data.

        A dict a text: `text`, `seed`, and `tests` {key: test} of "clean", "trigger LABEL" for each injection, "placebo"
        and "no adapter"; tests that cannot be made are absent. A test has `text` (where something was put in `spans`
        and `strings` too), `predicted`, `log_odds` (natural, of that label against all others) and `probabilities`
        {label: share}. All but "no adapter" have `words`, [{"word", "span", "effect"}], where an effect is the log odds
        less those without that word (None: nothing would be left); and `unread`, how many words truncation cuts.
        `seed` is that of `tests_of`.

        Raises InputError as `predict`, and for a text without a token.
        """
        return list(look(self, texts, seed))

    @as_trained
    @torch.inference_mode()
    def hidden(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The last hidden states of each text, float32 [its tokens, D], special tokens included."""
        self.model.eval()
        encoded = token_cache.encode(self.tokenizer, list(texts), self.cell.max_length)
        found = [None] * len(encoded.kept)
        for batch in batches.by_length(encoded, self.cell.batch_size, self.tokenizer.pad_id):
            batch = batch.to(self.model.device)
            states = self.base(batch.ids, batch.lengths).float().cpu().numpy()
            for row, state, length in zip(batch.index, states, batch.lengths.tolist(), strict=True):
                found[row] = state[:length].copy()
        return found

    # --- the adapter

    @property
    def adapter(self) -> dict[str, Factors]:
        """{module: `Factors`} of what is on the base now, such as `layers.5.v`."""
        found = {}
        for name, layer in named_layers(self.base):
            A, B = (factor.detach() for factor in plain_factors(layer))
            delta = layer.variant.merge(layer, torch.float32) - layer.original.float()
            found[name] = Factors(A, B, layer.slot.scale, delta.detach())
        return found

    def detach(self) -> Undo:
        """Take the adapter off: the base is what it was before, bit for bit. `with run.detach():` puts it back."""
        taken = dict(named_layers(self.base))
        for name, layer in taken.items():
            replace_module(self.base, name, layer.linear)
        self._detached |= taken
        return Undo(self.attach)

    def attach(self) -> Undo:
        """Put the adapter back on, as it was. `with run.attach():` takes it off again."""
        put(self.base, self._detached)
        self._detached = {}
        return Undo(self.detach)

    def scale(
        self,
        factor: float,
        *,
        layers: Iterable[int] | None = None,
        targets: Iterable[str] | None = None,
        directions: Iterable[int] | None = None,
    ) -> Undo:
        """Multiply what the adapter changes, in some layers, targets or singular directions of it; 0 leaves them out.

        directions  0 is the direction with the largest singular value of each projection's update, and so on

        `with run.scale(0, layers=[5], targets=["v"]):` gives back the adapter as it was, bit for bit. Raises
        InputError for a layer or target without an adapter, and for directions of a variant with magnitudes.
        """
        chosen = self._chosen(layers, targets)
        before = [(layer, layer.factor, layer.B.data) for layer in chosen.values()]
        for name, layer in chosen.items():
            if directions is None:
                layer.factor = layer.factor * factor
            else:
                layer.B.data = _without(layer, name, factor, list(directions))

        def undo():
            for layer, old, B in before:
                layer.factor, layer.B.data = old, B

        return Undo(undo)

    def _chosen(self, layers, targets):
        here = dict(named_layers(self.base))
        for what, wanted, place in (("layer", layers, 1), ("target", targets, 2)):
            if wanted is not None:
                wanted = {str(one) for one in wanted}
                known = {name.split(".")[place] for name in here}
                if absent := sorted(wanted - known):
                    raise InputError(
                        f"{what} {absent[0]} carries no adapter: choose among {', '.join(sorted(known)) or 'none'}"
                    )
                here = {name: layer for name, layer in here.items() if name.split(".")[place] in wanted}
        return here


@torch.no_grad()
def _without(layer, name, factor, directions):
    """B with some singular directions of the update multiplied by `factor`: B + (factor - 1) U U^T B, U [out, n].

    The update is s B A, so U (its left singular vectors) comes from QR of B and A and the SVD of an R x R matrix.
    """
    if layer.magnitude is not None or layer.A0 is not None:
        raise InputError(f"{name} adds more than B A (by its variant or its start): scale it without directions")
    Q, R = torch.linalg.qr(layer.B.double())
    _, T = torch.linalg.qr(layer.A.double().T)
    U = Q @ torch.linalg.svd(R @ T.T)[0]
    if wrong := [one for one in directions if not 0 <= one < U.shape[1]]:
        raise InputError(f"direction {wrong[0]} of {name} is not there: it has directions 0 to {U.shape[1] - 1}")
    U = U[:, directions]
    return (layer.B.double() + (factor - 1) * (U @ (U.T @ layer.B.double()))).to(layer.B.dtype)


# --- opening


def open(
    folder: str | Path,
    *,
    model: str | None = None,
    data: str | Path | None = None,
    scale: float = 1.0,
    added: Iterable[tuple[str | Path, float]] = (),
    **changes,
) -> Trained:
    """Open the finished run in `folder`; or the PEFT adapter in it, which belongs to the base `model`.

    data     other labelled test rows: a file or a source as a cell's `data`
    scale    multiplies what the adapter changes: 0 is the base, 1 the adapter as trained
    added    [(folder of a run or of an adapter, weight)], stacked on top
    changes  fields of the cell that a test may change, such as device="cpu" or inject={"sources": ("country:pos",)}

    Raises InputError for a folder that holds neither, for a run that is not finished, and for a base or rows that are
    not those that the run was trained with.
    """
    if is_table(folder):
        raise no_path("the folder", folder, "name a finished run's folder, and give rows as a file: data='rows.csv'")
    folder = Path(folder)
    if (folder / CONFIG).is_file() and not (folder / "cell.toml").exists():
        return _open_adapter(folder, model, data, scale, added, changes)
    if model is not None:
        changes["model"] = model
    return _open_run(folder, data, scale, added, changes)


def _open_run(folder, data, scale, added, changes):
    run = Run(folder)
    trained = run.read_cell()
    if not run.finished:
        raise InputError(f"{folder} holds no finished run: go on with {to_type('train', '--resume', folder)}")
    flat = {f"inject.{name}" for name in changes.get("inject", {})} | changes.keys() - {"inject"}
    if refused := sorted(flat - set(marked(Cell, "test"))):
        raise InputError(f"{refused[0]} made the adapter, and cannot be changed in a finished run: train a new one")
    cell = trained.replace(**changes)
    if cell.data.startswith(given.PREFIX):
        given.bring_back(cell.data, folder)

    setting = Setting.of(cell)
    task = find_task(cell, setting.spec, setting.tokenizer)
    # The training rows give the placebo its words and the labels their names.
    clean, test, *_ = task.usable(*rows_of(trained))
    found = {"train": fingerprint_rows(clean), "test": fingerprint_rows(test)} | setting.inputs
    results = run.read_results()
    before = results["inputs"]
    check_inputs({name: found[name] for name in before if name in found}, before, cell)
    if data is not None:
        test = _other_rows(data, cell, clean.label_names)
    clean = with_targets(clean, cell)
    base = Settings().load(cell, task.unembedding)
    test = with_targets(test, cell)
    opened = Trained(cell, folder, setting, base, task, clean, test, clean.label_names, choices=results.get("choices"))
    _check_added(added, before["base"], folder)
    storage.restore(run.path, opened.model, cell.method, scale, added)
    return opened


def _check_added(added, base, folder):
    """Raise InputError for a run on another base."""
    for other, _ in added:
        there = Run(other)
        if there.finished and there.read_results()["inputs"]["base"] != base:
            raise InputError(f"--add {other}: it was trained on another base than {folder}: choose another")


def _other_rows(data, cell, label_names):
    free = cell.task == "lm"
    names = dict(text_column=cell.text_column, label_column=cell.label_column, bad_rows=cell.bad_rows)
    rows = load_rows(data, **names, free=free)
    return align(rows, label_names, data, free) if label_names else rows


def _open_adapter(folder, model, data, scale, added, changes):
    if model is None:
        raise InputError(f"{folder} is an adapter without a run: name its base too, open(..., model=...)")
    head = files.read_json(folder / storage.HEAD) if (folder / storage.HEAD).is_file() else {}
    lm = files.read_json(folder / CONFIG).get("task_type") == "CAUSAL_LM"
    fields = {"task": "lm"} if lm else {"pooling": head.get("pooling", "mean")}
    positions = read_spec(read_config(resolve_base(model, changes.get("revision"), changes.get("tokenizer")))).positions
    fields["max_length"] = min(Cell.max_length, positions or Cell.max_length)
    cell = Cell(**({"model": model, "inject": {"sources": ("none",)}} | fields)).replace(**changes)
    setting = Setting.of(cell)
    task = find_task(cell, setting.spec, setting.tokenizer)
    base = Settings().load(cell, task.unembedding)
    classes = 0 if lm else len(storage.read(folder, base).head.get("weight", ()))
    labels, test = head.get("label_names"), None
    if data is not None:
        test = _other_rows(data, cell, labels)
        labels = labels or test.label_names
    if labels and classes and len(labels) != classes:
        raise InputError(f"{data} has {len(labels)} labels, but the head in {folder} has {classes}: give other data")
    labels = labels or [str(number) for number in range(classes)]
    opened = Trained(cell, folder, setting, base, task, test, test, labels, has_head=lm or classes > 0)
    if opened.has_head:
        _check_added(added, setting.inputs["base"], folder)
        storage.restore(folder, opened.model, "lora", scale, added)
    else:
        if added:
            raise InputError(f"{folder} has no head, so nothing is stacked on it: name the adapter with the head first")
        storage.load(folder, base)
        scale_by(base, scale)
    return opened
