# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Estimators: how a reward becomes a gradient. To add one, write a subclass of `Estimator` and list it here."""

from .backprop import Backprop
from .base import Estimator
from .forward_process import AWM, NFT, ForwardProcess
from .policy_gradient import PolicyGradient
from .transport import Transport

ESTIMATORS: dict[str, type[Estimator]] = {
    "grpo": PolicyGradient,
    "rft": ForwardProcess,
    "nft": NFT,
    "awm": AWM,
    "transport": Transport,
    "backprop": Backprop,
}

__all__ = ["AWM", "ESTIMATORS", "NFT", "Backprop", "Estimator", "ForwardProcess", "PolicyGradient", "Transport"]
