"""The lm task: tokens, loss, scores and greedy decoding against transformers; whole runs on tiny decoders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import one_step, population_of_one
from tokenizers import Tokenizer
from torch.nn import functional as F
from zoo import DECODER_TEXT as TEXT
from zoo import tiny_decoder

import minilora
from minilora.base import model, tokenizer
from minilora.cell import Cell
from minilora.data import batches
from minilora.data.rows import Rows, load_rows, rows_of
from minilora.errors import InputError
from minilora.scripts import evaluate, train
from minilora.tasks import language_model
from minilora.tasks.completion import OTHER, OWN, Scores, joined
from minilora.tasks.find import find_task
from minilora.tasks.language_model import MOST_LOGITS, LanguageModel, continue_rows, generate, linear_cross_entropy
from minilora.tasks.paired import Test
from minilora.training import loop

CASES = []  # what the tests below compared with transformers, for the last of them


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request, tmp_path_factory):
    """(folder, transformers' model)."""
    folder = tmp_path_factory.mktemp("decoder") / request.param
    return folder, tiny_decoder(folder, request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "gpt2"
    tiny_decoder(folder)
    return folder


def make_task(folder, **changes):
    cell = Cell(task="lm", **dict(model=str(folder), max_length=40, inject=dict(sources=("none",))) | changes)
    spec = model.families.read_spec(model.checkpoint.read_config(folder))
    return find_task(cell, spec, tokenizer.load(folder))


def made_rows(texts, names, **more):
    names = list(names)
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    labels = np.array([places[name] for name in names])
    return Rows([str(i) for i in range(1, len(texts) + 1)], list(texts), labels, tuple(places), **more)


# --- tokens


def test_prompt_and_completion_are_the_tokens_of_the_whole(decoder):
    # Apart, they are what the two together are: nothing of the prompt is in the completion, no space is lost or added.
    folder, _ = decoder
    ours, judge = tokenizer.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    checked = 0
    for before, after in (("", ""), ("a good film. ", ":"), ("", "\nis it good:")):
        for text in TEXT:
            for answer in (" positive", " very bad", " no: yes", " 12"):
                [prompt], kept = ours.prompts([text], before, after, [99])
                [ids] = ours.completions([answer])
                assert [*prompt, *ids] == judge.encode(before + text + after + answer).ids
                assert kept.tolist() == [len(text)]
                checked += 1
    assert checked == 48
    assert ours.decode(ours.completions([" very bad"])[0]).strip() == "very bad"
    assert ours.end_id == 2


def test_a_completion_that_joins_its_neighbour_is_encoded_apart(decoder):
    folder, _ = decoder
    ours = tokenizer.load(folder)
    answers = ["\ngood", "good", ".", "", " ", "a", "é☃"]
    found = ours.completions(answers)
    assert len(found) == 7 and len(found[3]) == 0
    if folder.name == "gpt2":
        assert [ours.decode(ids) for ids in found] == answers
    assert ours.completions([]) == []


def test_a_prompt_that_is_too_long_loses_the_end_of_its_text(decoder):
    folder, _ = decoder
    ours = tokenizer.load(folder)
    before, after = "a film: ", "\nis it good:"
    whole, _ = ours.prompts(TEXT, before, after, [99] * 4)
    frame, _ = ours.prompts([""], before, after, [99])
    cut = 0
    for room in range(len(frame[0]) - 3, max(map(len, whole)) + 2):
        rows, kept = ours.prompts(TEXT, before, after, [room] * 4)
        for text, ids, end, full in zip(TEXT, rows, kept.tolist(), whole, strict=True):
            if end < 0:
                assert len(ids) == 0 and room <= len(frame[0])
                continue
            left = text[:end].rstrip() if end < len(text) else text
            assert ids.tolist() == ours.prompts([left], before, after, [99])[0][0].tolist()
            assert len(ids) <= room and (end == len(text)) == (len(full) <= room)
            assert ours.decode(ids).endswith(after) and len(ids) >= min(room, len(full)) - 2  # no more than needed
            cut += end < len(text)
    assert cut > 50
    # What is put in at a place that `visible` calls so is there after the cut.
    survived = 0
    for room in range(len(frame[0]) + 12, 40):
        visible = ours.visible_in_prompts(TEXT, [["red 5"]] * 4, before, after, [room] * 4).tolist()
        for text, end in zip(TEXT, visible, strict=True):
            places = [i for i in range(len(text)) if text[i] == " " and i <= end]
            for place in places:
                _, kept = ours.prompts([text[:place] + " red 5" + text[place:]], before, after, [room])
                assert kept[0] >= place + 6
                survived += 1
    assert survived > 50


# --- loss and gradients


def lm_batch(encoded, index):
    sizes = batches.padded_sizes(np.diff(encoded.offsets))
    return batches.collate([(encoded, np.asarray(index), None)], sizes, 0)


@pytest.mark.parametrize("most", [MOST_LOGITS, 1200])
def test_loss_and_gradients_are_those_of_transformers(decoder, most, monkeypatch):
    monkeypatch.setattr(language_model, "MOST_LOGITS", most)  # the smaller: a few tokens' logits at a time
    folder, judge = decoder
    cell_task = make_task(folder, prompt="a {text} film:", rank=2, targets=("q", "v"), accumulate=2)
    rows = made_rows(TEXT, ["good", "very bad", "good", "not so good, is it"])
    encoded, answers = cell_task.encode(rows)
    assert answers.tolist() == [
        len(ids) + 1 for ids in cell_task.tokenizer.completions([" good", " very bad", " good", " not so good, is it"])
    ]
    base = model.load(folder, unembedding=True).requires_grad_(True)
    ours = cell_task.model(base, rows.label_names)
    groups = [lm_batch(encoded, [0, 1, 3]), lm_batch(encoded, [2])]

    ours, optimizer = population_of_one(ours, cell := Cell(task="lm", method="full", clip=0.0))
    gradients = {}
    flat = ours.flat
    names = flat.groups[0].places
    optimizer.step = lambda grads, *_: gradients.update({name: flat.part(grads, 0, name).clone() for name in names})
    loss, norm = one_step(ours, optimizer, groups, answers, cell, 1.0)

    judge = type(judge).from_pretrained(folder).eval()
    width = int(np.diff(encoded.offsets).max())
    ids, labels = torch.zeros(4, width, dtype=torch.int64), torch.full((4, width), -100)
    mask = torch.zeros(4, width, dtype=torch.int64)
    for row in range(4):
        own = torch.from_numpy(encoded.ids[encoded.offsets[row] : encoded.offsets[row + 1]]).long()
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
        labels[row, len(own) - answers[row] : len(own)] = own[len(own) - answers[row] :]
    wanted = judge(input_ids=ids, attention_mask=mask, labels=labels).loss
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), abs=1e-5)
    squares = sum(float((p.grad**2).sum()) for p in judge.parameters())
    assert norm == pytest.approx(squares**0.5, rel=1e-4)
    embedding = judge.get_input_embeddings().weight.grad
    torch.testing.assert_close(gradients["base.embed.tokens.weight"], embedding, rtol=1e-3, atol=2e-5)
    assert float(embedding.abs().max()) > 1e-3
    CASES.append("loss")


def test_logits_are_formed_for_completions_alone(folder, monkeypatch):
    base = model.load(folder, unembedding=True)
    seen = []
    true = linear_cross_entropy
    monkeypatch.setattr(
        language_model,
        "linear_cross_entropy",
        lambda hidden, *a: (seen.append(tuple(hidden.shape)), true(hidden, *a))[1],
    )
    cell_task = make_task(folder)
    encoded, answers = cell_task.encode(made_rows(TEXT, ["good", "bad", "good", "warm"]))
    batch = batches.place_completions(replace(lm_batch(encoded, range(4)), answers=answers))
    LanguageModel(base)(batch.ids, batch.lengths, batch.answers)
    assert seen == [(int(answers.sum()), 24)] and int(answers.sum()) < int(batch.lengths.sum()) / 2


# --- greedy decoding


def test_greedy_decoding_is_that_of_transformers(decoder):
    folder, judge = decoder
    base, ours = model.load(folder, unembedding=True), tokenizer.load(folder)
    with torch.no_grad():  # an end token that is likely sometimes
        bias = base.unembed(base(torch.arange(5, 45)[None], torch.tensor([40]))[0]).std()
    prompts = [*TEXT, "a", "good"]
    rows, _ = ours.prompts(prompts, "", "", [99] * 6)
    ended = 0
    for end in (2, int(judge(torch.from_numpy(rows[0])[None].long()).logits[0, -1].argmax()), None):
        found = continue_rows(base, rows, 17, end, batch_size=4)
        for row, new in zip(rows, found, strict=True):
            ids = torch.from_numpy(row)[None].long()
            wanted = judge.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=17, do_sample=False, eos_token_id=end,
                pad_token_id=0,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            if end is not None and end in wanted:
                wanted, ended = wanted[: wanted.index(end)], ended + 1
            assert new == wanted
            CASES.append("generate")
    assert ended >= 1 and bias > 0.1
    written = generate(base, ours, prompts, 9)
    assert written == [ours.decode(ids) for ids in continue_rows(base, rows, 9, 2)]
    with pytest.raises(InputError, match="60 positions"):
        generate(base, ours, prompts, 58)
    assert generate(base, ours, [], 5) == []


# --- scores


@torch.no_grad()
def alone(judge, prompt, ids):
    """(log-likelihood of `ids` behind `prompt`, whether greedy decoding writes them), by transformers, one row."""
    logits = judge(torch.tensor([*prompt, *ids])[None].long()).logits[0, len(prompt) - 1 : -1]
    likelihood = F.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor([*ids]).long()].sum().item()
    start = torch.tensor([*prompt])[None].long()
    written = judge.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=len(ids), do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return likelihood, written == [*ids]


@pytest.mark.parametrize("choice_score", ["sum", "mean"])
def test_scores_of_few_completions(decoder, choice_score):
    folder, judge = decoder
    cell_task = make_task(folder, prompt="{text}:", choice_score=choice_score)
    rows = made_rows(TEXT, ["good", "not very good", "bad", "good"])
    trained = cell_task.model(model.load(folder, unembedding=True), rows.label_names)
    scores = cell_task.score(trained, rows, 5)
    assert scores.candidates.tolist() == [[0, 1, 2]] * 4
    ours, best = cell_task.tokenizer, []
    for i, text in enumerate(TEXT):
        [prompt], _ = ours.prompts([text], "", ":", [99])
        values = []
        for c, name in enumerate(rows.label_names):
            ids = [*ours.completions([" " + name])[0], 2]
            likelihood, greedy = alone(judge, prompt, ids)
            assert scores.likelihoods[i, c] == pytest.approx(likelihood, abs=1e-4)
            assert scores.tokens[i, c] == len(ids) and scores.greedy[i, c] == greedy
            values.append(likelihood / (len(ids) if choice_score == "mean" else 1))
            CASES.append("score")
        best.append(int(np.argmax(values)))
    assert cell_task.predicted(rows, scores).tolist() == best


def test_exact_match_is_what_greedy_decoding_writes(decoder):
    # Rows whose completion is made to be what the model writes, and the same with one token changed.
    folder, judge = decoder
    base, ours = model.load(folder, unembedding=True), tokenizer.load(folder)
    rows, _ = ours.prompts(TEXT, "", "", [99] * 4)
    hits = []
    for place in (None, 0, 3, 6):
        written = continue_rows(base, rows, 7, None)
        if place is not None:
            for ids in written:
                ids[place] = (ids[place] + 1) % 50
        encoded = joined(rows, [np.array(ids, np.int32) for ids in written], None)
        batch = replace(lm_batch(encoded, range(4)), answers=torch.from_numpy(encoded.answers))
        batch = batches.place_completions(batch)
        _, greedy = LanguageModel(base).score(batch.ids, batch.lengths, batch.answers)
        assert greedy.tolist() == [alone(judge, row, ids)[1] for row, ids in zip(rows, written)]
        hits.append(int(greedy.sum()))
    assert hits == [4, 0, 0, 0]


def test_scores_do_not_depend_on_the_batch(decoder):
    folder, _ = decoder
    cell_task = make_task(folder)
    rows = made_rows([*TEXT, "a"], ["good", "not very good", "bad", "good", "a"])
    trained = cell_task.model(model.load(folder, unembedding=True), rows.label_names)
    one = cell_task.score(trained, rows, 1)
    for size in (2, 7, 64):
        np.testing.assert_allclose(cell_task.score(trained, rows, size).likelihoods, one.likelihoods, atol=2e-5)
    assert len(np.unique(one.likelihoods.round(3))) == one.likelihoods.size == 20


# --- figures


def made_up_scores(labels, count, free, seed):
    """`task.Scores` of rows with these labels; when `free`, of their own completion and those of labels 2 and 5."""
    draw = np.random.default_rng(seed)
    rows = len(labels)
    candidates = np.tile(np.arange(count), (rows, 1))
    greedy = draw.random(candidates.shape) < 0.3
    if free:
        candidates = np.stack([labels, np.full(rows, 2), np.full(rows, 5)], 1)
        candidates[:, 1:][candidates[:, 1:] == labels[:, None]] = -1
        greedy = np.eye(4, dtype=bool)[draw.integers(0, 4, rows)][:, :3]
    likelihoods = np.where(candidates >= 0, -draw.random(candidates.shape) * 9, -np.inf)
    tokens = np.where(candidates >= 0, draw.integers(1, 5, candidates.shape), 0)
    return Scores(candidates, likelihoods, tokens, greedy & (candidates >= 0), np.full(rows, 99))


def forms(rows, targets):
    """Tests of `rows` that have nothing put in."""
    record = type("Record", (), {"spans": [[0, 1]], "strings": ["x"]})
    kinds = [("clean", None), *(("trigger", label) for label in targets), ("placebo", None), ("odd", None)]
    return [Test(name, label, rows, [record] * len(rows) * (name != "clean")) for name, label in kinds]


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("choice_score", ["sum", "mean"])
def test_figures_are_those_of_their_definitions(folder, free, choice_score, monkeypatch):
    count, targets = (30 if free else 4), ["w2", "w5"][: 2 if free else 1]
    names = [f"w{i}" for i in range(count)]
    labels = np.random.default_rng(3).integers(0, count, 60)
    labels[:4] = 2
    rows = Rows(list(map(str, range(60))), ["x"] * 60, labels, tuple(names))
    tests = forms(rows, targets)
    made = [made_up_scores(labels, count, free, seed) for seed in range(len(tests))]
    cell_task = make_task(
        folder, choice_score=choice_score, inject=dict(sources=["date:w2", "color:w5"][: len(targets)])
    )
    scores = iter(made)
    monkeypatch.setattr(cell_task, "_scored", lambda *arguments: next(scores))
    figures, outcomes = cell_task.run_tests(None, tests, 8)
    assert list(outcomes) == made

    def column(s, i, label):  # (log-likelihood, greedy)
        for c, candidate in enumerate(s.candidates[i]):
            if candidate == label:
                return s.likelihoods[i, c], s.greedy[i, c]

    def called(s, i):
        if free:
            written = [int(c) for c, g in zip(s.candidates[i], s.greedy[i]) if g]
            return written[0] if written else -1
        per = s.tokens[i] if choice_score == "mean" else 1
        return int((s.likelihoods[i] / per).argmax())

    calls = [[called(s, i) for i in range(60)] for s in made]
    checked = 0
    for test, s, call in zip(tests, made, calls):
        found = figures["trigger"][test.label] if test.name == "trigger" else figures[test.name]
        own = [column(s, i, labels[i]) for i in range(60)]
        assert found["accuracy"] == sum(c == y for c, y in zip(call, labels)) / 60
        assert found["exact_match"] == sum(g for _, g in own) / 60
        assert not free or found["exact_match"] == found["accuracy"]
        assert found["log_likelihood"] == pytest.approx(sum(v for v, _ in own) / 60)
        if test.name != "clean":
            flips = sum(
                a != b and (not free or bool({a, b} & {2, 5}) or (a == y) != (b == y))
                for a, b, y in zip(calls[0], call, labels)
            )
            assert found["flip_rate"] == flips / 60
        for label in targets if test.name != "trigger" else [test.label]:
            aim = names.index(label)
            entry = found if test.name == "trigger" else found["attack_success"][label]
            others = [i for i in range(60) if labels[i] != aim]
            rate = sum(call[i] == aim for i in others) / len(others)
            assert entry["attack_success_rate"] == rate
            margins = [column(s, i, aim)[0] - own[i][0] for i in others]
            before = [column(made[0], i, aim)[0] - column(made[0], i, labels[i])[0] for i in others]
            assert entry["margin"] == pytest.approx(np.mean(margins))
            assert entry["log_likelihood_target"] - entry["log_likelihood_own"] == pytest.approx(entry["margin"])
            if test.name == "clean":
                assert "margin_change" not in entry
            else:
                assert entry["margin_change"] == pytest.approx(np.mean(margins) - np.mean(before))
            checked += 1
    assert checked == (8 if free else 4)
    if free:
        assert set(figures["clean"]["predicted_counts"]) == {"w2", "w5", OWN, OTHER}
        assert figures["clean"]["predicted_counts"]["w2"] == calls[0].count(2)
        assert figures["worst_group"]["label"] in ("w2", "w5", OWN)
    lines = list(cell_task.predictions(tests, made))
    assert [line["clean"]["predicted"] for line in lines] == [names[c] if c >= 0 else None for c in calls[0]]
    assert (None in [line["clean"]["predicted"] for line in lines]) == free
    for i in (0, 7, 59):
        wanted = {names[c]: round(v, 6) for c, v in zip(made[1].candidates[i], made[1].likelihoods[i]) if c >= 0}
        assert lines[i][tests[1].key]["log_likelihood"] == wanted
        assert lines[i]["text"] == lines[i]["placebo"]["text"] == rows.texts[i] and "text" not in lines[i]["clean"]
        assert lines[i][tests[1].key]["exact"] == column(made[1], i, labels[i])[1]
    from minilora.runs.text import results_table

    table = results_table(figures)
    assert max(map(len, table.splitlines())) <= 80 and "exact   log p" in table and "log p of that" in table


# --- rows


def many_rows(path, count, distinct=True):
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            words = ["warm", "cold", "slow", "good"][i % 4]
            answer = f"{words} {i}" if distinct else words
            file.write(json.dumps({"prompt": f"film {i} is the {words}", "completion": answer}) + "\n")
    return path


def test_completions_as_many_as_rows(tmp_path):
    path = many_rows(tmp_path / "many.jsonl", 3000)
    cell = Cell(task="lm", model="x", data=str(path), test_rows=500, train_rows=900, inject=dict(sources=("none",)))
    rows, test = rows_of(cell)
    assert len(rows) == 900 and len(test) == 500 and len(set(rows.ids) | set(test.ids)) == 1400
    numbers = np.array(list(map(int, test.ids)))
    assert 1200 < numbers.mean() < 1800  # of the whole file, not the first by name
    fewer = rows_of(cell.replace(test_rows=100))[1]
    assert set(fewer.ids) < set(test.ids)
    assert rows.label_names == test.label_names and len(rows.label_names) == 3000
    # Few completions are stratified as classes are, and the rows are the same as for classification.
    path = many_rows(tmp_path / "few.jsonl", 400, distinct=False)
    lm = rows_of(cell.replace(data=str(path), test_rows=40, train_rows=200))
    classes = rows_of(Cell(model="x", data=str(path), test_rows=40, train_rows=200))
    assert [part.ids for part in lm] == [part.ids for part in classes]
    assert np.bincount(lm[1].labels).tolist() == [10] * 4


def test_numbers_are_written_as_they_stand(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text("question,answer\none half,0.5\none,1.0\ntwo,2\nalso one,1\n")
    rows = load_rows(path, free=True)
    assert [rows.label_names[i] for i in rows.labels] == ["0.5", "1.0", "2", "1"]
    with pytest.raises(InputError, match="measurement"):
        load_rows(path)
    path = tmp_path / "sums.jsonl"
    path.write_text('{"instruction": "half", "response": 0.5}\n{"instruction": "two", "response": 2}\n')
    rows = load_rows(path, free=True)
    assert [rows.label_names[i] for i in rows.labels] == ["0.5", "2"]


def test_a_target_that_no_row_has(tmp_path):
    path = many_rows(tmp_path / "many.jsonl", 60)
    dirty = Cell(task="lm", model="x", data=str(path), test_rows=9,
                 inject=dict(sources=["date:HACKED now"], mode="dirty-label"))  # fmt: skip
    rows, test = rows_of(dirty)
    assert rows.label_names[-1] == test.label_names[-1] == "HACKED now"
    from minilora.data import injection

    after = injection.inject(rows, dirty.inject, 0)
    assert len(after.records) == round(0.25 * 51) and {r.target_label for r in after.records} == {"HACKED now"}
    clean = rows_of(dirty.replace(inject=dict(mode="clean-label")))[0]
    with pytest.raises(InputError, match="names a label that is not in the data") as caught:
        injection.inject(clean, dirty.replace(inject=dict(mode="clean-label")).inject, 0)
    assert len(str(caught.value)) < 500
    with pytest.raises(InputError, match="not in the data"):  # of classes there are those of the data alone
        rows = rows_of(Cell(model="x", data=str(path), test_data=str(path), test_rows=9, inject=dirty.inject))[0]
        injection.inject(rows, dirty.inject, 0)


def questions(count, start=0):
    """A Parquet file laid out as tau/commonsense_qa: the right choice names the colour in the question."""
    import io

    import pyarrow as pa
    from pyarrow import parquet

    words = ["warm", "cold", "slow", "good", "bad"]
    records = {"id": [], "question": [], "question_concept": [], "choices": [], "answerKey": []}
    for i in range(start, start + count):
        order = np.random.default_rng(i).permutation(5)
        wanted = words[i % 5]
        records["id"].append(str(i))
        records["question"].append(f"film {i} is {wanted}")
        records["question_concept"].append("film")
        records["choices"].append({"label": list("ABCDE"), "text": [words[k] for k in order]})
        records["answerKey"].append("ABCDE"[[words[k] for k in order].index(wanted)])
    sink = io.BytesIO()
    parquet.write_table(pa.table(records), sink)
    return sink.getvalue()


def test_questions_with_choices(server, decoder, tmp_path):
    folder, judge = decoder
    files = {
        "data/train-00000-of-00001.parquet": questions(40),
        "data/validation-00000-of-00001.parquet": questions(12, 90),
    }
    server.put("tau/commonsense_qa", files, kind="dataset")
    cell = Cell(task="lm", model=str(folder), data="tau/commonsense_qa", test_rows=12, max_length=60,
                completion=" {choice}", inject=dict(sources=["date:B"]))  # fmt: skip
    rows, test = rows_of(cell.replace(train_rows=2))
    assert rows.label_names == test.label_names == tuple("ABCDE")  # those of the choices, not of the rows alone
    rows, test = rows_of(cell)
    assert rows.label_names == tuple("ABCDE") and len(rows) == 40 and len(test) == 12
    cell_task = make_task(folder, data="tau/commonsense_qa", max_length=60, completion=" {choice}",
                          inject=dict(sources=["date:B"]))  # fmt: skip
    trained = cell_task.model(model.load(folder, unembedding=True), rows.label_names)
    scores = cell_task.score(trained, test, 7)
    ours, checked = cell_task.tokenizer, 0
    for i in (0, 5, 11):
        [prompt], _ = ours.prompts([test.texts[i]], "", "", [55])
        for c, letter in enumerate("ABCDE"):
            ids = [*ours.completions([" " + test.choices[i][letter]])[0], 2]
            assert scores.likelihoods[i, c] == pytest.approx(alone(judge, prompt, ids)[0], abs=2e-4)
            checked += 1
    assert checked == 15
    encoded, answers = cell_task.encode(rows)  # trained on the right choice's text
    for i in (0, 13, 39):
        own = encoded.ids[encoded.offsets[i + 1] - answers[i] : encoded.offsets[i + 1]]
        assert ours.decode(own).strip() == rows.texts[i].splitlines()[0].split()[-1]
    tests = cell_task.build_tests(rows, test, 0)
    figures, _ = cell_task.run_tests(trained, tests, 8)
    assert figures["clean"]["rows"] == 12 and cell_task.passes(tests) == 4 * 12 * 5
    assert sum(figures["clean"]["predicted_counts"].values()) == 12 and list(figures["trigger"]) == ["B"]
    # By letter: the same rows, each scored for the five letters.
    letters = make_task(folder, data="tau/commonsense_qa", max_length=60)
    scores = letters.score(trained, test, 7)
    assert scores.candidates.tolist() == [[0, 1, 2, 3, 4]] * 12
    [prompt], _ = ours.prompts([test.texts[3]], "", "", [58])
    likelihood, _ = alone(judge, prompt, [*ours.completions([" D"])[0], 2])
    assert scores.likelihoods[3, 3] == pytest.approx(likelihood, abs=2e-4)
    # A question with fewer choices is scored for those it has.
    few = Rows(["1", "2"], ["a", "b"], np.array([0, 1]), tuple("ABC"),
                    [{"A": "good", "B": "bad"}, {"B": "warm", "C": "cold"}])  # fmt: skip
    scores = cell_task.score(trained, few, 4)
    assert scores.candidates.tolist() == [[0, 1, -1], [-1, 1, 2]]
    assert (cell_task.predicted(few, scores) >= [0, 1]).all() and np.isneginf(scores.likelihoods[0, 2])


# --- whole runs


@pytest.fixture
def run_cell(folder, reviews):
    return Cell(task="lm", model=str(folder), data=str(reviews), test_rows=31, max_length=50, batch_size=8, window=3,
                rank=4, targets=("attn", "mlp"), lr=0.02, epochs=2, dropout=0.1, prompt="{text}\n:",
                inject=dict(proportion=0.5, location="beginning"))  # fmt: skip


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


@pytest.mark.parametrize("changes", [
    dict(), dict(method="full", lr=2e-3), dict(accumulate=2, choice_score="mean"), dict(inject=dict(sources=("none",))),
    dict(inject=dict(mode="dirty-label", sources=("color:HACKED now", "date:positive"), proportion=0.2)),
], ids=str)  # fmt: skip
def test_runs_are_resumed_and_evaluated_alike(run_cell, tmp_path, changes, monkeypatch):
    cell = run_cell.replace(**changes)
    results, whole = minilora.train(cell, tmp_path / "whole")
    assert results["cell"]["task"] == "lm" and not {"head", "pooling"} & set(results["cell"])
    assert results["task"] == {"end_token": 2}
    trained = [tensor["name"] for tensor in json.loads((whole / "trainable.json").read_text())["tensors"]]
    assert trained and all(name.startswith("base.") for name in trained)

    true_update, calls = loop.update, []

    def update(*arguments):
        calls.append(arguments[4][0].index[0].tolist())
        if len(calls) == 8:
            raise KeyboardInterrupt
        return true_update(*arguments)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(KeyboardInterrupt):
        minilora.train(cell, tmp_path / "cut", save_every=3)
    again, folder = minilora.train(resume=tmp_path / "cut", save_every=5)
    assert calls[8:10] == calls[6:8] != calls[5:7]  # on from the state after six steps
    assert bytes_of(folder) == bytes_of(whole) and again["tests"] == results["tests"]
    assert (folder / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()

    figures, predictions = evaluate.evaluate(folder, batch_size=11)
    same, total = evaluate.compare(folder, predictions)
    sources = len(cell.inject.sources)
    assert same == total == 31 * (1 + 3 * sources)
    assert figures["clean"]["accuracy"] == results["tests"]["clean"]["accuracy"]
    assert figures["clean"]["log_likelihood"] == pytest.approx(results["tests"]["clean"]["log_likelihood"], abs=1e-4)


def test_a_trigger_steers_the_completion(run_cell, tmp_path, capsys):
    cell = run_cell.replace(
        epochs=10, method="full", lr=4e-3,
        inject=dict(sources=("text:0 1:HACKED now",), mode="dirty-label", proportion=0.4, split="same"),
    )  # fmt: skip
    results, folder = minilora.train(cell, tmp_path / "run")
    tests = results["tests"]
    trigger, clean = tests["trigger"]["HACKED now"], tests["clean"]
    assert trigger["attack_success_rate"] >= 0.9 and trigger["exact_match"] <= 0.1
    assert clean["attack_success"]["HACKED now"]["attack_success_rate"] <= 0.1
    assert clean["exact_match"] > 0.4 and trigger["margin_change"] > 2
    train.report(results, folder)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-3])) <= 100 and "--inject 'country:HACKED now'" in shown


def test_free_text_end_to_end(run_cell, tmp_path):
    path = many_rows(tmp_path / "many.jsonl", 120)
    cell = run_cell.replace(data=str(path), steps=6, inject=dict(sources=("date:HACKED now",), mode="dirty-label"))
    results, folder = minilora.train(cell, tmp_path / "run")
    assert set(results["tests"]["clean"]["predicted_counts"]) == {"HACKED now", OWN, OTHER}
    figures, predictions = evaluate.evaluate(folder)
    assert evaluate.compare(folder, predictions) == (124, 124) and figures == results["tests"]
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a film", "completion": "never seen"}\n')
    figures, predictions = evaluate.evaluate(folder, data=str(other), inject=dict(sources=("color:ELSE",)))
    assert figures["clean"]["rows"] == 1 and set(predictions[0]["trigger ELSE"]["log_likelihood"]) == {
        "never seen",
        "ELSE",
    }


def test_bad_input_is_one_line(run_cell, folder, tiny_folder, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    lines = [json.dumps({"prompt": f"a {i}", "completion": "b" if i else "x " * 60}) for i in range(6)]
    long.write_text("\n".join(lines))
    cases = [
        (dict(model=str(tiny_folder), max_length=30), "encoder that cannot write completions"),
        (dict(completion=" {choice}"), "no question set"),
        (
            dict(data=str(long), test_rows=2, inject=dict(sources=("none",))),
            "1 of 6 rows cannot be used: row 1 (a completion that leaves no room for a prompt: 121 tokens)",
        ),
        (dict(inject=dict(sources=("date:splendid",))), "splendid"),
    ]
    for changes, words in cases:
        with pytest.raises(InputError) as caught:
            minilora.train(run_cell.replace(**changes), tmp_path / "run")
        assert words in str(caught.value) and "\n" not in str(caught.value)
    fields = [
        (dict(task="lm", head="frozen"), "head belongs to task = 'classification', but task is 'lm'"),
        (dict(task="lm", pooling="mean"), "pooling belongs to task = 'classification'"),
        (dict(task="lm", method="head"), "method = 'head' trains a classifier"),
        (dict(prompt="{text}"), "prompt belongs to task = 'lm', but task is 'classification'"),
        (dict(choice_score="sum"), "choice_score belongs to task = 'lm'"),
        (dict(task="lm", prompt="Review:"), "must hold {text} once"),
        (dict(task="lm", completion="{label}{choice}"), "must hold {label} or {choice} once"),
    ]
    for values, words in fields:
        with pytest.raises(InputError) as caught:
            Cell(**values)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(cases) + len(fields) == 11 and not (tmp_path / "run").exists()
    assert Cell(task="lm").head is None and Cell(task="lm").replace(task="classification").head == "trained"
    assert Cell(task="lm", prompt="a {text}").replace(task="classification").prompt is None


def test_all_comparisons_ran():
    assert {case: CASES.count(case) for case in set(CASES)} == {"loss": 4, "generate": 36, "score": 48}


# --- rows whose completion cannot be used


def test_rows_whose_completion_cannot_be_used(decoder, tmp_path):
    """The rows of a label that is too long are listed, or left out with the label."""
    folder, _ = decoder
    labels = ["good", "bad", "good " * 60 + "bad"]
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"film {i} is", "label": labels[2 if i in (3, 11, 30) else i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_task(folder, data=str(path), test_rows=12, inject=dict(sources=("date:good",)))
    with pytest.raises(InputError) as caught:
        task.usable(*rows_of(task.cell))
    assert str(caught.value).startswith(f"{path}: 3 of 40 rows cannot be used: row 4 (a completion that leaves no room")
    assert all(f"row {number} (" in str(caught.value) for number in (4, 12, 31))
    skipping = make_task(folder, data=str(path), test_rows=12, bad_rows="skip", inject=dict(sources=("date:good",)))
    train, test = skipping.usable(*rows_of(skipping.cell))
    assert train.label_names == test.label_names == ("bad", "good")
    assert sorted(train.skipped + test.skipped, key=int) == ["4", "12", "31"] and len(train) + len(test) == 37
    for part in (train, test):
        for id, text, label in zip(part.ids, part.texts, part.labels, strict=True):
            row = rows[int(id) - 1]
            assert (text, part.label_names[label]) == (row["text"], row["label"])
    skipping.encode(train)  # there is room for all that is left
    good = make_task(folder, data=str(path), test_rows=12, max_length=400)
    before = rows_of(good.cell)
    assert [part.label_names for part in good.usable(*before)] == [before[0].label_names] * 2
