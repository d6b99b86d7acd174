"""Several processes as one: each runs its share of the batches, what they saw is added up, the first one writes.

    with together():                     # in a script that torchrun starts in every process
        apply(model, recipe, batches)

Inside `together` every process runs the same program on the same model and is given all the batches. `record`, `apply`
and `evaluate` run the model on every n-th batch only and exchange what they saw, so that each process ends with what
one process would have found. Outside of it, and if there is one process, nothing here does anything: a process group
may then be someone else's, of a training for example.

Every exchange begins with a header from all: whether the sender failed, what it is about to exchange, and how long its
description is. So an error in one process ends all, and processes that went different ways say so instead of waiting
for each other. What is sent is tensors and JSON, no pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from actkit.core.ground.errors import ProcessError

T = TypeVar("T")

HEADER = 256  # bytes of a header: JSON, filled up with spaces
PATIENCE = timedelta(days=1)  # a process may be slow; one that died is noticed at once, by its connection
FAILURE = 2000  # characters sent of an error's text


@dataclass
class _Group:
    """The processes that work together.

    Attributes:
        rank: of this one.
        count: of them all.
        headers: the group that carries tensors on the CPU.
        nccl: whether tensors on GPUs are sent as they are.
        ended: why nothing can be exchanged any more, once an error has ended it.
    """

    rank: int
    count: int
    headers: Any
    nccl: bool
    ended: str = ""


_group: _Group | None = None


def count() -> int:
    """How many processes work together; 1 outside of `together`."""
    return 1 if _group is None else _group.count


def rank() -> int:
    """The number of this process, from 0 on."""
    return 0 if _group is None else _group.rank


def several() -> bool:
    """Whether more than one process works on this run."""
    return count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def mine(batch: int) -> bool:
    """Say whether this process runs the batch with that index: each runs every n-th.

    It may run none, if there are fewer batches than processes; it takes part in all exchanges all the same.

    Args:
        batch: index of a batch, from 0.
    """
    return batch % count() == rank()


def started_by_torchrun() -> bool:
    """Whether the environment says that this is one of several processes."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in needed) and int(os.environ["WORLD_SIZE"]) > 1


def refuse(what: str, instead: str) -> None:
    """Raise ProcessError if torchrun started several processes, for what runs in one; instead: what to do."""
    if several() or started_by_torchrun():
        running = count() if several() else os.environ["WORLD_SIZE"]
        raise ProcessError(f"{what}: it runs in one process, and {running} were started; {instead}.")


# -- the scope ---------------------------------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """The processes work as one inside. All must enter it, and do the same there.

    It takes the process group that torch.distributed has, else makes one from torchrun's variables: gloo for tensors on
    CPUs, nccl for those on GPUs, of which each process gets its own. An error in one process ends all: it leaves as
    itself there, and as ProcessError in the others. Inside another `together`, or with one process, it does nothing.
    """
    global _group
    if _group is not None or not (dist.is_initialized() or started_by_torchrun()):
        yield
        return
    own = not dist.is_initialized()
    if own:
        _initialize()
    try:
        _group = _join()
        if _group is None:
            yield
            return
        try:
            yield
        except BaseException as error:
            done = isinstance(error, SystemExit) and not error.code
            if not _group.ended:
                _begin("the end", error=None if done else error)
            raise
        _begin("the end")
    finally:
        _group = None
        if own:
            dist.destroy_process_group()


def _initialize() -> None:
    # Its functions have the group there is at import as a default, and would keep it: gloo's threads would outlive it,
    # and abort a process whose interpreter ends while they let go of a tensor.
    import_module("torch.distributed.nn.functional")
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local % gpus)
    one_each = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # nccl refuses two processes on one GPU
    nccl = gpus > 0 and one_each and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)


def _join() -> _Group | None:
    if dist.get_world_size() == 1:
        return None
    backends = str(dist.get_backend_config())
    headers = dist.group.WORLD if "gloo" in backends else dist.new_group(backend="gloo", timeout=PATIENCE)
    return _Group(dist.get_rank(), dist.get_world_size(), headers, "nccl" in backends)


# -- exchanges ---------------------------------------------------------------------------------------------------------


def everyone(
    label: str, tensors: Mapping[str, Tensor] | None = None, about: Any = None
) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Return what each process holds, in the order of their ranks; all must ask, and take all of it.

    Args:
        label: what is exchanged, the same in all.
        tensors: may differ in names and shapes from process to process; those of others come on the CPU, or on this
            process's GPU if nccl carried them.
        about: JSON that goes with them.

    Raises:
        ProcessError: another process failed, is gone, or exchanges something else.
    """
    tensors = tensors or {}
    if _group is None:
        yield about, dict(tensors)
        return
    described = {name: [str(x.dtype).removeprefix("torch."), list(x.shape), x.is_cuda] for name, x in tensors.items()}
    message = json.dumps([about, described]).encode()
    sizes = _begin(label, size=len(message))
    for source in range(_group.count):
        theirs, names = json.loads(_text(source, message, sizes[source]))
        found = {}
        for name, (dtype, shape, on_gpu) in names.items():
            found[name] = _tensor(source, tensors.get(name), getattr(torch, dtype), shape, on_gpu)
        yield theirs, found


def total(label: str, values: Tensor) -> Tensor:
    """Sum a tensor over all processes, on the device of the values.

    It is done in the order of the ranks, so that all get the same bits.

    Args:
        label: what is summed, the same in all processes.
        values: of this process, of the same shape in all.
    """
    if _group is None:
        return values
    found = [tensors["values"].to(values.device) for _, tensors in everyone(label, {"values": values.detach()})]
    summed = found[0].clone()
    for other in found[1:]:
        summed += other
    return summed


def agree(**what: str) -> None:
    """Raise ProcessError, in all processes, if one of these texts is not the same in all."""
    found = [theirs for theirs, _ in everyone("what the processes were given", about=what)]
    for other, theirs in enumerate(found):
        wrong = [name for name in found[0] if theirs.get(name) != found[0][name]]
        if wrong:
            raise ProcessError(
                f"{' and '.join(wrong)}: process {other} was given another one than process 0; give every process the "
                f"same model and all the data (with the same seed), they are shared out here."
            )


def on_first(label: str, function: Callable[[], T]) -> T | None:
    """What the function gives, run by the first process alone while the others wait; None in these."""
    if _group is None:
        return function()
    result = None
    if is_first():
        try:
            result = function()
        except BaseException as error:
            _begin(label, error=error)
            raise
    _begin(label)
    return result


def _begin(label: str, *, size: int = 0, error: BaseException | None = None) -> list[int]:
    """Exchange headers; returns what each process says of its size."""
    assert _group is not None
    if _group.ended:
        raise ProcessError(_group.ended)
    text = b"" if error is None else f"{type(error).__name__}: {error}"[:FAILURE].encode()
    named = label.encode("ascii", "replace").decode()[:100]
    header = {"failed": error is not None, "label": named, "size": len(text) or size}
    own = _bytes(json.dumps(header).encode().ljust(HEADER))
    found = [torch.empty_like(own) for _ in range(_group.count)]
    try:
        dist.all_gather(found, own, group=_group.headers)
        headers = [json.loads(bytes(each.tolist())) for each in found]
        failed = [source for source, each in enumerate(headers) if each["failed"]]
        texts = [_text(source, text, headers[source]["size"]).decode(errors="replace") for source in failed]
    except RuntimeError as lost:
        _group.ended = f"another process is gone or does not answer ({lost}); see its own output."
        if error is not None:  # the reason, which is about to be raised
            return []
        raise ProcessError(_group.ended) from lost
    if failed:
        _group.ended = f"process {failed[0]} failed: {texts[0]}"
    elif len({each["label"] for each in headers}) > 1:
        listed = ", ".join(f"process {source} {each['label']!r}" for source, each in enumerate(headers))
        _group.ended = (
            f"the processes went different ways and exchange different things: {listed}. Inside `together` all must "
            f"make the same calls; what only the first shall do goes after it."
        )
    if _group.ended and error is None:
        raise ProcessError(_group.ended)
    return [each["size"] for each in headers]


def _text(source: int, message: bytes, size: int) -> bytes:
    """A message of the process `source`; of that size."""
    assert _group is not None
    buffer = _bytes(message) if source == _group.rank else torch.empty(size, dtype=torch.uint8)
    dist.broadcast(buffer, source, group=_group.headers)
    return bytes(buffer.tolist())


def _tensor(source: int, tensor: Tensor | None, dtype: torch.dtype, shape: list[int], on_gpu: bool) -> Tensor:
    """A tensor of the process `source`, sent as bytes."""
    assert _group is not None
    by_nccl = on_gpu and _group.nccl
    device = torch.device("cuda", torch.cuda.current_device()) if by_nccl else torch.device("cpu")
    if source == _group.rank:
        assert tensor is not None
        sent = tensor.detach().to(device).contiguous()
    else:
        sent = torch.empty(shape, dtype=dtype, device=device)
    if sent.numel():
        group = None if by_nccl else _group.headers
        dist.broadcast(sent.reshape(-1).view(torch.uint8), source, group=group)
    return sent


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
