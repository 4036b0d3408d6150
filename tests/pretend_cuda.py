# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A GPU that is not there: tensors on the CPU that say they are on `cuda:0`, and operations that mind it.

What is moved to `cuda:0` or made there is remembered by its memory. Every operation runs on the CPU all the same, once
it is checked that a GPU would take it: its tensors are on one device, but for single numbers, indices and copies. So
training runs with real values, in the numbers that a CPU gives, and a tensor left behind is an error as on a GPU. What
makes the host wait for the device is counted.
"""

import time
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {"_to_copy", "copy_", "lift_fresh", "lift", "detach", "alias", "set_", "_pin_memory", "record_stream"}
# operations that take an index or a number from the CPU, and where among their arguments
INDEXING = {"index": (1,), "index_put": (1,), "index_put_": (1,), "_index_put_impl_": (1,)}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}


class PretendCuda(TorchDispatchMode):
    """
    Attributes:
        waits (`Counter`): what made the host wait: operations that give it a value, and copies that block or that are
            made from memory which is not pinned.
    """

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self._there = {}
        self._pinned = {}
        self.moving = False  # whether a copy is one that was asked for

    # ---- where memory is ----

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self._there if tensor.layout == torch.strided else False

    def pin(self, tensor):
        pinned = tensor.clone()
        self._remember(self._pinned, pinned)
        return pinned

    def _remember(self, known, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in known:
            known[key] = weakref.finalize(storage, known.pop, key, None)

    def device_of(self, tensor):
        return CUDA if self.holds(tensor) else tensor_device(tensor)

    # ---- operations ----

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        asked = kwargs.get("device")
        if name == "_to_copy" and not self.moving:
            asked = None  # a change of dtype, by code that knows of no device but the CPU
        there = self._check(name, args, given) if asked is None else torch.device(asked).type == "cuda"
        if asked is not None and torch.device(asked).type == "cuda":
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type != "cuda":
                raise RuntimeError(f"{name}: expected a 'cuda' generator but found '{generator.device.type}'")
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        self._count(name, args, kwargs, given, there)
        out = function(*args, **kwargs)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and there:
                self._remember(self._there, value)
        return out

    def _check(self, name, args, given):
        """Whether results are on the device; an error where a GPU has one."""
        if name in COPIES:
            return bool(args) and isinstance(args[0], torch.Tensor) and self.holds(args[0])
        free = [t for i in INDEXING.get(name, ()) for t in tree_leaves(args[i]) if isinstance(t, torch.Tensor)]
        if free:
            first = args[0]
            if not self.holds(first) and any(self.holds(t) for t in free):
                raise RuntimeError(f"{name}: indices should be either on cpu or on the same device as the tensor")
            given = [t for t in given if not any(t is other for other in free)]
        where = [self.holds(t) for t in given]
        # a single number on the CPU goes along with anything that is computed element by element
        wide = [held for held, t in zip(where, given, strict=True) if held or t.ndim > 0]
        if any(where) and not all(wide):
            shapes = [(tuple(t.shape), str(self.device_of(t))) for t in given]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {shapes}")
        return any(where)

    def _count(self, name, args, kwargs, given, there):
        held = [t for t in given if self.holds(t)]
        if name in WAITING and held:
            self.waits[name] += 1
        masks = tree_leaves(args[1]) if name in INDEXING else ()
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.bool and self.holds(t) for t in masks):
            self.waits[name] += 1
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            pinned = source.untyped_storage()._cdata in self._pinned
            if self.holds(source) != there and (blocking or (there and not pinned)):
                self.waits["to device" if there else "to host"] += 1


tensor_device = torch.Tensor.device.__get__


class _Autocast:
    """`torch.autocast`, whose rules for `cuda` are those of the CPU here; those for `cpu` then do nothing."""

    real = torch.autocast

    def __new__(cls, device_type, *args, **kwargs):
        return cls.real("cpu", *args, **kwargs) if device_type == "cuda" else nullcontext()


class _Event:
    """`torch.cuda.Event` on the host's clock."""

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


@contextmanager
def pretend_cuda(monkeypatch):
    """Within it `cuda:0` can be used, and `accelerate`'s processes take it for theirs."""
    mode = PretendCuda()
    to, tensor, as_tensor = torch.Tensor.to, torch.tensor, torch.as_tensor

    def moved_to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            return moved_to(self, args[0].device, args[0].dtype, *args[1:], **kwargs)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(
            *args, **{key: value for key, value in kwargs.items() if key not in ("copy", "memory_format")}
        )
        copy = kwargs.get("copy", False)
        if device is None or torch.device(device).type == self.device.type:
            same = dtype is None or dtype == self.dtype
            return self if same and not copy and not kwargs.get("memory_format") else to(self, **_like(dtype, kwargs))
        if device.type == "cuda" or self.device.type == "cuda":
            return _moved(self, device, dtype or self.dtype, non_blocking)
        return to(self, *args, **kwargs)

    def _like(dtype, kwargs):
        kept = {key: kwargs[key] for key in ("copy", "memory_format") if key in kwargs}
        return {**kept, **({} if dtype is None else {"dtype": dtype})}

    def _moved(self, device, dtype, non_blocking):
        mode.moving = True
        try:
            return torch.ops.aten._to_copy(self, device=device, dtype=dtype, non_blocking=bool(non_blocking))
        finally:
            mode.moving = False

    def made(function):
        def make(data, *args, device=None, **kwargs):
            if isinstance(data, torch.Tensor) and device is None:
                return function(data, *args, **kwargs)
            if isinstance(data, torch.Tensor):
                dtype = kwargs.get("dtype")
                return moved_to(data, torch.device(device), *([] if dtype is None else [dtype]))
            value = function(data, *args, **kwargs)
            return value if device is None else moved_to(value, torch.device(device))

        return make

    def on_host(method):
        def read(self, *args, **kwargs):
            if self.device.type == "cuda":
                raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({method.__name__})")
            return method(self, *args, **kwargs)

        return read

    def tolist(self):
        return list_of(moved_to(self, CPU))

    list_of = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "device", property(mode.device_of))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(mode.holds))
    monkeypatch.setattr(torch.Tensor, "to", moved_to)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *args, **kwargs: moved_to(self, CPU))
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: mode.pin(self))
    for name in ("numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, on_host(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "tensor", made(tensor))
    monkeypatch.setattr(torch, "as_tensor", made(as_tensor))
    monkeypatch.setattr(torch, "autocast", _Autocast)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: mode.waits.update(["synchronize"]))
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU that is not there")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(CUDA))
    with mode:
        yield mode
