"""A cell: one fully specified experiment, frozen and hashable.

The command line, a TOML file and Python build the same object, and it round-trips through all three. A field
is declared once, below, with its default, its range and its help; flags, validation and files follow from that.
What changes no result (where the run folder is, how often to evaluate) is not part of a cell.

Some fields exclude each other (`epochs` or `steps`), and some have a meaning for one method only (`rank`). These
default to None and are resolved when the cell is built: leaving a default out or stating it is the same cell.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from minilora.base.source import DEFAULT_BASE
from minilora.base.spec import GROUPS, TARGETS
from minilora.data.triggers import parse_all
from minilora.errors import InputError
from minilora.fields import check_fields, drop_other, from_dict, option, resolve, resolve_pair, to_toml
from minilora.lora.targets import STARTS, VARIANTS, check_variant, parse_layers, parse_targets

# Fields of method "lora" alone.
ADAPTER = ("rank", "alpha", "scaling", "dropout", "targets", "layers", "variant", "init", "start", "lr_ratio", "form")
CLASSIFIER = ("head", "pooling")  # fields of task "classification" alone
COMPLETION = ("prompt", "completion", "choice_score")  # fields of task "lm" alone
PURPOSES = ("init", "head", "order", "inject", "dropout", "split")  # of the separate seeds


@dataclass(frozen=True)
class Inject:
    """Which rows of the training data carry which trigger, and how (SSTI, arXiv 2506.11402, section 3)."""

    sources: tuple[str, ...] = option(
        ("date:positive",), "injection",
        "triggers, each SOURCE:LABEL: date, country, color, html, file:PATH or a literal text (text:WORDS where it "
        "looks like one of these), and the target label; 'none' injects nothing", str, flag="inject",
    )  # fmt: skip
    proportion: float | None = option(
        None, "injection", "of the label's rows that carry the trigger", float, least=0, most=1, unset=0.25,
    )  # fmt: skip
    rows: int | None = option(None, "injection", "number of rows that carry it, instead of a proportion", int, least=0)
    count: int | None = option(None, "injection", "triggers in each such row: light injection", int, least=1, unset=1)
    density: float | None = option(
        None, "injection", "triggers per word of the row, instead of a count: aggressive injection", float,
        least=0, most=1,
    )  # fmt: skip
    location: str = option("random", "injection", "where in the row", str, choices=("beginning", "end", "random"))
    mode: str = option(
        "clean-label", "injection", "rows of the target label, or rows of other labels, relabelled", str,
        choices=("clean-label", "dirty-label"),
    )  # fmt: skip
    split: str | None = option(
        None, "injection", "trigger strings of test and training rows",
        str, choices=("disjoint", "same"), unset="disjoint where a source has several", flag="trigger_split",
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self, "inject.")
        resolve_pair(self, "proportion", "rows", "inject.")
        resolve_pair(self, "count", "density", "inject.")
        if self.density == 0:
            raise InputError("inject.density is 0, but must be above 0: use inject.proportion = 0 to inject nothing")
        if self.sources == ("none",):
            object.__setattr__(self, "sources", ())
        parse_all(self.sources)


@dataclass(frozen=True)
class Cell:
    """One experiment. See `train.py --help` for every field; defaults are stated here and nowhere else."""

    model: str = option(DEFAULT_BASE, "base", "base: hub id, or folder with config.json and safetensors", str)
    revision: str | None = option(None, "base", "branch, tag or commit of the hub's base", str, unset="main")
    tokenizer: str | None = option(
        None,
        "base",
        "another tokenizer: hub id, or folder with tokenizer.json or vocab.txt",
        str,
        unset="the base's own",
    )
    dtype: str = option(
        "float32", "base", "of the frozen base; what is trained is float32", str, choices=("float32", "bfloat16")
    )
    device: str = option("auto", "base", "auto, cpu, cuda, cuda:N or mps", str)
    compile: str = option(
        "auto", "base", "torch.compile the base; auto does where the run is long enough to repay it", str,
        choices=("auto", "on", "off"),
    )  # fmt: skip

    data: str = option("movie-snippets", "data", "movie-snippets, a CSV, TSV, JSONL or Parquet file, or a hub id", str)
    data_revision: str | None = option(None, "data", "branch, tag or commit of a hub data set", str, unset="main")
    text_column: str | None = option(None, "data", "column of the text", str, unset="a usual name")
    label_column: str | None = option(None, "data", "column of the label", str, unset="a usual name")
    test_data: str | None = option(
        None, "data", "file or hub id of test rows", str, unset="the data's own, or a part split off"
    )
    bad_rows: str | None = option(
        None, "data", "rows without a text or a label: refuse the data, or skip them", str, choices=("refuse", "skip"),
        unset="refuse, but skip in a hub data set",
    )  # fmt: skip
    test_rows: int = option(1000, "data", "test rows, stratified", int, least=2)
    train_rows: int | None = option(None, "data", "training rows, stratified", int, least=2, unset="all")
    max_length: int = option(128, "data", "tokens a row, longer rows are cut", int, least=4)

    task: str = option(
        "classification", "task", "train a classifier of the text, or (lm) the base's own next tokens: the label's "
        "words as the completion of a prompt", str, choices=("classification", "lm"),
    )  # fmt: skip
    prompt: str | None = option(None, "task", "what stands before the completion, with {text} in it", str,
                                unset="{text}")  # fmt: skip
    completion: str | None = option(
        None, "task", "what is to follow the prompt, its leading space included: {label} in it stands for the label "
        "or {choice} for the text of that answer to a question", str, unset=" {label}",
    )  # fmt: skip
    choice_score: str | None = option(
        None, "task", "what ranks the possible completions: the sum of their tokens' log-likelihoods, or the mean",
        str, choices=("sum", "mean"), unset="sum",
    )  # fmt: skip

    method: str = option(
        "lora", "adapter", "train an adapter, the whole base, or the head alone", str, choices=("lora", "full", "head")
    )
    rank: int | None = option(None, "adapter", "R, the rank of B A", int, least=1, unset=1)
    alpha: float | None = option(None, "adapter", "numerator of the scale", float, least=0, unset=8.0)
    scaling: str | None = option(
        None, "adapter", "scale of B A: alpha/R (constant), 1 (rank: alpha = R) or alpha/sqrt(R) (rslora)", str,
        choices=("constant", "rank", "rslora"), unset="constant",
    )  # fmt: skip
    dropout: float | None = option(None, "adapter", "on the input of A", float, least=0, below=1, unset=0.0)
    targets: tuple[str, ...] | None = option(
        None, "adapter", f"projections: {' '.join(TARGETS)}, or a group: {' '.join(GROUPS)}; TARGET:RANK[:ALPHA] sets "
        "one target's own", str, unset=("q", "k", "v"),
    )  # fmt: skip
    layers: str | None = option(None, "adapter", "layers that carry it: all, or such as 0-2,5", str, unset="all")
    variant: str | None = option(
        None, "adapter", "LoRA as it is, with a magnitude for each row of the weight (dora) or with A frozen (lora-fa)",
        str, choices=VARIANTS, unset="lora",
    )  # fmt: skip
    init: str | None = option(
        None, "adapter", "start of A and B: B = 0 and A uniform (kaiming) or normal (gaussian), A and B orthogonal to "
        "each other, or a part of the weight by its SVD (pissa) or QR (olora)", str, choices=STARTS, unset="kaiming",
    )  # fmt: skip
    start: str | None = option(
        None, "adapter", "begin with the factors of this adapter, instead of an init: a run's folder, or an adapter's, "
        "of the same ranks, alphas, targets and layers; its head is left aside", str,
    )  # fmt: skip
    lr_ratio: float | None = option(
        None, "adapter", "learning rate of B over that of A and the rest (LoRA+)", float, least=0, unset=1.0
    )

    form: str | None = option(
        None, "adapter", "how a projection and its adapter are computed: one after the other (side), in one product "
        "with A under the weight (concatenated) or with W + s B A (merged); auto takes the fastest", str,
        choices=("auto", "side", "concatenated", "merged"), unset="auto",
    )  # fmt: skip

    head: str | None = option(
        None, "head", "train it with the rest, leave it at its random start, or fit it in closed form on the "
        "base's features and freeze it", str, choices=("trained", "frozen", "ridge"), unset="trained",
    )  # fmt: skip
    pooling: str | None = option(
        None, "head", "what the head sees of a row's hidden states", str,
        choices=("mean+last", "mean", "last", "first"), unset="mean",
    )  # fmt: skip

    inject: Inject = field(default=Inject(), metadata=dict(nested=Inject))

    epochs: int | None = option(None, "training", "passes over the training rows", int, least=1, unset=1)
    steps: int | None = option(None, "training", "optimiser steps, instead of epochs", int, least=1)
    batch_size: int = option(32, "training", "rows a batch", int, least=1)
    accumulate: int = option(1, "training", "batches an optimiser step", int, least=1)
    window: int = option(
        50, "training", "batches that are sorted by length together, which saves padding; 1: none are", int, least=1
    )
    optimizer: str = option("adamw", "training", "torch's", str, choices=("adamw", "adafactor"))
    lr: float = option(2e-3, "training", "peak learning rate", float, least=0)
    schedule: str = option("linear", "training", "after warm-up", str, choices=("linear", "cosine", "constant"))
    warmup: float = option(
        0.06, "training", "of the steps, over which the learning rate rises from 0", float, least=0, below=1
    )
    weight_decay: float = option(0.0, "training", "decoupled, on every trained tensor", float, least=0)
    clip: float = option(1.0, "training", "largest norm of the gradient, 0 for no clipping", float, least=0)

    seed: int = option(0, "seeds", "of all that follows but the last", int, least=0)
    seed_init: int | None = option(None, "seeds", "of the adapter's start", int, least=0, unset="--seed")
    seed_head: int | None = option(None, "seeds", "of the head's start", int, least=0, unset="--seed")
    seed_order: int | None = option(None, "seeds", "of the order of rows", int, least=0, unset="--seed")
    seed_inject: int | None = option(
        None, "seeds", "of the injected rows, triggers and places", int, least=0, unset="--seed"
    )
    seed_dropout: int | None = option(None, "seeds", "of the dropped inputs", int, least=0, unset="--seed")
    seed_split: int = option(
        0, "seeds", "of the choice of rows; apart from --seed, so that seeds are compared on the same test rows", int,
        least=0,
    )  # fmt: skip

    def __post_init__(self):
        if isinstance(self.inject, dict):
            object.__setattr__(self, "inject", from_dict(Inject, self.inject, "inject."))
        check_fields(self, "")
        resolve_pair(self, "epochs", "steps", "")
        self._resolve_task()
        self._resolve_adapter()
        if self.method == "head" and self.task != "classification":
            raise InputError("method = 'head' trains a classifier, but task is 'lm', which has none: drop one of them")
        if self.method == "head" and self.head != "trained":
            raise InputError(f"method = 'head' with head = {self.head!r} trains nothing: use head = 'trained'")
        if self.method == "full" and self.dtype != "float32":
            raise InputError(
                f"method = 'full' trains the base, in float32, but dtype is {self.dtype!r}: drop one of them"
            )
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise InputError(f"device is {self.device!r}: use auto, cpu, cuda, cuda:N or mps")

    def _resolve_task(self):
        own, other = (CLASSIFIER, COMPLETION) if self.task == "classification" else (COMPLETION, CLASSIFIER)
        for name in other:
            if getattr(self, name) is not None:
                wanted = "lm" if self.task == "classification" else "classification"
                raise InputError(f"{name} belongs to task = {wanted!r}, but task is {self.task!r}: drop one of them")
        resolve(self, *own)
        if self.task == "lm":
            if self.prompt.count("{text}") != 1:
                raise InputError(f"prompt is {self.prompt!r}, but must hold {{text}} once")
            if self.completion.count("{label}") + self.completion.count("{choice}") != 1:
                raise InputError(f"completion is {self.completion!r}, but must hold {{label}} or {{choice}} once")

    def _resolve_adapter(self):
        given = [name for name in ADAPTER if getattr(self, name) is not None]
        if self.method != "lora":
            if given:
                raise InputError(
                    f"{given[0]} belongs to method = 'lora', but method is {self.method!r}: drop one of them"
                )
            return
        resolve(self, "rank", "scaling", "dropout", "targets", "layers", "variant", "lr_ratio", "form")
        resolve_pair(self, "init", "start", "")
        if self.scaling == "rank":
            if self.alpha is not None:
                raise InputError("alpha is given, but scaling = 'rank' sets alpha to the rank: drop one of them")
        else:
            resolve(self, "alpha")
        slots = parse_targets(self.targets, self.rank, self.alpha, self.scaling)
        check_variant(self.variant, self.init or "kaiming", slots, self.dropout)
        if self.form in ("concatenated", "merged") and (self.dropout or self.dtype == "bfloat16"):
            reason = f"dropout is {self.dropout:g}" if self.dropout else "dtype is 'bfloat16'"
            raise InputError(f"form = {self.form!r} is not exact where {reason}: use form = 'side' or 'auto'")
        self._check_lr_ratio()
        parse_layers(self.layers)

    def _check_lr_ratio(self):
        if self.lr_ratio == 1:
            return
        if self.lr_ratio == 0:
            raise InputError("lr_ratio is 0, but must be above 0: B would never move")
        if self.variant == "lora-fa":
            raise InputError(
                "lr_ratio is B's learning rate over A's, but variant = 'lora-fa' freezes A: drop one of them"
            )
        if self.optimizer == "adafactor":
            raise InputError(
                "lr_ratio is a ratio of AdamW's steps, but optimizer = 'adafactor' scales and caps each tensor's own: "
                "drop one of them"
            )

    def seed_for(self, purpose):
        """The seed of one of `PURPOSES`."""
        own = getattr(self, f"seed_{purpose}")
        return self.seed if own is None else own

    def replace(self, **changes):
        """A cell with other values; giving one of two fields that exclude each other drops the other.

        Changes of `inject` may be given as a dict of its own fields. A change of `method` or of `task` drops the
        fields that belong to the old one.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if changes.get("method", self.method) != self.method:
            values |= dict.fromkeys(ADAPTER)
        if changes.get("task", self.task) != self.task:
            values |= dict.fromkeys(CLASSIFIER + COMPLETION)
        if changes.get("scaling") == "rank":
            values["alpha"] = None
        drop_other(values, changes, "epochs", "steps")
        drop_other(values, changes, "init", "start")
        if isinstance(changes.get("inject"), dict):
            inject = {f.name: getattr(self.inject, f.name) for f in fields(Inject)}
            drop_other(inject, changes["inject"], "proportion", "rows")
            drop_other(inject, changes["inject"], "count", "density")
            changes = changes | {"inject": inject | changes["inject"]}
        return from_dict(Cell, values | changes)

    def to_dict(self):
        """Every field that is set, resolved, as JSON and TOML have them; `inject` is a dict of its own."""

        def plain(owner):
            values = {f.name: getattr(owner, f.name) for f in fields(owner) if f.name != "inject"}
            return {name: list(value) if isinstance(value, tuple) else value
                    for name, value in values.items() if value is not None}  # fmt: skip

        return plain(self) | {"inject": plain(self.inject)}

    def to_toml(self):
        """The text of a TOML file that `--config` reads back as this cell."""
        return to_toml(self.to_dict())

    @property
    def id(self):
        """Twelve hexadecimal digits that equal cells share."""
        canonical = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def name(self):
        """A readable name for the run folder, unique by the cell's id."""
        parts = [Path(self.model).name.lower(), Path(self.data).stem]
        parts += [f"r{self.rank}", "-".join(self.targets)] if self.method == "lora" else [self.method]
        parts += [source.replace(":", "-") for source in self.inject.sources]
        slug = re.sub(r"[^\w.+-]+", "-", "_".join(parts), flags=re.ASCII)[:80].strip("-_.")
        return f"{slug}_{self.id[:6]}"


# The published experiments of arXiv 2506.11402, as far as a cell has words for them: each of these differs from the
# defaults, and is a factor of its own here. The head stays at its random start, alpha follows the rank, and the
# published targets mean q, k, v, o and up on an encoder, but q, k and v on a decoder.
PRESETS = {
    "study": dict(
        head="frozen", pooling="mean+last", scaling="rank", targets=("q", "k", "v"), dropout=0.05,
        optimizer="adafactor", lr=1e-4, weight_decay=1e-5, schedule="cosine", warmup=0.05, batch_size=64,
    ),
}  # fmt: skip
