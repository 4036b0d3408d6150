# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Calls of functions that score single images, plain or `async`, and what they may return."""

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

RewardFunction = Callable[..., Any]


def score_images(functions: Mapping[str, RewardFunction], images: Tensor, **arguments: object) -> list[Tensor]:
    """
    Calls functions by name with images `(K, C, H, W)` and further keyword arguments; `async` ones run together.
    Returns float64 scores `(K,)` of each. `None`, by which a function abstains, becomes NaN. A NaN that a function
    returns becomes infinite: it is a fault and no abstention.
    """
    returned = {}
    for name, function in functions.items():
        try:
            returned[name] = function(images=images, **arguments)
        except TypeError as error:
            passed = f"reward function {name!r} is called with the keyword arguments images, {', '.join(arguments)}"
            error.add_note(f"{passed}: let its signature end in **kwargs for those that it does not use.")
            raise
    waiting = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
    if waiting:
        finished = asyncio.run_coroutine_threadsafe(_together(waiting.values()), _event_loop()).result()
        returned |= zip(waiting, finished, strict=True)
    return [_as_scores(name, value, images) for name, value in returned.items()]


def _as_scores(name: str, returned: Tensor | np.ndarray | Sequence[float | None], images: Tensor) -> Tensor:
    what = f"a {type(returned).__name__}"
    try:
        listed = returned.flatten().tolist() if isinstance(returned, Tensor | np.ndarray) else list(returned)
        what = f"{len(listed)} values"
        scores = [math.nan if v is None else math.inf if math.isnan(v) else float(v) for v in listed]
    except (TypeError, ValueError):
        scores = []
    if len(scores) != len(images):
        found = f"reward function {name!r} returned {what} for {len(images)} images"
        raise ValueError(f"{found}: return one number per image, or None where it abstains.")
    return torch.tensor(scores, dtype=torch.float64, device=images.device)


async def _together(waiting: Iterable[Awaitable]) -> list:
    with torch.no_grad():  # a thread has its own mode
        return await asyncio.gather(*waiting)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own: a notebook's thread already runs one. It stays, as clients are bound to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop
