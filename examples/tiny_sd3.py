# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Writes what configs/sd3_smoke.yaml trains on: a tiny random Stable Diffusion 3, a CLIP and captioned images.

    python examples/tiny_sd3.py outputs/tiny-sd3
    trl-distreward train --config examples/configs/sd3_smoke.yaml
"""

import sys
from pathlib import Path

import diffusers
import torch
import transformers
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

COLOURS = {"red": (210, 50, 40), "green": (60, 180, 70), "blue": (50, 70, 210), "white": (235, 235, 235)}
NOUNS = ("cat", "dog", "house", "boat")
TOKENS = ["<pad>", "<unk>", "<s>", "</s>", "a", *COLOURS, *NOUNS]
SIDE = 16  # pixels of an image
MAX_LENGTH = 8  # tokens of a prompt
WIDTH = 16


def make_parts(folder: Path) -> None:
    """Writes `pipeline`, `clip` and `dataset` to a folder."""
    torch.manual_seed(0)
    random_pipeline().save_pretrained(folder / "pipeline")
    random_clip().save_pretrained(folder / "clip")
    word_tokenizer().save_pretrained(folder / "clip")
    captioned_images(64).save_to_disk(folder / "dataset")


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Makes a tokenizer with one token for each word of the prompts."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TOKENS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **names)


def clip_text_config() -> dict:
    return {
        "vocab_size": len(TOKENS),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


def random_clip() -> transformers.CLIPModel:
    vision = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 8, "projection_dim": 8}
    config = transformers.CLIPConfig(text_config=clip_text_config(), vision_config=vision, projection_dim=8)
    return louder(transformers.CLIPModel(config))


def random_pipeline() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE // 2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        shift_factor=0.0,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    text = transformers.CLIPTextConfig(**clip_text_config())
    t5 = transformers.T5Config(
        vocab_size=len(TOKENS), d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, pad_token_id=0
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=louder(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=louder(transformers.CLIPTextModelWithProjection(text)),
        tokenizer=word_tokenizer(),
        text_encoder_2=louder(transformers.CLIPTextModelWithProjection(text)),
        tokenizer_2=word_tokenizer(),
        text_encoder_3=louder(transformers.T5EncoderModel(t5)),
        tokenizer_3=word_tokenizer(),
    )


def louder(module: nn.Module) -> nn.Module:
    """Draws weights large enough for inputs to matter, also in output layers that start at zero."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return module.eval()


def captioned_images(count: int) -> Dataset:
    """Makes noisy images of one colour, with prompts that name the colour."""
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list] = {"image": [], "prompt": []}
    pairs = [(colour, noun) for colour in COLOURS for noun in NOUNS]
    for i in range(count):
        colour, noun = pairs[i % len(pairs)]
        pixels = torch.randn(SIDE, SIDE, 3, generator=generator) * 20 + torch.tensor(COLOURS[colour])
        rows["image"].append(PILImage.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy()))
        rows["prompt"].append(f"a {colour} {noun}")
    return Dataset.from_dict(rows, features=Features({"image": Image(), "prompt": Value("string")}))


if __name__ == "__main__":
    make_parts(Path(sys.argv[1]))
