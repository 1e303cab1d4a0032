"""Whether a tokenizer.json can be used without harm: the library panics or aborts on some, and never ends on others.

Most files hold only rules that end in time linear in the text. The others are tried in a process of their own, with
limits on time and memory, on texts made of their own patterns; a file that passed is remembered by its hash. Left out:
a proof: a rule may still be slow on a text that was not tried, which `tokenizer.py` bounds.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys

from minilora.errors import InputError, first_words
from minilora.files import cache, check_regular, replacing

# Rules without patterns or tables of their own.
PLAIN = {
    "BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "Prepend", "ByteLevel",
    "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Metaspace", "Digits", "Punctuation", "UnicodeScripts",
    "BertProcessing", "RobertaProcessing", "Sequence",
}  # fmt: skip
SECONDS, ROOM = 5, 768 << 20  # of processor time; bytes of address space beyond 40 times the file
TRY = """
import json, resource, sys
for kind, limit in ("AS", int(sys.argv[2])), ("CPU", int(sys.argv[3])), ("CORE", 0):
    kind = getattr(resource, "RLIMIT_" + kind)
    most = resource.getrlimit(kind)[1]
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(kind, (limit, limit))
from tokenizers import Tokenizer
try:
    tokenizer = Tokenizer.from_file(sys.argv[1])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for text in json.load(sys.stdin):
        for special in (True, False):
            if len(tokenizer.encode(text, add_special_tokens=special)) > 100 * len(text) + 100:
                raise ValueError("a text of %d characters grows too large" % len(text))
except BaseException as error:
    print(str(error)[:200])
    sys.exit(3)
"""


def check_safe(path):
    """Raise InputError unless the tokenizer.json at `path` can be loaded and used. Text that is no JSON passes."""
    check_regular(path)
    data = path.read_bytes()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a JSON {type(document).__name__}, not an object; fetch the checkpoint again")
    try:
        if is_plain(document):
            return
    except (TypeError, AttributeError, KeyError):
        pass  # a rule of another shape: the library says what is wrong
    import tokenizers

    digest = hashlib.sha256(tokenizers.__version__.encode() + TRY.encode() + data).hexdigest()
    passed = cache() / "tokenizers" / digest
    if passed.exists():
        return
    reason = attempt(path, texts(document), ROOM + 40 * len(data), SECONDS + len(data) // 2_000_000)
    if reason is not None:
        raise InputError(f"{path}: not a usable tokenizer ({first_words(reason)}); fetch the checkpoint again")
    with contextlib.suppress(OSError):  # without a cache it is tried each time
        passed.parent.mkdir(parents=True, exist_ok=True)
        with replacing(passed) as temporary:
            temporary.touch()


def is_plain(document):
    """Whether a tokenizer.json holds only rules that cannot harm."""
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        for rule in rules(document.get(part)):
            if rule.get("type") == "TemplateProcessing":
                if not is_sound(rule):
                    return False
            elif rule.get("type") == "Replace":
                pattern, content = (rule.get("pattern") or {}), rule.get("content")
                if set(pattern) != {"String"} or len(pattern["String"]) < 1 or len(str(content)) > 4:
                    return False
            elif rule.get("type") not in PLAIN:
                return False
    model = document.get("model")
    if not isinstance(model, dict) or model.get("continuing_subword_prefix") and model.get("type") == "BPE":
        return False
    return model.get("type") in ("BPE", "WordPiece", "WordLevel") and not model.get("end_of_word_suffix")


def rules(value):
    """Every rule in a part of tokenizer.json: sequences hold others."""
    if isinstance(value, dict):
        yield value
        for inner in ("normalizers", "pretokenizers", "processors"):
            for rule in value.get(inner) or ():
                yield from rules(rule)


def is_sound(template):
    """Whether a TemplateProcessing has all tokens that it names, and exactly one text in a single one."""
    single, tokens = template.get("single"), template.get("special_tokens")
    if not isinstance(single, list) or not isinstance(tokens, dict):
        return False
    pieces = [next(iter(piece.items()), (None, None)) for piece in single if isinstance(piece, dict)]
    pieces = [(kind, value.get("id") if isinstance(value, dict) else None) for kind, value in pieces]
    return [i for kind, i in pieces if kind == "Sequence"] == ["A"] and all(
        kind == "Sequence" or i in tokens for kind, i in pieces
    )


def texts(document):
    """Texts to try: ordinary ones, and for each character of the rules' own patterns one that it fills."""
    patterns = []

    def collect(value):
        if isinstance(value, dict):
            patterns.extend(str(value[key]) for key in ("String", "Regex", "content") if key in value)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(inner)

    for part in ("normalizer", "pre_tokenizer"):
        collect(document.get(part))
    own = list(dict.fromkeys("".join(patterns)))[:200]
    fill = list(dict.fromkeys([*"aA1 .-_\n\t", "é", "中", *own]))
    plain = ["", "a", "The film was good, and it's 2024!\n\n  Naïve Å İ ﬁ 中文 한국어 🎬 \u200b\x07", " ".join(own)]
    return plain + [character * 60 + end for character in fill for end in ("", "!", "b")] + patterns[:50]


def attempt(path, texts, room, seconds):
    """Why the file cannot be used, or None; tried in another process."""
    command = [sys.executable, "-c", TRY, str(path), str(room), str(seconds)]
    quiet = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, input=json.dumps(texts), capture_output=True, text=True, timeout=20 * seconds, env=quiet
        )
    except subprocess.TimeoutExpired:
        return f"it does not end within {20 * seconds} s"
    if done.returncode == 0:
        return None
    if done.returncode == 3:
        return " ".join(done.stdout.split()) or "it fails"
    return f"its rules need more than {seconds} s or {room >> 20} MiB for short texts, or crash the library"
