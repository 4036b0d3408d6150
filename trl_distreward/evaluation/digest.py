# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Digests of networks: other weights under the same name make other images and other features."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


def network_digest(networks: nn.Module | Mapping[str, nn.Module]) -> str:
    """A digest of all weights and buffers, names and dtypes included."""
    named = {"": networks} if isinstance(networks, nn.Module) else networks
    digest = hashlib.blake2b(digest_size=16)
    for name, network in sorted(named.items()):
        for key, value in network.state_dict().items():
            digest.update(f"{name}.{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
