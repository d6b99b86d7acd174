"""A fresh process that loads saved folders and runs them: for reload proofs, speeds and peak memory.

    with FreshProcess() as process:
        process.load("smaller")
        logits = process.outputs({"input_ids": ids})

What this process holds in memory (a changed model, warm caches, other candidates) cannot help or disturb the other one.
It is one worker, `python -m actkit.core.measure.fresh`: requests and replies are JSON lines on its stdin and stdout,
tensors cross in temporary safetensors files, and whatever a library prints goes to stderr, whose last lines end up in
errors. The worker has its own process group (Ctrl-C reaches it through us only), no network, and goes when its stdin
closes, so also when we are killed; the last of the two to go removes the temporary files.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actkit.core.ground.errors import ActkitError, FreshProcessError
from actkit.core.ground.memory import release_memory

if TYPE_CHECKING:
    from actkit.core.measure.decoding import Decoder

TIMEOUT = 600.0  # seconds that one request may take
TAIL = 12  # lines of stderr in an error

Base = str | Callable[[], nn.Module]


class FreshProcess:
    """A worker process; use it as a context manager, or `close()` it.

    One worker can load several folders one after another; each load drops the model before.

    Args:
        threads: of the worker; None for torch's number here.
        timeout: seconds that one request may take.

    Raises:
        ValueError: there are fewer threads than 1.
        FreshProcessError: the worker could not be started. Every method raises it too: if the worker reports an error,
            it stays usable; if the worker dies or takes too long, it is closed.
    """

    def __init__(self, *, threads: int | None = None, timeout: float = TIMEOUT) -> None:
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"threads: {threads} was given; give 1 or more.")
        self.timeout = timeout
        self.loaded: dict[str, Any] = {}  # what the last load said
        self._folder = Path(tempfile.mkdtemp(prefix="actkit-fresh-"))
        self._stderr: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - it has no name, and `_end` closes it
        self._said = 0  # bytes of stderr before the current request
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "actkit.core.measure.fresh", str(self._folder), str(self.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=_environment(self.threads),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise FreshProcessError(f"fresh process: {sys.executable} could not be started ({error}).") from error
        self._end = weakref.finalize(self, _end, self._process, self._folder, self._stderr, os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and remove its temporary files; it may be closed twice."""
        self._end()

    @property
    def closed(self) -> bool:
        """Whether the process has ended."""
        return not self._end.alive

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    # -- what it does

    def load(
        self,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        decode: bool = False,
        *,
        base: Base | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
        to_decode: bool = False,
    ) -> dict[str, Any]:
        """Load a folder (transformers' or actkit's) as `core.store.checkpoint.load` does.

        Args:
            folder: of a saved model.
            dtype: of the loaded model; None for the stored one.
            decode: build the sparse kernel's buffers (`pack`).
            base: builds the unchanged model, for a folder of one's own nn.Module: 'package.module:function', or a
                function or class that can be imported by its name.
            device: to load on.
            trust_remote_code: run code that the folder brings.
            to_decode: leave the weights in their files (`core.store.pending`) until a decoder packs them, as `actkit
                generate` does; whatever else is asked for loads the whole model then.

        Returns:
            A dictionary with

                - `model_class`, `dtype`, `threads`;
                - `attention`: the implementation;
                - `unsaved`: `unsaved_dtypes`;
                - `inputs`: `Inputs.to_dict`;
                - `weight_bytes`;
                - `packed`: layers that decode through the sparse kernel;
                - `seconds`, and `load_peak_bytes` (None if unknown).

        Raises:
            FreshProcessError: the folder does not load.
            ValueError: `base` could not be imported in a fresh process.
        """
        self.loaded = {}
        self.loaded = self._ask(
            "load",
            folder=str(Path(folder).absolute()),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            decode=decode,
            base=None if base is None else import_name(base),
            device=device,
            trust_remote_code=trust_remote_code,
            to_decode=to_decode,
        )
        return self.loaded

    def pack(self, capacity: int | None = None) -> dict[str, Any]:
        """Get the loaded model ready for `time_decode`; another call replaces what was built.

        Args:
            capacity: tokens of one text, prompt and new ones, for which a decoder is made if one takes the model
                (`core.measure.decoding`); None for transformers in any case, whose layers then get the sparse kernel's
                buffers.

        Returns:
            A dictionary with

                - `engine`: 'decoder' or 'transformers';
                - `reason`: why it is not the decoder, or '';
                - `threads`: that it runs with;
                - `packed`: layers with buffers of the sparse kernel.
        """
        return self._ask("pack", capacity=capacity)

    def outputs(self, batch: Any) -> Tensor:
        """Return the model's logits, or its first output, on one batch.

        Args:
            batch: a dict of the model's keywords, a tensor or a tuple of tensors.

        Returns:
            float32, on the CPU.
        """
        reply = self._ask("outputs", batch=_write_batch(batch, self._folder))
        return _read_tensors(self._folder, reply["file"])["output"]

    def time_decode(self, input_ids: Tensor, new_tokens: int) -> dict[str, Any]:
        """Decode greedily with a key-value cache.

        A single row goes through the decoder if `pack` made one.

        Args:
            input_ids: int64 [batch, prompt].
            new_tokens: 2 or more, per row.

        Returns:
            A dictionary with

                - `first_token_seconds`: of the prompt's pass;
                - `token_seconds`: one per following step;
                - `tokens_per_second`: of the following steps, all rows together;
                - `tokens`: the chosen ids [batch, new_tokens] as lists;
                - `engine`: 'decoder' or 'transformers';
                - `compiled`: whether kernels were compiled meanwhile, which took time and leaves some 300 MB in the
                  process.

        Raises:
            ValueError: there are fewer new tokens than 2.
        """
        if new_tokens < 2:
            raise ValueError(f"new_tokens: {new_tokens} was given; give 2 or more, as the first one is timed alone.")
        return self._ask("time_decode", batch=_write_batch(input_ids, self._folder), new_tokens=new_tokens)

    def time_forward(self, batch: Any, at_least: float = 0.0) -> float:
        """Return the seconds of one forward pass over a batch, without a cache.

        Args:
            batch: as in `outputs`.
            at_least: repeat until so many seconds have passed and give the mean, as one short pass is mostly noise.

        Returns:
            Seconds of one pass.
        """
        reply = self._ask("time_forward", batch=_write_batch(batch, self._folder), at_least=at_least)
        return reply["seconds"]

    def memory(self) -> dict[str, Any]:
        """Return the bytes of the whole worker, libraries included.

        Returns:
            A dictionary with

                - `peak_bytes`: largest resident set since the load ended;
                - `resident_bytes`: now;
                - `before_bytes`: resident just before the load;
                - `request`: `resident_bytes` just before the request before this one, and its `peak_bytes` (None if the
                  system lets no process reset its peak);
                - `peak`: 'VmHWM' if the system lets a process reset its peak, else 'ru_maxrss', the largest since the
                  worker started, the load included.
        """
        return self._ask("memory")

    def call(self, function: str, batch: Any, **settings: Any) -> dict[str, Any]:
        """Run a function of the loaded model, as `actkit.finetuning.timed_step.time_step` does.

        Args:
            function: of (model, batch, **settings), as 'package.module:function'; it returns what JSON takes.
            batch: as in `outputs`.
            settings: what JSON takes.

        Returns:
            What the function returned.
        """
        return self._ask("call", function=function, batch=_write_batch(batch, self._folder), settings=settings)

    def use_threads(self, threads: int) -> None:
        """Set the worker's number of threads; a decoder keeps those it was made with."""
        self._ask("use_threads", threads=threads)
        self.threads = threads

    # -- requests and replies

    def _ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        if self.closed:
            raise FreshProcessError(f"{what}: the fresh process was closed; start another FreshProcess().")
        request = json.dumps({"what": what, **arguments}).encode() + b"\n"
        try:
            reply = self._exchange(request, what)
        except BaseException:  # Ctrl-C too: a reply that comes later would answer the wrong question
            self.close()
            raise
        if "error" in reply:
            for left in self._folder.iterdir():  # what the request brought and was not read
                left.unlink(missing_ok=True)
            raise FreshProcessError(f"{what}: the fresh process reports {reply['error']}{self._tail()}")
        return reply

    def _exchange(self, request: bytes, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        deadline = time.monotonic() + self.timeout
        self._said = os.fstat(self._stderr.fileno()).st_size
        with suppress(BrokenPipeError):  # it died before; reading tells how
            self._process.stdin.write(request)
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise FreshProcessError(
                        f"{what}: the fresh process did not answer within {self.timeout:g} s and was ended; pass a "
                        f"larger timeout= if the model is that slow.{self._tail()}"
                    )
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise FreshProcessError(f"{what}: the fresh process died ({self._death()}).{self._tail()}")
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}, most often for want of memory" if name == "SIGKILL" else name

    def _tail(self) -> str:
        file = self._stderr.fileno()
        start = max(self._said, os.fstat(file).st_size - 8192)
        said = os.pread(file, 8192, start).decode(errors="replace")  # a seek would move where the worker writes
        lines = said.splitlines()[-TAIL:]
        return "\nIts last lines:\n  " + "\n  ".join(lines) if lines else ""


def import_name(base: Base) -> str:
    """Return 'package.module:name' of a function or class, or of that text itself.

    Args:
        base: what builds a model.

    Returns:
        The name to import it by.

    Raises:
        ValueError: a fresh process could not import it: a lambda, a nested function, or one of the main script.
    """
    if isinstance(base, str):
        module, _, name = base.partition(":")
        if not module or not name.isidentifier():
            raise ValueError(f"base: {base!r} was given; write 'package.module:function'.")
        return base
    module, name = getattr(base, "__module__", None) or "", getattr(base, "__qualname__", "")
    if not name.isidentifier() or module in ("", "__main__"):
        raise ValueError(
            f"base: {name or base!r} of {module or 'no module'} cannot be imported by a fresh process; put a function "
            f"without arguments that builds the unchanged model into a module of its own."
        )
    return f"{module}:{name}"


def _environment(threads: int) -> dict[str, str]:
    """This process's environment, without a network for the hub, and with the same places to import from."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen[bytes], folder: Path, stderr: BinaryIO, owner: int) -> None:
    """Kill the worker and its group, wait for it, remove the temporary files."""
    if os.getpid() != owner:  # a forked child that ends must leave its parent's worker alone
        return
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it holds nothing that would have to be saved
    process.wait()
    for pipe in (process.stdin, process.stdout, stderr):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    shutil.rmtree(folder, ignore_errors=True)


# -- tensors -----------------------------------------------------------------------------------------------------------


def _write_batch(batch: Any, folder: Path) -> dict[str, Any]:
    """Write a batch's tensors to a file; returns what `_read_batch` needs, as JSON takes it."""
    if isinstance(batch, Mapping):
        form, items = "dict", {str(key): value for key, value in batch.items()}
    elif isinstance(batch, tuple):
        form, items = "tuple", {str(index): value for index, value in enumerate(batch)}
    else:
        form, items = "one", {"0": batch}
    tensors = {key: value for key, value in items.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in items.items() if not isinstance(value, Tensor)}
    try:
        json.dumps(values)
    except TypeError as error:
        raise ValueError(f"batch: {error}; give tensors, numbers, texts and lists of these.") from error
    return {"form": form, "keys": list(items), "values": values, "file": _write_tensors(tensors, folder)}


def _read_batch(content: dict[str, Any], folder: Path) -> Any:
    items = {**_read_tensors(folder, content["file"]), **content["values"]}
    if content["form"] == "dict":
        return {key: items[key] for key in content["keys"]}
    ordered = tuple(items[key] for key in content["keys"])
    return ordered if content["form"] == "tuple" else ordered[0]


def _write_tensors(tensors: dict[str, Tensor], folder: Path) -> str:
    handle, name = tempfile.mkstemp(dir=folder, suffix=".safetensors")
    os.close(handle)
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    save_file(copies, name)
    return Path(name).name


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read a file of `_write_tensors` and remove it."""
    path = folder / name
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}  # no longer mapped to the file
    path.unlink()
    return tensors


# -- the worker --------------------------------------------------------------------------------------------------------


class _Worker:
    """Answers requests: each public method is one of them; `_answer` runs it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model: nn.Module | None = None
        self._decoder: Decoder | None = None
        self._kernels = False  # whether decoding runs kernels of ours
        self._before: int | None = None
        self._peak = "ru_maxrss"
        self._largest = 0  # peak of the requests since the load
        self._request: dict[str, int | None] = {}  # the last one's memory

    @property
    def _opened(self) -> nn.Module:
        """The model, some of whose weights may still be in its files."""
        if self._model is None:
            raise ValueError("no model is loaded; call load(folder) first.")
        return self._model

    @property
    def _loaded(self) -> nn.Module:
        """The whole model."""
        from actkit.core.store.pending import pending_of, whole

        if pending_of(self._opened) is not None:  # as if it had been loaded so from the beginning
            self._model = whole(self._opened)
            gc.collect()
            self._peak, self._largest = "VmHWM" if _reset_peak() else "ru_maxrss", 0
        return self._opened

    def load(
        self,
        folder: str,
        dtype: str | None,
        decode: bool,
        base: str | None,
        device: str,
        trust_remote_code: bool,
        to_decode: bool,
    ) -> dict[str, Any]:
        from actkit.core.forward.example import Inputs, main_dtype, unsaved_dtypes
        from actkit.core.ground.memory import parameter_bytes
        from actkit.core.model.parts import attention_implementation
        from actkit.core.store.checkpoint import load
        from actkit.core.store.opening import open_pending

        self._model, self._decoder, self._kernels = None, None, False
        release_memory()
        self._before = _resident()
        _reset_peak()
        started = time.perf_counter()
        factory = None if base is None else _imported(base)
        if to_decode and dtype is None and factory is None and device == "cpu":
            model = open_pending(folder, trust_remote_code=trust_remote_code)
        else:
            model = load(folder, device=device, dtype=dtype, base=factory, trust_remote_code=trust_remote_code)
        seconds = time.perf_counter() - started
        self._model = model
        load_peak = _peak()[0]
        gc.collect()
        self._peak, self._largest = "VmHWM" if _reset_peak() else "ru_maxrss", 0
        return {
            "model_class": type(model).__name__,
            "dtype": str(main_dtype(model)).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "attention": attention_implementation(model),
            "unsaved": unsaved_dtypes(model),
            "inputs": Inputs.of(model).to_dict(),
            "weight_bytes": parameter_bytes(model),
            "packed": self.pack(None)["packed"] if decode else 0,
            "seconds": seconds,
            "load_peak_bytes": load_peak,
        }

    def pack(self, capacity: int | None) -> dict[str, Any]:
        from actkit.core.layers.linear import ActLinear, pack_for_decode
        from actkit.core.measure.decoding import Engine, choose_engine

        model = self._opened
        self._decoder = None
        for module in model.modules():
            if isinstance(module, ActLinear):
                module.unpack()
        engine = Engine(None, "it was not asked for") if capacity is None else choose_engine(model, capacity=capacity)
        self._decoder = engine.decoder
        packed = pack_for_decode(self._loaded) if engine.decoder is None else 0
        self._kernels = packed > 0 or engine.decoder is not None
        threads = torch.get_num_threads() if engine.decoder is None else engine.decoder.threads
        return {"engine": engine.name, "reason": engine.reason, "threads": threads, "packed": packed}

    def outputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        from actkit.core.forward.batch import first_tensor, forward
        from actkit.core.forward.hooks import evaluating

        with evaluating(self._loaded):
            output = first_tensor(forward(self._loaded, _read_batch(batch, self._folder)))
        return {"file": _write_tensors({"output": output.float()}, self._folder)}

    def time_decode(self, batch: dict[str, Any], new_tokens: int) -> dict[str, Any]:
        from actkit.core.forward.hooks import evaluating
        from actkit.core.ground.compiling import compiling

        ids: Tensor = _read_batch(batch, self._folder)
        decoder = self._decoder if len(ids) == 1 else None
        model = self._loaded if decoder is None else self._opened
        device = torch.device("cpu") if decoder is not None else _device(model)
        ids = ids.to(device)
        step = _steps_of_model(model) if decoder is None else _steps_of_decoder(decoder)
        seconds, tokens, compiled = [], [], False

        def compiles() -> None:
            nonlocal compiled
            compiled = True

        # If no kernel of ours runs, Numba is not imported: it would count as memory of the model's process.
        with compiling(compiles) if self._kernels else nullcontext(), evaluating(model):
            for _ in range(new_tokens):
                started = time.perf_counter()
                ids = step(ids)
                _wait_for(device)
                seconds.append(time.perf_counter() - started)
                tokens.append(ids)
        return {
            "first_token_seconds": seconds[0],
            "token_seconds": seconds[1:],
            "tokens_per_second": len(ids) * len(seconds[1:]) / sum(seconds[1:]),
            "tokens": torch.cat(tokens, dim=1).tolist(),
            "engine": "transformers" if decoder is None else "decoder",
            "compiled": compiled,
        }

    def time_forward(self, batch: dict[str, Any], at_least: float) -> dict[str, Any]:
        from actkit.core.forward.batch import forward
        from actkit.core.forward.hooks import evaluating

        model, inputs = self._loaded, _read_batch(batch, self._folder)
        device = _device(model)
        passes, spent = 0, 0.0
        with evaluating(model):
            started = time.perf_counter()
            while not passes or spent < at_least:
                forward(model, inputs)
                _wait_for(device)
                passes, spent = passes + 1, time.perf_counter() - started
        return {"seconds": spent / passes}

    def memory(self) -> dict[str, Any]:
        peak, method = _peak(self._peak)
        return {
            "peak_bytes": max(self._largest, peak),
            "resident_bytes": _resident(),
            "before_bytes": self._before,
            "request": self._request,
            "peak": method,
        }

    def call(self, function: str, batch: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        called: Any = _imported(function)
        return called(self._loaded, _read_batch(batch, self._folder), **settings)

    def _answer(self, what: str, **arguments: Any) -> dict[str, Any]:
        """One request; its peak begins with what is resident, and counts among those since the load."""
        resident, resets = _resident(), _reset_peak()
        try:
            return getattr(self, what)(**arguments)
        finally:
            if what != "memory":
                peak = _peak(self._peak)[0]
                self._largest = max(self._largest, peak)
                self._request = {"resident_bytes": resident, "peak_bytes": peak if resets else None}

    def use_threads(self, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        return {}


def _steps_of_model(model: Any) -> Callable[[Tensor], Tensor]:
    """From a prompt, then from the tokens before, int64 [batch, length], to the likeliest next ones [batch, 1]."""
    from actkit.core.layers.prefill import dense_prompt

    last = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": 1} if last else {}  # the logits inside a prompt are not needed
    past: Any = None

    def step(ids: Tensor) -> Tensor:
        nonlocal past
        with dense_prompt(model, ids.shape[1]):
            output = model(input_ids=ids, past_key_values=past, use_cache=True, **keep)
        past = getattr(output, "past_key_values", None)
        if past is None:
            raise ValueError(f"{type(model).__name__} returns no key-value cache; use time_forward instead.")
        return output.logits[:, -1].argmax(-1, keepdim=True)

    return step


def _steps_of_decoder(decoder: Decoder) -> Callable[[Tensor], Tensor]:
    """The same for one row."""
    decoder.reset()
    return lambda ids: decoder(ids[0].tolist()).argmax().view(1, 1)


def _imported(name: str) -> Callable[[], nn.Module]:
    """What 'package.module:function' names; it was named by the caller of `FreshProcess.load`, never by a file."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident() -> int:
    """Bytes of this process that are in memory now."""
    found = _status("VmRSS")
    if found is not None:
        return found
    import psutil

    return psutil.Process().memory_info().rss


def _peak(method: str = "VmHWM") -> tuple[int, str]:
    """The largest resident set, and by which method it is known."""
    found = _status("VmHWM") if method == "VmHWM" else None
    if found is not None:
        return found, "VmHWM"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss"


def _reset_peak() -> bool:
    """Let VmHWM start again from what is resident now; returns whether the system allowed it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _serve(folder: Path, threads: int) -> None:
    """Answer requests until stdin closes. Nothing else uses file descriptors 0 and 1 meanwhile."""
    import faulthandler

    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what libraries print goes to stderr
    faulthandler.enable()
    torch.set_num_threads(threads)
    worker = _Worker(folder)
    try:
        for line in requests:
            arguments = json.loads(line)
            try:
                reply = worker._answer(**arguments)
            except Exception as error:
                if not isinstance(error, ActkitError):  # those say all in their text
                    traceback.print_exc()
                sys.stderr.flush()
                reply = {"error": f"{type(error).__name__}: {error}"}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
    except BrokenPipeError:  # the process that asked is gone
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
