# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The FID network. Fingerprints are outputs of the original networks with the weights of `fill_by_pattern`."""

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import fill_by_pattern, pattern_images
from trl_distreward.metrics import inception
from trl_distreward.metrics.inception import BLOCKS, InceptionV3, check_state, load_inception, nvidia_names

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


def test_features_and_logits_are_those_of_torch_fidelity(network):
    outputs = network.outputs(IMAGES, ["pool3", "logits", "logits_unbiased"])
    for name, values in outputs.items():
        assert values.shape == (2, inception.DIMENSIONS[name])
        assert_fingerprint(values, name)
    assert list(outputs) == ["pool3", "logits", "logits_unbiased"]


@pytest.mark.parametrize("resize", ["pytorch", "clean"])
def test_other_resizes_are_those_of_pytorch_fid_and_clean_fid(network, monkeypatch, resize):
    monkeypatch.setattr(network, "resize", resize)
    assert_fingerprint(network(IMAGES), resize)


def test_nvidia_names_load_and_spatial_features_are_adms(network, tmp_path):
    parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    state, ours = {}, network.state_dict()
    for name, theirs in nvidia_names().items():
        state |= {f"{theirs}.{part}": ours[f"{name}.{mine}"] for part, mine in parts.items()}
    state |= {"output.weight": ours["fc.weight"], "output.bias": ours["fc.bias"]}
    assert len(state) == 378
    torch.save(state, tmp_path / "inception-2015-12-05.pt")
    loaded = load_inception(tmp_path / "inception-2015-12-05.pt", output="spatial")
    assert (loaded.name, loaded.dimension) == ("inception-spatial", 2023)
    outputs = loaded.outputs(IMAGES, ["pool3", "spatial"])
    assert_fingerprint(outputs["pool3"], "nvidia")
    assert_fingerprint(outputs["spatial"], "spatial")
    assert torch.equal(loaded(IMAGES), outputs["spatial"])  # where the pass ends early


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Conv2d_1a_3x3", "conv"),
        ("Conv2d_4a_3x3", "conv_4"),
        ("Mixed_5b.branch1x1", "mixed.conv"),
        ("Mixed_5b.branch5x5_1", "mixed.tower.conv"),
        ("Mixed_5d.branch3x3dbl_3", "mixed_2.tower_1.conv_2"),
        ("Mixed_5d.branch_pool", "mixed_2.tower_2.conv"),
        ("Mixed_6a.branch3x3", "mixed_3.conv"),
        ("Mixed_6a.branch3x3dbl_1", "mixed_3.tower.conv"),
        ("Mixed_6d.branch1x1", "mixed_6.conv"),
        ("Mixed_6d.branch7x7_2", "mixed_6.tower.conv_1"),
        ("Mixed_6d.branch7x7dbl_5", "mixed_6.tower_1.conv_4"),
        ("Mixed_7a.branch3x3_2", "mixed_8.tower.conv_1"),
        ("Mixed_7a.branch7x7x3_4", "mixed_8.tower_1.conv_3"),
        ("Mixed_7c.branch3x3_2a", "mixed_10.tower_mixed_conv"),
        ("Mixed_7c.branch3x3dbl_3b", "mixed_10.tower_1_mixed_conv_1"),
        ("Mixed_7c.branch_pool", "mixed_10.tower_2_conv"),
    ],
)
def test_names_of_the_frozen_graph(ours, theirs):
    assert nvidia_names()[ours] == f"layers.{theirs}"


def test_weights_come_back_from_pytorch_fids_file_and_from_safetensors(network, saved, tmp_path):
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    for path in (saved, tmp_path / "inception.safetensors"):
        loaded = load_inception(path, resize="clean", output="logits")
        assert (loaded.name, loaded.resize, loaded.dimension) == ("inception-logits", "clean", 1008)
        state = loaded.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    names = set(torch.load(saved))
    assert {"Mixed_5b.branch5x5_1.bn.running_mean", "Mixed_7c.branch3x3dbl_3a.conv.weight", "fc.bias"} <= names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_6b.branch7x7_2.bn.bias"), r"1 are missing \(Mixed_6b.branch7x7_2.bn.bias\)"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 are unknown \(extra\)"),
        (
            lambda s: s.update({"fc.weight": torch.ones(1000, 2048)}),
            r"1 have another shape \(fc.weight \(1000, 2048\), not \(1008, 2048\)\)",
        ),
        (lambda s: s.update({"fc.bias": torch.ones(1008).half()}), r"1 are not float32 \(fc.bias\)"),
        (lambda s: s["fc.bias"].fill_(float("nan")), r"1 are not finite \(fc.bias\)"),
        (lambda s: s.update({"AuxLogits.fc.bias": torch.ones(1)}), "torchvision's Inception-v3, which is another"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(network, change, message):
    state = {name: value.clone() if name == "fc.bias" else value for name, value in network.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=f"some.pth does not hold the FID Inception-v3.*{message}"):
        check_state(state, network, "some.pth")


def test_files_of_another_network_are_refused(tmp_path):
    torch.save({"fc.bias": torch.ones(1008)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not hold the FID Inception-v3: of its tensors 471 are miss"):
        load_inception(tmp_path / "other.pth")


def test_pickles_with_code_are_refused(tmp_path):
    (tmp_path / "inception-2015-12-05.pkl").write_bytes(b"anything")
    with pytest.raises(ValueError, match="carries source code and is not read: its weights are those of https://"):
        load_inception(tmp_path / "inception-2015-12-05.pkl")


def test_default_weights_are_pytorch_fids_release(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("trl_distreward.metrics.weights.constants.HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(ConnectionError, match=f"put the file of sha256 6726825d0af5f729cebd.* at {place}"):
        load_inception()
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not 6726825d0af5f729"):
        load_inception()


def test_autocast_and_training_mode_change_nothing(network):
    image = IMAGES[:1]
    expected = network(image)
    network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(image)
    assert features.dtype == torch.float32 and torch.equal(features, expected)


def test_images_carry_gradients_and_weights_do_not(network):
    image = IMAGES[:1].float().requires_grad_()
    features = network(image)
    assert torch.equal(features, network(IMAGES[:1]))
    (gradient,) = torch.autograd.grad(features.square().sum(), image)
    assert gradient.isfinite().all() and gradient.abs().amax(dim=(0, 2, 3)).gt(0).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_grey_images_are_three_equal_channels(network):
    grey = IMAGES[:1, :1]
    names = ["spatial"]  # a pass that ends early suffices
    expected = network.outputs(grey.repeat(1, 3, 1, 1), names)
    assert torch.equal(network.outputs(grey, names)["spatial"], expected["spatial"])


def test_padding_is_left_out_of_averages():
    for name in ("Mixed_5b", "Mixed_6b", "Mixed_7b"):
        assert BLOCKS[name][-1][0] == "average"
    assert torch.equal(inception.POOLS["average"](torch.full((1, 1, 4, 4), 3.0)), torch.full((1, 1, 4, 4), 3.0))
    assert BLOCKS["Mixed_7c"][-1][0] == "maximum"


@pytest.mark.parametrize("kwargs", [{"resize": "nearest"}, {"output": "pool"}])
def test_unknown_options_are_refused(kwargs):
    with torch.device("meta"), pytest.raises(ValueError, match="is unknown: choose one of '(tensorflow|pool3)'"):
        InceptionV3(**kwargs)
