# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import json
import pickle

import pytest
from trl import TrlParser
from trl.trainer.base_config import _BaseConfig

from tests.helpers import tiny_config
from trl_distreward import PAPER, DiffusionDistributionConfig, MergeCoefficientConfig

both = pytest.mark.parametrize("config", [DiffusionDistributionConfig, MergeCoefficientConfig])


def test_paper_has_the_settings_of_the_paper(tmp_path):
    config = DiffusionDistributionConfig(output_dir=str(tmp_path), use_cpu=True, **PAPER)
    assert (config.reference_set_size, config.num_subsets, config.replace_size) == (5000, 128, 50)
    assert (config.reference_update, config.reference_refresh_steps) == ("refresh", 10)
    assert (config.num_inference_steps, config.num_inference_steps_eval) == (50, [250])
    assert config.eval_samplers == ["sde", "ode"] and config.max_steps == 450
    assert (config.epsilon, config.beta, config.top_advantage_quantile) == (1e-4, 0.0, 0.25)
    assert (config.learning_rate, config.weight_decay, config.lr_scheduler_type) == (1e-5, 0.0, "constant")
    assert (config.adam_beta1, config.adam_beta2, config.num_iterations, config.ema_decay) == (0.9, 0.999, 1, 0.0)
    assert config.rollout_schedule.trainable_steps == tuple(range(49))  # SiT's last step has no noise


@both
def test_a_configuration_survives_copies_and_its_own_json(tmp_path, config):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "seed": 3, "eval_samplers": ["ode"]}
    whole = config(**given)
    fields = [field.name for field in dataclasses.fields(config) if field.init]
    written = json.loads(whole.to_json_string())
    again = config(**{name: written[name] for name in fields})
    for found in (pickle.loads(pickle.dumps(whole)), dataclasses.replace(whole), again):
        assert found.to_dict() == whole.to_dict() and found.eval_schedules == whole.eval_schedules
    assert config(output_dir="a").eval_samplers is not config(output_dir="a").eval_samplers


@both
def test_every_option_has_a_line_of_help(config):
    shown = TrlParser(config).format_help()
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(config) if field.init)
    inherited = {field.name for field in dataclasses.fields(_BaseConfig)}
    own = [field for field in dataclasses.fields(config) if field.name not in inherited and field.init]
    assert len(own) > 20 and all(field.metadata["help"] for field in own)


def test_options_come_from_the_command_line_and_from_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("num_subsets: 64\neval_samplers: [ode]\nlast_step_size: null\n")
    arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--replace_size", "25", "--use_cpu"]
    (config,) = TrlParser(DiffusionDistributionConfig).parse_args_and_config(arguments)
    assert (config.num_subsets, config.replace_size, config.last_step_size) == (64, 25, None)
    assert list(config.eval_schedules) == ["ode"] and config.reference_refresh_steps == 10


def test_a_distance_is_better_when_lower(tmp_path):
    config = tiny_config(tmp_path, metric_for_best_model="eval_ode_distance_features")
    assert config.greater_is_better is False


@both
def test_both_trainers_sample_alike(tmp_path, config):
    shared = {"output_dir": str(tmp_path), "use_cpu": True, "eval_samplers": ["sde"]}
    times = [config(**shared, last_step_size=size).eval_schedules["sde"].times for size in (0.0, None, 0.04)]
    assert times[0] == times[1] != times[2] and times[2][-2] == 0.04
    args = config(**shared, time_grid="karras", last_step_size=0)
    assert args.rollout_schedule.times[0] == args.eval_schedules["sde"].times[0] < 1
    for name, value in {"time_grid": "cosine", "noise_schedule": "ddpm"}.items():
        with pytest.raises(ValueError, match=f"{name}='{value}'"):
            config(**shared, **{name: value})
    with pytest.raises(ValueError, match="decode_batch_size=0 must be at least 1"):
        config(**shared, decode_batch_size=0)


def test_several_numbers_of_steps_are_evaluated_by_name(tmp_path):
    def names(**kwargs):
        return list(tiny_config(tmp_path, **kwargs).eval_schedules)

    assert names(num_inference_steps_eval=5) == ["sde", "ode"]
    assert names(num_inference_steps_eval=[4, 8]) == ["sde_4", "sde_8", "ode_4", "ode_8"]
    # an adaptive solver has no number of steps to tell apart
    assert names(num_inference_steps_eval=[4, 8], eval_solver="dopri5") == ["sde_4", "sde_8", "ode"]
    assert tiny_config(tmp_path, num_inference_steps_eval=[4, 8]).eval_schedules["ode_8"].num_steps == 8
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--num_inference_steps_eval", "50", "250"]
    (config,) = TrlParser(DiffusionDistributionConfig).parse_args_and_config(arguments)
    assert list(config.eval_schedules) == ["ode_50", "ode_250"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"replace_size": 24}, "replace_size=24 is not smaller than reference_set_size=24"),
        ({"replace_size": 0}, "replace_size=0 must be at least 1"),
        ({"num_subsets": 1}, "num_subsets=1 must be at least 2"),
        ({"num_generations": 4}, "num_generations=4 must divide num_subsets=6"),
        ({"advantage_normalization": "group"}, "set it to 2 or more"),
        ({"advantage_normalization": "rank"}, "advantage_normalization='rank' is unknown: choose one of"),
        ({"reference_update": "never"}, "reference_update='never' is unknown"),
        ({"top_advantage_quantile": 0.0}, r"top_advantage_quantile=0.0 must lie in \(0, 1\]"),
        ({"noise_schedule": "cps", "noise_level": 1.5}, "between 0 and 1"),
        ({"sampler": "ode"}, "needs the density of each step"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must lie in \[0, 1\)"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"beta": -1.0}, "beta=-1.0 must be at least 0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1"),
        ({"eval_samplers": ["ddim"]}, "sampler='ddim'"),
        ({"best_of_n": 2, "reference_refresh_steps": "auto"}, "without any drift"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 must be at least 0"),
        ({"num_eval_images": 1}, "num_eval_images=1 must be at least 2"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"num_train_epochs": 5}, "num_train_epochs=5 and max_steps=2 .*: set max_steps=-1 to count epochs"),
        ({"last_step_size": "none"}, "last_step_size='none' must be a number, or 'auto'"),
    ],
)
def test_errors_give_the_value_and_the_rule(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **kwargs)
