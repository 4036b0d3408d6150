# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Float32 products in full precision."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Switches TF32, bfloat16 products and autocast off: TF32 costs 0.1 % of the rewards' standard deviation."""
    backends: Any = torch.backends
    exact: tuple[str, object] = ("allow_tf32", False)
    parts = [backends.cuda.matmul, backends.cudnn]
    if hasattr(backends, "fp32_precision"):  # since torch 2.9, where reading the older names may raise
        exact = ("fp32_precision", "ieee")
        parts = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    with ExitStack() as stack:
        for backend in parts:
            stack.callback(setattr, backend, exact[0], getattr(backend, exact[0]))
            setattr(backend, *exact)
        for device in ("cuda", "cpu"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
