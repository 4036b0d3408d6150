# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Make pickles with the layout of EDM2's snapshots, without NVIDIA's code."""

import copy
import io
import pickle
import struct
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

# code in a snapshot; running it makes a file in the current folder
SOURCE = "open('executed', 'w').close()\n"


class EasyDict(dict):
    __module__, __qualname__ = "dnnlib.util", "EasyDict"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a snapshot's object was reconstructed")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Pickles as an object together with the source of its class."""

    def __init__(self, class_name, state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name}
        return _reconstruct_persistent_obj, ({**meta, "state": self.state},), None


@contextmanager
def original_modules():
    """Adds modules with the names in the pickle, and nothing else in them."""
    contents = {"dnnlib": {}, "torch_utils": {}, "dnnlib.util": {"EasyDict": EasyDict}}
    contents["torch_utils.persistence"] = {"_reconstruct_persistent_obj": _reconstruct_persistent_obj}
    for name, content in contents.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name in contents:
            del sys.modules[name]


def persistent(module, class_name="Anything", **init_kwargs):
    """Turns a torch module into the original's persistent object; torch's own containers stay."""
    children = {
        name: child if isinstance(child, nn.ModuleDict) else child and persistent(child)
        for name, child in module._modules.items()
    }
    for container in (child for child in children.values() if isinstance(child, nn.ModuleDict)):
        container.__dict__["_modules"] = {name: persistent(child) for name, child in container._modules.items()}
    state = {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_modules": children,
        "_init_args": (),
        "_init_kwargs": init_kwargs,
    }
    return Persistent(class_name, state)


def snapshot(model, in_latents=True, network="Precond", **overrides):
    """Makes a snapshot with the weights of an `EDM2UNet2DModel`, in float16 as published."""
    names = {"sample_size": "img_resolution", "in_channels": "img_channels", "num_classes": "label_dim"}
    ours = {name for name in model.config if not name.startswith("_")} - {"forced_weight_normalization"}
    kwargs = {names.get(name, name): model.config[name] for name in ours}
    kwargs = {name: list(value) if isinstance(value, tuple) else value for name, value in kwargs.items()}
    encoder = Persistent("StandardRGBEncoder", {"_init_args": (), "_init_kwargs": EasyDict()})
    if in_latents:
        arrays = {"scale": np.full(4, 0.1, np.float32), "bias": np.arange(4, dtype=np.float32)}
        encoder = Persistent("StabilityVAEEncoder", {"vae_name": "stabilityai/sd-vae-ft-mse", **arrays, "_vae": None})
    model = copy.deepcopy(model).half().requires_grad_(False)
    content = {
        "encoder": encoder,
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="images"),
        "loss_fn": Persistent("EDM2Loss", {"P_mean": -0.4}),
        "ema": persistent(model, network, **{**kwargs, "use_fp16": True, **overrides}),
    }
    with original_modules():
        return pickle.dumps(EasyDict(content))


class Call:
    """Pickles as a call of a function that can be imported."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class _StoragePickler(pickle.Pickler):
    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


def storage_bytes(values, numel=None):
    """Makes a float32 storage as in pickles of tensors; `numel` is the length that it claims."""
    numel = len(values) if numel is None else numel
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    stream = io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(header, stream, protocol=2)
    _StoragePickler(stream, protocol=2).dump(("storage", torch.FloatStorage, "0", "cpu", numel, None))
    pickle.dump(["0"], stream, protocol=2)
    return stream.getvalue() + struct.pack("<q", numel) + struct.pack(f"<{len(values)}f", *values)


def tensor_call(storage, size, stride=(1,), offset=0):
    """Makes a tensor as in pickles, from a storage's bytes."""
    storage = Call(torch.storage._load_from_bytes, storage)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
