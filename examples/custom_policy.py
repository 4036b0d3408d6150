# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
A network that is not a diffusers pipeline: a small MLP on scikit-learn's 8x8 digits, first trained by flow matching,
then on a distribution-wise reward. The class DigitsPolicy is all that the trainer needs.

    python examples/custom_policy.py
    python examples/custom_policy.py --pretraining-steps 200 --steps 2
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trl_distreward import (
    DiffusionDistributionConfig,
    DistributionRewardTrainer,
    FeatureStatistics,
    SubsetReplaceReward,
)
from trl_distreward.sampling import gaussian_noise


class VelocityMLP(nn.Module):
    """Velocity of 64 pixels, from their values, the time and the class."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.classes = nn.Embedding(10, 32)
        self.layers = nn.Sequential(nn.Linear(64 + 8 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 64)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = t[:, None] * torch.pi * 2.0 ** torch.arange(-1, 3, device=t.device)
        given = torch.cat([x.flatten(1), angles.sin(), angles.cos(), self.classes(labels)], dim=1)
        return self.last(self.layers(given)).view_as(x)


class DigitsPolicy:
    """The members of trl_distreward.DiffusionPolicy."""

    num_conditions = 10

    def __init__(self, model: VelocityMLP):
        self.model = model

    def to(self, device):
        """Moves nothing: the trainer moves the network."""

    def check_conditions(self, conditions):
        if not all(0 <= int(label) < 10 for label in conditions):
            raise ValueError("labels must lie in 0 to 9.")

    def encode(self, conditions):
        return {"labels": torch.as_tensor(conditions, device=self.model.last.weight.device)}

    def noise(self, conditions, generator=None):
        return gaussian_noise((len(conditions), 1, 8, 8), generator, self.model.last.weight.device, torch.float32)

    def velocity(self, model, x, t, cond):
        return model(x, t, cond["labels"]).float()  # `model` may be wrapped, averaged or merged: not self.model

    def decode(self, x):
        return (x / 2 + 0.5).clamp(0, 1)

    def save_pretrained(self, path, model=None):
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file((self.model if model is None else model).state_dict(), str(Path(path) / "model.safetensors"))

    def read_weights(self, path):
        return load_file(str(Path(path) / "model.safetensors"))


def pretrain(policy: DigitsPolicy, images: Tensor, labels: Tensor, steps: int) -> None:
    """Trains by flow matching: `v = x_1 - x_0` at `x_t = (1-t) x_0 + t x_1`."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        x_0, x_1, t = images[rows] / 127.5 - 1, torch.randn(128, 1, 8, 8), torch.rand(128)
        wide = t.view(-1, 1, 1, 1)
        velocity = policy.velocity(policy.model, (1 - wide) * x_0 + wide * x_1, t, policy.encode(labels[rows]))
        optimizer.zero_grad()
        (velocity - (x_1 - x_0)).square().mean().backward()
        optimizer.step()


def pixels(images: Tensor) -> Tensor:
    """Features of uint8 images (B, 1, 8, 8)."""
    return images.float().flatten(1) / 255


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining-steps", type=int, default=2000, help="steps of flow matching")
    parser.add_argument("--steps", type=int, default=50, help="updates with the reward")
    parser.add_argument("--reference-set-size", type=int, default=1000, help="images of the reference set")
    parser.add_argument("--output-dir", default="outputs/custom-policy", help="folder for the weights")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images * 16).clamp(max=255).round().to(torch.uint8)[:, None]
    policy = DigitsPolicy(VelocityMLP())
    pretrain(policy, images.float(), torch.from_numpy(digits.target), arguments.pretraining_steps)
    trainer = DistributionRewardTrainer(
        model=policy,
        reward_funcs=SubsetReplaceReward(pixels, FeatureStatistics.from_features(pixels(images))),
        args=DiffusionDistributionConfig(
            output_dir=arguments.output_dir,
            max_steps=arguments.steps,
            reference_set_size=arguments.reference_set_size,
            num_subsets=arguments.reference_set_size // 10,
            num_inference_steps=10,
            num_inference_steps_eval=[10],
            eval_samplers=["ode"],
            rollout_batch_size=512,
            per_device_train_batch_size=512,
            per_device_eval_batch_size=512,
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    before = trainer.evaluate()["eval_ode_distance_features"]
    trainer.train()
    after = trainer.evaluate()["eval_ode_distance_features"]
    trainer.save_model()
    report = {"distance_before": before, "distance_after": after}
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
