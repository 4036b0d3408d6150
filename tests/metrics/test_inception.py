# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The FID network. Fingerprints are outputs of the original networks with the weights of `fill_by_pattern`."""

from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import fill_by_pattern, pattern_images
from trl_distreward.metrics import inception
from trl_distreward.metrics.inception import InceptionV3, load_inception

IMAGES = pattern_images(2, 3, 48, 40)
# first and last three values of each image, and the norm of both
FINGERPRINTS = {
    # torch-fidelity 0.4.0
    "pool3": (
        [0.04715, 0, 1.16213, 1.80343, 0.05722, 0.95674, 0.04391, 0, 1.32054, 2.23524, 0.10639, 0.88486],
        81.7157,
    ),
    "logits_unbiased": (
        [1.36253, 0.20926, -1.10688, 1.72492, 1.30288, 1.13541, 1.34587, 0.24909, -1.23128, 1.82067, 1.52724, 1.07642],
        81.1335,
    ),
    "logits": (
        [1.20867, 0.08734, -0.89114, 1.83659, 1.21906, 1.37815, 1.192, 0.12718, -1.01554, 1.93234, 1.44342, 1.31916],
        81.5104,
    ),
    # pytorch-fid 0.3.0
    "pytorch": (
        [0.04266, 0, 1.15597, 1.79164, 0.07089, 1.01319, 0.04853, 0, 1.30884, 2.22115, 0.10394, 0.8853],
        81.6421,
    ),
    # clean-fid 0.1.35's resize, torch-fidelity's network
    "clean": ([0.04698, 0, 1.19749, 1.87752, 0.07608, 1.0215, 0.05275, 0, 1.3528, 2.27851, 0.10403, 0.90258], 83.9469),
    # the evaluator of OpenAI's consistency models, which is NVIDIA's network: no scale of normalization
    "nvidia": (
        [0.07649, 0, 0.63572, 0.95283, 0.03811, 0.66722, 0.10426, 0.00018, 0.75806, 1.19995, 0.1299, 0.64938],
        66.8406,
    ),
    "spatial": ([0, 1.07981, 0, 1.89604, 0, 0, 0, 1.29666, 0, 1.45581, 0, 0], 104.4591),
}


def assert_fingerprint(features, name):
    values, norm = FINGERPRINTS[name]
    ends = torch.cat([features[:, :3], features[:, -3:]], dim=1).flatten()
    assert torch.allclose(ends, torch.tensor(values), atol=1e-4, rtol=0), ends
    assert features.norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.fixture(scope="module")
def network():
    return fill_by_pattern(InceptionV3())


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """The weights under pytorch-fid's names, which are torchvision's."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    counts = {f"{n}.num_batches_tracked": torch.tensor(0) for n, m in network.named_modules() if n.endswith(".bn")}
    torch.save({**network.state_dict(), **counts}, path)
    return path


def output_of(network, output, images=IMAGES):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "output", output)
        return network(images)


def test_features_and_logits_are_those_of_torch_fidelity(network):
    outputs = {name: output_of(network, name) for name in ("pool3", "logits", "logits_unbiased")}
    for name, values in outputs.items():
        assert values.shape == (2, inception.DIMENSIONS[name])
        assert_fingerprint(values, name)
    assert torch.equal(network.logits(outputs["pool3"]), outputs["logits_unbiased"])


@pytest.mark.parametrize("resize", ["pytorch", "clean"])
def test_other_resizes_are_those_of_pytorch_fid_and_clean_fid(network, monkeypatch, resize):
    monkeypatch.setattr(network, "resize", resize)
    assert_fingerprint(network(IMAGES), resize)


def test_spatial_features_are_those_of_adms_evaluator():
    network = fill_by_pattern(InceptionV3(output="spatial"))
    assert (network.name, network.dimension) == ("inception-spatial", 2023)
    for name, value in network.state_dict().items():
        if name.endswith("bn.weight"):
            value.fill_(1)  # NVIDIA's network has no scale of normalization
    assert_fingerprint(network(IMAGES), "spatial")
    assert_fingerprint(output_of(network, "pool3"), "nvidia")


def test_weights_load_from_pytorch_fids_file_and_from_safetensors(network, saved, tmp_path):
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    for path in (saved, tmp_path / "inception.safetensors"):
        loaded = load_inception(path, resize="clean", output="logits")
        assert (loaded.name, loaded.resize, loaded.dimension) == ("inception-logits", "clean", 1008)
        state = loaded.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    names = set(torch.load(saved))
    assert {"Mixed_5b.branch5x5_1.bn.running_mean", "Mixed_7c.branch3x3dbl_3a.conv.weight", "fc.bias"} <= names


def test_files_of_another_network_are_refused(network, tmp_path):
    cases = {
        "missing": ({"fc.bias": torch.ones(1008)}, "Missing key.*Conv2d_1a_3x3"),
        "other shape": ({**network.state_dict(), "fc.bias": torch.ones(1000)}, "size mismatch for fc.bias"),
        "torchvision": ({**network.state_dict(), "AuxLogits.fc.bias": torch.ones(1)}, "Unexpected key.*AuxLogits"),
    }
    for name, (state, message) in cases.items():
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=f"(?s){name}.pth does not hold the weights of the FID.*{message}"):
            load_inception(tmp_path / f"{name}.pth")
    torch.save(network, tmp_path / "pickle.pth")  # a pickle that would run code
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("pickle.pth", "broken.safetensors"):
        with pytest.raises(ValueError, match=f"{name} does not hold the weights"):
            load_inception(tmp_path / name)


def test_default_weights_are_pytorch_fids_release(network, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(OSError, match=f"cannot be downloaded .*no network.*put that file into {place.parent}"):
        load_inception()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"something else")
    with pytest.raises(ValueError, match="6726825d.pth does not hold the weights"):
        load_inception()
    place.write_bytes(saved.read_bytes())
    assert torch.equal(load_inception().fc.bias, network.fc.bias)


def test_images_carry_gradients_and_autocast_changes_nothing(network):
    image, expected = IMAGES[:1].float().requires_grad_(), network(IMAGES[:1])
    network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(image)
    assert features.dtype == torch.float32 and torch.equal(features, expected)
    (gradient,) = torch.autograd.grad(features.square().sum(), image)
    assert gradient.isfinite().all() and gradient.abs().amax(dim=(0, 2, 3)).gt(0).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_grey_images_become_three_equal_channels(network):
    grey = IMAGES[:1, :1]
    assert torch.equal(output_of(network, "spatial", grey), output_of(network, "spatial", grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("kwargs", [{"resize": "nearest"}, {"output": "pool"}])
def test_unknown_options_are_refused(kwargs):
    with torch.device("meta"), pytest.raises(ValueError, match="is unknown: choose one of '(tensorflow|pool3)'"):
        InceptionV3(**kwargs)
