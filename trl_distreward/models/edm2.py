# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""EDM2's U-Net with magnitude-preserving layers (arXiv 2312.02696, config G), with the published state-dict keys.

Written from the paper's equations and Figure 21. Every layer normalizes its weights, and activations keep unit
magnitude on expectation, with pixel norms as the only normalization layers.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

# channels of the first level, and dropout in training
EDM2_SIZES: dict[str, dict[str, Any]] = {
    "XXS": {"model_channels": 64},
    "XS": {"model_channels": 128},
    "S": {"model_channels": 192},
    "M": {"model_channels": 256, "dropout": 0.1},
    "L": {"model_channels": 320, "dropout": 0.1},
    "XL": {"model_channels": 384, "dropout": 0.1},
    "XXL": {"model_channels": 448, "dropout": 0.1},
}


def normalize(x: Tensor, dim: int | None = None, eps: float = 1e-4) -> Tensor:
    """Divides `x` by its root mean square along `dim`, or along all dimensions but the first (Eq. 66)."""
    dims = list(range(1, x.ndim)) if dim is None else [dim]
    count = math.prod([x.shape[d] for d in dims])
    rms = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32) / math.sqrt(count)
    return x / (rms + eps).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Computes SiLU, divided by its root mean square on standard normal input (Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Adds with weights that keep the magnitude of independent inputs (Eq. 88); `t` is the share of `b`."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenates channels, scaled so that `b` contributes the share `t` for any channel counts (Eq. 103)."""
    scale = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))], dim=1)


class MPFourier(nn.Module):
    """Fourier features of unit magnitude, `√2 cos(f x + φ)`, with fixed random frequencies and phases (Eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        angles = x.float()[:, None] * self.freqs.float() + self.phases.float()
        return math.sqrt(2) * angles.cos()  # (B, channels)


class MPLayer(nn.Module):
    """Linear layer, or convolution with a kernel size, that uses its weights at unit magnitude (Eq. 47)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | None = None):
        super().__init__()
        kernel = () if kernel_size is None else (kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def unit_weight(self) -> Tensor:
        # a view, as layerwise casting replaces the parameter's data before the backward pass reads it
        return normalize(self.weight.view_as(self.weight).float())

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = (self.unit_weight() * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPEmbedding(MPLayer):
    """Linear layer of one-hot labels times √classes, which cancels its own 1/√classes."""

    def forward(self, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self.unit_weight().t()[labels]


class EDM2Block(nn.Module):
    """Encoder or decoder block with optional self-attention (Figure 21); `config` as in [`EDM2UNet`]."""

    def __init__(
        self,
        config: FrozenDict,
        emb_channels: int,
        in_channels: int,
        out_channels: int,
        *,
        decoder: bool,
        attention: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.decoder, self.resample = decoder, resample
        self.num_heads = out_channels // config["channels_per_head"] if attention else 0
        self.res_balance, self.attn_balance = config["res_balance"], config["attn_balance"]
        self.clip_act = config["clip_act"]
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = MPLayer(in_channels if decoder else out_channels, out_channels, 3)
        self.emb_linear = MPLayer(emb_channels, out_channels)
        self.conv_res1 = MPLayer(out_channels, out_channels, 3)
        self.dropout = nn.Dropout(config["dropout"])
        self.conv_skip = MPLayer(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPLayer(out_channels, 3 * out_channels, 1) if attention else None
        self.attn_proj = MPLayer(out_channels, out_channels, 1) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "down":  # the published filter [1, 1]: averages 2x2 pixels, or copies to them
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if not self.decoder:
            x = normalize(self._skip(x), dim=1)
        modulation = self.emb_linear(emb, self.emb_gain) + 1  # (B, channels)
        y = self.conv_res0(mp_silu(x))
        y = self.dropout(mp_silu(y * modulation[:, :, None, None].to(y.dtype)))
        if self.decoder:
            x = self._skip(x)
        x = mp_sum(x, self.conv_res1(y).to(x.dtype), self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attend(x).to(x.dtype), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)

    def _attend(self, x: Tensor) -> Tensor:
        """Computes cosine attention: queries, keys and values are normalized per head and pixel."""
        assert self.attn_qkv is not None and self.attn_proj is not None
        batch, channels, height, width = x.shape
        qkv = self.attn_qkv(x).reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        q, k, v = normalize(qkv, dim=2).permute(3, 0, 4, 1, 2)  # 3 x (B, pixels, heads, head width)
        y = dispatch_attention_fn(q, k, v)
        return self.attn_proj(y.flatten(2).transpose(1, 2).reshape(batch, channels, height, width))


class EDM2UNet(nn.Module):
    """The raw network `F(x; c_noise, class)`, before preconditioning; `config` is that of [`EDM2UNet2DModel`]."""

    def __init__(self, config: FrozenDict):
        super().__init__()
        sample_size, in_channels, num_classes = config["sample_size"], config["in_channels"], config["num_classes"]
        widths = [config["model_channels"] * multiplier for multiplier in config["channel_mult"]]
        emb_channels, num_blocks = max(widths), config["num_blocks"]
        self.label_balance, self.concat_balance = config["label_balance"], config["concat_balance"]
        self.gradient_checkpointing = False
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPLayer(widths[0], emb_channels)
        self.emb_label = MPEmbedding(num_classes, emb_channels) if num_classes else None
        block = partial(EDM2Block, config, emb_channels)
        levels = [(sample_size >> level, width) for level, width in enumerate(widths)]
        width = widths[0]
        self.enc = nn.ModuleDict({f"{sample_size}x{sample_size}_conv": MPLayer(in_channels + 1, width, 3)})
        skips = [width]
        for level, (size, channels) in enumerate(levels):
            attends = size in config["attn_resolutions"]
            if level:
                self.enc[f"{size}x{size}_down"] = block(width, width, decoder=False, attention=False, resample="down")
                skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{size}x{size}_block{i}"] = block(width, channels, decoder=False, attention=attends)
                width = channels
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, (size, channels) in reversed(list(enumerate(levels))):
            attends = size in config["attn_resolutions"]
            if level == len(levels) - 1:
                self.dec[f"{size}x{size}_in0"] = block(width, width, decoder=True, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(width, width, decoder=True, attention=False)
            else:
                self.dec[f"{size}x{size}_up"] = block(width, width, decoder=True, attention=False, resample="up")
            for i in range(num_blocks + 1):
                joined = width + skips.pop()
                self.dec[f"{size}x{size}_block{i}"] = block(joined, channels, decoder=True, attention=attends)
                width = channels
        self.out_conv = MPLayer(width, in_channels, 3)

    def embed(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(c_noise))  # (B, emb_channels)
        if self.emb_label is not None:
            label = torch.zeros_like(emb)
            if class_labels is not None:
                label = self.emb_label(class_labels).to(emb.dtype)
            emb = mp_sum(emb, label, self.label_balance)
        return mp_silu(emb)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        emb = self.embed(c_noise, class_labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # a channel of ones stands in for biases
        skips = []
        for i, module in enumerate(self.enc.values()):
            x = self._run(module, x, emb) if i else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = self._run(module, x, emb)
        return self.out_conv(x, self.out_gain)

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x, emb)  # type: ignore[operator]
        return block(x, emb)


class EDM2UNet2DModel(ModelMixin, ConfigMixin):
    """
    EDM2's denoiser with its preconditioning: takes noisy samples and noise levels, and returns denoised samples.

    Only the direction of a layer's weights matters. Training should still keep their size at one: as weights grow, a
    step of the same size turns them less. Set `forced_weight_normalization`, or call `normalize_weights` after each
    optimizer step. Adapters are not supported: a low-rank update beside a normalized weight differs from one merged
    into it.

    Parameters:
        sample_size (`int`): height and width of the input, in latent or image pixels; halved from level to level.
        in_channels (`int`): channels of the input and output.
        num_classes (`int`): classes; 0 for an unconditional model.
        model_channels (`int`): channels of the first level.
        channel_mult (`list[int]`): channels of each level, as multiples of `model_channels`.
        num_blocks (`int`): blocks per level of the encoder; the decoder has one more.
        attn_resolutions (`list[int]`): heights of the levels with self-attention.
        channels_per_head (`int`): width of an attention head; divides a level's channels.
        dropout (`float`): dropout in training mode.
        label_balance, concat_balance (`float`): share of the class embedding, and of the skip connections.
        res_balance, attn_balance (`float`): share of residual branches and of attention.
        clip_act (`float`): bound on each block's activations; `None` for no bound.
        sigma_data (`float`): standard deviation of the data.
        logvar_channels (`int`): Fourier features for the uncertainty.
        forced_weight_normalization (`bool`):
            whether the trainers of this library call `normalize_weights` after each optimizer step (Eq. 66).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EDM2Block"]
    _repeated_blocks = ["EDM2Block"]
    # half precision would round frequencies, which reach tens, and gains, which scale everything
    _keep_in_fp32_modules = ["emb_fourier", "logvar_fourier", "emb_gain", "out_gain"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        num_classes: int = 1000,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        forced_weight_normalization: bool = False,
    ):
        super().__init__()
        self.unet = EDM2UNet(self.config)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPLayer(logvar_channels, 1)
        # denoising does not use the uncertainty, and DDP needs a gradient for every trained parameter
        self.logvar_linear.requires_grad_(False)

    @classmethod
    def from_size(cls, size: str, **kwargs: object) -> "EDM2UNet2DModel":
        """Builds a published size, `"XXS"` to `"XXL"`, with random weights; `kwargs` are those of the constructor."""
        if size not in EDM2_SIZES:
            raise ValueError(f"size={size!r} is unknown: choose one of {', '.join(EDM2_SIZES)}.")
        return cls(**{**EDM2_SIZES[size], **kwargs})

    @torch.no_grad()
    def normalize_weights(self) -> None:
        """Overwrites the weights of all layers with their normalized values. The output stays the same, to an ε."""
        for module in self.modules():
            if isinstance(module, MPLayer):
                module.weight.copy_(module.unit_weight())

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Keeps weights in `storage_dtype` while their layer does not run; diffusers casts torch's layers only."""
        compute_dtype = compute_dtype or self.dtype
        for module in self.modules():
            if isinstance(module, MPLayer):
                apply_layerwise_casting_hook(module, storage_dtype, compute_dtype, non_blocking)

    def uncertainty(self, timestep: Tensor) -> Tensor:
        """Computes `u(σ)` of shape `(B,)`, the log-variance of the loss at noise levels σ (Eq. 21); not trained."""
        return self.logvar_linear(self.logvar_fourier(timestep.float().log() / 4)).flatten()

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """
        Denoises `sample`, `z = x_0 + σ ε` `(B, C, H, W)`, at the noise levels σ > 0 in `timestep`, `(B,)` or a number.

        Without `class_labels` `(B,)` no class is embedded. Preconditioning and the returned `.sample` are in float32
        (EDM, arXiv 2206.00364, Table 1); the network runs in its weights' dtype, or under autocast.
        """
        z, data = sample.float(), self.config.sigma_data
        sigma = torch.as_tensor(timestep, dtype=torch.float32, device=z.device).reshape(-1).expand(len(z))
        total = (sigma**2 + data**2).view(-1, 1, 1, 1)
        c_skip, c_in = data**2 / total, total.rsqrt()
        c_out = sigma.view(-1, 1, 1, 1) * data * c_in
        raw = self.unet((c_in * z).to(self.dtype), sigma.log() / 4, class_labels)
        denoised = c_skip * z + c_out * raw.float()
        return UNet2DOutput(sample=denoised) if return_dict else (denoised,)
