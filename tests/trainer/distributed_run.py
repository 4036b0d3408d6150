# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Trains a tiny model and writes its weights and logs; test_distributed.py starts it in several processes."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from tests.helpers import tiny_merge_trainer, tiny_reward, tiny_trainer
from tests.runs import stop_in
from tests.trainer.sharded_launch import use_deepspeed, use_fsdp2
from trl_distreward import LogSamplesCallback
from trl_distreward.trainer.sharding import whole_state_dict


def bright(images, log_metric, **kwargs):
    """Scores images, and logs a value for each of the darker ones."""
    scores = images.float().mean(dim=(1, 2, 3)).tolist()
    for score in scores:
        if score < 128:
            log_metric("darkness", 128 - score)
    return [score if score > 100 else None for score in scores]


def broken(*args, **kwargs):
    raise OSError("this process fails")


def train(output, settings):
    samples, stop, fail, again = (settings.pop(name, None) for name in ("samples", "stop", "fail", "again"))
    if settings.pop("bright", False):
        settings["reward_funcs"] = [tiny_reward(), bright]
    resume_from, launch = settings.pop("resume_from", None), settings.pop("launch", "ddp")
    if launch == "fsdp2":
        use_fsdp2()
    elif launch != "ddp":
        use_deepspeed(stage=int(launch.removeprefix("zero")))
        settings["use_cpu"] = False
    lora = LoraConfig(r=2, lora_alpha=4) if settings.pop("lora", False) else None
    if settings.pop("merge", False):
        trainer = tiny_merge_trainer(output, settings.pop("checkpoints"), **settings)
    else:
        trainer = tiny_trainer(output, peft_config=lora, **settings)
    if samples:
        trainer.add_callback(LogSamplesCallback(trainer, trainer.conditions[:samples], freq=100))
    if stop is not None and trainer.accelerator.process_index == 1:
        stop_in(trainer, trainer.estimator, "loss", stop)
    if fail is not None and trainer.accelerator.process_index == fail[0]:
        setattr(trainer, fail[1], broken)
    trainer.train(resume_from_checkpoint=resume_from)
    assert trainer.interrupted == (stop is not None)
    metrics = trainer.evaluate()
    trainer.save_model(str(output / "saved"))
    network = trainer.unwrapped(trainer.sampled_model)
    weights = {name: value.clone() for name, value in whole_state_dict(network).items()}  # all processes take part
    if trainer.accelerator.is_main_process:
        save_file({name: weights[name].contiguous() for name, _ in network.named_parameters()}, output / "weights")
        (output / "log.json").write_text(json.dumps({"history": trainer.state.log_history, "metrics": metrics}))
    if again:
        trainer.train()
        assert any(not torch.equal(value, weights[name]) for name, value in whole_state_dict(network).items())
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), json.loads(sys.argv[2]))
