# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""SiT, the Scalable Interpolant Transformer (arXiv 2401.08740), with the original state-dict keys.

The network is DiT's (arXiv 2212.09748), and its output is a velocity. diffusers' `DiTTransformer2DModel` cannot hold
the published weights: here all blocks share their embedders, and frequencies are `10000^(-k/128)`.
"""

from collections import OrderedDict
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

# Table 1 of arXiv 2401.08740: depth, width, heads
SIT_SIZES = {
    "S": {"num_layers": 12, "hidden_size": 384, "num_attention_heads": 6},
    "B": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "L": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "XL": {"num_layers": 28, "hidden_size": 1152, "num_attention_heads": 16},
}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        waves = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(get_parameter_dtype(self.mlp)))


class LabelEmbedder(nn.Module):
    """Class embedding whose last row is the null class, which replaces labels with `dropout_prob` in training mode."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class SiTAttnProcessor:
    """Self-attention by the backend that `set_attention_backend` chose."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "Attention", x: Tensor) -> Tensor:
        q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).unbind(2)  # 3 x (B, patches, heads, head width)
        x = dispatch_attention_fn(q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config)
        return attn.proj(x.flatten(2))


class Attention(nn.Module, AttentionModuleMixin):
    _supports_qkv_fusion = False  # one layer projects to all three

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor = SiTAttnProcessor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (arXiv 2212.09748, Section 3.2)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        inner = int(hidden_size * mlp_ratio)
        fc1, fc2 = nn.Linear(hidden_size, inner), nn.Linear(inner, hidden_size)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(approximate="tanh"), fc2=fc2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiTTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """
    Class-conditional transformer that predicts a velocity.

    Parameters:
        sample_size (`int`): height and width of the input, in latent or image pixels.
        patch_size (`int`): height and width of a patch; must divide `sample_size`.
        in_channels (`int`): channels of the input and of the velocity.
        hidden_size (`int`): width; a multiple of 4 and of `num_attention_heads`.
        num_layers, num_attention_heads (`int`): number of blocks, and heads of each.
        mlp_ratio (`float`): width of the MLP, as a multiple of `hidden_size`.
        num_classes (`int`): classes; label `num_classes` is the null class.
        class_dropout_prob (`float`): probability of training on the null class; with 0 there is none.
        learn_sigma (`bool`):
            whether the last layer has a second half of channels, as published weights do; the velocity ignores them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTBlock"]
    _repeated_blocks = ["SiTBlock"]
    # the layers that an adapter adapts by default
    _lora_target_modules = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"patch_size={patch_size} must divide sample_size={sample_size}.")
        self.gradient_checkpointing = False
        grid_size = sample_size // patch_size
        patches = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.x_embedder = nn.Sequential(OrderedDict(proj=patches, flatten=nn.Flatten(2)))  # (B, width, patches)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = get_2d_sincos_pos_embed(hidden_size, grid_size, base_size=grid_size)  # (patches, width), float64
        self.pos_embed = nn.Parameter(positions.to(torch.get_default_dtype())[None], requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))
        self.initialize_weights()

    @classmethod
    def from_size(cls, size: str, **kwargs: object) -> "SiTTransformer2DModel":
        """Builds a published size, e.g. `"XL/2"`, with random weights; `kwargs` are those of the constructor."""
        name, _, patch = size.partition("/")
        if name not in SIT_SIZES or (patch and not patch.isdigit()):
            raise ValueError(f"size={size!r} is unknown: choose one of {', '.join(SIT_SIZES)}, e.g. 'XL/2'.")
        return cls(**{**SIT_SIZES[name], "patch_size": int(patch or 2), **kwargs})

    def initialize_weights(self) -> None:
        """Initializes linear layers by Xavier, embedders by N(0, 0.02²), modulations and output by 0 (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        embeddings: list[Any] = [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for embedding in embeddings:
            nn.init.normal_(embedding.weight, std=0.02)
        adapted: list[Any] = [*self.blocks, self.final_layer]
        for module in adapted:
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Puts patches `(B, patches, patch² · channels)` together to `(B, channels, H, W)`."""
        p, grid = self.config.patch_size, self.config.sample_size // self.config.patch_size
        x = x.reshape(x.shape[0], grid, grid, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, grid * p, grid * p)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Predicts `.sample`, the velocity `x_data - x_noise` `(B, C, H, W)`, at samples `hidden_states`.

        `timestep` `(B,)` is SiT's time in [0, 1], with noise at 0 and data at 1. `class_labels` `(B,)` lie in
        [0, num_classes]; the last is the null class.
        """
        x = self.x_embedder(hidden_states).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(timestep) + self.y_embedder(class_labels)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)
        velocity = self.unpatchify(self.final_layer(x, c))
        if self.config.learn_sigma:
            velocity = velocity.chunk(2, dim=1)[0]
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
