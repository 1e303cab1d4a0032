"""What cells make once and share: each member has what it would have prepared by itself."""

import numpy as np

from minilora.cell import Cell
from minilora.runs.bases import Settings, Shared
from minilora.training.member import Member


def prepared(member):
    """All that `prepare` makes of rows, as plain data."""
    tests = [(test.key, test.rows.texts, test.rows.labels.tolist()) for test in member.tests]
    tokens = [array.tolist() for array in (member.encoded.ids, member.encoded.offsets, member.answers.numpy())]
    encoded, index = member.read
    return member.inputs, list(member.injected.to_dicts()), tests, tokens, encoded.ids.tolist(), index.tolist()


def test_members_share_what_does_not_depend_on_them(base, reviews):
    first = Cell(
        model=str(base), data=str(reviews), test_rows=31, max_length=30, batch_size=7, window=2, steps=3, rank=2
    )
    changes = [dict(rank=5, lr=0.1, seed_init=4), dict(inject=dict(proportion=0.5)), dict(inject=dict(count=2)),
               dict(seed_inject=3), dict(seed_split=2), dict(max_length=12), dict(steps=20), dict(test_rows=20),
               dict(seed_order=8), dict(inject=dict(sources=("date:negative",)))]  # fmt: skip
    settings, members, seen = Settings(), [], []
    for cell in [first, *(first.replace(**change) for change in changes)]:
        one, alone = Member(cell, None), Member(cell, None)
        one.prepare(settings.of(cell), settings.shared)
        alone.prepare(settings.of(cell))
        assert prepared(one) == prepared(alone)
        members.append(one)
        seen.append(prepared(alone))
    same = [[getattr(one, name) is getattr(members[0], name) for name in ("clean", "tests", "injected")]
            for one in members[1:]]  # fmt: skip
    assert same[0] == [True, True, True] and same[1] == [True, True, False] and same[2] == [True, False, False]
    assert all(other != seen[0] for other in seen[2:]) and len(seen) == 11
    assert members[1].read is members[0].read and not np.array_equal(members[4].read[0].ids, members[0].read[0].ids)


def test_the_last_that_were_used_are_kept():
    shared, made = Shared(), []
    for seed in (*range(Shared.KEPT), 0, Shared.KEPT, 0, 1):
        shared("rows", Cell(seed=seed), ["seed"], make=lambda seed=seed: made.append(seed))
    assert made == [*range(Shared.KEPT), Shared.KEPT, 1]
