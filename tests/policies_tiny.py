# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A tiny random pipeline of every family, and how each is called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers

from tests.edm2 import tiny_edm2_pipeline
from tests.helpers import tiny_pipeline
from tests.policies_parts import (
    PROMPTS,
    clip,
    coder_blocks,
    ddim,
    flow,
    gemma,
    language,
    randomized,
    t5,
    tokenizer,
    vae,
)

LABELS = [0, 2, 1]
SIDE = 8  # pixels, of a latent of 4 by 4
HEADS = {"num_attention_heads": 2, "attention_head_dim": 4}
WIDE_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


@dataclass(frozen=True)
class Family:
    """`build()` makes a pipeline, `call(pipeline, conditions, guidance_scale, **kwargs)` its images `(B, C, H, W)`."""

    name: str
    build: Callable[[], Any]
    call: Callable[..., torch.Tensor]
    conditions: list = field(default_factory=lambda: PROMPTS)
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    options: dict[str, Any] = field(default_factory=dict)  # for the policy


def dit(num_classes: int = 1000) -> diffusers.DiTPipeline:
    config = {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 4, "norm_elementwise_affine": False}
    # DiTPipeline knows no other null class than 1000
    network = diffusers.DiTTransformer2DModel(**HEADS, **config, num_embeds_ada_norm=num_classes)
    return diffusers.DiTPipeline(randomized(network), vae(), diffusers.DDIMScheduler(clip_sample=False))


def call_pipeline(pipeline, conditions, guidance_scale, **kwargs):
    return pipeline(conditions, guidance_scale=guidance_scale, output_type="pt", **kwargs).images


UNET_SIZES = {"block_out_channels": (4, 8), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 2}


def unet2d(channels: int = 3, **kwargs: Any) -> diffusers.UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 4, "in_channels": channels, "out_channels": channels, **UNET_SIZES}
    return randomized(diffusers.UNet2DModel(**blocks, **sizes, **kwargs))


def ddim_pixels() -> diffusers.DDIMPipeline:
    return diffusers.DDIMPipeline(unet2d(), diffusers.DDIMScheduler(clip_sample=True))


def call_unconditional(**options):
    def call(pipeline, conditions, guidance_scale, **kwargs):
        images = pipeline(len(conditions), output_type="np", **options, **kwargs).images
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    return call


def ddpm_classes() -> diffusers.DDPMPipeline:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")  # DDPM's own would draw noise
    return diffusers.DDPMPipeline(unet2d(num_class_embeds=4), scheduler)


def call_ddpm(pipeline, conditions, guidance_scale, generator, num_inference_steps):
    """Runs DDPMPipeline with labels, which its own call does not take."""
    x = torch.cat([torch.randn(1, 3, 4, 4, generator=g) for g in generator])
    labels, null = torch.tensor(conditions), torch.full((len(conditions),), 3)
    pipeline.scheduler.set_timesteps(num_inference_steps)
    for t in pipeline.scheduler.timesteps:
        with torch.no_grad():
            output, without = pipeline.unet(x, t, labels).sample, pipeline.unet(x, t, null).sample
        output = without + guidance_scale * (output - without)
        x = pipeline.scheduler.step(output, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def ddpm() -> diffusers.DDPMPipeline:
    return diffusers.DDPMPipeline(unet2d(), diffusers.DDPMScheduler())


def call_ddpm_as_ddim(pipeline, conditions, guidance_scale, **kwargs):
    deterministic = diffusers.DDIMPipeline(pipeline.unet, pipeline.scheduler)  # takes over the scheduler's config
    deterministic.set_progress_bar_config(disable=True)
    call = call_unconditional(use_clipped_model_output=True)
    return call(deterministic, conditions, guidance_scale, **kwargs)


def ldm() -> diffusers.LDMPipeline:
    sizes = {"block_out_channels": (4, 4), "latent_channels": 3, "num_vq_embeddings": 8, "norm_num_groups": 1}
    codes = diffusers.VQModel(**coder_blocks(2), **sizes, scaling_factor=0.5)
    return diffusers.LDMPipeline(randomized(codes), unet2d(), ddim(set_alpha_to_one=True))


def unet_condition(**kwargs: Any) -> diffusers.UNet2DConditionModel:
    config = {
        "sample_size": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        **UNET_SIZES,
    }
    return randomized(diffusers.UNet2DConditionModel(**{**config, **kwargs}))


def stable_diffusion(scheduler: Any) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae(), clip(), tokenizer(), unet_condition(), scheduler, None, None, requires_safety_checker=False
    )


def rescheduled(kind: str, **options: Any) -> diffusers.StableDiffusionPipeline:
    return stable_diffusion(getattr(diffusers, kind).from_config(ddim(set_alpha_to_one=True).config, **options))


def call_with(kind: str, **options: Any):
    """Calls a pipeline with another scheduler of the same config."""

    def call(pipeline, conditions, guidance_scale, **kwargs):
        scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **options)
        parts = {**pipeline.components, "scheduler": scheduler}
        other = type(pipeline)(**parts, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        return call_pipeline(other, conditions, guidance_scale, **kwargs)

    return call


def v_prediction() -> diffusers.StableDiffusionPipeline:
    config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "timestep_spacing": "leading"}
    return stable_diffusion(diffusers.EulerDiscreteScheduler(**config))


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    network = unet_condition(cross_attention_dim=32, projection_class_embeddings_input_dim=6 * 4 + 16, **times)
    codes = vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.2, 0.8])
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    parts = [codes, clip(), clip(projection=True), tokenizer(), tokenizer(), network, scheduler]
    return diffusers.StableDiffusionXLPipeline(*parts, add_watermarker=False)


def pixart() -> diffusers.PixArtSigmaPipeline:
    sizes = {"sample_size": 4, "num_layers": 2, "in_channels": 4, "out_channels": 8, "patch_size": 2, **HEADS}
    captions = {"cross_attention_dim": 8, "caption_channels": 16}
    network = diffusers.PixArtTransformer2DModel(**sizes, **captions, use_additional_conditions=False)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.PixArtSigmaPipeline(tokenizer(), t5(), vae(), randomized(network), scheduler)


def sd3() -> diffusers.StableDiffusion3Pipeline:
    sizes = {"sample_size": 4, "num_layers": 2, "in_channels": 4, "out_channels": 4, "patch_size": 2, **HEADS}
    captions = {"joint_attention_dim": 32, "caption_projection_dim": 8, "pooled_projection_dim": 32}
    network = diffusers.SD3Transformer2DModel(**sizes, **captions, pos_embed_max_size=4)
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomized(network),
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=tokenizer(),
    )


def sana() -> diffusers.SanaPipeline:
    sizes = {"sample_size": 16, "num_layers": 2, "in_channels": 4, "out_channels": 4, "patch_size": 1, **HEADS}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8}
    network = diffusers.SanaTransformer2DModel(**sizes, **cross, caption_channels=8)
    blocks = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1),
    }
    codes = diffusers.AutoencoderDC(
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()},
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    return diffusers.SanaPipeline(tokenizer(), gemma(), randomized(codes), randomized(network), flow(shift=3.0))


def call_binned(pipeline, conditions, guidance_scale, **kwargs):
    """Calls a pipeline at the size asked for, not at the nearest of a table."""
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    size = {"height": side, "width": side, "use_resolution_binning": False}
    return call_pipeline(pipeline, conditions, guidance_scale, **size, **kwargs)


def flux(guidance_embeds: bool) -> diffusers.FluxPipeline:
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16, **WIDE_HEADS}
    network = diffusers.FluxTransformer2DModel(
        **sizes, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance_embeds
    )
    codes = vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    parts = [flow(use_dynamic_shifting=True), codes, clip(), tokenizer(), t5(), tokenizer(), randomized(network)]
    pipeline = diffusers.FluxPipeline(*parts)
    pipeline.default_sample_size = 4
    return pipeline


def call_true_guidance(negative):
    def call(pipeline, conditions, guidance_scale, **kwargs):
        guidance = {"true_cfg_scale": guidance_scale}
        if guidance_scale > 1:
            guidance["negative_prompt"] = [negative] * len(conditions)
        return pipeline(conditions, output_type="pt", height=SIDE, width=SIDE, **guidance, **kwargs).images

    return call


def qwen_image() -> diffusers.QwenImagePipeline:
    sizes = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, **WIDE_HEADS}
    network = diffusers.QwenImageTransformer2DModel(**sizes, joint_attention_dim=16, axes_dims_rope=(4, 2, 2))
    latents = {"latents_mean": [0.1, 0.0, -0.1, 0.2], "latents_std": [1.0, 1.2, 0.8, 1.1]}
    codes = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **latents
    )
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    tokens = {"image_token_id": 14, "video_token_id": 15, "vision_start_token_id": 12, "vision_end_token_id": 13}
    config = transformers.Qwen2_5_VLConfig(
        text_config=language(16, num_hidden_layers=1, rope_scaling=rope), vision_config=vision, **tokens
    )
    encoder = randomized(transformers.Qwen2_5_VLForConditionalGeneration(config))
    scheduler = flow(use_dynamic_shifting=True, shift_terminal=0.02)
    parts = [scheduler, randomized(codes, 0.3), encoder, tokenizer(256), randomized(network, 0.4)]
    return diffusers.QwenImagePipeline(*parts)


def z_image() -> diffusers.ZImagePipeline:
    sizes = {"in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    network = diffusers.ZImageTransformer2DModel(
        **sizes, cap_feat_dim=16, axes_dims=[4, 2, 2], axes_lens=[256, 16, 16]
    )
    config = transformers.Qwen3Config(**language(16, num_hidden_layers=2), head_dim=8)
    codes, encoder = vae(shift_factor=0.1), randomized(transformers.Qwen3Model(config))
    return diffusers.ZImagePipeline(flow(shift=3.0), codes, encoder, tokenizer(), randomized(network))


def call_z_image(pipeline, conditions, guidance_scale, **kwargs):
    size = {"height": SIDE, "width": SIDE}
    return call_pipeline(pipeline, conditions, guidance_scale - 1, **size, **kwargs)


def lumina2() -> diffusers.Lumina2Pipeline:
    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "num_layers": 1, "multiple_of": 8}
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "axes_dim_rope": (4, 2, 2), "axes_lens": (300, 16, 16)}
    network = diffusers.Lumina2Transformer2DModel(**sizes, **heads, num_refiner_layers=1, cap_feat_dim=8)
    # the pipeline takes for granted that sides are divided by 8
    codes = vae(block_out_channels=(4, 4, 4, 4), **coder_blocks(4), shift_factor=0.1)
    return diffusers.Lumina2Pipeline(randomized(network), flow(use_dynamic_shifting=True), codes, gemma(), tokenizer())


CLASS_FAMILIES = [
    Family("dit", dit, call_pipeline, LABELS),
    Family("ddim", ddim_pixels, call_unconditional(use_clipped_model_output=True), [0, 0, 0], (1.0,)),
    Family("ddpm-classes", ddpm_classes, call_ddpm, LABELS, (1.0, 3.0), {"null_class": 3}),
    Family("ldm", ldm, call_unconditional(), [0, 0, 0], (1.0,)),
]
TEXT_FAMILIES = [
    Family("sd1", lambda: stable_diffusion(ddim(set_alpha_to_one=True)), call_pipeline),
    Family("sd2-v", v_prediction, call_pipeline),
    Family("sdxl", sdxl, call_pipeline),
    Family("pixart-sigma", pixart, call_binned),
    Family("sd3", sd3, call_pipeline),
    Family("sana", sana, call_binned),
    Family("flux-distilled", lambda: flux(True), call_pipeline),
    Family("flux", lambda: flux(False), call_true_guidance("")),
    Family("qwen-image", qwen_image, call_true_guidance(" "), options={"height": SIDE, "width": SIDE}),
    Family("z-image", z_image, call_z_image, options={"height": SIDE, "width": SIDE}),
    Family("lumina2", lumina2, call_pipeline),
]
FAMILIES = CLASS_FAMILIES + TEXT_FAMILIES
# Own pipelines, and schedulers that draw noise or have a memory: those are called as DDIM or Euler of the same config
MORE_SAMPLERS = [
    Family("sit", tiny_pipeline, call_pipeline, LABELS),
    Family("edm2", tiny_edm2_pipeline, call_pipeline, LABELS),
    Family("ddpm", ddpm, call_ddpm_as_ddim, [0, 0, 0], (1.0,)),
    Family("pndm", lambda: rescheduled("PNDMScheduler", skip_prk_steps=True), call_with("DDIMScheduler")),
    Family(
        "dpm",
        lambda: rescheduled("DPMSolverMultistepScheduler"),
        call_with("DPMSolverMultistepScheduler", solver_order=1),  # DDIM at the times of DPM-Solver
    ),
    Family(
        "euler-ancestral",
        lambda: rescheduled("EulerAncestralDiscreteScheduler"),
        call_with("EulerDiscreteScheduler"),
    ),
]
