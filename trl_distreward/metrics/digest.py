# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Networks and their digests: other weights under the same name make other images and other features."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def network_digest(networks: nn.Module | Mapping[str, nn.Module]) -> str:
    """
    A digest of all weights and buffers, shapes and dtypes included.

    Names of tensors within a network are left out: they change with the version of the library that loads them.
    """
    named = {"": networks} if isinstance(networks, nn.Module) else networks
    digest = hashlib.blake2b(digest_size=16)
    for name, network in sorted(named.items()):
        digest.update(name.encode() + b"\n")
        for content in sorted(map(_tensor_digest, network.state_dict().values())):
            digest.update(content)
    return digest.hexdigest()


def extractor_digest(extractor: Any) -> str | None:
    """Of the network behind an extractor, `None` where there is none."""
    module = module_of(extractor)
    return None if module is None else network_digest(module)


def module_of(extractor: Any) -> nn.Module | None:
    """The module behind an extractor: itself, the owner of a bound method, or what a wrapper holds as `extractor`."""
    owner = getattr(extractor, "__self__", extractor)
    if isinstance(owner, nn.Module):
        return owner
    inner = getattr(owner, "extractor", None)
    return None if inner is None else module_of(inner)


def _tensor_digest(value: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{tuple(value.shape)} {value.dtype}".encode(), digest_size=16)
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
