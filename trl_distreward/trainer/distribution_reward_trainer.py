# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..conditions import take
from ..generation import image_generators
from ..metrics.image_metrics import ImageMetric
from ..policies import as_policy
from ..rewards.diagnostics import reward_diagnostics
from ..rewards.subset_replace import SubsetReplaceReward
from .backprop import TailLoss, TailRollouts
from .base import DiffusionTrainer
from .callbacks import print_rewards
from .checks import check_best_metric, check_gradients, check_on, check_sizes, images_of_noise
from .distribution_reward_config import DiffusionDistributionConfig
from .estimates import batch_arithmetic
from .judged import Judged
from .objective import normalize_advantages, select
from .pair_loss import PairLoss, UpdateStatistics
from .reference_set import ReferenceSet, conditions_and_slots
from .reward_functions import RewardFunctions
from .rollout_batch import RolloutBatch
from .rollouts import Rollouts

logger = get_logger(__name__)

RewardFunction = Callable[..., Any]


class DistributionRewardTrainer(DiffusionTrainer):
    """
    Trains a diffusion or flow-matching generator on distribution-wise rewards: by policy gradient, by rejection
    sampling (`loss_type="rft"`), or along the gradient of the distance itself (`"backprop"`).

    Under `recipe="paper"` every update draws subsets of a generated reference set, generates new images for their
    conditions through an SDE, rewards each subset by how close the reference set comes to real data once it is
    replaced (Eq. 4), and takes a clipped policy-gradient step on the best of them (Eq. 5 and 6 of
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
            Conditions of the reference set, in a column `class_labels`, or `prompt` for a text-to-image policy: each
            slot keeps its own, and new images answer it again. Without a dataset all classes are balanced. A further
            column of strata may be named by `stratify_by`.
        eval_dataset (`datasets.Dataset`, *optional*):
            Conditions of the evaluated images, likewise; prompts are those of `train_dataset` by default.
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
        self.reward_funcs, self.reward_names = self.rewards.functions, self.rewards.names
        self.reward_weights = self.rewards.weights
        images_per_step = args.num_subsets * args.replace_size
        reference = None
        if args.beta > 0 and peft_config is None:
            # in float32, as what is trained from half precision
            reference = copy.deepcopy(policy.model).requires_grad_(False).float().eval()
        super().__init__(
            policy=policy,
            args=args,
            steps_per_epoch=math.ceil(args.reference_set_size / images_per_step) * args.num_iterations,
            eval_metrics=self.rewards.metrics() | dict(eval_metrics or {}),
            ema_decay=args.ema_decay,
            peft_config=peft_config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference_model = reference.to(self.accelerator.device) if reference is not None else None
        self._buffer: RolloutBatch | None = None
        self._last_rewards: tuple[Tensor, Tensor] | None = None
        self.reference_set = ReferenceSet(self.distribution_rewards, args, self.accelerator)
        self.pair_loss = PairLoss(args, self._velocity, self._initial_velocity)
        kind = TailRollouts if args.loss_type == "backprop" else Rollouts
        self.rollouts = kind(policy, args, self.conditions, self.rewards, self.accelerator, self.autocast)
        self.rewards.to(self.accelerator.device)
        self._check()
        logger.info(batch_arithmetic(args, self.accelerator.num_processes))

    def _check(self) -> None:
        """That configuration, rewards and metrics fit together."""
        check_sizes(self.args, self.rewards, self.accelerator.num_processes)
        images, conditions = images_of_noise(self.policy, self.conditions, self.accelerator.device)
        check_on(images, conditions, self.rewards, self.eval_metrics)
        if self.args.loss_type == "backprop":
            check_gradients(images, conditions, self.rewards, self.state)
        check_best_metric(self.args, self.eval_metrics)

    @property
    def distribution_rewards(self) -> list[SubsetReplaceReward]:
        return self.rewards.distributional

    @property
    def _judges(self) -> list[tuple[SubsetReplaceReward, float]]:
        """The distribution rewards and their weights."""
        weighted = zip(self.reward_funcs, self.reward_weights, strict=True)
        return [(function, weight) for function, weight in weighted if isinstance(function, SubsetReplaceReward)]

    # ---- one step ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._buffer, self.num_images = None, 0
        self.reference_set.reset()  # a checkpoint that is resumed from restores its own
        self.rewards.reset()  # and the scales of distances
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One update: generates if none is buffered, then runs all its micro-batches, gradients synced at the last."""
        model.train()
        if self.args.loss_type == "backprop":
            return self._backprop_step(model)
        if self.state.global_step % self.args.num_iterations == 0 or self._buffer is None:
            self._buffer = self._generate(model)
        batch, total = self._buffer, torch.zeros((), device=self.accelerator.device)
        if batch.num_images == 0:
            return self._no_update()
        statistics = UpdateStatistics()
        self.hold_gradients()
        with self._timed("training"):
            for micro, is_last in self._micro_batches(batch):
                # split weights have split gradients, unless they wait whole for the last micro-batch
                defer = not (is_last or self.is_fsdp_enabled or self.is_deepspeed_enabled)
                with self.accelerator.no_sync(model) if defer else nullcontext():
                    self.accelerator.gradient_state._set_sync_gradients(is_last)
                    loss = self.compute_loss(model, {**micro, "statistics": statistics})
                    self.accelerator.backward(loss)
                total += loss.detach()
        self._record_update(statistics)
        return total

    def _no_update(self) -> Tensor:
        self._without_update = True
        if self.accelerator.scaler is not None:  # float16's scaler wants gradients to look at
            nothing = sum(p.sum() * 0.0 for p in self.network.parameters() if p.requires_grad)
            self.accelerator.backward(nothing)
        return torch.zeros((), device=self.accelerator.device)

    def _backprop_step(self, model: nn.Module) -> Tensor:
        """One update along the gradient of the distance of the set in which all new images are."""
        args, step = self.args, self.state.global_step
        assert isinstance(self.rollouts, TailRollouts)
        with torch.no_grad():
            self._prepare_reference(model)
            slots = self.slot_sampler.draw(args.num_subsets, args.replace_size, distinct=True)
            slots = slots.to(self.accelerator.device)
            with self._timed("rollout"):
                tails = self.rollouts.tails(model, slots.flatten(), step)
            self._count_images("rollout", slots.numel())
            with self._timed("reward"):
                finite = all(self._all_finite(tail.finite and tail.judged.finite) for tail in tails)
                if finite:
                    features = [self._gather_features(tail.judged.features) for tail in tails]
                    of_sets = self._rewards_of_sets(slots.flatten(), features[0])
                    # of several draws, the sampler's own images are what is rolled, the draws what is trained on
                    trained = list(zip(tails, features, strict=True))[1 if len(tails) > 1 else 0 :]
                    gradients = [self._feature_gradients(slots.flatten(), spaces) for _, spaces in trained]
        self._count_features_as_reward()
        if not finite:
            self.skip_update("an image or its features are not finite", slots=slots)
            return self._no_update()
        if args.reference_update == "rolling":
            self.reference_set.roll(slots, features[0], self.slot_sampler.generator)
        rewards = list(zip(self.reward_names, self.reward_funcs, self.reward_weights, strict=True))
        objective = TailLoss(self.policy, args, self.rollouts, rewards)
        # A checkpointed or repeated forward pass confuses DDP: gradients are summed without it, and sent at the end
        shared = self.accelerator.num_processes > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        network, scale = (self.network if shared else model), self.accelerator.num_processes / len(trained)
        device, mine = self.accelerator.device, self.rollouts.local(slots)
        size = args.per_device_train_batch_size
        number_of_batches = len(trained) * math.ceil(len(mine) / size)
        batches = (  # one at a time: states may wait in CPU memory
            (tail, gradient, batch)
            for (tail, _), gradient in zip(trained, gradients, strict=True)
            for batch in tail.micro_batches(size, device)
        )
        statistics = UpdateStatistics()
        self.hold_gradients()
        with self._timed("training"), self.accelerator.no_sync(model) if shared else nullcontext():
            for number, (tail, gradient, batch) in enumerate(batches, start=1):
                is_last = number == number_of_batches
                self.accelerator.gradient_state._set_sync_gradients(is_last)  # DeepSpeed steps by it
                loss, values = objective(
                    partial(self._velocity, network),
                    self._initial_velocity,
                    batch,
                    gradient,
                    mine[batch[0]],
                    tail.first,
                    step,
                    self.state,
                )
                self.accelerator.backward(loss * scale)
                weights = torch.full_like(batch[0], 1 / slots.numel() / len(trained), dtype=torch.float32)
                statistics.add(weights, **values)
        if shared:
            tail = tails[0]
            x, cond = tail.states[tail.first][:1].to(device), {k: v[:1] for k, v in tail.cond.items()}
            nothing = self._velocity(model, x, torch.ones(1, device=device), cond).sum() * 0.0
            self.accelerator.backward(nothing)
        return torch.tensor(-self._record_objective(statistics, of_sets), device=device)

    def _rewards_of_sets(self, slots: Tensor, features: list[dict[str, Tensor]]) -> dict[str, float]:
        """The distribution rewards of the set in which all new images are, by the names they are logged under."""
        known = iter(features)
        return {
            f"rewards/{name}/mean": function.subset_rewards(slots[None], next(known)).item()
            for name, function in zip(self.reward_names, self.reward_funcs, strict=True)
            if isinstance(function, SubsetReplaceReward)
        }

    def _record_objective(self, statistics: UpdateStatistics, of_sets: dict[str, float]) -> float:
        """Keeps an update's values; returns its reward, the weighted sum of those of all functions."""
        found = of_sets | statistics.reduced(self.accelerator)
        keys = [f"rewards/{name}/mean" for name in self.reward_names]
        reward = sum(weight * found[key] for key, weight in zip(keys, self.reward_weights, strict=True))
        if len(keys) == 1:
            del found[keys[0]]  # the reward itself, but for its weight
        for name, value in {"reward": reward, **found}.items():
            self.record(name, value)
        return reward

    def _initial_velocity(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Of the network before training: the frozen copy, or the trained one with its adapter off."""
        network = self.network
        with network.disable_adapter() if isinstance(network, PeftModel) else nullcontext():
            return self._velocity(network if self.reference_model is None else self.reference_model, x, t, cond)

    def _feature_gradients(self, slots: Tensor, features: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """
        Of the weighted distances by all images' features: this process's rows, per distribution reward and space.

        Divided by the share of the set that is replaced: as if all of it were.
        """
        share = len(slots) / self.args.reference_set_size
        mine, gradients = self.rollouts.local(torch.arange(len(slots), device=slots.device)), []
        for (reward, weight), spaces in zip(self._judges, features, strict=True):
            whole = reward.gradient(slots, spaces)
            gradients.append({space: values[mine] * (weight / share) for space, values in whole.items()})
        return gradients

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """
        Weighted loss of one micro-batch of (image, step) pairs.

        Args:
            inputs (`dict`): `cond`, `x`, `next_x` `(P, ...)`, `t`, `t_next`, `advantages`, `weights`,
                `drawn_log_probs` `(P,)`, and `old_log_probs` `(P,)` off-policy.
        """
        loss, values = self.pair_loss(model, inputs)
        if "statistics" in inputs:
            inputs["statistics"].add(inputs["weights"], **values)
            if "ratio" in values:
                inputs["statistics"].ratios.append(values["ratio"])
                if self.args.log_steps:
                    num_steps = self.args.num_inference_steps
                    delta = values["delta_log_prob"]
                    inputs["statistics"].add_delta(delta, inputs["weights"], inputs["step"], num_steps)
        # gradients are averaged over processes: each returns its share of the global mean times their number
        loss = (loss * inputs["weights"]).sum() * self.accelerator.num_processes
        return (loss, values) if return_outputs else loss

    def _velocity(self, model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with self.autocast():
            return self.policy.velocity(model, x, t.to(x.dtype), cond)

    def _micro_batches(self, batch: RolloutBatch) -> Iterator[tuple[dict[str, Any], bool]]:
        times, size = self.args.rollout_schedule.times, self.args.per_device_train_batch_size
        noisy = self.args.step_weighting == "noise"
        weights = self.pair_loss.step_weights(batch.steps, self.accelerator.device) if noisy else None
        return batch.micro_batches(times, size, self.accelerator.num_processes, weights)

    # ---- generation ----

    @torch.no_grad()
    def _generate(self, model: nn.Module) -> RolloutBatch:
        """Slots, rollouts, rewards, advantages and selection: everything up to the update."""
        args = self.args
        self._prepare_reference(model)
        slots = self._draw_slots().to(self.accelerator.device)  # (B, n), the same on every process
        with self._timed("rollout"):
            local, judged = self.rollouts.generate(model, slots, self.state.global_step)
        self._count_images("rollout", slots.numel() * args.best_of_n)
        with self._timed("reward"):
            finite = self._all_finite(local.finite and judged.finite)
            rewards = self._rewards(judged, slots) if finite else []  # per function (B, 1) or (B, n) float64
        self._count_features_as_reward()
        if not finite:
            return self._skip(local, "an image or its features are not finite", slots=slots)
        if not all(bool(values.isfinite().all()) for values in rewards):
            return self._skip(local, "a reward is not finite", slots=slots, rewards=rewards)
        advantages = self._advantages(rewards)
        if args.log_reward_diagnostics or args.reference_update == "rolling":
            everyone = self._gather_features(judged.features)
            if args.log_reward_diagnostics:
                self._diagnose(slots, everyone)
            if args.reference_update == "rolling":
                self.reference_set.roll(slots, everyone, self.slot_sampler.generator)
        if not (advantages != 0).any():
            logger.warning("All rewards of this step are equal: there is nothing to learn, the update is skipped.")
            self._note_skipped("all rewards are equal")
            return replace(local, num_images=0)
        batch = self._select(local, advantages, slots.shape)
        if args.num_iterations > 1:
            self._anchor(model, batch)
        return batch

    def _skip(self, local: RolloutBatch, reason: str, **context: Any) -> RolloutBatch:
        self.skip_update(reason, **context)
        return replace(local, num_images=0)

    def _draw_slots(self) -> Tensor:
        args = self.args
        groups = args.num_subsets // args.num_generations
        slots = self.slot_sampler.draw(groups, args.replace_size, distinct=args.reference_update == "rolling")
        return slots.repeat_interleave(args.num_generations, dim=0)

    def _all_finite(self, finite: bool) -> bool:
        """Whether every process says so."""
        flags = self.accelerator.gather(torch.tensor([finite], device=self.accelerator.device))
        return bool(flags.all())

    def _count_features_as_reward(self) -> None:
        """Features are taken between samples, but they are the reward's: so is their time."""
        seconds = self.rollouts.judge.stopwatch.read()
        for phase, more in (("rollout", -seconds), ("reward", seconds)):
            self._metrics[f"seconds/{phase}"][-1] += more
            self.run_record.seconds[phase] += more

    def _gather_features(self, features: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Of all processes' images."""
        return [{space: self.accelerator.gather(rows) for space, rows in spaces.items()} for spaces in features]

    def _rewards(self, judged: Judged, slots: Tensor) -> list[Tensor]:
        """Of every reward function: `(B, 1)` if a subset's images share their reward, else `(B, n)`."""
        local_slots, known = self.rollouts.local(slots).view(-1, slots.shape[1]), iter(judged.features)
        conditions = take(self.conditions, local_slots.flatten().cpu())
        rewards = []
        for name, function in zip(self.reward_names, self.reward_funcs, strict=True):
            if isinstance(function, SubsetReplaceReward):
                values = self.accelerator.gather(function.score(local_slots, next(known))).view(len(slots), -1)
            else:
                returned = function(
                    images=judged.images, conditions=conditions, slots=local_slots, trainer_state=self.state
                )
                local = torch.as_tensor(returned, dtype=torch.float64, device=slots.device).flatten()
                if len(local) != local_slots.numel():
                    raise ValueError(
                        f"reward function {name!r} returned {len(local)} values for {local_slots.numel()} images: it "
                        "must return one float per image."
                    )
                values = self.accelerator.gather(local).view(slots.shape)
            if len(self.reward_funcs) > 1:
                self.record(f"rewards/{name}/mean", values.mean().item())
                self.record(f"rewards/{name}/std", values.std().item())
            rewards.append(values)
        return rewards

    def _diagnose(self, slots: Tensor, features: list[dict[str, Tensor]]) -> None:
        (generator,) = image_generators(self.args.seed, "diagnostics", self.state.global_step, [0])
        for reward, spaces in zip(self.distribution_rewards, features, strict=True):
            if self.accelerator.is_main_process and len(slots) > 1:
                found = reward_diagnostics(reward, slots, spaces, self.conditions, generator)
                kind = "placebo" if self.reference_set.last_refresh == self.state.global_step else "diagnostics"
                if self.args.best_of_n > 1:  # of images that were chosen
                    found.pop("drift", None)
                for name, value in found.items():
                    self.record(f"reward_{kind}/{name}", value)

    def _advantages(self, rewards: list[Tensor]) -> Tensor:
        """Weighted sum and normalization of the rewards, in the order that was asked for: `(B, 1)` or `(B, n)`."""
        args = self.args

        def normalize(values: Tensor) -> Tensor:
            return normalize_advantages(values, args.advantage_normalization, args.num_generations)

        weighted = list(zip(self.reward_weights, rewards, strict=True))
        total = sum(weight * values for weight, values in weighted)
        assert isinstance(total, Tensor)
        self.record("reward", total.mean().item())
        self.record("reward_std", total.std().item())
        functions = zip(self.reward_funcs, rewards, strict=True)
        drift = None
        if args.reference_update == "refresh" and args.best_of_n == 1:  # those that were chosen are better by that
            drift = self.reference_set.watch_drift([r for f, r in functions if isinstance(f, SubsetReplaceReward)])
        if drift is not None:
            self.record("reference_drift", drift)
        advantages = normalize(total)
        if args.multi_objective_aggregation == "normalize_then_sum":
            advantages = torch.stack([(weight * normalize(r)).expand_as(total) for weight, r in weighted]).sum(dim=0)
        self._last_rewards = total.mean(dim=1), advantages.mean(dim=1)
        return advantages

    def _select(self, local: RolloutBatch, advantages: Tensor, shape: torch.Size) -> RolloutBatch:
        """Keeps the selected images of all processes and deals them out evenly."""
        args, accelerator = self.args, self.accelerator
        shares = accelerator.num_processes if args.selection_scope == "local" else 1
        mask = select(advantages, args.selection, args.top_advantage_quantile, shares)
        self.record("advantage_kept", mask.double().mean().item())
        kept = mask.expand(shape).flatten().nonzero().flatten()  # images of all processes, in order
        everyone = advantages.expand(shape).flatten()
        return local.deal(kept, everyone, accelerator.gather, accelerator.process_index, accelerator.num_processes)

    def _anchor(self, model: nn.Module, batch: RolloutBatch) -> None:
        """Old log-probabilities from the very micro-batches of the update, so that the first ratio is 1."""
        log_probs, means = [], []
        for micro, _ in self._micro_batches(batch):
            step = self.pair_loss.score(partial(self._velocity, model), micro)
            log_probs.append(step.log_prob)
            if self.args.ratio_normalization:
                means.append(step.mean.cpu() if self.args.offload_trajectories else step.mean)
        shape = batch.drawn_log_probs.shape  # (K, steps); micro-batches may end with repeated pairs
        batch.old_log_probs = torch.cat(log_probs)[: shape.numel()].view(shape)
        if means:
            of_steps = torch.cat(means)[: shape.numel()].view(*shape, *means[0].shape[1:]).unbind(dim=1)
            batch.old_means = dict(zip(batch.steps, of_steps, strict=True))

    def _prepare_reference(self, model: nn.Module) -> None:
        if self.reference_set.is_due(self.state.global_step):
            self._refresh_reference(model)
        for name, distance in self.reference_set.distances.items():
            self.record(f"reference_distance/{name}", distance)

    def _refresh_reference(self, model: nn.Module) -> None:
        """Generates the reference set anew, each process a share of it."""
        step = self.state.global_step
        noise = (self.args.seed, "reference", step)
        with self._timed("refresh"):
            schedule = self.rollouts.schedule(step)
            batches = self._share_of_images(model, self.conditions, schedule, noise, "Reference set")
            self.reference_set.refresh(batches, step)
        self._count_images("refresh", len(self.conditions))

    def _count_images(self, phase: str, number: int) -> None:
        self.num_images += number
        self.run_record.images[phase] += number

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.args.log_rewards and self._last_rewards is not None and self.accelerator.is_main_process:
            print_rewards(*self._last_rewards, step=self.state.global_step)
            self._last_rewards = None

    def _record_update(self, statistics: UpdateStatistics) -> None:
        for name, value in statistics.reduced(self.accelerator).items():
            self.record(name, value)

    # ---- checkpoints ----

    def training_state(self) -> dict[str, Any]:
        return super().training_state() | {
            "reference_set": self.reference_set.state_dict(),
            "slots": self.slot_sampler.state_dict(),
        }

    def _describe_run(self) -> dict[str, Any]:
        return super()._describe_run() | {"rewards": dict(zip(self.reward_names, self.reward_weights, strict=True))}

    def process_state(self) -> dict[str, Any]:
        """The rollout buffer, where more updates are to be made from it."""
        if self._buffer is None or self.state.global_step % self.args.num_iterations == 0:
            return {}
        buffer = {field.name: getattr(self._buffer, field.name) for field in fields(self._buffer)}
        return {"buffer": buffer, "processes": self.accelerator.num_processes}

    def load_process_state(self, state: dict[str, Any]) -> None:
        if state["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"this checkpoint was written between two updates of one generation by {state['processes']} processes "
                f"and cannot be resumed on {self.accelerator.num_processes}: use as many, or a checkpoint at a "
                f"multiple of num_iterations={self.args.num_iterations} steps."
            )
        buffer = state["buffer"]
        if isinstance(buffer["old_means"], Tensor):  # as version 0.1.0 kept them
            buffer["old_means"] = dict(zip(buffer["steps"], buffer["old_means"].unbind(dim=1), strict=True))
        self._buffer = RolloutBatch(**buffer).to(
            self.accelerator.device, move_states=not self.args.offload_trajectories
        )

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        self.reference_set.load_state_dict(state["reference_set"])
        self.slot_sampler.load_state_dict(state["slots"])
