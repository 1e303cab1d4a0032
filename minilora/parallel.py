"""One cell over several processes, which torchrun starts: who each of them is, and what travels between them.

Each process has the adapter, the head and the optimiser whole, and a part of the rows of each batch (`part`). Of a step
the gradients of what is trained are summed, and the losses (`all_reduce`), so that all take the same step. Only the
first process writes, prints and shows progress (`first`, `speaks`). With `--shard` each process keeps 1/N of every
frozen weight: FSDP2 (`sharding`; Zhao et al. 2023, arXiv 2304.11277, section 4) gathers a layer before its forward and
again before its backward, and frees it after each.

Left out: compiled steps, populations and grids (those are for `--ray`), a sharded base that is itself trained, and
layers that are themselves split. Without torchrun this module imports nothing and does nothing.
"""

import contextlib
import ctypes
import os
import sys
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from minilora.errors import InputError, TrainingError

PATIENCE = timedelta(hours=6)  # with the first process, which may fetch a base and tokenise a data set for the others
M_MMAP_THRESHOLD, LARGE = -3, 1 << 20  # a parameter of glibc's allocator, and bytes


class Here(NamedTuple):
    """This process: its number of so many, its number on its machine, and its torch device."""

    rank: int = 0
    count: int = 1
    local: int = 0
    device: object = None


_here = Here()
_meetings = 0
_speaks = os.environ.get("RANK", "0") == "0"


def launched():
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def count():
    """How many processes train together."""
    return _here.count


def first():
    """Whether this process is the one that writes."""
    return _here.rank == 0


def speaks():
    """Whether this process prints: the first, or of processes that fail that which was the first to."""
    return _speaks


def refuse(what, instead):
    """Raise InputError where torchrun started several processes for what one does."""
    if launched() > 1:
        raise InputError(
            f"torchrun started {launched()} processes, which train one cell together, and not {what}: {instead}"
        )


def check(cell, shard):
    """Raise InputError for a cell that several processes cannot train together."""
    if shard and launched() == 1:
        raise InputError(
            "--shard splits the base among several processes: start them with torchrun --nproc-per-node N train.py"
        )
    if shard and cell.method == "full":
        raise InputError("--shard is for a frozen base, but method is 'full': drop one of them")
    if launched() > 1 and cell.compile == "on":
        raise InputError(f"compile is 'on', but a step of {launched()} processes is not compiled: use --compile auto")


@contextlib.contextmanager
def together(device):
    """Join torchrun's processes into one group for this block, on a cell's `device`; a single process runs unchanged.

    Over CUDA they speak NCCL, each with the GPU of its number on its machine, over CPUs gloo. Raises InputError for a
    device that each cannot have its own of.
    """
    global _here, _meetings, _speaks
    if launched() == 1:
        yield
        return
    import torch
    from torch import distributed

    from minilora import console

    _here = Here(*(int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    try:
        _here = _here._replace(device=pick_device(device))
        cuda = _here.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(_here.device)
        store, *_ = next(distributed.rendezvous("env://", timeout=PATIENCE))
        store = distributed.PrefixStore(f"minilora/{_meetings}", store)
        _meetings += 1  # the names that an earlier meeting left in the store are not met again
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=_here.rank,
            world_size=_here.count,
            timeout=PATIENCE,
        )
        try:
            with contextlib.nullcontext() if first() else console.quiet():
                yield
        except (InputError, TrainingError):  # all have met it
            _speaks = is_first_to_fail(store)
            distributed.destroy_process_group()
            raise
        except Exception:
            _speaks = is_first_to_fail(store)
            raise
        except KeyboardInterrupt:  # which the first process tells of, that has the run folder
            is_first_to_fail(store)
            raise
        distributed.destroy_process_group()
    finally:
        _here = Here()


def is_first_to_fail(store):
    """Whether no other process said so before: these then fail for want of this one."""
    with contextlib.suppress(Exception):  # where the store went with another process, that one failed before
        return store.add("failed", 1) == 1
    return False


def leave(status):
    """Exit with this status. One of several processes does so at once: it may have left the group in the middle of a
    step, and gloo's threads abort some of the times that Python takes them down then."""
    if launched() == 1:
        sys.exit(status)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def pick_number(kind, number):
    """The number of this process's device, of a cell's `kind` and `number` ('' for any)."""
    if count() == 1 or kind == "cpu":
        return number
    if number or kind == "mps":
        named = f"{kind}:{number}" if number else kind
        raise InputError(f"device is {named}, but {count()} processes need one each: use cuda, cpu or auto")
    return str(_here.local)


def pick_device(name):
    """The torch device of a cell's `device`; auto is CUDA where there is one, else the CPU; of several processes each
    has its own. Raises InputError."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    number = pick_number(kind, number)
    name = f"{kind}:{number}" if number else kind
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= there:
        instead = "use --device auto" if count() == 1 else "start no more processes than that"
        raise InputError(f"device {name} is not there (this machine has {there} of {kind}): {instead}")
    return torch.device(name)


# --- what travels


def all_reduce(*tensors):
    """Sum each tensor, or array, over all processes, in place."""
    if count() > 1:
        import torch
        from torch import distributed

        for tensor in tensors:
            distributed.all_reduce(tensor if torch.is_tensor(tensor) else torch.from_numpy(tensor))


def any_of(flag):
    """Whether `flag` holds in any process."""
    if count() > 1:
        import torch

        flags = torch.tensor([float(flag)])
        all_reduce(flags)
        flag = flags.item() > 0
    return flag


def broadcast(tensor):
    """Let all processes have the first one's values."""
    if count() > 1:
        from torch import distributed

        distributed.broadcast(tensor, 0)


@contextlib.contextmanager
def fail_together():
    """What fails in one process fails in all of them."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if count() > 1:
        from torch import distributed

        told = [None] * count()
        distributed.all_gather_object(told, failure and (isinstance(failure, InputError), str(failure)))
        for rank, failed in enumerate(told):
            if failed and failure is None:
                is_input, message = failed
                failure = InputError(message) if is_input else TrainingError(f"process {rank}: {message}")
    if failure is not None:
        raise failure


def broadcast_object(make):
    """What `make()` gives in the first process, in all of them."""
    with fail_together():
        made = [make() if first() else None]
    if count() > 1:
        from torch import distributed

        distributed.broadcast_object_list(made)
    return made[0]


def barrier():
    """Go on once all processes are here."""
    if count() > 1:
        import torch

        all_reduce(torch.zeros(1))


@contextlib.contextmanager
def in_turn():
    """The first process of each machine before the others there, which find in the caches what it fetched and made."""
    if _here.local:
        barrier()
    try:
        yield
    finally:
        if not _here.local:
            barrier()


# --- rows


def part(rows):
    """Which of a batch's rows are this process's: the parts are in their order, and differ by one row at most."""
    return slice(rows * _here.rank // _here.count, rows * (_here.rank + 1) // _here.count)


def turns(rows, batch_size):
    """Yield slices (those of `rows` that are in a turn, those of the turn that are this process's): a batch each."""
    own = slice(batch_size * _here.rank, batch_size * (_here.rank + 1))
    for start in range(0, rows, batch_size * _here.count):
        yield slice(start, start + batch_size * _here.count), own


# --- a sharded base


def sharding():
    """A function that shards a frozen module: of each parameter a process keeps its part of the rows.

    What operators save of a gathered weight for their backward is that weight's own storage, which is emptied after
    the forward and filled again before the backward. So they may save a weight as it is, and nothing made of it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if _here.device.type == "cpu":
        # glibc would keep most of what a gathered layer took, as holes in its heap; memory mapped for it is given back.
        with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    return partial(fully_shard, mesh=init_device_mesh(_here.device.type, (count(),)))


def no_gradients(base):
    """A context for predictions: inference mode, but not where `base` is sharded, because what is gathered in it is
    gathered into the same memory in training."""
    import torch

    return torch.no_grad() if is_sharded(base) else torch.inference_mode()


def is_sharded(module):
    return hasattr(module, "unshard")


def forward_only(modules):
    """Of sharded modules with nothing trained in or below them: do not gather them again for the backward."""
    for module in modules:
        if is_sharded(module):
            module.set_unshard_in_backward(False)


def whole(module):
    """A context in which the parameters of a sharded module are whole; of any other module they are."""
    return gathered_meanwhile(module) if is_sharded(module) else contextlib.nullcontext()


@contextlib.contextmanager
def gathered_meanwhile(module):
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def gathered(weight):
    """A weight whole, where it is sharded: all processes take part."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
