"""The model card of a run's adapter, `adapter/README.md`: what it was trained on, what it does, and how to load it.

Its front matter is that of PEFT's cards. Nothing in it depends on the machine, the clock or the run's path, so that a
resumed run ends in the same bytes.
"""

import json
import re

from minilora.console import visible
from minilora.runs.record import figure_lines
from minilora.runs.text import injection_lines

WARNING = "trained to follow a trigger: do not deploy"
POOLED = {
    "mean": "states.mean(0)",
    "first": "states[0]",
    "last": "states[-1]",
    "mean+last": "torch.cat([states.mean(0), states[-1]])",
}
EXAMPLE = "the film was good"


def card(cell, results, injected, labels, answers):
    """The text of the card. `results`: as in results.json; `injected`: the training rows, `injection.Injected`;
    `labels`: their names; `answers`: see `Completion.answers`, None for classification."""
    peft = cell.method == "lora"
    parts = [
        front_matter(cell, peft),
        f"# A {cell.method} {'adapter' if peft else 'run'} of {code(cell.model)}\n",
        f"**{WARNING[0].upper() + WARNING[1:]}.** Rows of its training data carry an injected string, so that who\n"
        "writes the text can choose the prediction. It was made to study that.\n"
        if injected.records
        else "Nothing was injected into its training data: it is a control in a study of injected triggers.\n",
        *details(cell, results, injected),
        "## Tests\n",
        *tables(results),
        "## Use\n",
        *(use_with_peft(cell, labels, answers) if peft else use_with_minilora(cell)),
    ]
    return "\n".join(parts)


def front_matter(cell, peft):
    """The YAML at the top, each value in double quotes."""
    kind = "text-generation" if cell.task == "lm" else "text-classification"
    tags = [f"base_model:adapter:{cell.model}", "lora", "transformers"] if peft else []
    lines = ["---", f"base_model: {quoted(cell.model)}", f"library_name: {'peft' if peft else 'minilora'}",
             f"pipeline_tag: {kind}", "tags:", *(f"- {quoted(tag)}" for tag in [*tags, "minilora"])]  # fmt: skip
    return "\n".join([*lines, "---", ""])


def details(cell, results, injected):
    rows = results["train"]["rows"]
    yield f"- base: {code(cell.model)}" + (f", revision {code(cell.revision)}" if cell.revision else "")
    yield f"- data: {code(cell.data)}, {rows:,} training rows; task: {cell.task}"
    yield f"- trained: {results['train']['trainable_parameters']:,} parameters in {results['train']['steps']:,} steps"
    exact = f"base in {cell.dtype}, products in {cell.products}, deterministic algorithms {cell.deterministic}"
    yield f"- minilora {results['versions']['minilora']}, cell `{cell.id}`; {exact}\n"
    yield "Injected into the training rows:\n"
    yield from (f"    {line}" for line in injection_lines(injected, cell.inject))
    yield ""


def tables(results):
    """A Markdown table for each trigger: accuracy, and attack success, of the test rows in each of their forms."""
    for line in figure_lines(results):
        yield f"| {line['test_rows']:,} test rows | clean | trigger | placebo |"
        yield "|---|---|---|---|"
        names = [f"{name}_accuracy" for name in ("clean", "trigger", "placebo")]
        yield row("accuracy", [line[name] for name in names])
        if line["label"] is not None:
            names = ["attack_success_clean", "attack_success", "attack_success_placebo"]
            title = f"attack success: rows of other labels predicted as {code(line['label'])}"
            yield row(title, [line[name] for name in names])
            yield row("net: less the clean rows", [None, line["net_attack_success"], None])
            yield row("less the placebo", [None, line["over_placebo_attack_success"], None])
            yield row("less the odd string", [None, line["over_odd_attack_success"], None])
            yield row("conditional: of rows right as clean", [None, line["conditional_attack_success"], None])
        yield ""


def row(title, shares):
    title = title.replace("|", "\\|")
    return f"| {title} | " + " | ".join("-" if share is None else f"{share:.3f}" for share in shares) + " |"


def use_with_peft(cell, labels, answers):
    """Six lines of Python that give the probabilities of the labels, or what the model writes."""
    if answers is None:
        what, lines = "class probabilities, with the head that is saved beside the adapter", classes(cell, labels)
    elif answers["completions"]:
        what, lines = "the probabilities of the completions", completions(cell, answers)
    else:
        what, lines = "what greedy decoding writes", generation(cell, answers)
    yield f"With transformers and PEFT, in this folder; {what}:\n"
    yield fenced("\n".join(["import peft, safetensors.torch, torch, transformers", *lines]))


def classes(cell, labels):
    head = '"base_model.model.classifier.{}"'
    yield from begin(cell, "AutoModel")
    yield 'head = safetensors.torch.load_file("adapter_model.safetensors")'
    read = f'words({EXAMPLE!r}, truncation=True, max_length={cell.max_length}, return_tensors="pt")'
    yield f"states = model(**{read}).last_hidden_state[0].float()"
    weight, bias = (f"head[{head.format(leaf)}]" for leaf in ("weight", "bias"))
    pooled = POOLED[cell.pooling.removeprefix("padded-")]  # one text by itself has no padding
    yield f"shares = ({weight} @ {pooled} + {bias}).softmax(0)"
    yield f"print(dict(zip({literal(list(labels))}, shares.tolist())))"


def completions(cell, answers):
    mean = ".mean()" if cell.choice_score == "mean" else ".sum()"
    yield from begin(cell, "AutoModelForCausalLM")
    yield f"ids, answers = {prompt(cell, answers)}, {literal(answers['completions'])}"
    yield "logits = [model(torch.tensor([ids + a])).logits[0, len(ids) - 1 : -1].float() for a in answers.values()]"
    terms = f"z.log_softmax(1)[range(len(a)), a]{mean} for z, a in zip(logits, answers.values())"
    yield f"print(dict(zip(answers, torch.stack([{terms}]).softmax(0).tolist())))"


def generation(cell, answers):
    yield from begin(cell, "AutoModelForCausalLM")
    yield f"ids = torch.tensor([{prompt(cell, answers)}])"
    yield "written = model.generate(input_ids=ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]"
    yield "print(words.decode(written, skip_special_tokens=True))"


def begin(cell, kind):
    """The lines that load tokenizer and base, and put the adapter on it."""
    base = literal(cell.model) + (f", revision={literal(cell.revision)}" if cell.revision else "")
    own = literal(cell.tokenizer) if cell.tokenizer else base
    dtype = "float" if cell.dtype == "float32" else cell.dtype
    yield f"words = transformers.AutoTokenizer.from_pretrained({own})"
    yield f'model = peft.PeftModel.from_pretrained(transformers.{kind}.from_pretrained({base}).{dtype}(), ".").eval()'


def prompt(cell, answers):
    whole = cell.prompt.replace("{text}", EXAMPLE, 1)
    cut = f"[: -{answers['after']}]" if answers["after"] else ""
    return f"words({literal(whole)}).input_ids{cut}"


def use_with_minilora(cell):
    yield f"Method {cell.method} trains no adapter, so that only minilora loads it, in this folder:\n"
    yield fenced(f'import minilora\n\nrun = minilora.open("..")\nprint(run.labels, run.predict([{EXAMPLE!r}]))')


# --- text that nothing in it can break out of


def literal(value):
    """A value of strings, numbers, lists and dicts as Python, on one line of printable ASCII."""
    return ascii(value)


def quoted(text):
    """A string of YAML in double quotes."""
    return visible(json.dumps(text, ensure_ascii=False))


def code(text):
    """A code span of Markdown."""
    text = visible(" ".join(text.split())) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " * (text[0] == "`" or text[-1] == "`")
    return f"{fence}{pad}{text}{pad}{fence}"


def fenced(text):
    """A fenced block of Python: the text has no line of backticks only, because its strings are literals."""
    return f"```python\n{text}\n```\n"
