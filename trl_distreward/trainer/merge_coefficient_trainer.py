# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..conditions import EvalRows, Rows, conditions_of_slots
from ..evaluation.image_metrics import ImageMetric
from ..files import State, write_json
from ..merging.adapters import ADAPTER_FOLDER
from ..merging.coefficients import (
    EMANet,
    coefficient_groups,
    coefficients_of,
    gaussian_log_prob,
    gaussian_samples,
    initial_coefficients,
    samples_of,
)
from ..merging.pool import CheckpointPool
from ..policies import DiffusionPolicy, Model
from ..saving import saved_whole
from ..seeds import keyed_generator
from . import checkpointing
from .advantages import normalize_advantages
from .base import DiffusionTrainer
from .candidates import CandidateJudge, build_search
from .image_sets import evaluate_samplers
from .merge_coefficient_config import MergeCoefficientConfig
from .model_card import code, comparison_table, table
from .network import disable_dropout
from .reward_functions import RewardFunction
from .run_record import is_evaluation, write_record
from .stopping import droppable

Coefficients = Tensor | Sequence[float]  # (N_c,) or (G, N_c)

logger = get_logger(__name__)


class MergeCoefficientTrainer(DiffusionTrainer):
    """
    Learns the coefficients of a merge of checkpoints from the images that the merged model generates under the ODE.

    Every step draws candidates, merges the checkpoints with each (Eq. 7 of
    [arXiv 2607.02291](https://huggingface.co/papers/2607.02291)), generates a set of images with each, all from the
    same noise, and rewards each by how close its set is to real data (Eq. 10). Only the coefficients are trained, by a
    search or a policy gradient.

    Example:

    ```python
    trainer = MergeCoefficientTrainer(
        model="run",
        checkpoints=["run/checkpoint-400", "run/checkpoint-500", "my-org/model@3f2a1c0"],
        reward_funcs=SubsetReplaceReward(feature_extractor, "imagenet256-statistics.safetensors"),
        args=MergeCoefficientConfig(output_dir="merged"),
    )
    trainer.train()
    trainer.compare()
    trainer.save_model()
    ```

    Args:
        model (pipeline, `str` or [`DiffusionPolicy`]):
            A pipeline with the checkpoints' network, as in [`DistributionRewardTrainer`]. Its weights are overwritten.
        checkpoints (`list[str]` or [`~merging.CheckpointPool`]): checkpoints to merge, in the order of training.
        reward_funcs, train_dataset, eval_dataset, eval_metrics, callbacks, optimizers:
            As in [`DistributionRewardTrainer`]. For a function of single images the mean counts. `train_dataset` holds
            the conditions of a candidate's images.
        args ([`MergeCoefficientConfig`], *optional*): configuration.
    """

    _tag_names = ["trl-distreward", "model-merging"]
    _name = "Merge Coefficients"

    args: MergeCoefficientConfig

    def __init__(
        self,
        model: Model,
        checkpoints: Sequence[str | os.PathLike] | CheckpointPool,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: MergeCoefficientConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows | None = None,
        eval_metrics: Mapping[str, ImageMetric | RewardFunction] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ):
        args = MergeCoefficientConfig.of(args, "merge-coefficients")
        self._given, self.steps_per_epoch = checkpoints, args.max_steps
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, eval_metrics, None, callbacks, optimizers
        )
        if any(reward.credit != "shared" or reward.control_variate for reward in self.rewards.of_sets):
            raise ValueError("a candidate has one reward, for its set: set credit='shared', control_variate=False.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            reason = "FSDP and DeepSpeed split networks, but here each process merges its own candidates"
            raise ValueError(f"{reason}: launch with examples/accelerate_configs/multi_gpu.yaml.")
        times = args.checkpoint_times or [float(i + 1) for i in range(len(self.pool))]
        self.search = build_search(args, self.initial_coefficients, times)
        self.comparison: dict[str, dict[str, float]] = {}
        self._chosen: Tensor | None = None  # the best of the learnt and the simple merges, after training
        self._shown: Tensor | None = None  # coefficients that are evaluated instead
        device = self.accelerator.device
        self.merged_network.to(device)
        if device.type == "cuda" and self.pool.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
            self.pool.load_resident(device)
        self.judge = CandidateJudge(self)

    def prepare_network(
        self, network: nn.Module, args: MergeCoefficientConfig, peft_config: PeftConfig | None
    ) -> nn.Module:
        """Makes what is trained: not the generator, but the policy of its coefficients."""
        pool = self._given
        if not isinstance(pool, CheckpointPool):
            buffers = [name for name, _ in network.named_buffers()]
            pool = CheckpointPool(pool, buffers=buffers, token=args.hub_token)
        self.pool = pool
        if len(pool) < 2:
            raise ValueError(f"{len(pool)} checkpoints: give at least 2 to merge.")
        self.groups, self.group_names = coefficient_groups(self.pool.weighted, args.granularity)
        start = initial_coefficients(
            args.initial_coefficients, len(self.pool), args.checkpoint_times, args.checkpoint_stds, args.initial_std
        )
        self.initial_coefficients = start.expand(len(self.group_names), -1).clone()  # (G, N_c)
        disable_dropout(network)
        network.float()  # half precision would round sums of checkpoints
        if self.pool.adapter_config is not None:
            network = get_peft_model(network, self.pool.adapter_config)
        self.merged_network = network.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # the same start on every process
            means = samples_of(self.initial_coefficients, args.coefficient_map)
            return EMANet(means, num_layers=args.policy_num_layers, scale=args.sampling_std)

    # ---- coefficients ----

    @property
    def mean(self) -> Tensor:
        """The learnt mean before the map to coefficients: `(G, N_c)`, float64, in CPU memory."""
        return self.network().detach().cpu() if self.search is None else self.search.mean

    @property
    def learnt_coefficients(self) -> Tensor:
        """The coefficients `(G, N_c)` that the search has come to, float64; one row for each of `group_names`."""
        return coefficients_of(self.mean, self.args.coefficient_map)

    @property
    def coefficients(self) -> Tensor:
        """The result: the learnt coefficients, or after training the start or a simple merge if that was better."""
        return self.learnt_coefficients if self._chosen is None else self._chosen

    def _merges(self) -> dict[str, Tensor]:
        """The last checkpoint, the uniform average, the start and the learnt merge: `(G, N_c)` each."""
        simple = {name: initial_coefficients(name, len(self.pool)) for name in ("last", "uniform")}
        rows = simple | {"start": self.initial_coefficients, "learnt": self.learnt_coefficients}
        return {name: self._expanded(row) for name, row in rows.items()}

    def _expanded(self, coefficients: Coefficients) -> Tensor:
        """One row for each group, from coefficients `(N_c,)` or `(G, N_c)`."""
        return torch.as_tensor(coefficients, dtype=torch.float64).cpu().expand(self.initial_coefficients.shape)

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: object) -> TrainOutput:
        self._chosen = None
        output = super().train(resume_from_checkpoint, **kwargs)
        if not self.interrupted:
            self._choose()
        return output

    @torch.no_grad()
    def _choose(self) -> None:
        """Keeps the best of the learnt, the start's and simple merges, on noise that the search has not seen."""
        rows = self._merges()
        values = self.judge.judge(torch.stack(list(rows.values())), self.state.max_steps)
        self.count_images("candidates", len(rows) * self.args.images_per_candidate)
        found, fitness = (
            dict(zip(rows, each.nan_to_num(nan=-torch.inf).tolist(), strict=True))
            for each in (self.rewards.total(values.unbind(dim=1)), self._fitness(values))
        )
        kept = "learnt" if max(fitness.values()) > -torch.inf else "start"  # where all are equal
        best = max(rows, key=lambda name: (fitness[name], name == kept))
        self._chosen = rows[best]
        self._metrics.clear()  # of the judging itself
        self.log({f"final_reward/{name}": value for name, value in found.items()})
        if best != "learnt":
            logger.warning(f"By the rewards on fresh noise {best!r} is the result, not what was learnt: {found}.")
        write_record(self)

    def _fitness(self, values: Tensor) -> Tensor:
        """Fitness `(B,)` of rewards `(B, functions)`, of several each normalized first; NaN if not finite."""
        fitness, finite = torch.full((len(values),), torch.nan, dtype=values.dtype), values.isfinite().all(dim=1)
        columns = values[finite].unbind(dim=1)
        if len(columns) > 1 and bool(finite.any()):
            columns = tuple(normalize_advantages(column[:, None])[:, 0] for column in columns)
        fitness[finite] = self.rewards.total(columns)
        return fitness

    def training_step(self, model: nn.Module, inputs: list[int], num_items_in_batch: object = None) -> Tensor:
        """Draws candidates, judges them and learns from their rewards."""
        with droppable(self):
            return self._step(model)

    def _step(self, model: nn.Module) -> Tensor:
        args, step = self.args, self.state.global_step
        if not self.num_images:
            self._judge_start()
        std = args.sampling_std_at(step)
        if self.search is not None:
            samples = self.search.ask()
        else:
            generator = keyed_generator(args.seed, "coefficients", step)
            samples = gaussian_samples(self.mean, std, args.num_generations, generator, args.antithetic_sampling)
        with self.timed("candidates"):
            values = self.judge.judge(coefficients_of(samples, args.coefficient_map), step)  # (B, functions)
        self.count_images("candidates", len(samples) * args.images_per_candidate)
        rewards = self._fitness(values)
        finite = rewards.isfinite()
        if not bool(finite.any()):
            self.skip_update("no candidate's images and features are finite")
            return self.no_update()
        self.skipped_in_a_row = 0
        rewards = torch.where(finite, rewards, rewards[finite].min())  # the worst merges may make no images at all
        totals = self.rewards.total(values[finite].unbind(dim=1))
        self.record_rewards(totals, values[finite].T[..., None].unbind())
        self.record("reward_best", totals[rewards[finite].argmax()].item())
        self.record("finite_candidates", finite.double().mean().item())
        if self.search is not None:
            self.search.tell(rewards)
            return self.no_update()
        return self._policy_gradient(model, samples, rewards, std)

    def _judge_start(self) -> None:
        """Judges the start. The distances of its set are the units of several feature spaces."""
        size = self.args.scale_set_size or self.args.reference_set_size
        conditions = conditions_of_slots(self.policy, self.train_dataset, size, self.args.seed, self.args.stratify_by)
        values = self.judge.judge_set(self.initial_coefficients, conditions, "start", 0)
        if not bool(values.isfinite().all()):
            raise ValueError(f"the start's rewards {values.tolist()} are not finite: change initial_coefficients.")
        self.count_images("candidates", size)

    def _policy_gradient(self, model: nn.Module, samples: Tensor, rewards: Tensor, std: float) -> Tensor:
        advantages = normalize_advantages(rewards[:, None])[:, 0].to(self.accelerator.device)
        if not bool((advantages != 0).any()):
            self.skip_equal_rewards()
            return self.no_update()
        # All processes know all rewards and make the same update: nothing is sent.
        with self.accelerator.no_sync(model):
            log_probs = gaussian_log_prob(samples.to(self.accelerator.device), self.network(), std)
            # The mean of a Gaussian has the Fisher information 1 / std²: without the factor, steps would grow as std
            # falls. The network's outputs are in units of its scale.
            loss = -(advantages * log_probs).mean() * (std / self.args.sampling_std) ** 2
            loss.backward()
        return -rewards.mean().to(self.accelerator.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not is_evaluation(logs) and len(self.group_names) == 1:
            logs = logs | {f"coefficients/{i}": w for i, w in enumerate(self.coefficients[0].tolist())}
        super().log(logs, start_time)

    # ---- evaluation and results ----

    @property
    def sampled_model(self) -> nn.Module:
        return self.merged_network

    def evaluation_weights(self) -> AbstractContextManager:
        """Merges the checkpoints with the learnt coefficients, or with those that are evaluated instead."""
        self.judge.merge(self.coefficients if self._shown is None else self._shown)
        return nullcontext()

    def evaluate(self, *args: Any, coefficients: Coefficients | None = None, **kwargs: Any) -> dict[str, float]:
        """Evaluates the merge with the learnt coefficients, or given ones `(N_c,)` or `(G, N_c)`."""
        if coefficients is not None:
            self._shown = self._expanded(coefficients)
            if kwargs.get("seed") is None:  # with a seed it does not count as one of the run
                kwargs["seed"] = self.args.eval_seed
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._shown = None

    @torch.no_grad()
    def compare(self) -> dict[str, dict[str, float]]:
        """Evaluates the last, uniform, start's and learnt merge from the same noise, for the model card."""
        for name, coefficients in self._merges().items():
            self._shown = coefficients
            self.comparison[name] = evaluate_samplers(self, self.eval_sets, self.args.eval_seed)
        self._shown = None
        write_record(self)
        return self.comparison

    def merge(self, coefficients: Coefficients | None = None) -> DiffusionPipeline | DiffusionPolicy:
        """Merges, and returns the pipeline, or the policy if it has none; the next merge overwrites its weights."""
        self.judge.merge(self.coefficients if coefficients is None else self._expanded(coefficients))
        pipeline = getattr(self.policy, "pipeline", self.policy)
        if isinstance(self.merged_network, PeftModel):
            component = "model" if pipeline is self.policy else getattr(self.policy, "component", "transformer")
            pipeline = copy.copy(pipeline)
            setattr(pipeline, component, self._plain_network())
        return pipeline

    def _plain_network(self) -> nn.Module:
        """The merged network without adapter layers."""
        network = self.merged_network
        return copy.deepcopy(network).merge_and_unload() if isinstance(network, PeftModel) else network

    # ---- checkpoints and records ----

    @cached_property
    def pool_description(self) -> State:
        return self.pool.describe()

    def write_model(self, folder: Path, adapter_alone: bool = False) -> None:
        if not self.args.should_save:
            return
        coefficients = self.coefficients
        self.judge.merge(coefficients)
        about = {"coefficients": self._by_group(coefficients), "pool": self.pool_description}
        with saved_whole(folder) as whole:
            if isinstance(self.merged_network, PeftModel):
                adapter = whole / ADAPTER_FOLDER / "adapter_model.safetensors"
                self.pool.save_merged(adapter, coefficients, self.groups)
            self.policy.save_pretrained(whole, model=self._plain_network())
            write_json(whole / "coefficients.json", about | {"num_images": self.num_images})
            (whole / "training_args.json").write_text(self.args.to_json_string() + "\n")

    def training_state(self) -> State:
        return super().training_state() | {
            "network": {name: value.cpu() for name, value in self.network.state_dict().items()},
            "search": None if self.search is None else self.search.state_dict(),
            # every candidate has a set of its own; the first distances stay
            "rewards": [reward.state_dict() | {"features": {}} for reward in self.rewards.of_sets],
            "comparison": self.comparison,
        }

    def load_training_state(self, state: State) -> None:
        super().load_training_state(state)
        for reward, saved in zip(self.rewards.of_sets, state["rewards"], strict=True):
            reward.load_state_dict(saved)
        self.comparison = state["comparison"]

    def load_trained(self, folder: str) -> None:
        state = checkpointing.read_training_state(self, folder)
        self.network.load_state_dict(state["network"])
        if self.search is not None:
            self.search.load_state_dict(state["search"])

    load_best = load_trained

    def describe_run(self) -> State:
        described = super().describe_run()
        described["model"]["parameters"] = sum(p.numel() for p in self.merged_network.parameters())
        described["model"]["trained"] = self.initial_coefficients.numel()
        return described | {
            "coefficients": self._by_group(self.coefficients),
            "initial_coefficients": self._by_group(self.initial_coefficients),
            "pool": [_place_of(member) for member in self.pool_description["members"]],
            "comparison": self.comparison,
        }

    def card_parts(self) -> tuple[Mapping[str, object], list[str]]:
        members, names = self.pool_description["members"], self.group_names
        repositories = sorted({member["repo_id"] for member in members if "repo_id" in member})
        metadata = {"base_model": repositories, "base_model_relation": "merge"} if repositories else {}
        rows = []
        for member, values in zip(members, self.coefficients.T.tolist(), strict=True):
            hashes = ", ".join(f"`{value[:12]}`" for value in member["files"].values())
            rows.append([code(_place_of(member)), hashes, *(f"{value:.4f}" for value in values)])
        head = [*map(code, names)] if len(names) > 1 else ["coefficient"]
        sections = ["## Coefficients\n\n" + table(["checkpoint", "SHA-256", *head], rows)]
        if self.comparison:
            sections.append(f"## Comparison\n\n{comparison_table(self.comparison)}")
        return metadata, sections

    def _by_group(self, coefficients: Tensor) -> dict[str, list[float]]:
        return dict(zip(self.group_names, coefficients.tolist(), strict=True))


def _place_of(member: State) -> str:
    """Names a checkpoint's place in one word."""
    if "repo_id" not in member:
        return member["path"]
    return f"{member['repo_id']}@{member['revision'][:7]}" + (f":{member['subfolder']}" if member["subfolder"] else "")
