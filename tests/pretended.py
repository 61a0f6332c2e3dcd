"""A GPU that is none: tensors that say they are on "cuda" and compute on the processor.

What a GPU would refuse is refused: an operation on tensors of two devices (a number alone may come from the processor,
and indices of an indexing too). What it would wait for is counted: `Pretended.waits` has the operation of each time
that the processor asks for a result, or hands over data. So code for a GPU is tried on machines that have none; what
its kernels compute is not. There is no autocast: products are in the type of the weights.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# The size of the result is known only when the device has finished.
_SIZE_UNKNOWN = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
_ASKS = {"_local_scalar_dense", "is_nonzero", "equal"}
_EITHER_DEVICE = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_"}
_THERE = {"cuda", "meta"}  # meta is what torch's own C++ takes the tensors for
_REAL = {name: getattr(torch.cuda, name) for name in ("is_available", "_lazy_init", "mem_get_info")}


class _On(torch.Tensor):
    """A tensor of the pretended device; `held` is where its numbers are."""

    @staticmethod
    def __new__(cls, held):
        # as torch's FakeTensor is made: without memory, dispatched (autocast, autograd) as on a GPU
        empty = torch.empty(0, dtype=held.dtype, device="meta").set_(
            torch.UntypedStorage(0, device="meta"), held.storage_offset(), held.shape, held.stride()
        )
        return torch.Tensor._make_subclass(
            cls, empty, False, dispatch_device=True, device_for_backend_keys=torch.device("cuda:0")
        )

    def __init__(self, held):
        self.held = held

    @property
    def device(self):
        return torch.device("cuda:0")

    is_meta = False  # for Module.to, which refuses to move what has no memory

    def tolist(self):
        return self.cpu().tolist()

    def __getitem__(self, at):
        return super().__getitem__(_lists_as_tensors(at))

    def __setitem__(self, at, value):
        super().__setitem__(_lists_as_tensors(at), value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of `pretended`")

    def __repr__(self):
        return f"on the pretended device: {self.held}"


class Pretended(TorchDispatchMode):
    """What happens on the pretended device, while it is entered."""

    def __init__(self):
        super().__init__()
        self.waits = []  # (operation, file:line of the code of lossmith or of a test that caused it)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        own = torch._library.custom_ops.OPDEFS.get(func._schema.name)
        if own is not None:
            with self:
                return own._init_fn(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func is torch.ops.prim.device.default:
            return torch.device("meta")  # what torch's own code may know of
        if name == "_fused_sdp_choice":
            return int(torch.nn.attention.SDPBackend.MATH.value)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in given if not isinstance(x, _On)]
        assert not any(x.is_meta for x in here), f"{name}: made where nobody saw it, at {_where()}"
        there = [x for x in given if isinstance(x, _On)]
        device = kwargs.get("device")
        goes_there = bool(there) if device is None else torch.device(device).type in _THERE
        if device is not None and goes_there:
            kwargs["device"] = torch.device("cpu")
        if there and name not in _EITHER_DEVICE and any(x.ndim for x in here):
            raise RuntimeError(f"{name}: tensors on cuda:0 and cpu, at {_where()}")
        self._count(name, args, kwargs, there, goes_there)
        if name == "copy_":
            goes_there = isinstance(args[0], _On)
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name in _ASKS or not goes_there:
            return result
        known = {id(x.held): x for x in there}  # an operation in place returns what it was given

        def wrapped(x):
            return known[id(x)] if id(x) in known else _On(x)

        return tree_map(lambda x: wrapped(x) if isinstance(x, torch.Tensor) else x, result)

    def _count(self, name, args, kwargs, there, goes_there):
        if name == "copy_":
            waits = len({isinstance(x, _On) for x in args[:2]}) == 2
        elif name == "_to_copy":
            waits = bool(there) and not goes_there  # to the device without waiting, if that was asked for
            waits = waits or (goes_there and not there and not kwargs.get("non_blocking"))
        elif name in ("index", "index_put", "index_put_"):
            waits = any(x is not None and (x.dtype == torch.bool or not isinstance(x, _On)) for x in args[1]) and there
        else:
            waits = there and (name in _ASKS or name in _SIZE_UNKNOWN)
        if waits:
            self.waits.append((name, _where()))


def _lists_as_tensors(at):
    """torch makes a tensor of a list of indices itself, where nobody sees it."""
    places = at if isinstance(at, tuple) else (at,)
    return tuple(torch.tensor(x, dtype=torch.long, device="cuda:0") if isinstance(x, list) else x for x in places)


def _held(x):
    return x.held if isinstance(x, _On) else x


def _where():
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "lossmith" in path.parts or path.name.startswith("test_"):
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@contextlib.contextmanager
def pretended():
    """Within, "cuda" is the pretended device."""
    torch.cuda.is_available, torch.cuda._lazy_init = (lambda: True), (lambda: None)
    torch.cuda.mem_get_info = lambda device=None: (8 << 30, 16 << 30)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) goes through `_to_copy`, which is seen here
    try:
        with Pretended() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        for name, real in _REAL.items():
            setattr(torch.cuda, name, real)


def moved(model):
    """The model, with its weights on the pretended device; those that share memory still do."""
    new = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, x in kind.items():
                if x is not None and id(x) not in new:
                    there = x.detach().to("cuda:0")
                    new[id(x)] = torch.nn.Parameter(there, x.requires_grad) if kind is module._parameters else there
                kind[name] = None if x is None else new[id(x)]
    return model
