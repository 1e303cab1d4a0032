"""A table of words as Markdown, LaTeX or plain text; the words stay text, and never become commands."""

import re
from dataclasses import dataclass

from minilora.console import visible

WIDE = 40  # characters; the lines of a longer column of a LaTeX table are broken
MARKDOWN = re.compile(r"[\\|<>*_`~$\[\]]|&(?=#?\w+;)|:(?=//)|(?<=www)\.")  # the last two: a bare address is a link
LATEX = {"\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}"} | {character: "\\" + character for character in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`name` is its file's; `heads` and each of `lines` are strings, one a column."""

    name: str
    title: str
    note: str
    heads: tuple
    lines: list


def one_line(text):
    return visible(" ".join(text.split()))


def for_markdown(text):
    return MARKDOWN.sub(r"\\\g<0>", one_line(text))


def for_latex(text):
    return "".join(LATEX.get(character, character) for character in one_line(text))


def markdown(table):
    def line(cells):
        return "| " + " | ".join(map(for_markdown, cells)) + " |"

    rule = "|" + " --- |" * len(table.heads)
    lines = [f"**{table.title}**", "", line(table.heads), rule, *map(line, table.lines), "", table.note]
    return "\n".join(lines).rstrip() + "\n"


def latex(table):
    """A table environment, for `\\usepackage{booktabs}`."""

    def line(cells):
        found = " & ".join(map(for_latex, cells)) + r" \\"
        return "{}" * found.startswith(("[", "*")) + found  # the end of the line before would take these as its options

    wide = [max(map(len, column)) > WIDE for column in zip(table.heads, *table.lines)]
    share = 0.8 / max(1, sum(wide) + 1)
    columns = "".join(rf"p{{{share:.2f}\linewidth}}" if broken else "l" for broken in wide)
    return "\n".join([
        "% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small",
        rf"\caption{{{for_latex(f'{table.title}. {table.note}')}}}",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(table.heads), r"\midrule",
        *map(line, table.lines), r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ]) + "\n"  # fmt: skip
