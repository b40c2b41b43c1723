"""GPUs that are not there: real numbers on the CPU, behind tensors that say ``cuda:0``.

What breaks on the first day with a GPU, and never on a CPU, is not arithmetic: a tensor that was
left on the CPU, a generator of the wrong device, a look at a number that makes the host wait. Here
every operation is dispatched as torch dispatches it, its arguments are judged as CUDA would judge
them, and then it is computed on the CPU. What makes the host wait is counted, and so are the bytes
that live on the devices.

It knows nothing of kernels: which of them there are for which types, how they round, how fast they
are. torch's ``FakeTensorMode`` knows more of that, but has no numbers, and so no engine can run.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwenvl_app.engine.engine import Engine

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_aten = torch.ops.aten
_MOVING = {_aten._to_copy.default, _aten.copy_.default}
# They may look up a tensor of a GPU by indices of the host.
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
}
# Taken apart they would be several, none of which looks at a number or goes elsewhere.
_WHOLE = {
    _aten.linear.default,
    _aten.matmul.default,
    _aten.reshape.default,
    _aten.to.dtype,
}
_LOOKING = {  # the host waits for a number, or for how many there are
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
}


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; ``host`` has its numbers, of which views are views."""

    host: torch.Tensor
    _gpu: torch.device

    @staticmethod
    def __new__(cls, host: torch.Tensor, gpu: torch.device) -> OnGpu:
        with torch.inference_mode(host.is_inference()):
            made: OnGpu = torch.Tensor._make_wrapper_subclass(
                cls,
                host.shape,
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                # To C++, which can't even slice on a device that it was built without.
                device=torch.device("meta", gpu.index),
            )
        made.host, made._gpu = host, gpu
        return made

    @property
    def device(self) -> torch.device:
        return self._gpu

    @property
    def is_cuda(self) -> bool:
        return True

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self._gpu}, {self.host!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.scaled_dot_product_attention:
                return _attend(*args, **kwargs or {})
            if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
                args = args[0], torch.tensor(args[1])  # or it would be one without numbers
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a GPU, outside of the engine's thread")


def _attend(*args: Any, **kwargs: Any) -> torch.Tensor:
    """One kernel, as on a GPU: torch would take it apart into products for the device "meta"."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    _same(tensors, "scaled_dot_product_attention")
    hosts = _mapped(_host, (args, kwargs))
    host = nn.functional.scaled_dot_product_attention(*hosts[0], **hosts[1])
    return OnGpu(host, args[0].device).detach()  # which is dispatched, and so its memory counted


def _same(tensors: list[torch.Tensor], what: str) -> torch.device:
    """The device of all ``tensors``, but for numbers of the host. Raises as CUDA does."""
    devices = {t.device for t in tensors if isinstance(t, OnGpu) or t.dim()}
    if len(devices) > 1:
        raise RuntimeError(f"{what}: Expected all tensors to be on the same device, got {devices}")
    return devices.pop()


@cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    """Whether ``func.decompose`` would take it apart, and is to."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return func not in _WHOLE and (key in func.py_kernels or has(func.name(), key))


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """``tree_map`` without what takes torch's longer than most operations. All tuples are plain."""
    if isinstance(value, tuple | list):
        changed = [_mapped(change, each) for each in value]
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {name: _mapped(change, each) for name, each in value.items()}
    return change(value)


def _host(value: Any) -> Any:
    if isinstance(value, torch.device):
        return _CPU
    return value.host if isinstance(value, OnGpu) else value


def _meta(value: Any) -> Any:
    gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("meta", value.index or 0) if gpu else value


class _Names(TorchFunctionMode):
    """Says "meta" to C++ for a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = _mapped(_meta, (args, kwargs or {}))
        if func is torch.tensor and (device := kwargs.pop("device", None)) is not None:
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class Recorded:
    """``compiled.Graph`` as far as there can be one: bound to the tensors that it was made with."""

    pool = None

    def __init__(self, gpus: Gpus, body: Callable[..., torch.Tensor], *tensors: Any):
        self._gpus, self._body, self._tensors = gpus, body, (tensors[0].clone(), *tensors[1:])
        before = gpus.waits.copy()
        self._run()
        if more := gpus.waits - before:
            raise RuntimeError(f"operation not permitted when stream is capturing: {more}")
        rows, _, columns, _ = tensors[1][0].shape
        gpus.recorded.append((rows, columns))

    def _run(self) -> torch.Tensor:
        return self._body(*self._tensors)

    def replay(self, inputs: torch.Tensor) -> torch.Tensor:
        self._gpus.replays += 1
        self._tensors[0].copy_(inputs)
        return self._run()


class Gpus(TorchDispatchMode):
    """What happens on pretended GPUs; see ``pretend``.

    ``waits`` counts, by what and where, whatever makes the host wait for a GPU: looks at numbers,
    and copies from and to memory that is not pinned. ``allocated`` and ``peak`` are in bytes, of
    all GPUs together; more than ``total`` there is not. ``recorded``: of each CUDA graph its
    rows and the columns that they look at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.recorded: list[tuple[int, int]] = []
        self.replays = 0
        self.allocated = self.peak = 0
        self.total = 2**40
        self._generators: dict[int, torch.Generator] = {}  # by the address of what is drawn from
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values: list[Any] = []
        _mapped(values.append, (args, kwargs))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        asked = next((value for value in values if isinstance(value, torch.device)), None)
        if asked is None and not any(isinstance(tensor, OnGpu) for tensor in tensors):
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:  # in inference mode an operation comes here before it is taken apart
                return func.decompose(*args, **kwargs)
        target = self._target(func, args, kwargs, tensors, asked)
        wrappers = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, OnGpu)}
        hosts = _mapped(_host, (args, kwargs))
        if func is _aten.histc.default:  # of whole numbers a GPU makes one, and a CPU does not
            result = func(hosts[0][0].float(), *hosts[0][1:], **hosts[1]).to(tensors[0].dtype)
        else:
            result = func(*hosts[0], **hosts[1])
        if target.type == "cpu":
            return result

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if (changed := wrappers.get(id(value))) is not None:  # in place
                return changed
            self._count(value)
            return OnGpu(value, target)

        return _mapped(wrap, result)

    def _target(self, func, args, kwargs, tensors, asked) -> torch.device:
        """Where the result is. Raises what CUDA raises for arguments that it can't take."""
        if asked is not None:
            target = torch.device("cuda", asked.index or 0) if asked.type == "meta" else asked
            if tensors and tensors[0].device != target:
                self._wait(f"copied to {target.type}")
            return target
        if func in _MOVING:
            if tensors[0].device != tensors[-1].device:
                self._wait(f"copied to {args[0].device.type}")
            return args[0].device
        if func in _LOOKING:
            self._wait(f"looked at by {func}")
        if func in _INDEXING:
            for index in args[1]:
                if index is not None and index.device.type == "cpu":
                    self._wait("indices copied to cuda")
                elif index is not None and index.dtype is torch.bool:
                    self._wait("looked at: how many a mask has")
            ours = {id(index) for index in args[1] if index is not None and index.device == _CPU}
            tensors = [tensor for tensor in tensors if id(tensor) not in ours]
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in self._generators:
            raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator")
        return _same(tensors, str(func))

    def _wait(self, what: str) -> None:
        for frame, line in traceback.walk_stack(None):
            path = frame.f_code.co_filename
            if "/qwenvl_app/" in path or "/transformers/" in path:
                file = path.rpartition("/")[2]
                self.waits[f"{what} ({file}:{line}: {frame.f_code.co_name})"] += 1
                return
        self.waits[what] += 1

    def _count(self, host: torch.Tensor) -> None:
        """The memory of a tensor that was made, for as long as it lives."""
        storage = host.untyped_storage()
        if (key := storage._cdata) in self._known:
            return
        if self.allocated + (size := storage.nbytes()) > self.total:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self._known.add(key)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

        def freed() -> None:
            self._known.discard(key)
            self.allocated -= size

        weakref.finalize(storage, freed)

    def restart(self) -> None:
        """The peak is what is allocated now."""
        self.peak = self.allocated

    @contextmanager
    def limit(self, room: int) -> Iterator[None]:
        """Within the block, so many bytes are left."""
        before, self.total = self.total, self.allocated + room
        try:
            yield
        finally:
            self.total = before

    @contextmanager
    def here(self) -> Iterator[None]:
        """Within the block, this thread has the GPUs. On any other, using them is an error."""
        with self, _Names():
            yield

    def move(self, module: nn.Module, gpu: torch.device = GPU) -> None:
        """All of ``module`` to ``gpu``. On a thread that is ``here``."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    moved = OnGpu(parameter.data, gpu)
                    part._parameters[name] = nn.Parameter(moved, requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = OnGpu(buffer, gpu)

    def _graph(self, body: Callable[..., torch.Tensor], *arguments: Any) -> Recorded:
        *tensors, _pool = arguments
        return Recorded(self, body, *tensors)

    def _generator(self, device: Any = _CPU) -> torch.Generator:
        made = _Generator()
        if torch.device(device).type == "cuda":
            self._generators[made._cdata] = made
        return made


_Generator = torch.Generator


@contextmanager
def pretend() -> Iterator[Gpus]:
    """Within the block, engines' threads have GPUs, and those of requests have not."""
    gpus, run = Gpus(), Engine._run

    def here(engine: Engine) -> None:
        with gpus.here():
            run(engine)

    with (
        patch("torch.Generator", gpus._generator),
        patch("qwenvl_app.engine.compiled.Graph", gpus._graph),
        patch("torch.cuda.get_device_capability", lambda _device=None: (7, 5)),
        patch.object(Engine, "_run", here),
    ):
        yield gpus
        assert Engine._run is here, "patched in the block, and put back after it: GPUs would stay"
