# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..generation import conditions_of_slots, image_generators, sample, take
from ..metrics.report import ImageMetric
from ..policies import as_policy, to_uint8
from ..rewards.subset_replace import SlotSampler, SubsetReplaceReward
from ..sampling import Transition, transition
from .base import DiffusionTrainer
from .distribution_reward_config import DiffusionDistributionConfig
from .objective import clipped_policy_loss, gaussian_kl, normalize_advantages, select_top
from .rollout_batch import RolloutBatch

logger = get_logger(__name__)

RewardFunction = Callable[..., Any]


@dataclass
class UpdateStatistics:
    """Sums and extremes of what an update's micro-batches saw, reduced over processes when logged."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    ratio_min: float = math.inf
    ratio_max: float = -math.inf

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum()


class DistributionRewardTrainer(DiffusionTrainer):
    """
    Trains a diffusion or flow-matching generator by policy gradient on distribution-wise rewards.

    Every update draws subsets of a generated reference set, generates new images for their conditions through an SDE,
    rewards each subset by how close the reference set comes to real data once it is replaced (Eq. 4), and takes a
    clipped policy-gradient step on the best of them (Eq. 5 and 6 of
    [arXiv 2607.02291](https://huggingface.co/papers/2607.02291)).

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
            A pipeline of a known family, the folder or Hub id of one, or an object with the members of
            [`DiffusionPolicy`].
        reward_funcs (`Callable` or `list` of them):
            [`SubsetReplaceReward`], or any function `reward(images=…, conditions=…, slots=…, **kwargs)` that returns
            one float per image: `images` is uint8 `(B, C, H, W)`. Several are weighted by `reward_weights` and summed.
        args ([`DiffusionDistributionConfig`], *optional*): configuration.
        train_dataset (`datasets.Dataset`, *optional*):
            Conditions of the reference set, in a column `class_labels`. Without one all classes are balanced.
        eval_dataset (`datasets.Dataset`, *optional*): conditions of the evaluated images, likewise.
        eval_metrics (`dict[str, ImageMetric]`, *optional*):
            Metrics of generated sets to evaluate besides the reward's own distances, e.g. a [`FeatureDistance`] in
            a feature space that the reward does not see.
        peft_config ([`~peft.PeftConfig`], *optional*): trains an adapter in place of the network's own weights.
        callbacks, optimizers: as in [`~transformers.Trainer`].
    """

    _tag_names = ["trl-distreward", "distribution-reward"]
    _name = "Distribution Reward"
    _paper = {
        "title": "Optimizing Visual Generative Models via Distribution-wise Rewards",
        "id": "2607.02291",
    }

    args: DiffusionDistributionConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: DiffusionDistributionConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_metrics: dict[str, ImageMetric] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        args = args if args is not None else DiffusionDistributionConfig(output_dir="distribution-reward")
        policy = as_policy(model, args.guidance_scale)
        self.conditions = conditions_of_slots(policy, train_dataset, args.reference_set_size, args.seed)
        num_eval = args.num_eval_images or args.reference_set_size

        self.reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        self.reward_names = [getattr(f, "__name__", type(f).__name__) for f in self.reward_funcs]
        weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(weights)} entries for {len(self.reward_funcs)} reward functions: give one "
                "weight per function."
            )
        self.reward_weights = weights
        self.slot_sampler = SlotSampler(args.reference_set_size, seed=args.seed)

        images_per_step = args.num_subsets * args.replace_size
        reference = None
        if args.beta > 0 and peft_config is None:
            reference = _frozen_copy(policy.model)
        super().__init__(
            policy=policy,
            args=args,
            steps_per_epoch=math.ceil(args.reference_set_size / images_per_step) * args.num_iterations,
            eval_conditions=conditions_of_slots(policy, eval_dataset, num_eval, args.eval_seed),
            eval_metrics=self._reward_metrics() | dict(eval_metrics or {}),
            ema_decay=args.ema_decay,
            peft_config=peft_config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference_model = reference.to(self.accelerator.device) if reference is not None else None
        self._buffer: RolloutBatch | None = None
        self._last_refresh: int | None = None
        self._check_processes()
        for reward in self.distribution_rewards:
            reward.to(self.accelerator.device)
        self._check_rewards()
        self._announce()

    # ---- checks at the door ----

    @property
    def distribution_rewards(self) -> list[SubsetReplaceReward]:
        return [reward for reward in self.reward_funcs if isinstance(reward, SubsetReplaceReward)]

    def _check_processes(self) -> None:
        processes = self.accelerator.num_processes
        if self.args.num_subsets % processes:
            raise ValueError(
                f"num_subsets={self.args.num_subsets} is not divisible among {processes} processes: choose a multiple "
                f"of {processes}."
            )

    @torch.no_grad()
    def _check_rewards(self) -> None:
        """Runs every extractor once on two images of noise, so that a misfit shows before any training."""
        conditions = take(self.conditions, [0, 1])
        images = to_uint8(self.policy.decode(self.policy.noise(conditions, image_generators(0, "check", 0, [0, 1]))))
        for reward in self.distribution_rewards:
            reward.extract(images, conditions)
        for name, metric in self.eval_metrics.items():
            metric.reset()
            try:
                metric.update(images, conditions)
            except Exception as error:
                error.add_note(f"raised by eval metric {name!r} on two test images {tuple(images.shape)}.")
                raise
            metric.reset()

    def _reward_metrics(self) -> dict[str, ImageMetric]:
        spaces = [item for reward in self.distribution_rewards for item in reward.metrics().items()]
        return {f"distance_{space}": metric for space, metric in spaces}

    def _announce(self) -> None:
        args, processes = self.args, self.accelerator.num_processes
        images, steps = args.num_subsets * args.replace_size, len(self.args.rollout_schedule.trainable_steps)
        kept = round(images * args.top_advantage_quantile)
        pairs = math.ceil(kept / processes) * steps
        micro_batches = math.ceil(pairs / args.per_device_train_batch_size)
        evaluations = images * args.rollout_schedule.num_evaluations
        logger.info(
            f"One generation: {args.num_subsets} subsets x {args.replace_size} = {images} images "
            f"({images // processes} per process), {evaluations} network evaluations. One update: {kept} kept images "
            f"x {steps} steps = {kept * steps} pairs, {micro_batches} micro-batches of "
            f"{args.per_device_train_batch_size} per process, forward and backward."
        )

    # ---- one step ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One update: generates if none is buffered, then runs all its micro-batches, gradients synced at the last."""
        model.train()
        if self.state.global_step % self.args.num_iterations == 0 or self._buffer is None:
            self._buffer = self._generate(model)
        batch, total = self._buffer, torch.zeros((), device=self.accelerator.device)
        if batch.num_images == 0:
            return total
        statistics = UpdateStatistics()
        with self._timed("training"):
            for micro, is_last in self._micro_batches(batch):
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    self.accelerator.gradient_state._set_sync_gradients(is_last)
                    loss = self.compute_loss(model, {**micro, "statistics": statistics})
                    self.accelerator.backward(loss)
                total += loss.detach()
        self._record_update(statistics)
        return total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """
        Weighted loss of one micro-batch of (image, step) pairs.

        Args:
            inputs (`dict`): `cond`, `x`, `next_x` `(P, ...)`, `t`, `t_next`, `advantages`, `weights`,
                `drawn_log_probs` `(P,)`, and `old_log_probs` `(P,)` off-policy.
        """
        step = self._score(model, inputs)
        old = inputs.get("old_log_probs")
        # On-policy the anchor is the log-probability itself: the ratio is exactly 1, whatever the kernels' noise.
        old = step.log_prob.detach() if old is None else old
        weights = inputs["weights"]
        policy = clipped_policy_loss(step.log_prob, old, inputs["advantages"], self.args.epsilon)
        loss = policy.loss
        values = {
            "weight": weights,
            "ratio": policy.ratio * weights,
            "clip_ratio": policy.clipped * weights,
            "delta_log_prob": (step.log_prob.detach() - inputs["drawn_log_probs"]).abs() * weights,
        }
        if self.args.beta > 0:
            kl = self._kl(model, inputs, step)
            loss = loss + self.args.beta * kl
            values["kl"] = kl * weights
        if "statistics" in inputs:
            statistics = inputs["statistics"]
            statistics.add(**values)
            statistics.ratio_min = min(statistics.ratio_min, policy.ratio.min().item())
            statistics.ratio_max = max(statistics.ratio_max, policy.ratio.max().item())
        # gradients are averaged over processes: each returns its share of the global mean times their number
        loss = (loss * weights).sum() * self.accelerator.num_processes
        return (loss, {"transition": step}) if return_outputs else loss

    def _score(self, model: nn.Module, pairs: dict[str, Any]) -> Transition:
        """Density of the taken steps under `model`."""
        velocity = self.policy.velocity(model, pairs["x"], pairs["t"].to(pairs["x"].dtype), pairs["cond"])
        return transition(
            pairs["x"],
            velocity,
            pairs["t"],
            pairs["t_next"],
            noise_schedule=self.args.noise_schedule,
            noise_level=self.args.noise_level,
            prev_sample=pairs["next_x"],
        )

    def _kl(self, model: nn.Module, pairs: dict[str, Any], step: Transition) -> Tensor:
        network = self.network
        with torch.no_grad(), network.disable_adapter() if isinstance(network, PeftModel) else nullcontext():
            reference = self._score(model if self.reference_model is None else self.reference_model, pairs)
        return gaussian_kl(step.mean, reference.mean, step.std)

    def _micro_batches(self, batch: RolloutBatch) -> Iterator[tuple[dict[str, Any], bool]]:
        times, size = self.args.rollout_schedule.times, self.args.per_device_train_batch_size
        return batch.micro_batches(times, size, self.accelerator.num_processes)

    # ---- generation ----

    @torch.no_grad()
    def _generate(self, model: nn.Module) -> RolloutBatch:
        """Slots, rollouts, rewards, advantages and selection: everything up to the update."""
        args = self.args
        if self._refresh_is_due():
            self._refresh_reference(model)
        for name, distance in self._reference_distances().items():
            self.record(f"reference_distance/{name}", distance)
        slots = self._draw_slots().to(self.accelerator.device)  # (B, n), the same on every process
        with self._timed("rollout"):
            local, images = self._rollout(model, slots)
        with self._timed("reward"):
            rewards, features = self._rewards(images, slots)  # (B, 1) or (B, n) float64
        advantages = normalize_advantages(rewards, args.advantage_normalization, args.num_generations)
        self._record_rewards(rewards)
        if args.reference_update == "rolling":
            for reward in self.distribution_rewards:
                reward.update_reference(slots, features[id(reward)], self.slot_sampler.generator)
        return self._select(model, local, advantages.expand(slots.shape), rewards.shape[1])

    def _draw_slots(self) -> Tensor:
        args = self.args
        groups = args.num_subsets // args.num_generations
        slots = self.slot_sampler.draw(groups, args.replace_size, distinct=args.reference_update == "rolling")
        return slots.repeat_interleave(args.num_generations, dim=0)

    def _rollout(self, model: nn.Module, slots: Tensor) -> tuple[RolloutBatch, Tensor]:
        """This process's share of the step's images (M = B n / processes), with the states to train on."""
        flat, device = slots.flatten(), self.accelerator.device
        share = len(flat) // self.accelerator.num_processes
        mine = range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        schedule = self.args.rollout_schedule
        size = self.args.rollout_batch_size or self.args.per_device_train_batch_size
        trajectories, images, conds = [], [], []
        for start in range(mine.start, mine.stop, size):
            indices = range(start, min(start + size, mine.stop))
            conditions = take(self.conditions, flat[start : indices.stop].cpu())
            generators = image_generators(self.args.seed, "rollout", self.state.global_step, indices)
            trajectory = sample(self.policy, model, conditions, schedule, generators, schedule.trainable_steps)
            trajectories.append(trajectory)
            conds.append(self.policy.encode(conditions))
            images.append(to_uint8(self.policy.decode(trajectory.sample)))
        batch = RolloutBatch(
            cond={name: torch.cat([c[name] for c in conds]) for name in conds[0]},
            states={i: torch.cat([t.states[i] for t in trajectories]) for i in trajectories[0].states},
            steps=trajectories[0].steps,
            drawn_log_probs=torch.cat([t.log_probs for t in trajectories]),
            advantages=torch.zeros(share, device=device),
            num_own=share,
            num_images=len(flat),
        )
        return batch, torch.cat(images)

    def _rewards(self, images: Tensor, slots: Tensor) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """Weighted sum of the reward functions, `(B, 1)` if all share a subset's reward, else `(B, n)`."""
        share, rank = len(images), self.accelerator.process_index
        local_slots = slots.view(-1)[rank * share : (rank + 1) * share].view(-1, slots.shape[1])
        conditions = take(self.conditions, local_slots.flatten().cpu())
        total: Tensor | float = 0.0
        features = {}
        for name, weight, function in zip(self.reward_names, self.reward_weights, self.reward_funcs, strict=True):
            if isinstance(function, SubsetReplaceReward):
                local = function.extract(images, conditions)
                features[id(function)] = {space: self.accelerator.gather(value) for space, value in local.items()}
                values = function.score(slots, features[id(function)])[:, None]
            else:
                returned = function(images=images, conditions=conditions, slots=local_slots, trainer_state=self.state)
                local_values = torch.as_tensor(returned, dtype=torch.float64, device=slots.device).flatten()
                if len(local_values) != share:
                    raise ValueError(
                        f"reward function {name!r} returned {len(local_values)} values for {share} images: it must "
                        "return one float per image."
                    )
                values = self.accelerator.gather(local_values).view(slots.shape)
            if not values.isfinite().all():
                raise ValueError(f"reward function {name!r} returned NaN or infinite values at this step.")
            if len(self.reward_funcs) > 1:
                self.record(f"rewards/{name}/mean", values.mean().item())
                self.record(f"rewards/{name}/std", values.std().item())
            total = total + weight * values
        return total, features  # type: ignore[return-value]

    def _select(self, model: nn.Module, local: RolloutBatch, advantages: Tensor, columns: int) -> RolloutBatch:
        """Keeps the global top share and deals it out evenly: kept image k of all goes to process k mod processes."""
        judged = advantages[:, :columns]
        mask = select_top(judged, self.args.top_advantage_quantile)
        self.record("advantage_kept", mask.double().mean().item())
        if not (judged != 0).any():
            logger.warning(
                "All rewards of this step are equal: there is no advantage to learn from, and the update is skipped."
            )
            self.record("skipped_updates", 1.0)
            local.num_images = 0
            return local
        kept = mask.expand(advantages.shape).flatten().nonzero().flatten()  # images of all processes, in order
        accelerator = self.accelerator
        batch = local.deal(
            kept, advantages.flatten(), accelerator.gather, accelerator.process_index, accelerator.num_processes
        )
        if self.args.num_iterations > 1:
            batch.old_log_probs = self._replay(model, batch)
        return batch

    def _replay(self, model: nn.Module, batch: RolloutBatch) -> Tensor:
        """Log-probabilities `(K, steps)` in the very micro-batches of the update, so that the first ratio is 1."""
        pairs = [self._score(model, micro).log_prob for micro, _ in self._micro_batches(batch)]
        shape = batch.drawn_log_probs.shape
        return torch.cat(pairs)[: shape.numel()].view(shape)

    # ---- the reference set ----

    def _refresh_is_due(self) -> bool:
        if not self.distribution_rewards:
            return False
        if self._last_refresh is None:
            return True
        age = self.state.global_step - self._last_refresh
        return self.args.reference_update == "refresh" and age >= self.args.reference_refresh_steps

    def _refresh_reference(self, model: nn.Module) -> None:
        """Generates the reference set anew, each process a share of it."""
        features: dict[int, dict[str, list[Tensor]]] = {id(reward): {} for reward in self.distribution_rewards}
        with self._timed("refresh"):
            batches = self._share_of_images(
                model,
                self.conditions,
                self.args.rollout_schedule,
                (self.args.seed, "reference", self.state.global_step),
                "Reference set",
            )
            for images, conditions, valid in batches:
                for reward in self.distribution_rewards:
                    for space, values in reward.extract(images, conditions).items():
                        gathered = self.accelerator.gather(values)[:valid]
                        features[id(reward)].setdefault(space, []).append(gathered)
            for reward in self.distribution_rewards:
                reward.set_reference({space: torch.cat(parts) for space, parts in features[id(reward)].items()})
        self._last_refresh = self.state.global_step

    def _reference_distances(self) -> dict[str, float]:
        return {k: v for reward in self.distribution_rewards for k, v in reward.reference_distances.items()}

    # ---- logging ----

    def _record_rewards(self, rewards: Tensor) -> None:
        self.record("reward", rewards.mean().item())
        self.record("reward_std", rewards.std().item())

    def _record_update(self, statistics: UpdateStatistics) -> None:
        """Means over all pairs of all processes; weights add up to 1 over them."""
        names = [name for name in statistics.sums if name != "weight"]
        sums = self.accelerator.reduce(torch.stack([statistics.sums[name] for name in names]), reduction="sum")
        extremes = torch.tensor([[statistics.ratio_min, -statistics.ratio_max]], device=sums.device)
        low, negative_high = self.accelerator.gather(extremes).amin(dim=0).tolist()
        weight = self.accelerator.reduce(statistics.sums["weight"], reduction="sum")
        values = dict(zip(names, (sums / weight).tolist(), strict=True))
        self.record("ratio/mean", values.pop("ratio"))
        self.record("ratio/min", low)
        self.record("ratio/max", -negative_high)
        for name, value in values.items():
            self.record(name, value)

    # ---- checkpoints ----

    def training_state(self) -> dict[str, Any]:
        return super().training_state() | {
            "rewards": [reward.state_dict() for reward in self.distribution_rewards],
            "slots": self.slot_sampler.state_dict(),
            "last_refresh": self._last_refresh,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        for reward, saved in zip(self.distribution_rewards, state["rewards"], strict=True):
            reward.load_state_dict(saved)
        self.slot_sampler.load_state_dict({name: value.cpu() for name, value in state["slots"].items()})
        self._last_refresh = state["last_refresh"]


def _frozen_copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()
