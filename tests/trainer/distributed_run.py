# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Trains a tiny model and writes what came of it; started by test_distributed.py, alone or under torchrun."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers import tiny_trainer


def main() -> None:
    output, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    resume_from = settings.pop("resume_from", None)
    trainer = tiny_trainer(output, **settings)
    trainer.train(resume_from_checkpoint=resume_from)
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        save_file({n: p.detach().contiguous() for n, p in trainer.network.named_parameters()}, output / "weights")
        (output / "log.json").write_text(json.dumps({"history": trainer.state.log_history, "metrics": metrics}))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
