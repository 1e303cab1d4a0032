"""A data set on the hub: which of its files make up a split, and what its card says of them.

The card (README.md) may declare configurations, the files of each split and the names of the classes. Without
that the names of files and folders tell, as in `data/train-00000-of-00002.parquet`. Left out: loading
scripts, so no remote code ever runs.
"""

import re

from minilora import hub
from minilora.data import formats
from minilora.data.formats import FORMATS, NoLabels, few
from minilora.errors import InputError

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")


class HubSet:
    """The data set `source` (`owner/name` or `owner/name:CONFIG`) as it is at one commit."""

    def __init__(self, source, revision=None):
        self.source = source
        self.repo_id, _, self.config = source.partition(":")
        self.card = {}

        def card_or_data(names):  # without a card the layout must do, so the training files come at once
            return ["README.md"] if "README.md" in names else self._files(names, "train")

        folder = hub.fetch(self.repo_id, card_or_data, kind="dataset", revision=revision)
        self.commit = folder.name  # what is fetched later belongs to the same state
        if (folder / "README.md").is_file():
            self.card = _card(folder / "README.md", self.repo_id)

    def read(self, split, text_column=None, label_column=None, free=False):
        """The files of `split`, a list of `tables.Table`; NoLabels if there is no such split or no labels."""
        chosen = []

        def choose(names):
            chosen[:] = self._files(names, split)
            return chosen

        folder = hub.fetch(self.repo_id, choose, kind="dataset", revision=self.commit)
        names = self._class_names()
        return [
            formats.read(folder / name, f"{self.repo_id}/{name}", text_column, label_column, names, free)
            for name in chosen
        ]

    def _files(self, names, split):
        names = [name for name in names if _is_data(name)]
        entry = self._entry()
        splits = _declared_splits(names, entry) if "data_files" in entry else self._found_splits(names, entry)
        word = SPLIT_WORDS.get(split, split)
        known = split if split in splits else next((s for s in splits if SPLIT_WORDS.get(s, s) == word), None)
        if known is None:
            raise NoLabels(f"{self.source} has no split {split!r}; there are: {few(splits)}")
        if not splits[known]:
            raise InputError(
                f"{self.source}: no file that is read here ({' '.join(FORMATS)}) is what the card gives for"
                f" split {known!r}; try revision refs/convert/parquet"
            )
        return sorted(splits[known])

    def _entry(self):
        """The card's entry of the configuration asked for, else the default or the only one, else {}."""
        entries = {entry.get("config_name", "default"): entry for entry in self.card.get("configs") or []}
        if not entries:
            return {}
        if self.config:
            wanted = self.config
        else:
            marked = [name for name, entry in entries.items() if entry.get("default")]
            wanted = (marked or (list(entries) if len(entries) == 1 else ["default"]))[0]
        if wanted not in entries:
            raise self._which_configuration(entries)
        return entries[wanted]

    def _which_configuration(self, names):
        problem = f"has no configuration {self.config!r}" if self.config else "has several configurations"
        return InputError(f"{self.source} {problem}; give {self.repo_id}:CONFIG, one of: {few(names)}")

    def _found_splits(self, names, entry):
        """{split: files} by the words in the names of files and folders."""
        folder = (entry.get("data_dir") or ("" if entry else self.config)).strip("./")
        inside = [name for name in names if name.startswith(f"{folder}/" if folder else "")]
        forms = [formats.format_of(name) for name in inside]
        best = next((form for form in FORMATS if form in forms), None)
        splits, folders = {}, set()
        for name in (name for name, form in zip(inside, forms) if form == best):
            split, above = _split_in(name)
            splits.setdefault(split, []).append(name)
            if split:
                folders.add(above)
        if best is None:
            raise InputError(
                f"{self.source} has no files that are read here ({' '.join(FORMATS)}){' in ' * bool(folder)}"
                f"{folder}; if it has a loading script, try revision refs/convert/parquet"
            )
        if len(folders) > 1:
            raise self._which_configuration(sorted(filter(None, folders)))
        others = splits.pop(None, [])  # of a split with another name; or all there are, then it is one split
        return splits or {"train": others}

    def _class_names(self):
        """{column: class names} from the card's dataset_info."""
        infos = self.card.get("dataset_info") or []
        infos = [infos] if isinstance(infos, dict) else infos
        config = self._entry().get("config_name", self.config or "default")
        named = [info for info in infos if info.get("config_name", "default") == config]
        found = {}
        for feature in (named or infos[: len(infos) == 1] or [{}])[0].get("features") or []:
            kind = feature.get("dtype")
            names = kind.get("class_label", {}).get("names") if isinstance(kind, dict) else None
            if isinstance(names, dict):  # {'0': first, '1': second}
                names = [names[key] for key in sorted(names, key=int)]
            if names:
                found[feature["name"]] = names
        return found


def _card(path, repo_id):
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception as error:  # YAML's own errors: the library comes with huggingface_hub, not with us
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{repo_id}/README.md: its front matter is not YAML ({reason})") from error


def _is_data(name):
    file = name.rpartition("/")[2]
    return formats.format_of(file) is not None and file not in NOT_DATA and not name.startswith(".")


def _declared_splits(names, entry):
    """{split: files} from a configuration's data_files: patterns, or a list or mapping of splits to"
    " patterns."""
    declared = entry["data_files"]
    if isinstance(declared, dict):
        declared = [{"split": split, "path": path} for split, path in declared.items()]
    elif isinstance(declared, str) or all(isinstance(pattern, str) for pattern in declared):
        declared = [{"split": "train", "path": declared}]
    folder = (entry.get("data_dir") or "").strip("./")
    splits = {}
    for part in declared:
        paths = [part["path"]] if isinstance(part["path"], str) else part["path"]
        paths = [path.removeprefix("./") for path in paths]
        patterns = [_pattern(f"{folder}/{path}" if folder else path) for path in paths]
        splits[part["split"]] = [name for name in names if any(p.fullmatch(name) for p in patterns)]
    return splits


def _pattern(glob):
    """A regular expression for a glob in which * stays within a folder and ** crosses them."""
    forms = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", glob)
    return re.compile("".join(forms.get(p) or (p if p.startswith("[") else re.escape(p)) for p in parts))


def _split_in(name):
    """The split that a path names, its file before its folders, and the folder above that part."""
    parts = name.split("/")
    for depth in reversed(range(len(parts))):
        for word in re.split("[^a-z]+", parts[depth].lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word], "/".join(parts[:depth])
    return None, ""
