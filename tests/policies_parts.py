# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Tiny random parts of pipelines: tokenizer, text encoders, VAE, schedulers."""

from typing import Any

import diffusers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

PROMPTS = ["a red cat", "the blue dog runs", "a cat"]


def randomized(module: nn.Module, std: float = 0.15) -> nn.Module:
    """Fills weights that would start at zero without effect, and switches dropout off."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 or "token" in name or "table" in name:
            nn.init.normal_(parameter, std=std)
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.05)
    return module.eval()


def tokenizer(length: int = 8) -> transformers.PreTrainedTokenizerFast:
    """Makes a tokenizer of whole words, between `<s>` and `</s>`."""
    words = ["<pad>", "<unk>", "<s>", "</s>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=length,
        padding_side="right",
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def language(hidden: int, **kwargs: Any) -> dict[str, Any]:
    """The config of a small language model."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return {"vocab_size": 16, "hidden_size": hidden, "intermediate_size": hidden, **heads, **kwargs}


def clip(projection: bool = False) -> nn.Module:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "projection_dim": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8}
    config = transformers.CLIPTextConfig(**sizes, **layers, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return randomized(kind(config))


def t5(hidden: int = 16) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=16, d_model=hidden, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=3
    )
    return randomized(transformers.T5EncoderModel(config))


def gemma() -> nn.Module:
    config = transformers.Gemma2Config(**language(8, num_hidden_layers=2, head_dim=4, pad_token_id=0))
    return randomized(transformers.Gemma2Model(config))


def coder_blocks(count: int) -> dict[str, list[str]]:
    """Blocks of a VAE that halves each side `count - 1` times."""
    return {"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count}


def vae(**kwargs: Any) -> diffusers.AutoencoderKL:
    """Makes a VAE of 4 channels that halves each side."""
    sizes = {"block_out_channels": (4, 4), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 1}
    return randomized(diffusers.AutoencoderKL(**{**coder_blocks(2), **sizes, "scaling_factor": 0.5, **kwargs}))


def ddim(**kwargs: Any) -> diffusers.DDIMScheduler:
    config = {"clip_sample": False, "steps_offset": 1, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    return diffusers.DDIMScheduler(**{"beta_start": 0.00085, "beta_end": 0.012, **config, **kwargs})


def flow(**kwargs: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**kwargs)
