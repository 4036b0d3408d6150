# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..conditions import take
from ..metrics.image_metrics import ImageMetric
from ..policies import as_policy
from .base import DiffusionTrainer
from .checks import check_best_metric, check_on, images_of_noise
from .diffusion_distribution_config import DiffusionDistributionConfig
from .dry_run import Plan
from .estimators import ESTIMATORS
from .estimators.base import Batch
from .image_sets import shared_images
from .reference_set import ReferenceSet, conditions_and_slots
from .reward_functions import Reward, RewardFunction, RewardFunctions, call_per_image
from .rollouts import Rollout, Sampler
from .update_statistics import UpdateStatistics

logger = get_logger(__name__)


class DistributionRewardTrainer(DiffusionTrainer):
    """
    Trains a diffusion or flow-matching generator on distribution-wise rewards.

    An update draws subsets of a generated reference set, generates new images for their conditions, and rewards each
    subset by how close the reference set comes to real data once the subset is replaced (Eq. 4 of
    [arXiv 2607.02291](https://huggingface.co/papers/2607.02291)). `loss_type` chooses how rewards become a gradient.

    Example:

    ```python
    from trl_distreward import DiffusionDistributionConfig, DistributionRewardTrainer, SubsetReplaceReward

    trainer = DistributionRewardTrainer(
        model="my-org/sit-xl-2-256",
        reward_funcs=SubsetReplaceReward(feature_extractor, "imagenet256-statistics.safetensors"),
        args=DiffusionDistributionConfig(output_dir="sit-distreward", bf16=True),
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        model (pipeline, `str` or [`DiffusionPolicy`]):
            A pipeline of a known family, its folder or Hub id, or an object with the members of [`DiffusionPolicy`].
        reward_funcs (`Callable` or `list` of them):
            [`SubsetReplaceReward`], or a function `reward(images=…, conditions=…, slots=…, **kwargs)` that returns one
            float per image; `images` is uint8 `(K, C, H, W)`, `slots` `(K,)` are their places in the reference set.
            Several are weighted by `reward_weights` and summed.
        args ([`DiffusionDistributionConfig`], *optional*): configuration.
        train_dataset (`datasets.Dataset`, *optional*):
            Conditions of the reference set, in a column `class_labels`, or `prompt` for a text-to-image model. Every
            slot keeps its condition. Without a dataset all classes are balanced. `stratify_by` names a further column.
        eval_dataset (`datasets.Dataset`, *optional*):
            Conditions of the evaluated images; for a text-to-image model the training prompts by default.
        eval_metrics (`dict[str, ImageMetric]`, *optional*):
            Metrics to evaluate beside the reward's own distances, e.g. a [`FeatureDistance`] in a feature space that
            the reward does not see.
        peft_config ([`~peft.PeftConfig`], *optional*): trains an adapter instead of the network's own weights.
        callbacks, optimizers: as in [`~transformers.Trainer`].
    """

    _tag_names = ["trl-distreward", "distribution-reward"]
    _name = "Distribution Reward"

    args: DiffusionDistributionConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: DiffusionDistributionConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_metrics: Mapping[str, ImageMetric] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        args = args if args is not None else DiffusionDistributionConfig(output_dir="distribution-reward")
        policy = as_policy(model, **args.guidance())
        args.bind(policy)
        self.conditions, self.slot_sampler = conditions_and_slots(policy, train_dataset, args)
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights)
        initial = None
        if args.beta > 0 and peft_config is None:  # float32, like what is trained from half precision
            initial = copy.deepcopy(policy.model).requires_grad_(False).float().eval()
        rollouts_per_epoch = math.ceil(args.reference_set_size / (args.num_subsets * args.replace_size))
        super().__init__(
            policy=policy,
            args=args,
            steps_per_epoch=rollouts_per_epoch * args.num_iterations,
            eval_metrics=self.rewards.metrics() | dict(eval_metrics or {}),
            ema_decay=args.ema_decay,
            peft_config=peft_config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        device, processes = self.accelerator.device, self.accelerator.num_processes
        if args.num_subsets % processes:
            raise ValueError(
                f"num_subsets={args.num_subsets} is not divisible by {processes} processes: choose a multiple."
            )
        if args.best_of_n > 1 and not self.rewards.of_sets:
            raise ValueError(
                f"best_of_n={args.best_of_n} chooses by a replaced distance, but no reward is a SubsetReplaceReward: "
                "set best_of_n=1."
            )
        self.initial_model = None if initial is None else initial.to(device)
        self.rewards.to(device)
        self.reference_set = ReferenceSet(self.rewards.of_sets, args, self.accelerator)
        self.batch: Batch | None = None
        self.sampler = Sampler(self)
        self.estimator = ESTIMATORS[args.loss_type](self)
        images, conditions = images_of_noise(policy, self.conditions, device)
        check_on(images, conditions, self.rewards, self.eval_metrics)
        self.estimator.check_rewards(images, conditions)
        check_best_metric(args, self.eval_metrics)
        logger.info(Plan.of(self).describe(args))

    # ---- one step ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One update. The first update of a rollout generates, scores and prepares; all of them update."""
        model.train()
        if self.batch is None or self.state.global_step % self.args.num_iterations == 0:
            rollout = self.rollout(model)
            rewards = self.score(rollout)
            self.batch = self.prepare(rollout, rewards)
        return self.update(model, self.batch)

    @torch.no_grad()
    def rollout(self, model: nn.Module) -> Rollout:
        """Generates the reference set if it is due, and new images for slots of it."""
        step, args = self.state.global_step, self.args
        if self.reference_set.is_due(step):
            with self.timed("refresh"):
                schedule, noise = self.sampler.schedule(step), (args.seed, "reference", step)
                batches = shared_images(self, model, self.conditions, schedule, noise, "Reference set")
                self.reference_set.refresh(batches, step)
            self.count_images("refresh", len(self.conditions))
        for name, distance in self.reference_set.distances.items():
            self.record(f"reference_distance/{name}", distance)
        slots = self.estimator.draw_slots(self.slot_sampler).to(self.accelerator.device)
        with self.timed("rollout"):
            rollout = self.estimator.rollout(model, slots, step)
        self.count_images("rollout", slots.numel() * args.best_of_n)
        return rollout

    @torch.no_grad()
    def score(self, rollout: Rollout) -> list[Tensor] | None:
        """
        Computes the rewards of a rollout.

        Returns:
            `list` of `torch.Tensor`: per function `(B, 1)` if a subset's images share a reward, else `(B, n)`; float64
            and the same on every process. `None` if values are not finite: the update is then skipped.
        """
        if not bool(self.accelerator.gather(rollout.finite).all()):
            self.skip_update("an image or its features are not finite")
            return None
        with self.timed("reward"):
            rewards = [self._score_one(reward, rollout) for reward in self.rewards.all]
        if not all(bool(values.isfinite().all()) for values in rewards):
            self.skip_update("a reward is not finite")
            return None
        total = self.rewards.total(rewards)
        self._record_reward("reward", "reward_std", total)
        if len(rewards) > 1:
            for reward, values in zip(self.rewards.all, rewards, strict=True):
                self._record_reward(f"rewards/{reward.name}/mean", f"rewards/{reward.name}/std", values)
        if self.args.reference_update == "refresh" and self.args.best_of_n == 1 and len(rollout.slots) > 1:
            of_sets = [v for reward, v in zip(self.rewards.all, rewards, strict=True) if reward.of_sets]
            drift = self.reference_set.watch_drift(of_sets)
            if drift is not None:
                self.record("reference_drift", drift)
        return rewards

    @torch.no_grad()
    def prepare(self, rollout: Rollout, rewards: list[Tensor] | None) -> Batch | None:
        """Turns rewards into what updates are made from, and lets the reference set roll on."""
        if rewards is None:
            return None
        batch = self.estimator.prepare(rollout, rewards)
        if self.args.reference_update == "rolling":
            self.reference_set.roll(rollout.slots, rollout.gathered, self.slot_sampler.generator)
        if batch is None:
            logger.warning("All rewards of this step are equal: there is nothing to learn, the update is skipped.")
            self.record("skipped_updates", 1.0)
        return batch

    def update(self, model: nn.Module, batch: Batch | None) -> Tensor:
        """Runs forward and backward passes in micro-batches, and sends gradients with the last one."""
        if batch is None:
            return self.no_update()
        processes, split = self.accelerator.num_processes, self.is_fsdp_enabled or self.is_deepspeed_enabled
        # DDP cannot follow several passes per backward: gradients are then summed without it, and sent at the end.
        apart = processes > 1 and not split and not self.estimator.single_pass
        total, statistics = torch.zeros((), device=self.accelerator.device), UpdateStatistics()
        with self.timed("training"):
            for micro_batch, is_last in batch.micro_batches(self.args.per_device_train_batch_size, processes):
                # split weights have split gradients: they do not wait for the last micro-batch
                defer = apart or not (is_last or split)
                with self.accelerator.no_sync(model) if defer else nullcontext():
                    self.accelerator.gradient_state._set_sync_gradients(is_last)
                    network = self.network if apart else model
                    loss, values = self.compute_loss(network, micro_batch, return_outputs=True)
                    self.accelerator.backward(loss)
                statistics.add(micro_batch["weights"], values)
                total += loss.detach()
            if apart:
                self._send_gradients(model)
        for name, value in statistics.reduced(self.accelerator).items():
            self.record(name, value)
        return total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the estimator's loss of one micro-batch, and values `(P,)` to log."""
        loss, values = self.estimator.loss(model, inputs)
        loss = loss * self.accelerator.num_processes  # because gradients are averaged over processes
        return (loss, values) if return_outputs else loss

    def _score_one(self, reward: Reward, rollout: Rollout) -> Tensor:
        slots, sampler = rollout.slots, self.sampler
        if not reward.of_sets:
            values = call_per_image(
                reward,
                images=rollout.images,
                conditions=take(self.conditions, rollout.local_slots.cpu()),
                slots=rollout.local_slots,
                trainer_state=self.state,
            )
            return self.accelerator.gather(values).view(slots.shape)
        if self._shared(slots):
            local = sampler.local(slots).view(-1, slots.shape[1])
            values = self.accelerator.gather(reward.function.score(local, rollout.features[reward.index]))
        else:  # a subset of images from all processes: each scores it
            values = reward.function.score(slots, rollout.gathered[reward.index])
        return values.view(len(slots), -1)

    def _shared(self, slots: Tensor) -> bool:
        """Whether processes share out whole subsets."""
        return len(slots) % self.accelerator.num_processes == 0

    def _record_reward(self, mean: str, std: str, values: Tensor) -> None:
        self.record(mean, values.mean().item())
        if values.numel() > 1:
            self.record(std, values.std().item())

    def _send_gradients(self, model: nn.Module) -> None:
        """Lets DDP average the gradients: its backward pass runs on one sample at weight 0."""
        conditions = take(self.conditions, [0])
        x = self.policy.noise(conditions).to(self.accelerator.device)
        t = torch.ones(1, device=self.accelerator.device)
        self.accelerator.backward(self.velocity(model, x, t, self.policy.encode(conditions)).sum() * 0.0)

    # ---- networks ----

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The velocity of a network under the trainer's autocast."""
        with self.autocast():
            return self.policy.velocity(model, x, t.to(x.dtype), cond)

    def initial_velocity(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The velocity of the network before training: the frozen copy, or the trained one with its adapter off."""
        network = self.network
        with network.disable_adapter() if isinstance(network, PeftModel) else nullcontext():
            return self.velocity(network if self.initial_model is None else self.initial_model, x, t, cond)

    # ---- state ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # A checkpoint that is resumed from restores all of this.
        self.batch, self.num_images = None, 0
        self.reference_set.reset()
        self.rewards.reset()
        return super().train(*args, **kwargs)

    def training_state(self) -> dict[str, Any]:
        return super().training_state() | {
            "reference_set": self.reference_set.state_dict(),
            "slots": self.slot_sampler.state_dict(),
            "estimator": self.estimator.state_dict(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        self.reference_set.load_state_dict(state["reference_set"])
        self.slot_sampler.load_state_dict(state["slots"])
        self.estimator.load_state_dict(state["estimator"])

    def process_state(self) -> dict[str, Any]:
        """The prepared batch, if further updates will be made from it."""
        if self.batch is None or self.state.global_step % self.args.num_iterations == 0:
            return {}
        return {"batch": self.batch.state_dict(), "processes": self.accelerator.num_processes}

    def load_process_state(self, state: dict[str, Any]) -> None:
        if state["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"this checkpoint was written between two updates of one rollout by {state['processes']} processes: "
                f"resume on as many, not {self.accelerator.num_processes}, or from a checkpoint at a multiple of "
                f"num_iterations={self.args.num_iterations} steps."
            )
        self.batch = self.estimator.restore(state["batch"])

    def describe_run(self) -> dict[str, Any]:
        return super().describe_run() | {"rewards": {reward.name: reward.weight for reward in self.rewards.all}}
