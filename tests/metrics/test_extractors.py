# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from tests.helpers import features, pattern_images, real_images
from trl_distreward import (
    FeatureStatistics,
    JointFeatures,
    JointTextFeatures,
    SubsetReplaceReward,
    load_feature_extractor,
)
from trl_distreward.metrics.extractors import network_digest

IMAGES = pattern_images(2, 3, 40, 48)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PREPROCESSOR = {
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 32},
    "image_mean": [0.5, 0.25, 0],
    "image_std": [0.5, 1, 2],
    "resample": 2,
}


class Colours(nn.Module):
    resize, dimension = "none", 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return images.float().mean(dim=(2, 3)) * self.scale

    def doubled(self, images):
        return 2 * self(images)


colours = Colours()
doubled = colours.doubled
joint = JointFeatures(features, num_classes=3, scale=1)


def save(model, folder, **preprocessor):
    torch.manual_seed(0)
    model.init_weights()
    model.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return str(folder)


@pytest.fixture
def dinov2(tmp_path):
    return save(Dinov2Model(Dinov2Config(**SMALL, image_size=518, patch_size=14)), tmp_path / "dinov2")


@pytest.fixture
def vit(tmp_path):
    model = ViTModel(ViTConfig(**SMALL, image_size=28, patch_size=14), add_pooling_layer=False)
    return save(model, tmp_path / "vit", **PREPROCESSOR)


def test_dinov2_returns_the_class_token_of_normalized_images(dinov2):
    extractor = load_feature_extractor("dinov2", source=dinov2)
    assert (extractor.name, extractor.resize, extractor.dimension) == ("dinov2", "torch-bicubic-224", 16)
    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(extractor.prepare(images).mean(dim=(0, 2, 3)), expected, atol=1e-5)
    hidden = extractor.model(pixel_values=extractor.prepare(IMAGES)).last_hidden_state
    assert torch.allclose(extractor(IMAGES), hidden[:, 0], atol=1e-6)
    assert not extractor.training and not any(p.requires_grad for p in extractor.parameters())


def test_dinov2_positions_are_resampled_as_by_its_authors(dinov2):
    plain = Dinov2Model.from_pretrained(dinov2)
    with torch.no_grad():
        ramp = torch.arange(37.0).view(1, 37, 1).expand(37, 37, 16)  # each position holds its column
        plain.embeddings.position_embeddings[0, 1:] = ramp.flatten(0, 1)
    plain.save_pretrained(dinov2)
    positions = load_feature_extractor("dinov2", source=dinov2).model.embeddings.position_embeddings
    columns = positions[0, 1:, 0].view(16, 16)
    ours, theirs = ((torch.arange(16) + 0.5) * 37 / count - 0.5 for count in (16.1, 16))
    # torch's bicubic filter reads a ramp to within 0.06 of its value, but for the ends
    assert (columns - ours)[:, 1:-1].abs().max() < 0.06 < 0.15 < (columns - theirs)[:, 1:-1].abs().max()
    native = load_feature_extractor("dinov2", source=dinov2, size=518).model.embeddings.position_embeddings
    assert torch.equal(native, plain.embeddings.position_embeddings)


def test_clip_returns_the_normalized_projection(tmp_path):
    config = CLIPVisionConfig(**SMALL, image_size=336, patch_size=112, projection_dim=8)
    folder = save(CLIPVisionModelWithProjection(config), tmp_path / "clip")
    extractor = load_feature_extractor("clip", source=folder)
    assert (extractor.name, extractor.dimension) == ("clip", 8)
    assert extractor.resize == "pillow-bicubic-336-image_embeds-clip"
    embeddings = extractor(IMAGES)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2))
    raw = extractor.model(pixel_values=extractor.prepare(IMAGES)).image_embeds
    assert torch.allclose(embeddings, raw / raw.norm(dim=1, keepdim=True), atol=1e-6)
    black = extractor.prepare(torch.zeros(1, 3, 20, 20, dtype=torch.uint8))[0, :, 0, 0]
    assert torch.allclose(black, torch.tensor([-1.7923, -1.7521, -1.4802]), atol=1e-4)  # -mean / std of CLIP


def test_backbone_follows_its_preprocessor_and_arguments_win(vit):
    extractor = load_feature_extractor(vit)
    assert (extractor.name, extractor.dimension) == ("vit", 16)
    assert extractor.resize == "torch-bilinear-28-mean=0.5,0.25,0-std=0.5,1,2"
    white = extractor.prepare(torch.full((1, 1, 9, 9), 255, dtype=torch.uint8))
    assert white.shape == (1, 3, 28, 28)
    assert torch.allclose(white[0, :, 5, 5], torch.tensor([1, 0.75, 0.5]))
    other = load_feature_extractor(vit, pooling="mean", resize="pillow", mode="bicubic")
    assert other.resize == "pillow-bicubic-28-mean-mean=0.5,0.25,0-std=0.5,1,2"
    hidden = other.model(pixel_values=other.prepare(IMAGES)).last_hidden_state
    assert torch.allclose(other(IMAGES), hidden.mean(dim=1), atol=1e-6)
    assert not torch.allclose(other(IMAGES), extractor(IMAGES), atol=1e-2)


def test_backbone_of_feature_maps_is_pooled(tmp_path):
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2))
    folder = save(model, tmp_path / "convnext", **PREPROCESSOR)
    assert load_feature_extractor(folder)(IMAGES).shape == (2, 12)
    mean = load_feature_extractor(folder, pooling="mean")
    maps = mean.model(pixel_values=mean.prepare(IMAGES)).last_hidden_state  # (B, d, h, w)
    assert torch.allclose(mean(IMAGES), maps.mean(dim=(2, 3)), atol=1e-6)


@pytest.mark.parametrize("resize", ["torch", "pillow"])
def test_images_carry_gradients_and_autocast_changes_nothing(vit, resize):
    extractor = load_feature_extractor(vit, resize=resize)
    images = IMAGES.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = extractor(images)
    assert values.dtype == torch.float32 and torch.equal(values, extractor(IMAGES))
    (gradient,) = torch.autograd.grad(values.square().sum(), images)
    assert gradient.isfinite().all() and gradient.abs().amax(dim=(2, 3)).gt(0).all()


def test_unknown_backbones_need_their_settings(tmp_path):
    model = SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=28, patch_size=14))
    folder = save(model, tmp_path / "siglip")
    given = {"pooling": "pooler", "size": 28, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert load_feature_extractor(folder, **given).dimension == 16
    for options, message in (
        ({}, "siglip, does not say how to use it: give pooling, size, mean, std"),
        ({**given, "pooling": "max"}, "pooling='max' is unknown"),
        ({**given, "resize": "nearest"}, "resize='nearest'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_feature_extractor(folder, **options)


def test_weights_that_would_stay_random_are_refused(vit):
    with pytest.raises(ValueError, match="which would stay random"):
        load_feature_extractor(vit, pooling="pooler")
    state = load_file(f"{vit}/model.safetensors")
    del state["layernorm.bias"]
    save_file(state, f"{vit}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of vit, .*layernorm.bias"):
        load_feature_extractor(vit)


def test_statistics_with_a_digest_need_the_same_weights(vit, tmp_path):
    features = load_feature_extractor(vit)
    metadata = {"extractor": features.name, "resize": features.resize, "weights": network_digest(features)}
    FeatureStatistics.from_features(features(real_images(20)), metadata).save(tmp_path / "real.safetensors")
    SubsetReplaceReward(load_feature_extractor(vit), tmp_path / "real.safetensors")
    with torch.no_grad():
        features.model.layernorm.bias += 1
    with pytest.raises(ValueError, match="has weights '.*', but the images are seen with"):
        SubsetReplaceReward(features, tmp_path / "real.safetensors")


def test_digests_depend_on_values_but_not_on_their_names():
    first, second = nn.Linear(2, 3), nn.Module()
    second.renamed, second.other = first.bias, first.weight
    assert network_digest(first) == network_digest(second)
    assert network_digest({"a": first, "b": nn.Linear(1, 1)}) != network_digest({"b": first, "a": nn.Linear(1, 1)})
    assert network_digest(first) != network_digest(nn.Linear(2, 3)) != network_digest(first.double())


def test_your_own_callable_is_wrapped():
    extractor = load_feature_extractor("tests.helpers.features")
    assert extractor.name == extractor.resize == "tests.helpers.features" and extractor.dimension is None
    assert torch.equal(extractor(real_images(5)), features(real_images(5)))
    for name in ("colours", "doubled"):
        extractor = load_feature_extractor(f"tests.metrics.test_extractors.{name}")
        assert [p.requires_grad for p in extractor.parameters()] == [False]
    conditional = load_feature_extractor("tests.metrics.test_extractors.joint")
    assert conditional.needs_conditions and conditional(real_images(2), torch.tensor([0, 2])).shape == (2, 11)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inceptoin", {}, "'inceptoin' is unknown: give 'inception', 'dinov2', 'clip'"),
        ("no.such.module", {}, "cannot be imported"),
        ("tests.metrics.test_extractors.SMALL", {}, "is a dict: give a function of images"),
        ("tests.metrics.test_extractors.Colours", {}, "is a type: give a function of images"),
        ("dinov2", {"source": "no/such/folder"}, "cannot be loaded .*run `hf download .* or give a folder"),
        ("inception", {"size": 3}, "inception has no option size"),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        load_feature_extractor(name, **options)


@pytest.mark.parametrize(("factor", "text"), [(1.0, False), (40.0, False), (0.01, True)])
def test_the_fitted_scale_lets_conditions_vary_as_much_as_features(factor, text):
    images, conditions = real_images(300), torch.arange(300) % 3
    if text:
        conditions = [f"{'ab' * (label + 1)}" for label in conditions.tolist()]
        lengths = lambda prompts: torch.tensor([[len(prompt), 1.0] for prompt in prompts])  # noqa: E731
        joint = JointTextFeatures(lambda x: factor * features(x), lengths)
    else:
        joint = JointFeatures(lambda x: factor * features(x), num_classes=3)
    with pytest.raises(ValueError, match=r"call fit\(real_images"):
        joint(images, conditions)
    values = joint.fit(images, conditions)(images, conditions)
    dimension = features(images).shape[1]
    ratio = values[:, dimension:].var(dim=0).sum() / values[:, :dimension].var(dim=0).sum()
    assert ratio.item() == pytest.approx(1.0, rel=1e-4)
