# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import pytest
from trl import TrlParser

from tests.helpers import tiny_config
from trl_distreward import DiffusionDistributionConfig, MergeCoefficientConfig


def test_defaults_are_the_papers(tmp_path):
    config = DiffusionDistributionConfig(output_dir=str(tmp_path))
    assert (config.reference_set_size, config.num_subsets, config.replace_size) == (5000, 128, 50)
    assert (config.reference_update, config.reference_refresh_steps) == ("refresh", 10)
    assert (config.num_inference_steps, config.num_inference_steps_eval) == (50, [250])
    assert (config.epsilon, config.beta, config.top_advantage_quantile) == (1e-4, 0.0, 0.25)
    assert (config.learning_rate, config.weight_decay, config.lr_scheduler_type) == (1e-5, 0.0, "constant")
    assert (config.adam_beta1, config.adam_beta2, config.num_iterations) == (0.9, 0.999, 1)
    assert config.rollout_schedule.trainable_steps == tuple(range(49))  # SiT's last step has no noise


def test_a_distance_is_better_when_lower(tmp_path):
    config = tiny_config(tmp_path, metric_for_best_model="eval_ode_distance_features")
    assert config.greater_is_better is False


@pytest.mark.parametrize("config", [DiffusionDistributionConfig, MergeCoefficientConfig])
def test_both_trainers_sample_alike(tmp_path, config):
    shared = {"output_dir": str(tmp_path), "use_cpu": True, "eval_samplers": ["sde"]}
    times = [config(**shared, last_step_size=size).eval_schedules["sde"].times for size in (0.0, None, 0.04)]
    assert times[0] == times[1] != times[2] and times[2][-2] == 0.04
    args = config(**shared, time_grid="karras", last_step_size=0)
    assert args.rollout_schedule.times[0] == args.eval_schedules["sde"].times[0] < 1
    for name, value in {"time_grid": "cosine", "noise_schedule": "ddpm"}.items():
        with pytest.raises(ValueError, match=f"{name}='{value}' is unknown: choose one of"):
            config(**shared, **{name: value})
    with pytest.raises(ValueError, match="decode_batch_size=0 must be at least 1, or None"):
        config(**shared, decode_batch_size=0)


def test_fields_come_from_the_command_line_and_yaml(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_subsets: 64\neval_samplers: [ode]\nlast_step_size: null\n")
    arguments = ["--config", str(recipe), "--output_dir", str(tmp_path), "--replace_size", "25"]
    (config,) = TrlParser(DiffusionDistributionConfig).parse_args_and_config(arguments)
    assert (config.num_subsets, config.replace_size, config.last_step_size) == (64, 25, None)
    assert list(config.eval_schedules) == ["ode"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"replace_size": 24}, "replace_size=24 is not smaller than reference_set_size=24"),
        ({"replace_size": 0}, "replace_size=0 must be at least 1"),
        ({"num_subsets": 1}, "num_subsets=1"),
        ({"num_generations": 4}, "num_generations=4 must divide num_subsets=6"),
        ({"advantage_normalization": "group"}, "num_generations"),
        ({"advantage_normalization": "rank"}, "advantage_normalization='rank'"),
        ({"reference_update": "never"}, "reference_update='never'"),
        ({"top_advantage_quantile": 0.0}, "top_advantage_quantile=0.0"),
        ({"noise_schedule": "ddpm"}, "noise_schedule='ddpm'"),
        ({"noise_level": 0.0}, "nothing can be trained"),
        ({"noise_schedule": "cps", "noise_level": 1.5}, "between 0 and 1"),
        ({"sampler": "ode"}, "needs the density"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 must be 1"),
        ({"eval_samplers": ["ddim"]}, "sampler='ddim'"),
        ({"best_of_n": 2, "reference_refresh_steps": "auto"}, "chosen are better"),
        ({"num_inference_steps": 4.0}, "num_inference_steps=4.0 must be a whole number"),
        ({"max_steps": 2.0}, "max_steps=2.0 must be a whole number"),
        ({"eval_samplers": "ode"}, r"eval_samplers='ode' must be a list: write \[ode\]"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 must be at least 1"),
        ({"num_eval_images": 1}, "num_eval_images=1 must be at least 2, or None"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"eval_samplers": []}, r"eval_samplers=\[\] evaluates nothing"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"sde_window": "random"}, "sde_window='random' does nothing under sde_window_size=None"),
        (
            {"sde_window_size": 2, "sde_window": "random", "sde_window_interval": 3},
            "sde_window_interval=3 does nothing under sde_window='random'",
        ),
        (
            {"sde_window_size": 1, "step_weighting": "noise"},
            "step_weighting='noise' does nothing under sde_window_size=1",
        ),
        (
            {"reference_update": "rolling", "reference_refresh_steps": 20},
            "reference_refresh_steps=20 does nothing under reference_update='rolling'",
        ),
        ({"refresh_drift": 1.0}, "refresh_drift=1.0 does nothing under reference_refresh_steps=10"),
        (
            {"eval_samplers": ["sde"], "eval_solver": "heun"},
            r"eval_solver='heun' does nothing under eval_samplers=\['sde'\]",
        ),
        ({"num_inference_steps_eval": 1, "last_step_size": 0.1}, "evaluation under 'sde': last_step_size"),
    ],
)
def test_errors_name_value_and_rule(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **kwargs)


def test_several_step_counts_are_evaluated_by_name(tmp_path):
    def names(**kwargs):
        return list(tiny_config(tmp_path, **kwargs).eval_schedules)

    assert names(num_inference_steps_eval=5) == ["sde", "ode"]
    assert names(num_inference_steps_eval=[4, 8]) == ["sde_4", "sde_8", "ode_4", "ode_8"]
    # an adaptive solver has no number of steps to tell apart
    assert names(num_inference_steps_eval=[4, 8], eval_solver="dopri5") == ["sde_4", "sde_8", "ode"]
    assert tiny_config(tmp_path, num_inference_steps_eval=[4, 8]).eval_schedules["ode_8"].num_steps == 8
    for wrong in ([], [0], 0):
        with pytest.raises(ValueError, match="num_inference_steps_eval"):
            tiny_config(tmp_path, num_inference_steps_eval=wrong)
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--num_inference_steps_eval", "50", "250"]
    (config,) = TrlParser(DiffusionDistributionConfig).parse_args_and_config(arguments)
    assert list(config.eval_schedules) == ["sde_50", "sde_250", "ode_50", "ode_250"]
