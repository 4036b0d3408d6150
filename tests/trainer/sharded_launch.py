# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""FSDP2 and DeepSpeed on CPU by gloo, although accelerate turns them on for accelerators only."""

import os

import transformers.training_args
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

# What `accelerate launch` sets for the presets of the same names
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
DEEPSPEED = {
    stage: {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }
    for stage in (2, 3)
}


def use_fsdp2() -> None:
    os.environ |= FSDP2
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def use_deepspeed(stage: int) -> None:
    os.environ |= DEEPSPEED[stage] | {"DS_ACCELERATOR": "cpu"}
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
