# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Original files become folders and repositories that load, with this library and without it."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.conversion.snapshots import snapshot
from tests.edm2 import tiny_edm2
from tests.helpers import tiny_sit, tiny_vae
from tests.hub_server import HubServer, run_code
from trl_distreward import load_pipeline
from trl_distreward.conversion.hub import code_of
from trl_distreward.scripts import convert

# one process, which takes seconds to start, loads without the library, then with it, then pushes
LOAD_AND_PUSH = """
import sys
import torch
from diffusers import DiffusionPipeline

def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    guidance = {"guidance_scale": 1.5} if type(pipeline).__name__ == "EDM2Pipeline" else {}
    return pipeline([0, 2], num_inference_steps=3, generator=generator, output_type="pt", **guidance).images

sys.modules["trl_distreward"] = None  # as if it were not installed
pipelines = []
for repo in ("org/sit", "org/edm2"):
    try:
        DiffusionPipeline.from_pretrained(repo)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("code ran unasked")
    pipelines.append(DiffusionPipeline.from_pretrained(repo, trust_remote_code=True))
remote = [images(pipeline) for pipeline in pipelines]
for number, pipeline in enumerate(pipelines):  # saved again they are complete: diffusers would leave the code out
    pipeline.save_pretrained(f"{sys.argv[2]}/{number}")
    again = DiffusionPipeline.from_pretrained(f"{sys.argv[2]}/{number}", trust_remote_code=True)
    assert torch.equal(images(again), remote[number])
    again.save_pretrained(f"{sys.argv[2]}/{number}")  # over itself as well

del sys.modules["trl_distreward"]
from trl_distreward import EDM2Pipeline, SiTPipeline, load_pipeline
from trl_distreward.scripts import convert
for command, known, expected in zip(eval(sys.argv[1]), (SiTPipeline, EDM2Pipeline), remote, strict=True):
    convert.main(command)
    repos = "org/" + command[0], command[-1]
    for pipeline in (known.from_pretrained(command[2]), *map(load_pipeline, repos)):
        assert type(pipeline) is known and torch.equal(images(pipeline), expected)
"""


@pytest.fixture
def originals(tmp_path):
    torch.save(tiny_sit(in_channels=4, learn_sigma=True).state_dict(), tmp_path / "sit.pt")
    (tmp_path / "edm2.pkl").write_bytes(snapshot(tiny_edm2(in_channels=4)))
    (tmp_path / "worse.pkl").write_bytes(snapshot(tiny_edm2(1, in_channels=4, num_classes=0)))
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path


def convert_both(folder, *extra):
    sit = ["sit", str(folder / "sit.pt"), str(folder / "sit"), "--num-attention-heads", "2"]
    edm2 = ["edm2", str(folder / "edm2.pkl"), str(folder / "edm2"), "--guider", str(folder / "worse.pkl")]
    return [[*command, "--vae", str(folder / "vae"), *extra] for command in (sit, edm2)]


def test_folders_load_with_the_content_of_the_originals(originals, capsys):
    for command in convert_both(originals):
        convert.main(command)
    assert "EDM2Pipeline" in capsys.readouterr().out
    sit, edm2 = load_pipeline(originals / "sit"), load_pipeline(originals / "edm2")
    expected = tiny_sit(in_channels=4, learn_sigma=True).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in sit.transformer.state_dict().items())
    assert edm2.config.latents_bias == [0, 1, 2, 3] and edm2.guider.config.num_classes == 0
    for pipeline in (sit, edm2):
        assert all(torch.equal(a, b) for a, b in zip(pipeline.vae.parameters(), tiny_vae().parameters(), strict=True))
    assert not list(originals.glob("*.partial"))


def test_vae_that_is_not_embedded_is_named(originals, capsys):
    for command in convert_both(originals, "--no-embed-vae", "--dtype", "bfloat16"):
        convert.main(command)
    printed, vae = capsys.readouterr().out, str(originals / "vae")
    for name in ("sit", "edm2"):
        assert not (originals / name / "vae").exists() and printed.count(vae) == 2
        assert 'vae=AutoencoderKL.from_pretrained("vae")' in (originals / name / "README.md").read_text()
    pipeline = load_pipeline(originals / "edm2", vae=tiny_vae(), torch_dtype=torch.bfloat16)
    assert pipeline.unet.dtype == torch.bfloat16 and pipeline.unet.unet.out_gain.dtype == torch.float32


def test_pushed_pipelines_load_with_the_library_and_without(originals):
    hub = HubServer()
    for command in convert_both(originals):
        family, folder = command[0], Path(command[2])
        convert.main(command)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        hub.add(f"org/{family}", {**files, **code_of(load_pipeline(folder))})
        shutil.rmtree(folder)
    try:
        commands = [[*command, "--push-to-hub", f"org/new-{command[0]}"] for command in convert_both(originals)]
        token = {"HF_TOKEN": "hf_secretsecretsecret"}
        result = run_code(hub, originals / "home", LOAD_AND_PUSH, commands, originals / "again", **token)
        assert result.returncode == 0, result.stderr[-3000:]
    finally:
        hub.shutdown()
    for name, network in (("sit", "transformer/sit.py"), ("edm2", "unet/edm2.py")):
        again = originals / "again" / str(int(name == "edm2"))
        for file in ("pipeline.py", network):
            assert (again / file).read_bytes() == hub.repos[f"org/{name}"][0][1][file]
        (commit,) = hub.repos[f"org/new-{name}"]  # one commit, so a push is whole or absent
        assert {"pipeline.py", network, "model_index.json", "vae/config.json", "README.md"} <= set(commit[1])
        assert commit[1]["model_index.json"] == hub.repos[f"org/{name}"][0][1]["model_index.json"]
        assert all(b"hf_secret" not in data and str(originals).encode() not in data for data in commit[1].values())
        assert b"trust_remote_code=True" in commit[1]["README.md"]


@pytest.mark.parametrize("family", ["sit", "edm2"])
def test_refused_files_leave_no_folder_and_existing_ones_stay(originals, family):
    command = convert_both(originals)[family == "edm2"]
    for name in ("sit.pt", "edm2.pkl"):
        (originals / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is refused as"):
        convert.main(command)
    assert not (originals / family).exists()
    (originals / family).mkdir()
    (originals / family / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        convert.main(command)
    assert [path.name for path in (originals / family).iterdir()] == ["mine.txt"]
