# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from trl import TrlParser

from tests.helpers import features, tiny_reward, tiny_trainer
from trl_distreward import RECIPES, DiffusionDistributionConfig
from trl_distreward.trainer.recipes import values_of

KEYS = list(RECIPES["paper"])
# Values that go together under any recipe; together they are of all its fields
GIVEN = [
    {"replace_size": 3, "num_subsets": 64, "ema_decay": 0.5, "lr_scheduler_type": "cosine"},
    {"reference_update": "refresh"},
    {"reference_update": "rolling"},
    {"loss_type": "grpo", "sampler": "sde", "top_advantage_quantile": 0.5},
    {"loss_type": "backprop", "sampler": "ode", "backprop_steps": 2, "num_subsets": 64, "replace_size": 2},
]


def config_of(recipe, **given):
    return DiffusionDistributionConfig(output_dir="run", use_cpu=True, report_to="none", recipe=recipe, **given)


def values(config):
    return {name: getattr(config, name) for name in KEYS}


def test_recipes_are_for_the_same_fields_which_have_no_other_default():
    assert all(list(settings) == KEYS for settings in RECIPES.values())
    fields = dataclasses.fields(DiffusionDistributionConfig)
    assert {f.name for f in fields if "the recipe's" in f.metadata.get("help", "")} == set(KEYS)
    assert set().union(*GIVEN) == set(KEYS)
    assert config_of("paper").recipe == DiffusionDistributionConfig(output_dir="run", use_cpu=True).recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_concrete_once_a_configuration_is_made(recipe):
    config = config_of(recipe)
    for found in (config, pickle.loads(pickle.dumps(config)), dataclasses.replace(config, seed=3)):
        assert values(found) == RECIPES[recipe]
        written = found.to_dict()
        assert written["recipe"] == recipe and {name: written[name] for name in KEYS} == RECIPES[recipe]
    again = DiffusionDistributionConfig(**{f.name: written[f.name] for f in dataclasses.fields(config) if f.init})
    assert values(again) == RECIPES[recipe]
    assert values(config_of(recipe, **dict.fromkeys(KEYS))) == RECIPES[recipe]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "+".join(given))
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_given_wins(recipe, given, tmp_path):
    expected = {**RECIPES[recipe], **given}
    assert values(config_of(recipe, **given)) == expected

    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"output_dir": "run", "use_cpu": True, "recipe": recipe, **given}))
    parse = TrlParser(DiffusionDistributionConfig).parse_args_and_config
    assert values(parse(["--config", str(path)])[0]) == expected

    path.write_text(json.dumps({"output_dir": "run", "use_cpu": True, "recipe": "paper", "seed": 3}))
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    (config,) = TrlParser(DiffusionDistributionConfig).parse_args_and_config(
        ["--config", str(path), "--recipe", recipe, *options]
    )
    assert values(config) == expected and config.seed == 3 and type(config.num_subsets) is int


def test_unknown_recipes_are_refused():
    with pytest.raises(
        ValueError, match="recipe='best' is unknown: choose one of paper, recommended, policy_gradient"
    ):
        config_of("best")


def test_only_what_was_given_can_be_in_vain():
    policy_gradient = config_of("recommended", loss_type="grpo", sampler="sde", num_inference_steps=2)
    assert policy_gradient.backprop_steps == RECIPES["recommended"]["backprop_steps"]
    backprop = config_of("paper", loss_type="backprop", num_subsets=8)
    assert backprop.top_advantage_quantile == RECIPES["paper"]["top_advantage_quantile"] < 1
    with pytest.raises(ValueError, match="top_advantage_quantile=0.5 does nothing.*leave it at 1.0"):
        config_of("recommended", top_advantage_quantile=0.5)
    with pytest.raises(ValueError, match="backprop_steps=2 does nothing under loss_type='grpo': leave it at 1,"):
        config_of("policy_gradient", backprop_steps=2)
    assert config_of("paper", loss_type="rft", timestep_fraction=1).timestep_fraction == 1
    with pytest.raises(ValueError, match="use sampler='sde', or recipe='policy_gradient'"):
        config_of("recommended", loss_type="grpo")


def test_help_and_docstring_tell_every_recipes_values():
    shown = " ".join(TrlParser(DiffusionDistributionConfig).format_help().split())
    for text in (shown, str(DiffusionDistributionConfig.__doc__).replace("`", "")):
        assert all(f"the recipe's: {values_of(name)}" in text for name in KEYS if name != "lr_scheduler_type")
    documented = re.findall(r"defaults to the recipe's: (.*)\):$", str(DiffusionDistributionConfig.__doc__), re.M)
    assert len(documented) == len(KEYS) - 1  # transformers documents lr_scheduler_type


def test_the_documentations_table_is_the_recipes():
    page = (Path(__file__).parents[2] / "docs" / "source" / "training.md").read_text()
    rows = [f"| | {' | '.join(f'`{name}`' for name in RECIPES)} |", "|---|" + "---|" * len(RECIPES)]
    for name in KEYS:
        rows.append(f"| `{name}` | " + " | ".join(f"`{settings[name]}`" for settings in RECIPES.values()) + " |")
    table = "\n".join(rows)
    assert f"\n\n{table}\n\n" in page, f"docs/source/training.md should have this table:\n{table}"


def recipe_trainer(folder, recipe, **kwargs):
    left = {"top_advantage_quantile": None, "num_subsets": 4, "replace_size": None, "num_inference_steps": 4}
    return tiny_trainer(folder, recipe=recipe, save_strategy="steps", save_steps=1, **{**left, **kwargs})


@pytest.mark.parametrize("recipe", ["recommended", "policy_gradient"])
def test_runs_resume_and_tell_their_recipe(tmp_path, recipe):
    whole = recipe_trainer(tmp_path / "whole", recipe)
    whole.train()
    resumed = recipe_trainer(tmp_path / "resumed", recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for (name, p), q in zip(whole.network.named_parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(p, q), name
    written = json.loads((tmp_path / "whole" / "checkpoint-2" / "training_args.json").read_text())
    assert (written["recipe"], written["loss_type"]) == (recipe, RECIPES[recipe]["loss_type"])
    whole.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"| `recipe` | `{recipe}` |" in card and f"| `ema_decay` | `{RECIPES[recipe]['ema_decay']}` |" in card


def test_rewards_without_a_gradient_have_a_recipe_of_their_own(tmp_path):
    def rounded(images):
        return features(images.round())

    blind = tiny_reward()
    blind.extractors = dict.fromkeys(blind.extractors, rounded)
    for reward in (blind, lambda images, **kwargs: [0.0] * len(images)):
        with pytest.raises(ValueError, match="needs no gradient of the reward: recipe='policy_gradient'"):
            recipe_trainer(tmp_path, "recommended", reward_funcs=reward)
        recipe_trainer(tmp_path, "policy_gradient", reward_funcs=reward)
