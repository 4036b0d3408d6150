# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The cost of a run by arithmetic: network evaluations, and FLOPs and bytes counted on tensors without data."""

import copy
import math
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..conditions import take
from ..metrics.extractors import module_of
from .image_sets import decode_and_extract

if TYPE_CHECKING:
    from .distribution_reward_trainer import DistributionRewardTrainer

FLOAT = 4  # bytes of float32
# Bytes of the optimizer's state per trained parameter; AdamW's two moments for optimizers that are not listed
OPTIMIZER_BYTES = {"sgd": 0, "adagrad": 4, "rmsprop": 4, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "adafactor": 1}
# Data sheets: dense FLOP/s in bfloat16, in float32 without TF32, and bytes of memory
GPUS = {"a100": (312e12, 19.5e12, 80e9), "h100": (989e12, 67e12, 80e9), "h200": (989e12, 67e12, 141e9)}
UTILISATION = 0.4  # assumed share of these FLOP/s
EIGH_RATE = 0.2e12  # assumed FLOP/s of an eigendecomposition in float64, which takes 9 d³


class Plan(NamedTuple):
    """Numbers of events in a run, and images and network evaluations of all processes for each."""

    steps: int
    rollouts: int
    refreshes: int
    evaluations: int
    checkpoints: int
    counts: dict[str, int]  # network evaluations per rollout, update, refresh and evaluation; guidance counts twice
    images: dict[str, int]  # decoded per rollout, refresh and evaluation

    @classmethod
    def of(cls, trainer: "DistributionRewardTrainer") -> "Plan":
        args, per_epoch, factor = trainer.args, trainer.steps_per_epoch, guidance_factor(trainer.policy)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        interval = 10 if args.reference_refresh_steps == "auto" else int(args.reference_refresh_steps)
        interval = math.ceil(interval / args.num_iterations) * args.num_iterations
        sampled = factor * args.rollout_schedule.num_steps
        evaluated = sum(factor * (s.num_evaluations or s.num_steps) for s in args.eval_schedules.values())
        images = {
            "rollout": args.num_subsets * args.replace_size * args.best_of_n,
            "refresh": args.reference_set_size if trainer.rewards.of_sets else 0,
            "evaluation": trainer.num_eval_images * len(args.eval_schedules),
        }
        estimator, passes = trainer.estimator, trainer.estimator.num_passes()
        counts = {
            "rollout": images["rollout"] * sampled,
            "old policy": estimator.uses_old * passes,
            "update": (factor if estimator.guided_loss else 1) * passes,
            "refresh": images["refresh"] * sampled,
            "evaluation": trainer.num_eval_images * evaluated,
        }

        def times(strategy: str, every: float | None) -> int:
            if strategy == "no" or not every:
                return 0
            every = every * steps if every < 1 else every  # transformers takes a share of all steps as well
            return int(steps // (per_epoch if strategy == "epoch" else every))

        rollouts = math.ceil(steps / args.num_iterations)
        refreshes = 1 if args.reference_update == "rolling" else math.ceil(steps / interval)
        evaluations = times(args.eval_strategy, args.eval_steps) + bool(args.eval_on_start)
        saves = times(args.save_strategy, args.save_steps)
        if saves and args.metric_for_best_model is not None and args.eval_steps != args.save_steps:
            saves += evaluations  # each may be the best
        return cls(steps, rollouts, refreshes, evaluations, saves, counts, images)

    @property
    def times(self) -> dict[str, int]:
        """Number of times that each event happens."""
        often = (self.rollouts, self.rollouts, self.steps, self.refreshes, self.evaluations)
        return dict(zip(self.counts, often, strict=True))

    def describe(self, trainer: "DistributionRewardTrainer") -> str:
        """The sizes of a run, by arithmetic."""
        args, of_sets, classes = trainer.args, trainer.rewards.of_sets, trainer.policy.num_conditions or 1
        passes, size = [self.counts[phase] * often for phase, often in self.times.items()], args.reference_set_size
        parameters = [(p.numel(), p.requires_grad) for p in trainer.skeleton.parameters()]
        chosen = f", the best of {args.best_of_n} each" if args.best_of_n > 1 else ""
        images = self.images["rollout"] * self.rollouts + self.images["refresh"] * self.refreshes
        lines = [
            f"{self.rollouts:,} rollouts of {args.num_subsets} subsets x {args.replace_size} images{chosen}",
            f"{images:,} images for training, {trainer.num_eval_images:,} in an evaluation",
            f"{sum(passes[:-1]) / self.steps:,.0f} network evaluations an update, {sum(passes):,} in all",
            f"{sum(n for n, trained in parameters if trained):,} of {sum(n for n, _ in parameters):,} weights trained",
        ]
        if of_sets:
            held = f"{size * sum(feature_widths(trainer)) * FLOAT / 2**20:,.1f} MiB of features"
            lines.append(f"reference set: {size:,} images, generated {self.refreshes} x; {held}")
        if trainer.train_dataset is None and classes > 1:
            lines.append(f"no train_dataset, so labels are all {classes} classes in balance")
        return "\n- ".join([f"The run: {self.steps:,} updates", *lines])


def guidance_factor(policy: object) -> int:
    return 2 if getattr(policy, "guided", getattr(policy, "guidance_scale", 1.0) != 1.0) else 1


def feature_widths(trainer: "DistributionRewardTrainer") -> list[int]:
    """Dimensions of the feature spaces of the distribution rewards."""
    distances = [each for reward in trainer.rewards.of_sets for each in reward.distances.values()]
    return [getattr(distance, "dimension", 0) for distance in distances]


class PeakMemory(TorchDispatchMode):
    """Finds the most bytes, `peak`, that tensors made in this context hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        returned = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(returned)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self._add(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._add, storage._cdata, -storage.nbytes())
        return returned

    def _add(self, key: int, size: int) -> None:
        self.known ^= {key}
        self.alive += size
        self.peak = max(self.peak, self.alive)


class Work(NamedTuple):
    """FLOPs of a batch forward, and forward and backward; bytes that it takes beside weights and gradients."""

    forward: float
    both: float
    held: float


def count_network(call: Callable[[nn.Module], object], skeleton: nn.Module, bf16: bool) -> Work:
    """Counts the work of the batch that `call` passes through a network, on tensors without data."""
    mode, found = FakeTensorMode(allow_non_fake_inputs=True), list[Work]()
    with mode:
        parts: dict[int, Tensor] = {id(x): torch.empty_like(x, device="cpu") for x in skeleton.buffers()}
        for p in skeleton.parameters():
            parts[id(p)] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
        network = copy.deepcopy(skeleton, parts)
    forward = network.forward

    @torch.enable_grad()
    def counted(*args: object, **kwargs: object) -> object:
        device = next(x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            args, kwargs = tree_map_only(Tensor, lambda x: torch.empty_like(x, device="cpu"), (args, kwargs))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
                returned = forward(*args, **kwargs)
                one_way = flops.get_total_flops()
                _backward(returned)
            with PeakMemory() as memory:  # the gradients are there
                _backward(forward(*args, **kwargs))
        found.append(Work(one_way, flops.get_total_flops(), memory.peak))
        return tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device), returned)

    network.forward = counted
    call(network)
    return found[0]


def _backward(returned: object) -> None:
    torch.stack([x.float().sum() for x in tree_leaves(returned) if torch.is_tensor(x)]).sum().backward()


@torch.no_grad()
def count(trainer: "DistributionRewardTrainer", plan: Plan) -> tuple[dict[str, float], dict[str, float]]:
    """Counts FLOPs by phase of an average update of all processes, and bytes by part on one process's device."""
    args, policy, estimator = trainer.args, trainer.policy, trainer.estimator
    device, batch = trainer.accelerator.device, args.per_device_train_batch_size
    conditions = take(trainer.conditions, [i % len(trainer.conditions) for i in range(batch)])
    x, t = policy.noise(conditions).to(device), torch.full((batch,), 0.5, device=device)
    velocity = partial(policy.velocity, x=x, t=t, cond=policy.encode(conditions))
    work = count_network(velocity, trainer.skeleton, bool(args.bf16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decoding, PeakMemory() as memory:
        decode_and_extract(trainer, x[:1], take(conditions, [0]))
    rows, image = batch * guidance_factor(policy), decoding.get_total_flops()
    once = {phase: plan.counts[phase] * work.forward / rows + plan.images[phase] * image for phase in plan.images}
    flops = {phase: value * plan.times[phase] / plan.steps for phase, value in once.items()}
    prepared = plan.counts["old policy"] * work.forward / rows
    decoded = memory.peak * (args.decode_batch_size or args.rollout_batch_size or 64)
    if estimator.replaces_all:  # the gradient of the distance by the samples
        prepared += 2 * image * plan.images["rollout"]
        with torch.enable_grad(), PeakMemory() as memory:
            policy.decode(x[:1].requires_grad_()).sum().backward()
        decoded = max(decoded, memory.peak * estimator.decoded_at_once)
    flops["update"] = plan.counts["update"] * work.both / rows + prepared * plan.rollouts / plan.steps
    return flops, memory_parts(trainer, work.held, decoded, x[0].nbytes)


def memory_parts(trainer: "DistributionRewardTrainer", held: float, decoded: float, sample: int) -> dict[str, float]:
    """Bytes by part, where a micro-batch takes `held`, decoding `decoded`, and a sample `sample`."""
    args, policy, estimator, of_sets = trainer.args, trainer.policy, trainer.estimator, trainer.rewards.of_sets
    weights, size = list(trainer.skeleton.parameters()), args.reference_set_size
    trained = sum(p.numel() for p in weights if p.requires_grad)
    copies = (args.ema_decay > 0) + estimator.uses_old + (getattr(trainer, "initial_model", None) is not None)
    frozen = [module_of(each) for reward in of_sets for each in reward.extractors.values()]
    waiting = "text_encoder" if getattr(policy, "offload_text_encoders", False) else "-"
    components = getattr(getattr(policy, "pipeline", None), "components", {}).items()
    frozen += [part for name, part in components if part is not policy.model and not name.startswith(waiting)]
    images = args.num_subsets * args.replace_size / trainer.accelerator.num_processes
    steps = estimator.num_passes() / estimator.num_selected()
    passes = 1 if estimator.single_pass or args.checkpoint_steps else steps  # whose activations wait together
    return {
        "weights": sum(p.nbytes for p in weights),
        "gradients": FLOAT * trained,
        "optimizer": optimizer_bytes(args.optim) * trained,
        "copies of the weights": FLOAT * copies * trained,
        "decoder, extractors": bytes_of(frozen),
        "reference set": sum(3 * FLOAT * size * width + 6 * FLOAT * width**2 for width in feature_widths(trainer)),
        "states": 0 if args.offload_trajectories else images * (steps + 1) * sample,
        "activations": max(passes * held, decoded),
    }


def bytes_of(modules: Iterable[object]) -> int:
    """Bytes of the parameters and buffers of those that are modules; shared ones count once."""
    tensors = [t for m in modules if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())]
    return sum({id(t): t.nbytes for t in tensors}.values())


def optimizer_bytes(name: object) -> int:
    """Bytes of the optimizer's state per trained parameter."""
    return OPTIMIZER_BYTES.get(str(getattr(name, "value", name)), 2 * FLOAT)
