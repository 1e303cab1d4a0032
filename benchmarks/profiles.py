"""The kernels that a step spends its time in, by torch's profiler.

`python -m benchmarks.profiles NAME FOLDER OUT BEGAN` trains the cells of FOLDER/cells.json together, profiles some
steps in the middle, and writes FOLDER/profile.txt.
"""

import json
import sys
from pathlib import Path

from minilora import files
from minilora.cell import Cell
from minilora.fields import from_dict

from . import alone

ROWS = 30  # of the table


class Watch:
    """Profiles the steps from `first` to `last`, as far as their losses are known: on a GPU they are read in bursts."""

    def __init__(self, first, last, device):
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        self.profile, self.first, self.last, self.began, self.ended = profile(activities=activities), first, last, 0, 0

    def step(self, step, **_):
        """Called once the loss of a step is known, for each member."""
        if not self.began and step >= self.first:
            self.profile.start()
            self.began = step
        if self.began and not self.ended and step >= self.last:
            self.end(step)

    def end(self, step):
        self.profile.stop()
        self.ended = step


def measure(name, folder):
    """What is said of the profile; the table itself goes into the folder."""
    import minilora
    from minilora.parallel import pick_device

    cells = [from_dict(Cell, values) for values in json.loads((folder / "cells.json").read_text(encoding="utf-8"))]
    device, steps = pick_device(cells[0].device).type, cells[0].steps
    watch = Watch(steps // 3, 2 * steps // 3, device)
    outs = [folder / "runs" / f"{name}-{number}" for number in range(len(cells))]
    for results, _ in minilora.train_together(cells, outs, size=len(cells), on_step=watch.step):
        if isinstance(results, Exception):
            raise results
    if watch.began and not watch.ended:  # with the tests, then
        watch.end(steps)
    events, of = watch.profile.key_averages(), "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    table = events.table(sort_by=of, row_limit=ROWS, max_name_column_width=60)
    files.write_text(folder / "profile.txt", f"{name}: steps {watch.began} to {watch.ended} of {steps}\n{table}\n")
    own = [event for event in events if device == "cpu" or str(event.device_type).endswith("CUDA")]
    total = sum(getattr(event, of) for event in own)
    first = max(own, key=lambda event: getattr(event, of))
    kernels = sum(event.count for event in own) / max(1, watch.ended - watch.began)
    part = getattr(first, of) / total if total else 0.0
    return {"steps": watch.ended - watch.began, "operations_a_step": kernels, "longest": first.key, "share": part,
            "line": f"profile {name}: {kernels:,.0f} {'kernels' if device == 'cuda' else 'operations'} a step; "
            f"{first.key[:60]} takes {part:.0%}"}  # fmt: skip


def main(argv):
    name, folder, out, _ = argv
    files.write_json(out, measure(name, Path(folder)))


if __name__ == "__main__":
    alone.begin()
    main(sys.argv[1:])
