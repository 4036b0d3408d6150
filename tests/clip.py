# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A tiny random CLIP, and images and prompts of few colours for it."""

import torch
import transformers

from tests.policies_parts import randomized, tokenizer

COLOURS = {"a red cat": (220, 40, 30), "a cat": (40, 200, 60), "the blue dog runs": (30, 60, 230)}


def tiny_clip(seed=0):
    torch.manual_seed(seed)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.CLIPConfig(
        text_config={**shared, **ids, "vocab_size": 16, "max_position_embeddings": 8},
        vision_config={**shared, "image_size": 16, "patch_size": 8, "projection_dim": 6},
        projection_dim=6,
    )
    return randomized(transformers.CLIPModel(config), std=0.3)


def save_tiny_clip(folder):
    tiny_clip().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def coloured(count, seed=0, size=16):
    """uint8 images `(count, 3, size, size)` and their prompts in turn, each of its prompt's colour, and noisy."""
    prompts = [list(COLOURS)[i % len(COLOURS)] for i in range(count)]
    colours = torch.tensor([COLOURS[prompt] for prompt in prompts]).view(-1, 3, 1, 1)
    noise = torch.randint(-25, 26, (count, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return (colours + noise).to(torch.uint8), prompts
