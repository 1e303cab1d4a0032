"""Text to token ids, for whole data sets at once, with the character at which each text is cut.

The `tokenizers` library does the work, by `tokenizer.json` or, for WordPiece, `vocab.txt`. Left out: padding
(batches are packed or padded later) and pairs of texts. Texts are always cut at their end.

A prompt and its completion are encoded apart, so that which tokens are the completion's is never in doubt, and a
prompt has the same tokens whatever follows it. The prompt has the special tokens that stand before a text and none
of those behind it. The completion has none, and is encoded as it would stand behind a line break: its leading space
is its own, and no other is put before it.
"""

import functools
import hashlib
import json
import threading
from array import array
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.base import word_table, words
from minilora.console import watch
from minilora.errors import InputError, first_words

# Texts are encoded in chunks of at most so many, and about so many characters: an encoding needs some 700 bytes, and
# some 50 bytes a character.
CHUNK_TEXTS, CHUNK_CHARACTERS = 1 << 12, 1 << 18
MOST_ID = 1 << 24  # the library would walk through all ids up to the largest
PATIENCE_SECONDS = 100  # for a chunk, which takes about one: on the slowest of machines too
# What a completion is encoded behind: the first of these whose tokens do not run into the completion's.
ANCHORS = ("\n", "a", ".")


@dataclass(frozen=True)
class Encoded:
    """N rows of tokens; row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: np.ndarray  # uint16 [tokens of all rows], or int32 where the tokenizer has larger ids
    offsets: np.ndarray  # int64 [N + 1]
    kept: np.ndarray  # int64 [N], characters before the first token that was cut; all of them if none was
    answers: np.ndarray | None = None  # int64 [N], how many of a row's last tokens are its completion

    def spread(self, index, count):
        """These rows as those at `index`, ascending, among `count`; the others have no token."""
        lengths, kept, answers = np.zeros(count, np.int64), np.zeros(count, np.int64), None
        lengths[index], kept[index] = np.diff(self.offsets), self.kept
        if self.answers is not None:
            answers = np.zeros(count, np.int64)
            answers[index] = self.answers
        return Encoded(self.ids, np.concatenate([[0], lengths.cumsum()]), kept, answers)


def load(folder, embedded=None):
    """The `TextTokenizer` of a checkpoint folder, for a base that embeds so many tokens (default: as many as it has).

    Raises InputError for a missing or malformed file, for a setting that is not implemented, and for a tokenizer that
    has more tokens than the base.
    """
    import tokenizers  # noqa: F401  a missing package is not the file's fault

    files = words.Files(folder)
    try:
        return TextTokenizer(words.build(files), files.role("pad_token"), files.role("eos_token"), embedded)
    except InputError:
        raise
    except BaseException as error:
        raise_unless_broken(error)
        reason = first_words(error)
        raise InputError(f"{files.path}: not a usable tokenizer ({reason}); fetch the checkpoint again") from error


def raise_unless_broken(error):
    """Raise what is no fault of the tokenizer's: an interrupt, say. The library's panics are no `Exception`."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


class TextTokenizer:
    """Encodes texts with the special tokens that the model expects around them.

    vocab_size  largest id that a text can have, plus 1: added tokens (an image's, say) have none in most
    pad_id      id to fill batches with (0 where the tokenizer has none)
    end_id      id of the token that ends a text (None where the tokenizer has none)
    around      ids of the special tokens before a text, and of those after it
    """

    def __init__(self, tokenizer, pad_token=None, end_token=None, embedded=None):
        padding = tokenizer.padding
        # all-MiniLM's own file pads every text to 128 tokens and cuts it there.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        probe = tokenizer.encode("a \U0001f701")  # the rare sign fails here if the unknown token is missing
        mask = probe.special_tokens_mask
        self._before, self._after = mask.index(0), mask[::-1].index(0)  # special tokens around a text
        self.around = probe.ids[: self._before], probe.ids[len(probe.ids) - self._after :]
        self._tokenizer = tokenizer
        self.pad_id = self._embeds(pad_token, embedded)
        if self.pad_id is None:
            self.pad_id = padding["pad_id"] if padding else 0
        self.end_id = self._embeds(end_token, embedded)
        largest = max(tokenizer.get_vocab().values(), default=0)
        if largest > MOST_ID:
            raise ValueError(f"a token has the id {largest:,}")
        used = [*probe.ids, self.pad_id, *([] if self.end_id is None else [self.end_id])]
        self.vocab_size = 1 + max([*tokenizer.get_vocab(with_added_tokens=False).values(), *used])
        self._embedded = embedded
        if embedded is not None and self.vocab_size > embedded:
            raise InputError(
                f"the tokenizer has ids up to {self.vocab_size - 1}, but the base embeds {embedded} tokens: they do "
                "not belong together, choose another --tokenizer or --model"
            )
        # Gemma 3 has one more added token than embeddings: it is refused where a text has it.
        self._exceeds = embedded is not None and largest >= embedded
        self._table = None
        if word_table.is_spaced(tokenizer):
            self._table = word_table.WordTable(lambda found: self._encodings(found, special=False), largest + 1)

    @property
    def special(self):
        """How many special tokens are at the start of an encoded text, and how many at its end."""
        return self._before, self._after

    def _embeds(self, token, embedded):
        """The id of a special token, None where there is none that the base embeds."""
        found = self._tokenizer.token_to_id(token) if token else None
        return None if found is None or embedded is not None and found >= embedded else found

    @functools.cached_property
    def fingerprint(self):
        """sha256 (hexadecimal) of all that is made of a text here follows from, beside the arguments: vocabulary and
        rules, the library's version, and this file's code."""
        import tokenizers

        own = (__file__, words.__file__, word_table.__file__)
        code = "".join(Path(file).read_text(encoding="utf-8") for file in own)
        state = [tokenizers.__version__, code, self._embedded, self._tokenizer.to_str()]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def encode(self, texts, max_length):
        """`Encoded` ids of a list of N texts, at most `max_length` tokens each, special tokens included.

        A longer text loses its last tokens, never the special ones. Raises InputError if `max_length` leaves
        no room for text, or if a text is not valid Unicode.
        """
        room = self._room(max_length)
        kind = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)
        flat, offsets, kept = array(kind.char), np.zeros(len(texts) + 1, np.int64), np.empty(len(texts), np.int64)
        for row, (ids, fitting) in enumerate(watch(self._read(texts), "tokenising", len(texts))):
            kept[row] = len(texts[row])
            if len(ids) > max_length:
                kept[row] = fitting(room)
                ids = ids[: self._before + room] + ids[len(ids) - self._after :]
            flat.extend(ids)
            offsets[row + 1] = len(flat)
        return Encoded(np.frombuffer(flat, kind) if flat else np.empty(0, kind), offsets, kept)

    def places(self, texts, max_length):
        """The characters (start, stop) that each token of `encode(texts, max_length)` stands for: of each text int64
        [its tokens, 2], (-1, -1) for a special token."""
        room, found = self._room(max_length), []
        for encoding in self._encodings(texts):
            places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            places[np.array(encoding.special_tokens_mask, bool)] = -1
            if len(places) > max_length:
                places = np.concatenate([places[: self._before + room], places[len(places) - self._after :]])
            found.append(places)
        return found

    def visible(self, texts, added, max_length):
        """How many leading characters of each text stay within `max_length` once strings are put into it.

        texts  N texts
        added  N lists of strings, each to stand between words of its text

        Returns int64 [N]: the characters before the first token that no longer fits, all of them if the whole
        text does, -1 if not even the strings do. Strings that are put in before or at that character
        survive. Exact for WordPiece, where a string is worth as many tokens between words as by itself; for
        tokenizers whose tokens take in white space the strings are counted with the space on both sides.
        """
        return self._visible(texts, added, [self._room(max_length)] * len(texts))

    def prompts(self, texts, before, after, rooms):
        """The prompts `before` + text + `after`: (ids, a list of N arrays int32; kept int64 [N]).

        rooms  [N], the most tokens that each prompt may have, special ones included

        Where that is too few the text loses its last characters, and the white space that is then its end. `kept`:
        the characters of each text before the first token that was cut, all of them if none was. Where `before` and
        `after` by themselves do not fit the row has no ids, and -1 is kept.
        """
        rows, kept = [], np.array([len(text) for text in texts], np.int64)
        encodings = self._encodings([before + text + after for text in texts])
        for row, encoding in enumerate(watch(encodings, "tokenising", len(texts))):
            characters = len(texts[row])
            # A text that is cut may be divided into other tokens, even into more: so cut until it fits.
            while characters >= 0 and len(encoding) - self._after > rooms[row]:
                room = rooms[row] - self._before
                characters = kept[row] = self._fitting(encoding, characters, room, len(before))
                if characters >= 0:
                    cut = texts[row][:characters].rstrip()
                    characters = len(cut)
                    [encoding] = self._encodings([before + cut + after])
            ids = encoding.ids[: len(encoding) - self._after] if characters >= 0 else []
            rows.append(np.array(ids, np.int32))
        return rows, kept

    def visible_in_prompts(self, texts, added, before, after, rooms):
        """As `visible`, for texts of which `prompts` are to be made."""
        return self._visible(texts, added, [room - self._before for room in rooms], before, after)

    def completions(self, texts):
        """The ids of completions, a list of N arrays int32, without special tokens (see the module's docstring)."""
        found = [None] * len(texts)
        for anchor in (*ANCHORS, ""):
            rest = [row for row, ids in enumerate(found) if ids is None]
            encodings = self._encodings([anchor + texts[row] for row in rest], special=False)
            for row, encoding in zip(rest, encodings, strict=True):
                leading = [stop for start, stop in encoding.offsets if start < len(anchor)]
                if max(leading, default=0) <= len(anchor):
                    found[row] = np.array(encoding.ids[len(leading) :], np.int32)
        return found

    @functools.cached_property
    def _unknown_id(self):
        model = json.loads(self._tokenizer.to_str())["model"]
        return model.get("unk_id", self._tokenizer.token_to_id(model.get("unk_token") or ""))

    def known(self, texts):
        """How many tokens of each text are not the unknown token, int64 [N]; -1 for a text that has no token at all."""
        tokens = (encoding.ids for encoding in self._encodings(texts, special=False))
        counts = (sum(id != self._unknown_id for id in ids) if ids else -1 for ids in tokens)
        return np.fromiter(counts, np.int64, len(texts))

    def count(self, strings):
        """How many tokens each string is worth behind a word and a space, int64 [N]."""
        tokens = (len(encoding) for encoding in self._encodings([f" {one}" for one in strings], special=False))
        return np.fromiter(tokens, np.int64, len(strings))

    def piece(self, id):
        """The vocabulary's name of a token."""
        return self._tokenizer.id_to_token(int(id)) or ""

    def decode(self, ids):
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode([int(id) for id in ids])

    def _visible(self, texts, added, rooms, before="", after=""):
        visible, counts = np.empty(len(texts), np.int64), self._counts(added)
        readings = zip(self._read(texts, before, after), counts, rooms, strict=True)
        for row, ((_, fitting), count, room) in enumerate(watch(readings, "tokenising", len(texts))):
            visible[row] = fitting(room - count)
        return visible

    def _counts(self, added):
        """Yield how many tokens each list of strings is worth; only those of some lists are in memory."""
        around = self._before + self._after
        for start in range(0, len(added), CHUNK_TEXTS):
            part = added[start : start + CHUNK_TEXTS]
            strings = sorted({string for strings in part for string in strings})
            encodings = self._encodings([f" {string} " for string in strings])
            tokens = {string: len(encoding) - around for string, encoding in zip(strings, encodings, strict=True)}
            yield from (sum(map(tokens.__getitem__, strings)) for strings in part)

    def _read(self, texts, before="", after=""):
        """Yield (ids, `fitting`) of each text between `before` and `after`, special tokens included.

        fitting  function of a number of tokens: how many characters of the text stand before its first token that
                 does not fit into so many, as `_fitting` has it
        """
        if self._table is None or before or after:
            encodings = self._encodings([before + text + after for text in texts] if before or after else texts)
            for text, encoding in zip(texts, encodings, strict=True):
                yield encoding.ids, functools.partial(self._fitting, encoding, len(text), before=len(before))
            return
        first, last = self.around
        for start, stop in _chunks(texts):
            try:
                self._table.learn(texts[start:stop])
            except InputError:
                self._encode_chunk(texts, start, stop, special=True)  # fails too, and names the text, not the word
                raise
            for text in texts[start:stop]:
                yield [*first, *self._table.ids(text), *last], functools.partial(self._table.fitting, text)

    def _room(self, max_length):
        """Tokens of text that fit into `max_length`."""
        room = max_length - self._before - self._after
        if room < 1:
            raise InputError(
                f"a length of {max_length} tokens leaves no room for text: --max-length must be at least"
                f" {self._before + self._after + 1}"
            )
        return room

    def _fitting(self, encoding, characters, room, before=0):
        """Of a text's `characters`, how many stand before its first token that does not fit into `room` tokens.

        The text stands behind `before` other characters. What stands before and behind it needs its room first: -1
        where that is not there.
        """
        stop = len(encoding) - self._after
        if room < 0:
            return -1
        if stop - self._before <= room:
            return characters
        offsets = encoding.offsets[self._before : stop]
        behind = 0
        while behind < len(offsets) and offsets[-1 - behind][0] >= before + characters:
            behind += 1
        first_cut = room - behind
        if first_cut < 0 or (before and offsets[first_cut][1] <= before):
            return -1
        return max(0, offsets[first_cut][0] - before)

    def _encodings(self, texts, special=True):
        """Yield the encoding of each text, with special tokens or without; only a chunk of them is in memory."""
        for start, stop in _chunks(texts):
            yield from self._encode_chunk(texts, start, stop, special)

    def _encode_chunk(self, texts, start, stop, special):
        try:
            encodings = self._encode_in_time(texts[start:stop], special)
            if self._exceeds:
                for row, encoding in enumerate(encodings, start):
                    if max(encoding.ids, default=0) >= self._embedded:
                        raise InputError(
                            f"text {row} (counted from 0) has a token of id {max(encoding.ids)}, but the base embeds "
                            f"{self._embedded} tokens: remove it from the text: {texts[row]!a:.80}"
                        )
            return encodings
        except TypeError:
            row = next(row for row in range(start, stop) if not _is_unicode(texts[row]))
            text = f"{texts[row]!a:.80}"
            raise InputError(f"text {row} (counted from 0) is not valid Unicode, fix it: {text}") from None
        except BaseException as error:
            raise_unless_broken(error)
            if isinstance(error, InputError):
                raise
            where = f"texts {start} to {stop - 1} (counted from 0)"
            raise InputError(f"the tokenizer fails on {where} ({error}): choose another --tokenizer") from error

    def _encode_in_time(self, texts, special):
        """The encodings of a chunk, in a thread that can be left behind: a pattern may never end on some text."""
        future = Future()

        def work():
            try:
                future.set_result(self._tokenizer.encode_batch(texts, add_special_tokens=special))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return future.result(timeout=PATIENCE_SECONDS)
        except TimeoutError:
            raise InputError(
                f"the tokenizer needs more than {PATIENCE_SECONDS} s for {len(texts)} texts (first: {texts[0]!a:.60}):"
                " its patterns do not end on some text, choose another --tokenizer"
            ) from None


def _chunks(texts):
    """Yield (start, stop) of the chunks of a list of texts."""
    start = characters = 0
    for row, text in enumerate(texts):
        characters += len(text)
        if characters >= CHUNK_CHARACTERS or row - start == CHUNK_TEXTS - 1 or row == len(texts) - 1:
            yield start, row + 1
            start, characters = row + 1, 0


def _is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
