# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from ..conditions import conditions_of_slots
from ..generation import image_generators
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
from ..merging.search import CMASearch, GridSearch, Search, power_profile_grid
from ..metrics.image_metrics import ImageMetric
from ..policies import as_policy
from .base import DiffusionTrainer, disable_dropout
from .candidates import CandidateJudge
from .checkpoints import ADAPTER_FOLDER
from .checks import check_best_metric, check_on, images_of_noise
from .merge_card import PLOT, coefficient_section, comparison_table, place_of, plot_coefficients
from .merge_coefficient_config import MergeCoefficientConfig
from .merge_state import check_identity, identity_of
from .model_card import recipe_of
from .objective import normalize_advantages
from .reference_set import conditions_and_slots
from .reward_functions import RewardFunctions
from .run_record import is_evaluation

logger = get_logger(__name__)


class MergeCoefficientTrainer(DiffusionTrainer):
    """
    Learns with which coefficients to merge checkpoints, from the images that the merged model makes under the ODE.

    Every step draws candidates, merges the checkpoints with each (Eq. 7 of
    [arXiv 2607.02291](https://huggingface.co/papers/2607.02291)), generates a set of images by each, all from the same
    noise, and rewards each by how close its set is to real data (Eq. 10). Nothing but the coefficients is trained: by
    a policy gradient, or by a search that gets as many images.

    Example:

    ```python
    from trl_distreward import MergeCoefficientConfig, MergeCoefficientTrainer, SubsetReplaceReward

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
            A pipeline with the checkpoints' network, of a known family, the folder or Hub id of one, or an object with
            the members of [`DiffusionPolicy`]. Its own weights are overwritten.
        checkpoints (`list[str]` or [`~merging.CheckpointPool`]):
            What is merged, in the order of training.
        reward_funcs (`Callable` or `list` of them):
            [`SubsetReplaceReward`], or any function `reward(images=…, conditions=…, slots=…, trainer_state=…)` that
            returns one float per image, whose mean counts. Several are weighted by `reward_weights` and summed.
        args ([`MergeCoefficientConfig`], *optional*): configuration.
        train_dataset (`datasets.Dataset`, *optional*):
            Conditions of a candidate's images, in a column `class_labels`, or `prompt` for a text-to-image policy.
            Without a dataset all classes are balanced. A further column of strata may be named by `stratify_by`.
        eval_dataset (`datasets.Dataset`, *optional*): conditions of the evaluated images, likewise.
        eval_metrics (`dict[str, ImageMetric]`, *optional*):
            Metrics of generated sets to evaluate besides the reward's own distances.
        callbacks, optimizers: as in [`~transformers.Trainer`].
    """

    _tag_names = ["trl-distreward", "model-merging"]
    _start_anew = "start a new run with initial_coefficients from its coefficients.json"
    _name = "Merge Coefficients"
    _paper = {
        "title": "Optimizing Visual Generative Models via Distribution-wise Rewards",
        "id": "2607.02291",
    }

    args: MergeCoefficientConfig

    def __init__(
        self,
        model: Any,
        checkpoints: Sequence[str | os.PathLike] | CheckpointPool,
        reward_funcs: Any,
        args: MergeCoefficientConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_metrics: Mapping[str, ImageMetric] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        args = args if args is not None else MergeCoefficientConfig(output_dir="merge-coefficients")
        policy = as_policy(model, **args.guidance())
        args.bind(policy)
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights)
        for reward in self.rewards.distributional:
            if reward.credit != "shared" or reward.control_variate:
                raise ValueError(
                    "a candidate has one reward, that of its whole set: leave credit='shared' and "
                    "control_variate=False."
                )
        if isinstance(checkpoints, CheckpointPool):
            self.pool = checkpoints
        else:
            buffers = [name for name, _ in policy.model.named_buffers()]
            self.pool = CheckpointPool(checkpoints, buffers=buffers, token=args.hub_token)
        files = [tuple(os.path.realpath(path) for path in member.files.values()) for member in self.pool.members]
        if len(set(files)) < max(2, len(files)):
            raise ValueError(
                f"{len(files)} checkpoints, of which {len(set(files))} differ: give at least 2 to merge, each once."
            )
        self.groups, self.group_names = coefficient_groups(self.pool.weighted, args.granularity)
        start = initial_coefficients(
            args.initial_coefficients, len(self.pool), args.checkpoint_times, args.checkpoint_stds, args.initial_std
        )
        self.initial_coefficients = start.expand(len(self.group_names), -1).clone()  # (G, N_c)
        self.merged_network = self._prepare_merged_network(policy)
        self.conditions, slots = conditions_and_slots(policy, train_dataset, args)
        super().__init__(
            policy=policy,
            args=args,
            steps_per_epoch=args.max_steps,
            eval_metrics=self.rewards.metrics() | dict(eval_metrics or {}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.search = self._build_search()
        self.comparison: dict[str, dict[str, float]] = {}
        self._shown: Tensor | None = None  # coefficients that are evaluated in place of the learnt ones
        device = self.accelerator.device
        self.merged_network.to(device)
        self.rewards.to(device)
        if device.type == "cuda" and self.pool.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
            self.pool.load_resident(device)
        self.judge = CandidateJudge(
            policy,
            self.merged_network,
            self.pool,
            self.groups,
            self.rewards,
            args,
            self.conditions,
            slots,
            self.accelerator,
            self.autocast,
            lambda: self.state,
        )
        check_on(*images_of_noise(policy, self.conditions, device), self.rewards, self.eval_metrics)
        check_best_metric(args, self.eval_metrics)
        self._announce()

    # ---- preparation ----

    def _prepare_merged_network(self, policy: Any) -> nn.Module:
        network = policy.model
        disable_dropout(network)
        network.float()  # sums of checkpoints keep what half precision would round away
        if self.pool.adapter_config is not None:
            network = get_peft_model(network, self.pool.adapter_config)
        return network.requires_grad_(False).eval()

    def _prepare_network(self, network: nn.Module, args: Any, peft_config: Any) -> nn.Module:  # type: ignore[override]
        """What is trained is not the generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # the same start on every process
            return EMANet(
                samples_of(self.initial_coefficients, args.coefficient_map),
                num_layers=args.policy_num_layers,
                hidden_size=args.policy_hidden_size,
                scale=args.sampling_std,
            )

    def _build_search(self) -> Search | None:
        args, start = self.args, samples_of(self.initial_coefficients, self.args.coefficient_map)
        if args.method == "cma":
            return CMASearch(start, args.sampling_std, args.num_generations, args.seed)
        if args.method == "grid":
            times = args.checkpoint_times or [float(i + 1) for i in range(len(self.pool))]
            profiles = power_profile_grid(times, args.num_generations, args.checkpoint_stds)
            points = profiles[:, None].expand(-1, len(self.group_names), -1)
            return GridSearch(samples_of(points, args.coefficient_map))
        return None

    def _check_launch(self, ema_decay: float) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed split a network over processes, but here each process merges and runs candidates "
                "of its own: launch with examples/accelerate_configs/multi_gpu.yaml."
            )
        super()._check_launch(ema_decay)

    def _announce(self) -> None:
        args = self.args
        images = args.num_generations * args.images_per_candidate
        evaluations = args.rollout_schedule.num_evaluations
        number = "as many as the solver decides" if evaluations is None else images * evaluations
        logger.info(
            f"{len(self.pool)} checkpoints, {self.initial_coefficients.numel()} coefficients. One step: "
            f"{args.num_generations} candidates x {args.images_per_candidate} images = {images}, "
            f"{number} network evaluations; {args.max_steps} steps."
        )

    # ---- coefficients ----

    @property
    def mean(self) -> Tensor:
        """What has been learnt, before the map to coefficients: `(G, N_c)`, float64, on the CPU."""
        return self.network().detach().cpu() if self.search is None else self.search.mean

    @property
    def coefficients(self) -> Tensor:
        """The learnt coefficients `(G, N_c)`, float64; one row for each of `group_names`."""
        return coefficients_of(self.mean, self.args.coefficient_map)

    def _whole(self, coefficients: Any) -> Tensor:
        """One row for each group, of coefficients given as `(N_c,)` or `(G, N_c)`."""
        rows = torch.as_tensor(coefficients, dtype=torch.float64).cpu()
        shape = self.initial_coefficients.shape
        if rows.shape not in (shape, shape[1:]):
            raise ValueError(
                f"coefficients have shape {tuple(rows.shape)}, but must have {tuple(shape[1:])} or {tuple(shape)}."
            )
        return rows.expand(shape)

    # ---- one step ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.num_images = 0  # so that the start is judged anew, for the scales of distances
        self.rewards.reset()  # a checkpoint that is resumed from restores both
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Draws candidates, judges them and learns from their rewards."""
        args, step = self.args, self.state.global_step
        if not self.num_images:
            self._judge_start()
        std = args.sampling_std_at(step)
        (generator,) = image_generators(args.seed, "coefficients", step, [0])
        if self.search is None:
            samples = gaussian_samples(self.mean, std, args.num_generations, generator, args.antithetic_sampling)
        else:
            samples = self.search.ask()
        candidates = coefficients_of(samples, args.coefficient_map)
        with self._timed("candidates"):
            values = self.judge.judge(candidates, step)  # (B, functions)
        self._count_images(len(samples) * args.images_per_candidate)
        rewards = self._total(values)
        finite = rewards.isfinite()
        if not bool(finite.any()):
            self.skip_update("no candidate's images and features are finite", candidates=candidates)
            return self._no_update()
        self._skipped_in_a_row = 0
        # the worst merges may make no images at all
        rewards = torch.where(finite, rewards, rewards[finite].min())
        self._record_rewards(values[finite], rewards, finite)
        if self.search is not None:
            self.search.tell(rewards)
            return self._no_update()
        return self._policy_gradient(model, samples, rewards, std)

    def _judge_start(self) -> None:
        """The first set is the start's, by whose distances those of several feature spaces are divided."""
        size = self.args.scale_set_size or self.args.reference_set_size
        conditions = conditions_of_slots(self.policy, self.train_dataset, size, self.args.seed, self.args.stratify_by)
        values = self.judge.judge_start(self.initial_coefficients, conditions)
        self._count_images(size)
        logger.info(f"Reward of the initial coefficients: {self._total(values[None]).item():.6g}.")

    def _count_images(self, number: int) -> None:
        self.num_images += number
        self.run_record.images["candidates"] += number

    def _total(self, values: Tensor) -> Tensor:
        return values @ torch.tensor(self.rewards.weights, dtype=torch.float64)

    def _no_update(self) -> Tensor:
        self._without_update = True
        return torch.zeros((), device=self.accelerator.device)

    def _policy_gradient(self, model: nn.Module, samples: Tensor, rewards: Tensor, std: float) -> Tensor:
        advantages = normalize_advantages(rewards[:, None])[:, 0]
        if not bool((advantages != 0).any()):
            logger.warning("All rewards of this step are equal: there is nothing to learn, the update is skipped.")
            self._note_skipped("all rewards are equal")
            return self._no_update()
        if self.args.advantage_normalization == "rank":
            advantages = normalize_advantages(rewards.argsort().argsort().double()[:, None])[:, 0]
        advantages = advantages.to(self.accelerator.device)
        # All processes know all rewards and make the same update: there is nothing to send
        with self.accelerator.no_sync(model):
            log_probs = gaussian_log_prob(samples.to(self.accelerator.device), self.network(), std)
            # On-policy: the ratio is 1. The mean of a Gaussian has the Fisher information 1 / std²; without it the
            # step would grow as the draws come closer. Outputs of the network are in units of its scale.
            loss = -(advantages * log_probs).mean() * (std / self.args.sampling_std) ** 2
            loss.backward()
        return -rewards.mean().to(self.accelerator.device)

    def _record_rewards(self, values: Tensor, rewards: Tensor, finite: Tensor) -> None:
        self.record("reward", rewards.mean().item())
        self.record("reward_std", rewards.std().item())
        self.record("reward_best", rewards.max().item())
        self.record("finite_candidates", finite.double().mean().item())
        if len(self.rewards.functions) > 1:
            for name, column in zip(self.rewards.names, values.T, strict=True):
                self.record(f"rewards/{name}/mean", column.mean().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not is_evaluation(logs):
            if "reward_best" in self._metrics:
                self._metrics["reward_best"] = [max(self._metrics["reward_best"])]
            if len(self.group_names) == 1:
                logs = logs | {f"coefficients/{i}": w for i, w in enumerate(self.coefficients[0].tolist())}
        super().log(logs, start_time)

    # ---- evaluation and results ----

    @property
    def sampled_model(self) -> nn.Module:
        return self.merged_network

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The checkpoints, merged with the learnt coefficients or those that are evaluated in their place."""
        self.judge.merge(self.coefficients if self._shown is None else self._shown)
        yield

    def evaluate(self, *args: Any, coefficients: Any = None, **kwargs: Any) -> dict[str, float]:
        """
        As in [`DistributionRewardTrainer.evaluate`], of the merge with the learnt coefficients.

        Args:
            coefficients (`torch.Tensor` of shape `(N_c,)` or `(G, N_c)`, *optional*): evaluated in their place.
        """
        with self._showing(coefficients):
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _showing(self, coefficients: Any) -> Iterator[None]:
        self._shown = None if coefficients is None else self._whole(coefficients)
        try:
            yield
        finally:
            self._shown = None

    def compare(self, others: Mapping[str, Any] | None = None, seed: int | None = None) -> dict[str, dict[str, float]]:
        """
        Evaluates the last checkpoint, the uniform average, the start, and the learnt coefficients, from the same
        noise; the model card shows the table.

        Args:
            others (`dict[str, torch.Tensor]`, *optional*): further coefficients `(N_c,)` or `(G, N_c)` by name.
            seed (`int`, *optional*): seed of the noise; `eval_seed` by default.

        Returns:
            `dict[str, dict[str, float]]`: of each, `{sampler}_{metric}`.

        Raises:
            ValueError: one of `others` has a name that is taken.
        """
        count = len(self.pool)
        rows = {
            "last": initial_coefficients("last", count),
            "uniform": initial_coefficients("uniform", count),
            "start": self.initial_coefficients,
        }
        if taken := {*rows, "learnt"} & {*(others or ())}:
            raise ValueError(
                f"others has {', '.join(sorted(taken))}, which is in the table anyway: name it otherwise."
            )
        rows |= {**(others or {}), "learnt": self.coefficients}
        seed = self.args.eval_seed if seed is None else seed
        self.comparison = {}
        for name, coefficients in rows.items():
            with self._showing(coefficients), torch.no_grad():
                self.comparison[name] = self._evaluate_samplers(self.eval_conditions, seed)
        self.write_record()
        return self.comparison

    def _note_evaluation(self, values: dict[str, float], seed: int, prefix: str, other_conditions: bool) -> None:
        super()._note_evaluation(values, seed, prefix, other_conditions)
        if self._shown is not None:
            self.run_record.evaluations[-1]["of"] = f"coefficients {self._shown.tolist()}"

    def _describe_run(self) -> dict[str, Any]:
        def by_group(coefficients: Tensor) -> dict[str, list[float]]:
            return dict(zip(self.group_names, coefficients.tolist(), strict=True))

        described = super()._describe_run()
        described["model"] |= {
            "parameters": sum(p.numel() for p in self.merged_network.parameters()),
            "trained": self.initial_coefficients.numel(),
        }
        return described | {
            "rewards": dict(zip(self.rewards.names, self.rewards.weights, strict=True)),
            "coefficients": by_group(self.coefficients),
            "initial_coefficients": by_group(self.initial_coefficients),
            "pool": [place_of(member) for member in self.pool_description["members"]],
            "comparison": self.comparison,
        }

    def merge(self, coefficients: Any = None) -> Any:
        """
        The pipeline with the checkpoints merged, by the learnt coefficients or by those given.

        It is the trainer's own: training, evaluation or another merge overwrites its weights. Of adapters it is a
        copy with a network of its own, without the adapter's layers, which saves and loads as any other. A policy
        without a pipeline takes the pipeline's place.
        """
        self.judge.merge(self.coefficients if coefficients is None else self._whole(coefficients))
        pipeline = getattr(self.policy, "pipeline", self.policy)
        if isinstance(self.merged_network, PeftModel):
            component = "model" if pipeline is self.policy else getattr(self.policy, "component", "transformer")
            pipeline = copy.copy(pipeline)
            setattr(pipeline, component, self._plain_network())
        return pipeline

    def _plain_network(self) -> nn.Module:
        """The merged network without layers of adapters."""
        network = self.merged_network
        return copy.deepcopy(network).merge_and_unload() if isinstance(network, PeftModel) else network

    # ---- checkpoints ----

    @cached_property
    def pool_description(self) -> dict[str, Any]:
        """Sources and hashes of the checkpoints."""
        return self.pool.describe()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder, coefficients = Path(output_dir or self.args.output_dir), self.coefficients
        folder.mkdir(parents=True, exist_ok=True)
        self.judge.merge(coefficients)
        recipe = recipe_of(self.args)
        about = {
            "coefficients": dict(zip(self.group_names, coefficients.tolist(), strict=True)),
            "pool": self.pool_description,
            "recipe": recipe,
            "num_images": self.num_images,
        }
        if isinstance(self.merged_network, PeftModel):
            adapter = folder / ADAPTER_FOLDER / "adapter_model.safetensors"
            self.pool.save_merged(adapter, coefficients, self.groups)
        self.policy.save_pretrained(folder, model=self._plain_network())
        (folder / "coefficients.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
        # not transformers' training_args.bin: a pickle, with the Hub token in plain text
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n")

    def training_state(self) -> dict[str, Any]:
        states = [reward.state_dict() for reward in self.rewards.distributional]
        return super().training_state() | {
            "network": {name: value.cpu() for name, value in self.network.state_dict().items()},
            # all processes are asked, one writes: the others need not read the pool for its hashes
            "identity": self._identity if self.args.should_save else None,
            "search": None if self.search is None else self.search.state_dict(),
            # every candidate has a set of its own; the scales of distances stay
            "rewards": [{**state, "features": {}} for state in states],
            "comparison": self.comparison,
        }

    @property
    def _identity(self) -> dict[str, Any]:
        return identity_of(self.args, self.group_names, self.pool_description)

    def load_training_state(self, state: dict[str, Any]) -> None:
        if "identity" not in state:
            raise ValueError("the checkpoint is of no merge: name one that this trainer has written.")
        check_identity(state["identity"], self._identity)
        super().load_training_state(state)
        self._load_learnt(state)
        for reward, saved in zip(self.rewards.distributional, state["rewards"], strict=True):
            reward.load_state_dict(saved)
        self.comparison = state["comparison"]

    def _load_learnt(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.search is not None:
            self.search.load_state_dict(state["search"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_training_state(self.read_training_state(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_learnt(self.read_training_state(str(self.state.best_model_checkpoint)))

    # ---- the model card ----

    def _card_metadata(self) -> dict[str, Any]:
        repositories = sorted(
            {member["repo_id"] for member in self.pool_description["members"] if "repo_id" in member}
        )
        return {"base_model": repositories, "base_model_relation": "merge"} if repositories else {}

    def _card_sections(self) -> list[str]:
        drawn = plot_coefficients(self.coefficients, self.group_names, Path(self.args.output_dir, PLOT))
        sections = [coefficient_section(self.coefficients, self.group_names, self.pool_description, drawn)]
        if self.comparison:
            sections.append(f"## Comparison\n\n{comparison_table(self.comparison)}")
        return sections
