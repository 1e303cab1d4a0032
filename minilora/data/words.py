"""Where the words of a text are, in every script: the places at which a trigger may stand.

Words are what white space separates. In a script that is written without spaces (Chinese, Japanese, Thai, emoji, ...)
a word is one character as a reader sees it, with its marks and the punctuation behind it. A cut never falls between a
letter and its mark: it is made at boundaries of graphemes only (Unicode Standard Annex 29), and at fewer of them than
the standard allows, because the tables of the standard are not here.
"""

import re
from itertools import pairwise
from unicodedata import category, combining

WORD = re.compile(r"\S+")
UNSPACED = re.compile(
    "["
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a00-\u1aaf\u1b00-\u1b7f"  # Thai to Tibetan, Burmese, Khmer
    "\u2600-\u27bf\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u312f\u31a0-\u31bf\u31f0-\u31ff"  # signs, kana
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa00-\uaadf\uf900-\ufaff\uff66-\uff9f"  # Han, Yi, Javanese
    "\U0001aff0-\U0001b16f\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\U00020000-\U0003ffff"  # emoji, rarer Han
    "]"
)
LEADING = re.compile("[\u0e40-\u0e44\u0ec0-\u0ec4\u19b5-\u19b7\u19ba\uaab5\uaab6\uaab9\uaabb\uaabc]")  # vowels
FOLLOWING = re.compile("[\u0e2f-\u0e33\u0e45\u0eb0-\u0eb3\U0001f3fb-\U0001f3ff]")  # vowels, and colours of skin
HANGUL_LEAD = re.compile("[\u1100-\u115f\ua960-\ua97c]")
HANGUL = re.compile("[\u1100-\u11ff\ua960-\ua97c\uac00-\ud7fb]")
HANGUL_REST = re.compile("[\u1160-\u11ff\ud7b0-\ud7fb]")
FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")
OPENING = ("Ps", "Pi")  # categories of brackets and quotes that belong to what follows
VIRAMA = 9  # the combining class of a sign that joins two consonants


def spans(text):
    """[(start, end), ...] of the words of a text, in its characters."""
    found = [word.span() for word in WORD.finditer(text)]
    if text.isascii() or not UNSPACED.search(text):
        return found
    return [piece for start, end in found for piece in pairwise([start, *_cuts(text, start, end), end])]


def split(text):
    """The words of a text."""
    if text.isascii() or not UNSPACED.search(text):
        return text.split()
    return [text[start:end] for start, end in spans(text)]


def graphemes(text):
    """The characters of a text as a reader sees them, each with its marks."""
    cuts = [place for place in range(1, len(text)) if not _attached(text[place - 1], text[place])]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def says(word):
    """Whether a word has a letter or a sign such as an emoji, so that it is not only digits or punctuation."""
    return any(category(character)[0] == "L" or category(character) == "So" for character in word)


def _cuts(text, start, end):
    for place in range(start + 1, end):
        before, after = text[place - 1], text[place]
        unspaced = UNSPACED.match(before) or UNSPACED.match(after)
        begins = category(after)[0] in "LNS" or category(after) in OPENING
        if unspaced and begins and category(before) not in OPENING and not _attached(before, after):
            yield place


def _attached(before, after):
    """Whether two neighbouring characters may belong together."""
    kind = category(after)
    return bool(
        kind[0] == "M"
        or kind in ("Cf", "Lm")
        or category(before) == "Cf"
        or combining(before) == VIRAMA
        or LEADING.match(before)
        or FOLLOWING.match(after)
        or HANGUL_REST.match(after)
        or (HANGUL_LEAD.match(before) and HANGUL.match(after))
        or (FLAG.match(before) and FLAG.match(after))
    )
