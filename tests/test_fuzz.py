# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Mutated files of every kind are read, or give an error in words: no hang, no crash, no gigabyte of memory."""

import os
import random
import signal
import traceback
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig
from yaml import YAMLError

from tests.conversion.snapshots import snapshot
from tests.edm2 import tiny_edm2
from tests.evaluation.images import encoded, pixels
from tests.helpers import tiny_sit, tiny_trainer
from tests.runs import SAVE_EVERY_STEP
from trl_distreward import CheckpointPool, FeatureStatistics
from trl_distreward.conversion import load_original_edm2, load_original_sit
from trl_distreward.evaluation import open_images
from trl_distreward.evaluation.decoding import decode_image
from trl_distreward.scripts.train import make_parser

NUMBER = int(os.environ.get("FUZZ_NUMBER", "100"))  # mutations of each kind
YAML = (
    "model: org/m\nreward_funcs: [pick_score]\noutput_dir: out\nuse_cpu: true\nlearning_rate: 1.0e-4\nmax_steps: 5\n"
)
ROWS, RUN, LORA = torch.randn(40, 6), SAVE_EVERY_STEP, LoraConfig(r=2, target_modules=["qkv"])


def decode(path):
    return [decode_image(image) for image in open_images(path).shard(0, 8)]


def image(kind):
    return lambda path: path.write_bytes(encoded(pixels(1, 40, 40)[0], kind)), lambda path: decode(path.parent)


KINDS = {  # suffix: what writes and what reads a file or a folder
    "safetensors": (lambda path: FeatureStatistics.from_features(ROWS).save(path, ROWS), FeatureStatistics.load),
    "npz": (lambda path: np.savez(path, mu=np.zeros(6), sigma=np.eye(6)), FeatureStatistics.load),
    "sample.npz": (lambda path: np.savez(path, pixels(3)), decode),
    **{kind: image(kind.upper()) for kind in ("png", "jpeg", "tiff", "gif", "webp", "bmp", "ppm")},
    "yaml": (lambda p: p.write_text(YAML), lambda p: make_parser().parse_args_and_config(["--config", str(p)])),
    "pkl": (lambda path: path.write_bytes(snapshot(tiny_edm2())), load_original_edm2),
    "pt": (lambda path: torch.save(tiny_sit().state_dict(), path), lambda path: load_original_sit(path, 2)),
    "adapter": (
        lambda path: tiny_trainer(path, peft_config=LORA, max_steps=1, **RUN).train(),
        lambda path: CheckpointPool([path / "checkpoint-1"]).merged([1.0]),
    ),
    "checkpoint": (
        lambda path: tiny_trainer(path, max_steps=1, **RUN).train(),
        lambda path: tiny_trainer(path, max_steps=2).train(str(path / "checkpoint-1")),
    ),
}


def mutated(content, draw):
    data, size, place = bytearray(content), draw.choice([1, 8, 200]), draw.randrange(len(content) + 1)
    new = bytes([draw.randrange(256)]), b"\xff\xff\xff\x7f", b"\0" * size, b"99999999", data[place : place + size]
    data[place : place + draw.choice([0, 1, 4, size, len(data)])] = draw.choice(new)
    return bytes(data)


def outcome(read, path):
    """Reads in a process of its own: how it ended, and its memory in bytes."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            read(path)
            os._exit(0)
        except (ValueError, OSError, YAMLError, RuntimeError):  # torch raises the last for damaged archives
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    _, status, usage = os.wait4(child, 0)
    return {0: "read", 256: "refused"}.get(status, f"status {status}"), 1024 * usage.ru_maxrss


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(tmp_path, kind):
    draw, counts, (write, read) = random.Random(kind), Counter(), KINDS[kind]
    place = tmp_path / f"file.{kind}"
    write(place)
    files = [place] if place.is_file() else [path for path in place.glob("checkpoint-1/**/*") if path.is_file()]
    result, base = outcome(read, place)
    assert result == "read"
    for number in range(NUMBER):
        path = draw.choice(sorted(files))
        content = path.read_bytes()
        path.write_bytes(mutated(content, draw))
        result, memory = outcome(read, place)
        assert memory - base < 2**30, f"mutation {number} of {path} took {memory} bytes"
        counts[result] += 1
        path.write_bytes(content)
    print(kind, dict(counts))  # noqa: T201
    assert set(counts) <= {"read", "refused"}
