# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.clip import coloured, save_tiny_clip, tiny_clip
from tests.helpers import features, real_images
from tests.policies_parts import tokenizer
from trl_distreward import JointTextFeatures, load_clip, load_feature_extractor
from trl_distreward.metrics import CLIPEmbeddings, extract_features


@pytest.fixture(scope="module")
def clip():
    return CLIPEmbeddings(tiny_clip(), tokenizer())


def test_embeddings_are_those_of_the_model(clip):
    images, prompts = coloured(5)
    tokens = tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = clip.model(
            pixel_values=clip.prepare(images), input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
    torch.testing.assert_close(clip(images), outputs.image_embeds)
    torch.testing.assert_close(clip.prompts(prompts), outputs.text_embeds)
    assert clip.dimension == 6 and not any(p.requires_grad for p in clip.parameters())


def test_images_are_embedded_as_by_the_feature_extractor(tmp_path):
    folder = save_tiny_clip(tmp_path)
    settings = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 16, "resample": 3, **settings}))
    images = coloured(3, size=40)[0]
    loaded, extractor = load_clip(folder), load_feature_extractor(folder, resize="pillow")
    torch.testing.assert_close(loaded(images), extractor(images))
    # statistics of the one serve the other
    assert (loaded.name, loaded.resize) == (extractor.name, extractor.resize) == (tmp_path.name, loaded.resize)


def test_a_prompt_is_embedded_once_and_independently_of_others():
    model, asked = tiny_clip(), []
    clip = CLIPEmbeddings(model, tokenizer())
    clip.cache_size = 2
    inner = model.get_text_features
    model.get_text_features = lambda **inputs: asked.append(len(inputs["input_ids"])) or inner(**inputs)
    together = clip.prompts(["a cat", "a red cat", "a cat"])
    assert torch.equal(together[0], together[2]) and asked == [64]
    clip.prompts(["a cat"])
    assert asked == [64]
    clip.prompts(["the blue dog runs", "a cat"])  # the cache keeps two
    assert asked == [64] * 2
    alone = clip.prompts(["a red cat"])
    assert asked == [64] * 3  # always the same number, so the last bits are the same
    assert torch.equal(alone[0], together[1])


def test_folders_without_all_weights_or_tokenizer_are_refused(tmp_path):
    folder = save_tiny_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "text_projection" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks weights of CLIP.*text_projection"):
        load_clip(folder)
    with pytest.raises(OSError, match="nothing"):
        load_clip(str(tmp_path / "nothing"))


def test_joint_features_are_concatenated_and_move_together(clip):
    images, prompts = coloured(4)
    joint = JointTextFeatures(clip, clip.prompts, scale=3.0)
    values = extract_features(joint, images, prompts)
    assert torch.equal(values, torch.cat([clip(images), 3.0 * clip.prompts(prompts)], dim=1))
    other = CLIPEmbeddings(tiny_clip(1), tokenizer())
    mixed = JointTextFeatures(features, other.prompts, scale=1)
    assert mixed(real_images(2), prompts[:2]).shape == (2, 14)
    mixed.to("meta")
    assert other.mean.is_meta
