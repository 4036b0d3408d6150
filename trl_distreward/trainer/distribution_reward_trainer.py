# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..conditions import EvalRows, Rows, members_of, take
from ..evaluation.image_metrics import ImageMetric
from ..files import State
from ..policies import Model
from .base import DiffusionTrainer
from .checks import images_of_noise
from .costs import Plan
from .diffusion_distribution_config import DiffusionDistributionConfig
from .estimators import ESTIMATORS
from .estimators.base import Batch
from .image_sets import shared_images
from .reference_set import ReferenceSet
from .reward_functions import Reward, RewardFunction
from .rollouts import Rollout, Sampler
from .sizing import noisy_rewards
from .stopping import droppable, stop_if_asked

logger = get_logger(__name__)


class DistributionRewardTrainer(DiffusionTrainer):
    """
    Trains a diffusion or flow-matching generator on distribution-wise rewards.

    An update draws subsets of a generated reference set, generates new images for their conditions, and rewards each
    subset by how close the reference set comes to real data once the subset is replaced (Eq. 4 of
    [arXiv 2607.02291](https://huggingface.co/papers/2607.02291)). `loss_type` chooses how rewards become a gradient.

    Example:

    ```python
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
            [`SubsetReplaceReward`], or a function of single images, plain or `async`, that returns one number per
            image, or `None` where it abstains. It gets `images`, uint8 `(K, C, H, W)`, `prompts` or `labels`, their
            `slots` `(K,)`, other columns of `train_dataset`, `trainer_state`, `log_metric` and `log_extra`.
        args ([`DiffusionDistributionConfig`], *optional*): configuration.
        train_dataset (`datasets.Dataset`, *optional*):
            Conditions of the reference set: class labels in a column such as `label`, or prompts in one such as
            `prompt`, `text` or `caption`. Every slot keeps its condition. By default all classes are balanced. Of a
            stream, the first `reference_set_size` rows.
        eval_dataset (`datasets.Dataset` or `dict` of them, *optional*):
            Conditions of the evaluated images; by default all classes, or the training prompts. A dictionary's metrics
            are called `eval_{name}_…`.
        eval_metrics (`dict[str, ImageMetric | Callable]`, *optional*):
            Metrics beside the reward's distances: e.g. a [`FeatureDistance`], or a function of single images.
        peft_config ([`~peft.PeftConfig`], *optional*): trains an adapter instead of the network's own weights.
        callbacks, optimizers: as in [`~transformers.Trainer`].
    """

    _tag_names = ["trl-distreward", "distribution-reward"]
    _name = "Distribution Reward"

    args: DiffusionDistributionConfig

    def __init__(
        self,
        model: Model,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: DiffusionDistributionConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows | None = None,
        eval_metrics: Mapping[str, ImageMetric | RewardFunction] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ):
        args = DiffusionDistributionConfig.of(args, "distribution-reward")
        rollouts = math.ceil(args.reference_set_size / (args.num_subsets * args.replace_size))
        self.steps_per_epoch = rollouts * args.num_iterations
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, eval_metrics, peft_config, callbacks, optimizers
        )
        processes = self.accelerator.num_processes
        if args.num_subsets % processes:
            raise ValueError(f"num_subsets={args.num_subsets} must be a multiple of the {processes} processes.")
        if args.best_of_n > 1 and not self.rewards.of_sets:
            raise ValueError(f"best_of_n={args.best_of_n} chooses by a SubsetReplaceReward: give one, or best_of_n=1.")
        self.reference_set = ReferenceSet(self.rewards.of_sets, args, self.accelerator)
        labels = self.conditions.tolist() if isinstance(self.conditions, Tensor) else None
        members = getattr(self.slot_sampler, "members", None) if labels is None else members_of(labels)
        if members is not None:
            for reward in self.rewards.of_sets:
                reward.centre_by(members)
        self.batch: Batch | None = None
        self.sampler = Sampler(self)
        self.estimator = ESTIMATORS[args.loss_type](self)
        self.estimator.check_rewards(*images_of_noise(self.policy, self.conditions, self.accelerator.device))
        logger.info(Plan.of(self).describe(self))
        for warning in noisy_rewards(self):
            logger.warning(warning)

    def prepare_network(
        self, network: nn.Module, args: DiffusionDistributionConfig, peft_config: PeftConfig | None
    ) -> nn.Module:
        self.initial_model: nn.Module | None = None
        if args.beta > 0 and peft_config is None:  # float32, like what is trained from half precision
            self.initial_model = copy.deepcopy(network).requires_grad_(False).float().eval().to(args.device)
        return super().prepare_network(network, args, peft_config)

    # ---- one step ----

    def training_step(self, model: nn.Module, inputs: list[int], num_items_in_batch: object = None) -> Tensor:
        """One update. The first update of a rollout generates, scores and prepares; all of them update."""
        model.train()
        with droppable(self):
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
        """Rewards `(B, 1)` or `(B, n)` by function, float64, the same on every process; `None` if not finite."""
        if not bool(self.accelerator.gather(rollout.finite).all()):
            self.skip_update("an image or its features are not finite")
            return None
        single: Sequence[Tensor] = ()
        with self.timed("reward"):
            if rollout.images is not None:
                scores = self.rewards.score_images(rollout.images, rollout.conditions, rollout.local_slots, self.state)
                single = [self.accelerator.gather(values).view(rollout.slots.shape) for values in scores]
            rewards = [
                self._score_subsets(reward, rollout) if reward.of_sets else single[reward.index]
                for reward in self.rewards.all
            ]
        self.rewards.record_metrics(self)
        total = self.rewards.total(rewards)
        if not bool(total.isfinite().all()):
            self.skip_update("a reward is not finite")
            return None
        self.record_rewards(total, rewards)
        of_sets = [v for reward, v in zip(self.rewards.all, rewards, strict=True) if reward.of_sets]
        subsets = self.args.best_of_n == 1 and len(rollout.slots) > 1
        if of_sets and subsets and self.args.reference_update == "refresh":
            self.record("reference_drift", self.reference_set.watch_drift(of_sets))
        return rewards

    @torch.no_grad()
    def prepare(self, rollout: Rollout, rewards: list[Tensor] | None) -> Batch | None:
        """Turns rewards into what updates are made from, and lets the reference set roll on."""
        if rewards is None:
            return None
        with self.timed("preparation"):
            batch = self.estimator.prepare(rollout, rewards)
        if self.args.reference_update == "rolling":
            for reward, features in zip(self.rewards.of_sets, rollout.gathered, strict=True):
                reward.update_reference(rollout.slots, features, self.slot_sampler.generator)
        if batch is None:
            self.skip_equal_rewards()
        return batch

    def update(self, model: nn.Module, batch: Batch | None) -> Tensor:
        """Runs forward and backward passes in micro-batches, and sends gradients with the last one."""
        if batch is None:
            return self.no_update()
        processes, split = self.accelerator.num_processes, self.is_fsdp_enabled or self.is_deepspeed_enabled
        # DDP cannot follow several passes per backward: gradients are then summed without it, and sent at the end.
        apart = processes > 1 and not split and not self.estimator.single_pass
        total, logged = torch.zeros((), device=self.accelerator.device), []
        with self.timed("training"):
            for micro_batch, is_last in batch.micro_batches(self.args.per_device_train_batch_size, processes):
                stop_if_asked(self)
                # split weights have split gradients: they do not wait for the last micro-batch
                defer = apart or not (is_last or split)
                with self.accelerator.no_sync(model) if defer else nullcontext():
                    self.accelerator.gradient_state._set_sync_gradients(is_last)
                    network = self.network if apart else model
                    loss, values = self.estimator.loss(network, micro_batch)
                    loss = loss * processes  # because gradients are averaged over processes
                    self.accelerator.backward(loss)
                logged.append((micro_batch["weights"], {name: value.detach() for name, value in values.items()}))
                total += loss.detach()
            if apart:
                self._send_gradients(model)
        self._record_values(logged)
        return total

    def _score_subsets(self, reward: Reward, rollout: Rollout) -> Tensor:
        slots = rollout.slots
        if len(slots) % self.accelerator.num_processes == 0:  # processes share out whole subsets
            local = self.sampler.local(slots).view(-1, slots.shape[1])
            values = self.accelerator.gather(reward.function.score(local, rollout.features[reward.index]))
        else:  # a subset of images from all processes: each scores it
            values = reward.function.score(slots, rollout.gathered[reward.index])
        return values.view(len(slots), -1)

    def _record_values(self, logged: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Records weighted means of micro-batches' values `(P,)` over all processes; of a ratio the extremes too."""
        weights = torch.cat([weights for weights, _ in logged])
        values = {name: torch.cat([found[name] for _, found in logged]) for name in logged[0][1]}
        sums = [weights.double().sum(), *((value.double() * weights).sum() for value in values.values())]
        weight, *totals = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        for name, total in zip(values, totals, strict=True):
            self.record("ratio/mean" if name == "ratio" else name, total / weight)
        if "ratio" in values:
            ratios = self.accelerator.gather(torch.stack([values["ratio"].min(), values["ratio"].max()])[None])
            self.record("ratio/min", ratios.min().item())
            self.record("ratio/max", ratios.max().item())

    def _send_gradients(self, model: nn.Module) -> None:
        """Lets DDP average the gradients: its backward pass runs on one sample at weight 0."""
        conditions = take(self.conditions, [0])
        x = self.policy.noise(conditions).to(self.accelerator.device)
        t = torch.ones(1, device=self.accelerator.device)
        self.accelerator.backward(self.velocity(model, x, t, self.policy.encode(conditions)).sum() * 0.0)

    # ---- networks ----

    def velocity(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor], dropped: Tensor | None = None
    ) -> Tensor:
        """Velocity under the trainer's autocast; with `dropped` `(B,)` unguided, for those without condition."""
        with self.autocast():
            if dropped is not None and hasattr(self.policy, "unguided_velocity"):
                return self.policy.unguided_velocity(model, x, t.to(x.dtype), cond, dropped)
            return self.policy.velocity(model, x, t.to(x.dtype), cond)

    def initial_velocity(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], dropped: Tensor | None = None) -> Tensor:
        """The velocity of the network before training: the frozen copy, or the trained one with its adapter off."""
        network = self.network
        with network.disable_adapter() if isinstance(network, PeftModel) else nullcontext():
            model = network if self.initial_model is None else self.initial_model
            return self.velocity(model, x, t, cond, dropped)

    # ---- state ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: object) -> TrainOutput:
        self.batch = None
        self.reference_set.reset()
        return super().train(resume_from_checkpoint, **kwargs)

    def training_state(self) -> State:
        return super().training_state() | {
            "reference_set": self.reference_set.state_dict(),
            "slots": self.slot_sampler.state_dict(),
            "estimator": self.estimator.state_dict(),
        }

    def load_training_state(self, state: State) -> None:
        super().load_training_state(state)
        self.reference_set.load_state_dict(state["reference_set"])
        self.slot_sampler.load_state_dict(state["slots"])
        self.estimator.load_state_dict(state["estimator"])

    def process_state(self) -> State:
        """The prepared batch, if further updates will be made from it."""
        if self.batch is None or self.state.global_step % self.args.num_iterations == 0:
            return {}
        return {"batch": self.batch.state_dict(), "processes": self.accelerator.num_processes}

    def load_process_state(self, state: State) -> None:
        if state["processes"] != self.accelerator.num_processes:
            found = f"{state['processes']} processes wrote this checkpoint between two updates of a rollout"
            other = f"one at a multiple of num_iterations={self.args.num_iterations} steps"
            raise ValueError(f"{found}: resume on as many, or from {other}.")
        self.batch = self.estimator.restore(state["batch"])
