"""A training step as CUDA graphs: recorded before the first step, then replayed with one launch each.

A graph repeats the same kernels at the same addresses. So its inputs are static: a call copies the step's numbers into
them. A gradient pass has a graph for each padded length, as every batch of a length has the same number of rows; a
micro-batch is a replay that adds to one gradient. The optimiser's move is one more graph. All share a pool of memory,
and the longest batches are recorded first, so that the pool grows once.

Recording runs each function a few times; all that it changed is put back. `record` is what makes a graph of a
function: `Cuda`, or in the tests one that runs on a CPU.
"""

from dataclasses import replace
from functools import partial

import torch

from minilora.training.state import fill
from minilora.training.step import gradient, move, total

WARM_UP = 2  # runs of a function before it is recorded: libraries are loaded and set up at the first


class Cuda:
    """Makes CUDA graphs that share a pool of memory: `record(function)` -> (replay, what `function()` returned).

    Each replay writes its results to the tensors returned here. Raises RuntimeError for what no graph can hold; the
    device can be used as before then.
    """

    def __init__(self, device):
        self.device = device
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function):
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):  # that of the recording: autograd goes on where it began
                for _ in range(WARM_UP):
                    function()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    outputs = function()
            except RuntimeError as error:  # torch leaves its stream, its pool and random numbers as while recording
                torch.cuda.set_stream(current)
                self.pool = torch.cuda.graph_pool_handle()
                random = torch.cuda.default_generators[torch.cuda.current_device()]
                random.graphsafe_set_state(random.clone_state())
                raise (error.__context__ or error) from None  # the first: the end of a recording fails for it
        return graph.replay, outputs


class Recorded:
    """`function(*tensors)` as a graph: the tensors are copied to static ones, and the outputs are static too."""

    def __init__(self, function, inputs, record):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.replay, self.outputs = record(partial(function, *self.inputs))

    def __call__(self, *inputs):
        for static, given in zip(self.inputs, inputs, strict=True):
            fill(static, given)
        self.replay()
        return self.outputs


class Replayed:
    """`step.update` by graphs: called with (micro-batches, rates) it returns (losses, norms), float32 [K].

    blanks  a batch of each shape that a step can see, the largest first (`Feed.blanks`)
    record  see the module's docstring

    A step's batches must be of these shapes (KeyError).
    """

    def __init__(self, population, optimizer, clips, going, blanks, record):
        self.population, self.optimizer, self.clips, self.going = population, optimizer, clips, going
        self.grads = torch.zeros_like(population.flat.values, requires_grad=False)
        self.losses = torch.zeros_like(clips)
        self.shares = len(clips) > 1 and population.prefix > 0  # layers, where the members' rows are the same
        self.passes = {}
        state = [*optimizer.tensors, population.keys, going, self.grads, self.losses]
        before = [tensor.detach().clone() for tensor in state]  # autograd's use of values would tie it to a stream
        population.train()
        try:
            for batch in blanks:
                for alike in (False, True) if self.shares else (False,):
                    batch = replace(batch, alike=alike)
                    add, inputs = partial(self._add, batch), tensors_of(batch, batch.weights)
                    self.passes[self._kind(batch)] = Recorded(add, inputs, record)
            self.end = Recorded(self._end, [torch.zeros_like(clips)], record)
        finally:
            with torch.no_grad():
                for tensor, kept in zip(state, before, strict=True):
                    tensor.copy_(kept)

    def __call__(self, micro_batches, rates):
        totals = total(micro_batches)
        for batch in micro_batches:
            self.passes[self._kind(batch)](*tensors_of(batch, totals))
        return [output.clone() for output in self.end(rates)]  # the next step writes to the same

    def _kind(self, batch):
        """What the batches of a graph have in common."""
        return *batch.ids.shape, *batch.answers.shape, self.shares and batch.alike

    def _add(self, batch, ids, lengths, answers, totals, keys=None):
        """The gradient of one micro-batch, added to the step's."""
        batch = replace(batch, ids=ids, lengths=lengths, answers=answers, keys=keys)
        losses, grads = gradient(self.population, batch, totals.clamp(min=1.0))
        self.losses += losses
        self.grads += grads

    def _end(self, rates):
        losses = self.losses.clone()
        norms = move(self.optimizer, self.clips, self.going, losses, self.grads, rates)
        self.losses.zero_()
        self.grads.zero_()
        return losses, norms


def tensors_of(batch, totals):
    """What a gradient pass reads of a batch."""
    tensors = [batch.ids, batch.lengths, batch.answers, totals]
    return tensors if batch.keys is None else [*tensors, batch.keys]
