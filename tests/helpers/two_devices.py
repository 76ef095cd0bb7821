"""Two GPUs that this machine does not have: tensors carry a pretended device, and ops check it.

A tensor's device is that of its storage, as it really is: views, detached tensors and parameters
over the same memory agree. Within `two_devices()`

- `.to`, `.cuda`, `.cpu`, `device=` and the queries of `torch.cuda` believe in `cuda:0` and
  `cuda:1`; what lies there is ordinary memory;
- every operation, those of a backward pass and of the optimizer included, raises the RuntimeError
  that CUDA would raise where its tensors lie on different devices. As there, a 0-dim tensor on the
  CPU mixes with anything, an index on the CPU may index a GPU's tensor, and copies may cross;
- what CUDA refuses on the host is refused: `numpy()` of a GPU's tensor, for example.

What crosses from one device to another is written down.
"""

import itertools
import threading
from contextlib import ExitStack, contextmanager
from unittest import mock

import peft.tuners.lora.model  # noqa: F401  # looks for a GPU's libraries when it is imported
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
MEMORY = 2**34  # of each pretended GPU

_aten = torch.ops.aten
_COPIES = {_aten.copy_, _aten._to_copy, _aten._copy_from, _aten.set_}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_INDEXED |= {_aten._unsafe_index, _aten._unsafe_index_put}


class Pretended:
    """Which storage lies where, and what has crossed."""

    def __init__(self, n_gpus=2):
        self.n_gpus = n_gpus
        self.free = [MEMORY] * n_gpus
        self.crossings = []
        self._places = {}
        self._lock = threading.Lock()

    def of(self, tensor):
        """Returns where a tensor lies."""
        real = _device_of(tensor)
        if real.type != "cpu":
            return real
        entry = self._places.get(tensor.untyped_storage()._cdata)
        return CPU if entry is None or entry[1].expired() else entry[0]

    def knows(self, tensor):
        """Returns whether a tensor's storage has a place."""
        entry = self._places.get(tensor.untyped_storage()._cdata)
        return entry is not None and not entry[1].expired()

    def put(self, tensor, device):
        """Says where a tensor's storage lies."""
        if not _pretends(tensor):
            return
        storage = tensor.untyped_storage()
        # A weak reference keeps the address from being used again.
        with self._lock:
            self._places[storage._cdata] = (device, StorageWeakRef(storage))
            if len(self._places) > 20000:
                alive = {k: v for k, v in self._places.items() if not v[1].expired()}
                self._places = alive

    def put_all(self, values, device):
        for tensor in _tensors(values if isinstance(values, (tuple, list)) else (values,)):
            self.put(tensor, device)

    def crossed(self, tensor, source, target):
        """Notes a copy from one device to another."""
        self.crossings.append((str(source), str(target), tensor.dtype, tuple(tensor.shape)))

    def resolved(self, value):
        """Returns the device that `value` means; `None` if it means none."""
        if isinstance(value, bool):
            return None
        if isinstance(value, int):
            value = torch.device("cuda", value)
        if isinstance(value, str):
            try:
                value = torch.device(value)
            except RuntimeError:
                return None
        if not isinstance(value, torch.device):
            return None
        if value.type == "cuda" and value.index is None:
            value = torch.device("cuda", 0)
        if value.type == "cuda" and value.index >= self.n_gpus:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return value


def _device_of(tensor):
    with torch._C.DisableTorchFunction():
        return tensor.device


def _pretends(tensor):
    return _device_of(tensor).type == "cpu"


def _tensors(values):
    """Returns the tensors among some values, and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [one for one in value if isinstance(one, torch.Tensor)]
    return found


class _Checked(TorchDispatchMode):
    """Below autograd: no operation mixes devices, and results lie where their inputs do."""

    def __init__(self, pretended):
        super().__init__()
        self.pretended = pretended

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs)

    def _run(self, func, args, kwargs):
        packet = func.overloadpacket
        tensors = [t for t in _tensors((*args, *kwargs.values())) if t.device.type == "cpu"]
        if packet in _COPIES:
            result = func(*args, **kwargs)
            if packet is _aten._to_copy and tensors:
                self.pretended.put_all(result, self.pretended.of(tensors[0]))
            elif packet is _aten.copy_ and len(tensors) == 2:
                target, source = map(self.pretended.of, tensors)
                if target != source:
                    self.pretended.crossed(tensors[1], source, target)
            return result
        where = self._checked(func, packet, args, tensors)
        result = func(*args, **kwargs)
        if where is not None and where is not CPU:
            made = result if isinstance(result, (tuple, list)) else (result,)
            for tensor in _tensors(made):
                # What shares memory with an argument has its place.
                if not any(tensor is t for t in tensors) and not self.pretended.knows(tensor):
                    self.pretended.put(tensor, where)
        return result

    def _checked(self, func, packet, args, tensors):
        if packet in _INDEXED:
            own = self.pretended.of(args[0])
            indices = [t for t in args[1] if t is not None]
            if any(self.pretended.of(i) not in (CPU, own) for i in indices):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    f"({own})"
                )
            tensors = [args[0], *_tensors(args[2:3])]
        found = {}
        for tensor in tensors:
            device = self.pretended.of(tensor)
            # A number on the host goes with every device.
            if device != CPU or tensor.dim():
                found.setdefault(device, tensor)
        if len(found) > 1:
            first, second = itertools.islice(found, 2)
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{first} and {second}! (in {func})"
            )
        return next(iter(found), CPU if tensors else None)


class _Crossing(torch.autograd.Function):
    """A copy to another device; the gradient goes back to where the input was."""

    @staticmethod
    def forward(ctx, tensor, source, target, pretended):
        ctx.places = (source, target, pretended)
        return _crossed(tensor, source, target, pretended)

    @staticmethod
    def backward(ctx, gradient):
        source, target, pretended = ctx.places
        return _crossed(gradient, target, source, pretended), None, None, None


def _crossed(tensor, source, target, pretended):
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        copy = tensor.detach().clone()
    pretended.put(copy, target)
    pretended.crossed(copy, source, target)
    return copy


_T = torch.Tensor
# Each look at an attribute's getter makes another object; they compare equal.
_DEVICE, _IS_CUDA, _IS_CPU = _T.device.__get__, _T.is_cuda.__get__, _T.is_cpu.__get__
_GRAD = _T.grad.__get__
_NEW = {_T.new_empty, _T.new_zeros, _T.new_ones, _T.new_full, _T.new_tensor}
_LIKE = {torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like}
_LIKE |= {torch.randn_like, torch.randint_like}
_ON_HOST = {_T.numpy, _T.__array__}


class _Believing(TorchFunctionMode):
    """Above autograd: what asks for a device, or moves to one."""

    def __init__(self, pretended):
        super().__init__()
        self.pretended = pretended

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        own = args[0] if args and isinstance(args[0], torch.Tensor) else None
        p = self.pretended
        if func is torch.device and args and isinstance(args[0], int):
            return torch.device("cuda", args[0])  # a number is one of a GPU, if there are GPUs
        if own is not None and _pretends(own):
            answered, result = self._of_a_tensor(func, own, args, kwargs)
            if answered:
                return result
        if kwargs.get("pin_memory") and "device" not in kwargs:
            kwargs["device"] = CPU
        if func is torch.Tensor.to or "device" not in kwargs:
            return func(*args, **kwargs)
        device = p.resolved(kwargs["device"])
        if device is None or device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(
                f"Expected a '{device.type}' device type for generator but found "
                f"'{generator.device.type}'"
            )
        if kwargs.pop("pin_memory", False) and device != CPU:
            raise RuntimeError("Only dense CPU tensors can be pinned")
        result = func(*args, **{**kwargs, "device": CPU})
        p.put_all(result, device)
        return result

    def _of_a_tensor(self, func, own, args, kwargs):
        """Returns whether this is a question to a tensor, and the answer."""
        p = self.pretended
        here = p.of(own)
        if func == _DEVICE:
            return True, here
        if func == _IS_CUDA:
            return True, here.type == "cuda"
        if func == _IS_CPU:
            return True, here.type == "cpu"
        if func is _T.get_device:
            return True, -1 if here.index is None else here.index
        if func == _GRAD:
            gradient = func(*args, **kwargs)
            if gradient is not None and p.of(gradient) != here:
                raise RuntimeError(f"a gradient on {p.of(gradient)} of a tensor on {here}")
            return True, gradient
        if func in _ON_HOST and here.type == "cuda":
            raise TypeError(
                f"can't convert {here} device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        if func is _T.pin_memory:
            if here.type == "cuda":
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors")
            return True, own
        if func is _T.cuda:
            given = args[1] if len(args) > 1 else kwargs.get("device")
            return True, self._moved(own, here, p.resolved("cuda" if given is None else given))
        if func is _T.cpu:
            return True, self._moved(own, here, CPU)
        if func is _T.to:
            return self._to(own, here, args, kwargs)
        if func is _T.type_as:
            return True, self._moved(own, here, p.of(args[1])).to(args[1].dtype)
        if (func in _NEW or func in _LIKE) and "device" not in kwargs:
            result = func(*args, **kwargs)
            p.put_all(result, here)
            return True, result
        return False, None

    def _to(self, own, here, args, kwargs):
        p, rest, target = self.pretended, [], None
        for value in args[1:]:
            if isinstance(value, torch.Tensor):
                target, rest = p.of(value), [*rest, value.dtype]
            elif (device := p.resolved(value)) is not None:
                target = device
            else:
                rest.append(value)
        given = kwargs.pop("device", None)
        target = target or p.resolved(given)
        if target is not None and target.type not in ("cpu", "cuda"):
            return False, None
        result = own
        if target is not None:
            result = self._moved(own, here, target)
        for name in ("non_blocking", "other"):
            if name == "other" and name in kwargs:
                raise NotImplementedError("to(other=...)")
            kwargs.pop(name, None)
        rest = [value for value in rest if not isinstance(value, bool) and value is not None]
        if rest or kwargs:
            result = torch.Tensor.to(result, *rest, **kwargs)
        return True, result

    def _moved(self, tensor, source, target):
        if source == target:
            return tensor
        return _Crossing.apply(tensor, source, target, self.pretended)


class _Stream:
    def __init__(self, device=None, **kwargs):
        self.device = device

    def record_event(self, *args):
        return object()

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


def _record_stream(tensor, stream):
    if not tensor.is_cuda or tensor.device != torch.device(stream.device):
        raise RuntimeError(f"a stream of {stream.device} for a tensor on {tensor.device}")


@contextmanager
def _nothing(*args, **kwargs):
    yield


def _grouped(pretended):
    """Returns what torch's optimizers group their tensors by: the device, pretended or not."""

    def grouped(lists, with_indices=False):
        groups = {}
        for i, first in enumerate(lists[0]):
            lists_of, numbers = groups.setdefault(
                (pretended.of(first), first.dtype), ([[] for _ in lists], [])
            )
            for one, of in zip(lists_of, lists, strict=True):
                one += [of[i]] if of else []
            numbers.append(i)
        return groups

    return grouped


@contextmanager
def two_devices(n_gpus=2):
    """Within, there are `n_gpus` GPUs; yields the `Pretended`."""
    pretended = Pretended(n_gpus)
    run = threading.Thread.run

    def enter(stack):
        stack.enter_context(_Checked(pretended))
        stack.enter_context(_Believing(pretended))

    backward = torch.autograd._engine_run_backward

    def backward_believing(*args, **kwargs):
        # While `backward` is answered above, hooks and layers that run again would not believe.
        with _Believing(pretended):
            return backward(*args, **kwargs)

    def run_believing(thread):
        with ExitStack() as stack:  # modes are a thread's own
            enter(stack)
            run(thread)

    def free(device=None):
        index = (pretended.resolved(0 if device is None else device)).index
        return pretended.free[index], MEMORY

    cuda = {
        "is_available": lambda: n_gpus > 0,
        "device_count": lambda: n_gpus,
        "current_device": lambda: 0,
        "mem_get_info": free,
        "synchronize": lambda device=None: pretended.resolved(0 if device is None else device),
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_device_name": lambda device=None: "a pretended GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": _Stream,
        "current_stream": _Stream,
        "device": _nothing,
        "stream": _nothing,
        "is_bf16_supported": lambda *args, **kwargs: True,
    }
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_believing))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", _record_stream))
        stack.enter_context(
            mock.patch.object(torch.autograd, "_engine_run_backward", backward_believing)
        )
        stack.enter_context(
            mock.patch.object(
                torch.optim.Optimizer,
                "_group_tensors_by_device_and_dtype",
                staticmethod(_grouped(pretended)),
            )
        )
        enter(stack)
        yield pretended
