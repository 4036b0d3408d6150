# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl import TrlParser

from tests.conversion.snapshots import snapshot
from tests.edm2 import tiny_edm2
from tests.helpers import tiny_vae
from trl_distreward import CheckpointPool, EDM2Pipeline, FeatureStatistics, MergeCoefficientConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted((EXAMPLES / "configs").glob("edm2_merge_*.yaml"))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("edm2_merge")


def mean_features(images):
    """(B, 12): means of 2x2 parts of RGB images."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, 2).flatten(1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_the_papers_pools(example, recipe):
    parser = TrlParser((example.EDM2MergeArguments, MergeCoefficientConfig))
    arguments, config = parser.parse_args_and_config(["--config", str(recipe), "--use_cpu", "True", "--bf16", "False"])
    kimg = [int(example.SNAPSHOT.search(name)["kimg"]) for name in arguments.snapshots]
    assert len(kimg) == 8
    steps = {round((b - a) * 1000 / 2**20, 1) for a, b in zip(kimg[:-1], kimg[1:], strict=True)}
    assert steps == {192.0} and kimg[-1] == 2147483  # one every 192 x 2^20 images, to the last
    assert config.rollout_schedule.num_evaluations == 63  # EDM2's sampler
    assert recipe.stem.rsplit("_", 1)[1] in arguments.snapshots[0].split("-")


def test_snapshots_become_one_merged_pipeline(example, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_edm2_merge.mean_features", mean_features, raising=False)
    files = []
    for index, kimg in enumerate((300, 100, 200)):  # in any order
        files.append(tmp_path / f"edm2-img512-xs-{kimg:07d}-0.100.pkl")
        files[-1].write_bytes(snapshot(tiny_edm2(index, in_channels=4)))
    tiny_vae().save_pretrained(tmp_path / "vae")
    real = torch.randint(0, 256, (100, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    FeatureStatistics.from_features(mean_features(real)).save(tmp_path / "real.safetensors")
    settings = {
        "pool_dir": tmp_path / "pool",
        "vae": tmp_path / "vae",
        "feature_extractor": "tests.test_edm2_merge.mean_features",
        "real_statistics": tmp_path / "real.safetensors",
        "output_dir": tmp_path / "merged",
        "time_grid": "karras",
        "solver": "heun_sigma",
        "num_inference_steps": 2,
        "max_steps": 1,
        "num_generations": 3,
        "reference_set_size": 16,
        "compare": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    example.main(["--snapshots", *map(str, files), *options])
    merged = EDM2Pipeline.from_pretrained(tmp_path / "merged")
    assert merged.vae is not None
    recipe = json.loads((tmp_path / "merged" / "coefficients.json").read_text())
    assert [Path(member["path"]).name for member in recipe["pool"]["members"]] == [
        f"edm2-img512-xs-{kimg:07d}-0.100" for kimg in (100, 200, 300)
    ]
    (coefficients,) = recipe["coefficients"].values()
    assert sum(coefficients) == pytest.approx(1)
    folders = sorted((tmp_path / "pool").iterdir())
    pool = CheckpointPool(folders, buffers=[name for name, _ in merged.unet.named_buffers()])
    written = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in pool.merged(torch.tensor(coefficients)):
        torch.testing.assert_close(written[name], value, atol=1e-6, rtol=1e-6)


def test_names_without_time_and_width_are_refused(example, tmp_path):
    given = {"pool_dir": str(tmp_path), "feature_extractor": "inception", "real_statistics": "img512.pkl"}
    for names, message in (
        (["edm2.pkl", "b.pkl"], "keep the published name"),
        (["a-2147483-0.100.pkl"], "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            example.convert_snapshots(example.EDM2MergeArguments(snapshots=names, **given))
