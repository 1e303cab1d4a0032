"""A cell: one fully specified experiment, frozen and hashable.

The command line, a TOML file and Python build the same object, and it round-trips through all three. A field is
declared once, below: its default, range and help, and what else the code asks of it (`fields.option`, `MARKS`). Flags,
validation, files and every list of fields follow from that. What changes no result (where the run folder is, how often
to evaluate) is not part of a cell. What changes none beyond rounding (a run option: `device`, `compile`, `form`) is
recorded with it, so that a resumed run ends bit for bit the same, but cells that differ only there are equal.

Some fields exclude each other (`epochs` or `steps`), and some have a meaning for only one method or task (`rank`).
These default to None and are resolved when the cell is built: leaving a default out or stating it is the same cell.
"""

import hashlib
import json
from dataclasses import dataclass, fields

from minilora import naming, precision
from minilora.base.source import DEFAULT_BASE
from minilora.base.spec import GROUPS, TARGETS
from minilora.data.named import NAMED, SNIPPETS
from minilora.errors import InputError, shown
from minilora.fields import (
    Named,
    check_fields,
    declared,
    from_dict,
    option,
    resolve,
    run_options,
    to_toml,
    value_of,
)
from minilora.inject import Inject
from minilora.lora.targets import STARTS, VARIANTS, check_variant, parse_layers, parse_targets
from minilora.mitigate import Mitigate
from minilora.presets import PRESETS

MARKS = {
    "free": "members of one population may differ in it",
    "test": "evaluate.py can test a finished run with another value",
    "peers": "the peers in benchmarks/ know it too",
    "path": "it may name a file or a folder",
    "dose": "it sets how many rows are injected",
    "slots": "it decides which projections are adapted, at which rank and scale",
}
ADAPTER, CLASSIFIER, COMPLETION = ("method", "lora"), ("task", "classification"), ("task", "lm")
TABLES = {"inject": Inject, "mitigate": Mitigate}  # the fields that are tables of their own


@dataclass(frozen=True)
class Cell(Named):
    """One experiment. See `train.py --help` for every field; only here are defaults stated."""

    model: str = option(
        DEFAULT_BASE, "base", "base: hub id, or folder with config.json and safetensors", short="",
        marks="test peers path",
    )  # fmt: skip
    revision: str | None = option(None, "base", "branch, tag or commit of the hub's base", unset="main")
    tokenizer: str | None = option(
        None, "base", "another tokenizer: hub id, or folder with tokenizer.json or vocab.txt", unset="the base's own",
        marks="test peers path",
    )  # fmt: skip
    dtype: str = option(
        "float32", "base", "of the frozen base; what is trained is float32", choices=("float32", "bfloat16"),
        short="", marks="peers",
    )  # fmt: skip
    products: str | None = option(
        None, "base", "what products with its matrices compute in: tf32 on GPUs that have it; bfloat16 rounds them "
        "once, all else stays float32", choices=("float32", "tf32", "bfloat16"), unset="float32", marks="peers",
    )  # fmt: skip
    device: str = option("auto", "base", "auto, cpu, cuda, cuda:N or mps", run=True, marks="test peers")
    compile: str = option(
        "auto", "base", "on compiles whole steps; auto replays them as graphs on a GPU; off does neither", run=True,
        choices=("auto", "on", "off"),
    )  # fmt: skip
    deterministic: str = option(
        "off", "base", "repeat a GPU's run bit for bit, which costs speed", run=True, choices=("off", "on")
    )

    data: str = option(
        SNIPPETS, "data", f"a name ({', '.join(NAMED)}), a CSV, TSV, JSONL or Parquet file, or a hub id",
        marks="free peers path",
    )  # fmt: skip
    data_revision: str | None = option(
        None, "data", "branch, tag or commit of a hub data set", unset="main", marks="free"
    )
    text_column: str | None = option(None, "data", "column of the text", unset="a usual name", marks="free test peers")
    label_column: str | None = option(
        None, "data", "column of the label", unset="a usual name", marks="free test peers"
    )
    test_data: str | None = option(
        None, "data", "file or hub id of test rows", unset="the data's own, or a part split off", marks="free path"
    )
    bad_rows: str | None = option(
        None, "data", "rows without a text or a label: refuse the data, or skip them", choices=("refuse", "skip"),
        unset="refuse, but skip in a hub data set", marks="free test",
    )  # fmt: skip
    test_rows: int = option(1000, "data", "test rows, stratified", least=2, marks="free peers")
    train_rows: int | None = option(
        None, "data", "training rows, stratified", least=2, unset="all", axis="training rows", marks="free dose"
    )
    label_noise: float = option(
        0.0, "data", "share of the training rows that get another label at random", least=0, most=1, marks="free"
    )
    strip_words: int | None = option(
        None, "data", "take the words that tell most, so many of each label, out of all rows", least=1, unset="none",
        axis="telling words taken out", marks="free",
    )  # fmt: skip
    validation_rows: int | None = option(
        None, "data", "rows taken out of the training data, to choose by, such as a learning rate for each rank",
        least=2, unset="none", marks="free",
    )  # fmt: skip
    panel: str | None = option(
        None, "data", "other strings to test what was trained under, beside its trigger: a shipped panel (dates) or a "
        "TOML file", unset="none", marks="free path",
    )  # fmt: skip
    max_length: int = option(128, "data", "tokens a row, longer rows are cut", least=4, marks="peers")

    task: str = option(
        "classification", "task", "train a classifier of the text, or (lm) the base's own next tokens: the label's "
        "words as the completion of a prompt", choices=("classification", "lm"), short="",
    )  # fmt: skip
    prompt: str | None = option(
        None, "task", "the text that precedes the completion, with {text} in it", of=COMPLETION, unset="{text}"
    )
    completion: str | None = option(
        None, "task", "what is to follow the prompt, its leading space included: {label} in it stands for the label "
        "or {choice} for the text of that answer to a question", of=COMPLETION, unset=" {label}",
    )  # fmt: skip
    choice_score: str | None = option(
        None, "task", "what ranks the possible completions: the sum of their tokens' log-likelihoods, or the mean",
        of=COMPLETION, choices=("sum", "mean"), unset="sum",
    )  # fmt: skip

    method: str = option(
        "lora", "adapter", "train an adapter, the whole base, or only the head", choices=("lora", "full", "head"),
        short="", curve=3,
    )  # fmt: skip
    rank: int | None = option(
        None, "adapter", "R, the rank of B A", of=ADAPTER, least=1, unset=1, short="r", curve=1,
        marks="free peers slots",
    )  # fmt: skip
    alpha: float | None = option(
        None, "adapter", "numerator of the scale", of=ADAPTER, least=0, unset=8.0, short="a",
        marks="free peers slots",
    )  # fmt: skip
    scaling: str | None = option(
        None, "adapter", "scale of B A: alpha/R (constant), 1 (rank: alpha = R) or alpha/sqrt(R) (rslora)", of=ADAPTER,
        choices=("constant", "rank", "rslora"), unset="constant", curve=2, marks="free peers slots",
    )  # fmt: skip
    dropout: float | None = option(
        None, "adapter", "on the input of A", of=ADAPTER, least=0, below=1, unset=0.0, marks="free"
    )
    targets: tuple[str, ...] | None = option(
        None, "adapter", f"projections: {' '.join(TARGETS)}, or a group: {' '.join(GROUPS)}; TARGET:RANK[:ALPHA] sets "
        "one target's own", of=ADAPTER, unset=("q", "k", "v"), short="", marks="free peers slots",
    )  # fmt: skip
    layers: str | None = option(
        None, "adapter", "layers that carry it: all, or such as 0-2,5", of=ADAPTER, unset="all",
        marks="free peers slots",
    )  # fmt: skip
    variant: str | None = option(
        None, "adapter", "LoRA as it is, with a magnitude for each row of the weight (dora) or with A frozen (lora-fa)",
        of=ADAPTER, choices=VARIANTS, unset="lora", short="", marks="slots",
    )  # fmt: skip
    init: str | None = option(
        None, "adapter", "start of A and B: B = 0 and A uniform (kaiming) or normal (gaussian), A and B orthogonal to "
        "each other, or a part of the weight by its SVD (pissa) or QR (olora)", of=ADAPTER, choices=STARTS,
        unset="kaiming", short="", marks="free",
    )  # fmt: skip
    start: str | None = option(
        None, "adapter", "begin with the factors of this adapter, instead of an init: a run's folder, or an adapter's, "
        "of the same ranks, alphas, targets and layers; its head is not used", of=ADAPTER, instead="init",
        marks="path",
    )  # fmt: skip
    lr_ratio: float | None = option(
        None, "adapter", "learning rate of B over that of A and the rest (LoRA+)", of=ADAPTER, least=0, unset=1.0,
        marks="free",
    )  # fmt: skip
    form: str | None = option(
        None, "adapter", "how a projection and its adapter are computed: one after the other (side), or in one "
        "product with W + s B A (merged); auto takes the faster one", of=ADAPTER,
        choices=("auto", "side", "merged"), unset="auto", run=True,
    )  # fmt: skip

    head: str | None = option(
        None, "head", "train it with the rest, leave it at its random start, or fit it in closed form on the "
        "base's features and freeze it", of=CLASSIFIER, choices=("trained", "frozen", "ridge"), unset="trained",
    )  # fmt: skip
    pooling: str | None = option(
        None, "head", "what the head sees of a row's hidden states; padded: of its padding too, as published",
        of=CLASSIFIER, choices=("mean+last", "mean", "last", "first", "padded-mean+last"), unset="mean", marks="peers",
    )  # fmt: skip

    inject: Inject = Inject()
    mitigate: Mitigate = Mitigate()

    epochs: int | None = option(None, "training", "passes over the training rows", least=1, unset=1, marks="free peers")
    steps: int | None = option(None, "training", "optimiser steps, not epochs", least=1, instead="epochs", marks="free")
    batch_size: int = option(32, "training", "rows a batch", least=1, short="batch", marks="peers")
    accumulate: int = option(1, "training", "batches an optimiser step", least=1)
    window: int = option(
        50, "training", "batches that are sorted by length together, which saves padding; 1: none are", least=1,
        marks="free",
    )  # fmt: skip
    optimizer: str = option("adamw", "training", "torch's", choices=("adamw", "adafactor"), short="")
    lr: float = option(2e-3, "training", "peak learning rate", least=0, axis="peak learning rate", marks="free peers")
    schedule: str = option(
        "linear", "training", "after warm-up", choices=("linear", "cosine", "constant"), short="", marks="free peers"
    )
    warmup: float = option(
        0.06, "training", "of the steps, over which the learning rate rises from 0", least=0, below=1,
        marks="free peers",
    )  # fmt: skip
    weight_decay: float = option(0.0, "training", "decoupled, on every trained tensor", least=0, marks="free")
    clip: float = option(1.0, "training", "largest norm of the gradient, 0 for no clipping", least=0, marks="free")

    seed: int = option(0, "seeds", "of all that follows except the last", least=0, marks="free peers")
    seed_init: int | None = option(None, "seeds", "of the adapter's start", least=0, unset="--seed", marks="free")
    seed_head: int | None = option(None, "seeds", "of the head's start", least=0, unset="--seed", marks="free")
    seed_order: int | None = option(None, "seeds", "of the order of rows", least=0, unset="--seed", marks="free")
    seed_inject: int | None = option(
        None, "seeds", "of the injected rows, triggers and places", least=0, unset="--seed", marks="free test"
    )
    seed_dropout: int | None = option(None, "seeds", "of the dropped inputs", least=0, unset="--seed", marks="free")
    seed_split: int = option(
        0, "seeds", "of the choice of rows; apart: seeds are compared on the same rows", least=0, marks="free"
    )

    def __post_init__(self):
        for name, kind in TABLES.items():
            if isinstance(value := getattr(self, name), dict):
                object.__setattr__(self, name, from_dict(kind, value, f"{name}."))
        check_fields(self, "")
        self._resolve()
        self.mitigate.check(self)
        object.__setattr__(self, "products", self.products or self.dtype)
        precision.refuse(self)
        if self.task == "lm":
            self._check_templates()
        if self.method == "lora":
            self._check_adapter()
        if self.method == "head":
            self._check_head()

    def _resolve(self):
        """Resolve the fields that the method and the task have, and refuse those that they have not."""
        names = ["epochs"]
        for f in fields(self):
            chooser, wanted = f.metadata.get("of") or (None, None)
            if chooser is None:
                continue
            if (chosen := getattr(self, chooser)) == wanted:
                names.append(f.name)
            elif getattr(self, f.name) is not None:
                raise InputError(
                    f"{f.name} belongs to {chooser} = {wanted!r}, but {chooser} is {chosen!r}: drop one of them"
                )
        if self.scaling == "rank":
            if self.alpha is not None:
                raise InputError("alpha is given, but scaling = 'rank' sets alpha to the rank: drop one of them")
            names.remove("alpha")
        resolve(self, *names)

    def _check_templates(self):
        """Refuse templates that do not say where the text and the label go."""
        if self.prompt.count("{text}") != 1:
            raise InputError(f"prompt is {shown(self.prompt)}, but must hold {{text}} once")
        if self.completion.count("{label}") + self.completion.count("{choice}") != 1:
            raise InputError(f"completion is {shown(self.completion)}, but must hold {{label}} or {{choice}} once")

    def _check_head(self):
        """Refuse to train only a head that there is not, or that is not trained."""
        if self.task != "classification":
            raise InputError("method = 'head' trains a classifier, but task is 'lm', which has none: drop one of them")
        if self.head != "trained":
            raise InputError(f"method = 'head' with head = {self.head!r} trains nothing: use head = 'trained'")

    def _check_adapter(self):
        """Refuse projections, variants and forms that do not go together."""
        slots = parse_targets(self.targets, self.rank, self.alpha, self.scaling)
        check_variant(self.variant, self.init or "kaiming", slots, self.dropout)
        if self.form == "merged" and (self.dropout or self.products == "bfloat16"):
            reason = f"dropout is {self.dropout:g}" if self.dropout else "products are 'bfloat16'"
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

    @property
    def seeds(self):
        """{purpose: seed} of the separate seeds; one that is not given is the general one."""
        own = {f.name.removeprefix("seed_"): getattr(self, f.name) for f in fields(self) if f.name[:5] == "seed_"}
        return {purpose: self.seed if seed is None else seed for purpose, seed in own.items()}

    def seed_for(self, purpose):
        """The seed of a purpose: init, head, order, inject, dropout or split."""
        return self.seeds[purpose]

    def replace(self, **changes):
        """A cell with other values; giving one of two fields that exclude each other drops the other.

        Changes of a table may be given as a dict of its own fields. A change of a method or of `task` drops the fields
        that belong to the old one.
        """
        values = self.after(changes)
        for f in fields(self):
            chooser, _ = f.metadata.get("of") or (None, None)
            if chooser and f.name not in changes and values[chooser] != getattr(self, chooser):
                values[f.name] = None
        if changes.get("scaling") == "rank" and "alpha" not in changes:
            values["alpha"] = None
        if "dtype" in changes and "products" not in changes:
            values["products"] = None
        for name in TABLES:
            if isinstance(changes.get(name), dict):
                values[name] = getattr(self, name).after(changes[name])
        return from_dict(Cell, values)

    def to_dict(self):
        """Every field that is set, resolved, as JSON and TOML have them; a table is a dict, `mitigate` only if used."""

        def plain(owner):
            values = {f.name: getattr(owner, f.name) for f in fields(owner) if f.name not in TABLES}
            return {name: list(value) if isinstance(value, tuple) else value
                    for name, value in values.items() if value is not None}  # fmt: skip

        used = {"mitigate": plain(self.mitigate)} if self.mitigate != Mitigate() else {}
        return plain(self) | {"inject": plain(self.inject)} | used

    def to_toml(self):
        """The text of a TOML file that `--config` reads back as this cell."""
        return to_toml(self.to_dict())

    @property
    def id(self):
        """Twelve hexadecimal digits that equal cells share."""
        identity = {name: value for name, value in self.to_dict().items() if name not in run_options(Cell)}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self):
        """A name for the run folder: how it differs from the defaults, or from a preset where that is less to say."""
        own = dict(task=self.task, method=self.method, dtype=self.dtype)  # others' defaults follow from these
        plain = Cell(**own)
        defaults = {name: value_of(plain, name) for name in declared(Cell)}
        defaults |= {name: getattr(Cell, name) for name in own}
        words, exact = naming.difference(self, defaults)
        for preset, changes in PRESETS.items():
            other = Cell().replace(**changes)
            left, told = naming.difference(self, {name: value_of(other, name) for name in defaults})
            if 1 + len(left) < len(words):
                words, exact = [preset, *left], told
        return naming.joined(words or ["default"], exact, self.id)
