# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Fingerprints of the library's numbers, to tell whether a change of the code changes a value.

    OMP_NUM_THREADS=1 python -m tests.fingerprints record /tmp/before.json
    OMP_NUM_THREADS=1 python -m tests.fingerprints check /tmp/before.json

A fingerprint is a digest of all bits and a float64 sum to look at. It belongs to one machine and one torch: record on
the commit before a change, check after it.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from tests.edm2 import tiny_edm2_pipeline
from tests.helpers import features, real_images, tiny_config, tiny_merge_trainer, tiny_reward, tiny_trainer
from tests.metrics.test_gradients import sample as feature_sample
from tests.metrics.test_gradients import subsets
from tests.policies_tiny import FAMILIES, Family
from tests.runs import launch, logged, weights
from tests.test_policy_families import build, generators, projection
from trl_distreward import (
    DistributionRewardTrainer,
    FeatureStatistics,
    FrechetDistance,
    KernelDistance,
    SubsetReplaceReward,
    feature_metrics,
    precision_recall_density_coverage,
)
from trl_distreward.merging.posthoc import posthoc_ema_coefficients
from trl_distreward.metrics import cmmd, inception_score, kernel_inception_distance
from trl_distreward.policies import as_policy
from trl_distreward.sampling import karras_grid, rollout, solve_ode, time_grid, transition

# Every value that a recipe of version 0.1.0 filled in, so that runs do not depend on defaults
PAPER = {
    "loss_type": "grpo",
    "sampler": "sde",
    "reference_update": "refresh",
    "reference_refresh_steps": 10,
    "top_advantage_quantile": 0.5,
    "lr_scheduler_type": "constant",
    "ema_decay": 0.0,
    "last_step_size": 0.04,
    "time_grid": "uniform",
}
ROLLING = {"reference_update": "rolling", "num_subsets": 8, "replace_size": 1, "top_advantage_quantile": 1.0}
BACKPROP = {**ROLLING, "loss_type": "backprop", "sampler": "ode", "backprop_from": 0.5}
RUNS = {
    "grpo": {},
    "grpo, average": {"ema_decay": 0.5, "lr_scheduler_type": "linear"},
    "grpo, two updates": {"num_iterations": 2, "epsilon": 0.2, "beta": 0.05},
    "grpo, normalized ratios": {"num_iterations": 2, "ratio_normalization": True},
    "grpo, window": {"sde_window_size": 2, "sde_window_interval": 2},
    "grpo, random window, best of two": {"sde_window_size": 2, "sde_window": "random", "best_of_n": 2},
    "grpo, part of the steps": {"timestep_fraction": 0.5, "step_weighting": "noise"},
    "grpo, groups": {"num_generations": 2, "advantage_normalization": "group"},
    "grpo, rolling": ROLLING,
    "grpo, refreshed": {"reference_refresh_steps": 3},
    "grpo, refreshed by drift": {"reference_refresh_steps": "auto", "refresh_drift": 0.3},
    "rft": {"loss_type": "rft"},
    "nft": {**ROLLING, "loss_type": "nft", "sampler": "ode"},
    "awm": {**ROLLING, "loss_type": "awm", "sampler": "ode"},
    "transport": {**ROLLING, "loss_type": "transport", "sampler": "ode", "transport_advantage": 0.5},
    "backprop": BACKPROP,
    "backprop, SDE, pull": {**BACKPROP, "sampler": "sde", "beta": 0.1, "checkpoint_steps": True},
}
for _schedule in ("flow_grpo", "dance", "cps"):
    RUNS[f"grpo, {_schedule}"] = {"noise_schedule": _schedule, "noise_level": 0.7}


def digest(*values):
    hashed, total = hashlib.sha256(), 0.0
    for value in values:
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        hashed.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        total += tensor.double().sum().item()
    return {"bits": hashed.hexdigest()[:16], "sum": total}


def distances():
    slots, rows = subsets(21), feature_sample(30, 0, offset=0.3)
    new = torch.stack([feature_sample(3, 5 + i, offset=0.1) for i in range(2)])
    real = FeatureStatistics.from_features(rows)
    for name, distance in {
        "frechet": FrechetDistance(real),
        "frechet direct": FrechetDistance(real, method="direct"),
        "frechet logdet": FrechetDistance(real, method="logdet"),
        "kernel": KernelDistance(rows),
        "kernel gaussian": KernelDistance(rows, kernel="gaussian", bandwidths=(0.7, 2.0, 20.0)),
    }.items():
        distance.fit(feature_sample(21, 3))
        yield f"{name}: value", digest(distance.value)
        yield f"{name}: delete one", digest(distance.delete_one(torch.arange(21)))
        for method in ("replaced", "gradient", "leave_one_in"):
            yield f"{name}: {method.replace('_', ' ')}", digest(getattr(distance, method)(slots, new))


def samplers():
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))

    def velocity(x, t):
        return torch.tanh(x) * t.view(-1, 1, 1) - 0.3 * x

    for schedule, level in (("sit", 1.0), ("flow_grpo", 0.7), ("dance", 0.3), ("cps", 0.8)):
        noise, times = {"noise_schedule": schedule, "noise_level": level}, time_grid(6, shift=2.0)
        for i in (0, 3, 5):
            t = torch.full((5,), times[i])
            step, options = (x, velocity(x, t), t, times[i + 1]), {"start": times[0], **noise}
            drawn = transition(*step, generator=torch.Generator().manual_seed(i), **options)
            scored = transition(*step, prev_sample=drawn.prev_sample, **options)
            yield f"{schedule} {i}: drawn", digest(*vars(drawn).values())
            yield f"{schedule} {i}: scored", digest(*vars(scored).values())
        kept = {"keep_steps": (1, 2), "final_step": "mean", "generator": torch.Generator().manual_seed(2)}
        walked = rollout(velocity, x, time_grid(6, last_step_size=0.04), **noise, **kept)
        yield f"{schedule}: rollout", digest(walked.sample, walked.log_probs)
    for solver in ("euler", "heun", "heun_sigma"):
        yield f"ode {solver}", digest(solve_ode(velocity, x, karras_grid(5), solver=solver))


def run(resume=None, folder=None, **settings):
    with tempfile.TemporaryDirectory() as own:
        trainer = tiny_trainer(folder or own, **{**PAPER, "max_steps": 10, **settings})
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained():
    for name, settings in RUNS.items():
        trainer = run(**settings)
        yield f"{name}: weights", digest(*weights(trainer.network).values())
        yield f"{name}: rewards", digest(torch.tensor(logged(trainer, "reward"), dtype=torch.float64))
        if trainer.ema is not None:
            yield f"{name}: averages", digest(*trainer.ema.averages.values())
    lora = LoraConfig(r=2, target_modules=["qkv", "fc1"])
    others = {
        "grpo, adapter": {"peft_config": lora, "beta": 0.1, **ROLLING},
        "leave one in": {"reward_funcs": tiny_reward(credit="leave_one_in")},
        "control variate": {"reward_funcs": tiny_reward(control_variate=True)},
        "kernel": {"reward_funcs": SubsetReplaceReward(features, features(real_images()), distance="kernel")},
    }
    for name, settings in others.items():
        yield f"{name}: weights", digest(*weights(run(**settings).network).values())
    updates = {"num_iterations": 2, "epsilon": 0.2, **ROLLING}
    with tempfile.TemporaryDirectory() as folder:
        whole = run(folder=folder, save_strategy="steps", save_steps=5, **updates)
        resumed = run(f"{folder}/checkpoint-5", folder=folder, overwrite_output_dir=True, **updates)
    yield "resumed: weights", digest(*weights(resumed.network).values())
    yield "uninterrupted: weights", digest(*weights(whole.network).values())


def processes():
    script = Path(__file__).parent / "trainer" / "distributed_run.py"
    for name, settings in {"grpo": {}, "backprop": BACKPROP}.items():
        for count in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                asked = json.dumps({**PAPER, "max_steps": 3, **settings})
                done = launch(script, folder, asked, processes=count, ACCELERATE_USE_CPU="true")
                assert done.returncode == 0, done.stderr[-2000:]
                yield f"{name}, {count} processes", digest(*load_file(Path(folder) / "weights").values())


def families():
    for family in [*FAMILIES, Family("edm2", tiny_edm2_pipeline, None, [0, 2, 1])]:
        policy, conditions = as_policy(build(family), **family.options), family.conditions
        with torch.no_grad():
            noise = policy.noise(conditions, generators(len(conditions)))
            images = (policy.decode(noise) * 255).round().to(torch.uint8)
        other = torch.randint(0, 256, (20, *images.shape[1:]), generator=torch.Generator().manual_seed(0))
        reward = SubsetReplaceReward(projection, FeatureStatistics.from_features(projection(other.to(torch.uint8))))
        dataset = None
        if policy.num_conditions is None:
            dataset = Dataset.from_dict({"prompt": [conditions[i % len(conditions)] for i in range(6)]})
        grid = {"time_grid": "karras" if family.name == "edm2" else "auto", "last_step_size": 0}
        sizes = {"reference_set_size": 6, "num_subsets": 2, "replace_size": 1, "num_inference_steps": 3}
        with tempfile.TemporaryDirectory() as folder:
            args = tiny_config(folder, **{**PAPER, "max_steps": 1, **sizes, **grid})
            trainer = DistributionRewardTrainer(policy, reward, args, train_dataset=dataset)
            before = digest(*weights(trainer.network).values())
            trainer.train()
        after = digest(*weights(trainer.network).values())
        assert before != after, family.name
        yield f"{family.name}: one update", after


def merges():
    for method, options in {"emanet": {}, "cma": {}, "cma per block": {"granularity": "per_block"}}.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = tiny_merge_trainer(Path(folder), method=method.split()[0], **options)
            trainer.train()
            yield f"merge {method}: coefficients", digest(trainer.coefficients)
            trainer.merge()
            yield f"merge {method}: weights", digest(*weights(trainer.merged_network).values())
    yield "post-hoc", digest(posthoc_ema_coefficients([1.0, 2.0, 3.0, 4.0], [0.1, 0.1, 0.05, 0.05], 4.0, 0.07))


def metrics():
    real, made = feature_sample(60, 1, dimension=6).float(), feature_sample(50, 2, dimension=6).float()
    logits = feature_sample(50, 3, dimension=6).float()
    found = {"fid": feature_metrics(real, made)["frechet"], "cmmd": cmmd(real, made)}
    found["kid"], found["kid_std"] = kernel_inception_distance(real, made, subset_size=20)
    found["inception_score"], found["inception_score_std"] = inception_score(logits, splits=5, seed=0)
    for name, value in {**found, **precision_recall_density_coverage(real, made)}.items():
        yield f"metric {name}", digest(torch.tensor(value, dtype=torch.float64))


def fingerprints():
    torch.set_num_threads(1)
    for part in (distances, samplers, metrics, merges, trained, families, processes):
        for name, value in part():
            yield f"{part.__name__}/{name}", value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    found = dict(fingerprints())
    if args.action == "record":
        args.file.write_text(json.dumps(found, indent=1) + "\n")
        return
    known, odd = json.loads(args.file.read_text()), 0
    for name in sorted({*known, *found}):
        if known.get(name) != found.get(name):
            odd += 1
            print(f"{name}: was {known.get(name)}, is {found.get(name)}")
    print(f"{len(found)} fingerprints, {odd} differ")
    raise SystemExit(bool(odd))


if __name__ == "__main__":
    main()
