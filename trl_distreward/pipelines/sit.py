# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Image generation with SiT (arXiv 2401.08740): in latent space, or in pixel space without a VAE."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


def dopri5(velocity: Callable[[Tensor, float], Tensor], x: Tensor, rtol: float, atol: float) -> Tensor:
    """Goes from noise at `t = 1` to data at `t = 0` by the adaptive Dormand-Prince method."""
    from torchdiffeq import odeint  # not a dependency: pip install torchdiffeq

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=x.device)
    return odeint(lambda s, x: -velocity(x, 1 - s.item()), x, ends, method="dopri5", rtol=rtol, atol=atol)[-1]


class SiTPipeline(DiffusionPipeline):
    """Class-conditional pipeline of a SiT network, in a VAE's latents or, without one, in pixels in [-1, 1]."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer: ModelMixin, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: object) -> DiffusionPipeline:
        """Shares the networks too: diffusers' own method asks for the exact class that the constructor names."""
        return super().from_pipe(pipeline, **{"transformer": pipeline.transformer, **kwargs})

    def predict_velocity(
        self,
        model: nn.Module,
        x: Tensor,
        t: Tensor,
        class_labels: Tensor,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
    ) -> Tensor:
        """
        Predicts the velocity `x_noise - x_data` of samples `x` `(B, C, H, W)` at times `t` `(B,)` in [0, 1].

        Data is at 0 and noise at 1; SiT's own time runs the other way. `model` is the transformer, possibly wrapped
        for distributed training. `guidance_channels` guides only the first channels; SiT's code guides 3.
        """
        x = x.to(self.transformer.dtype)
        if guidance_scale == 1.0:
            return -model(x, 1 - t, class_labels, return_dict=False)[0]
        null = torch.full_like(class_labels, self.transformer.config.num_classes)
        both = model(torch.cat([x, x]), 1 - torch.cat([t, t]), torch.cat([class_labels, null]), return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if guidance_channels is not None:
            guided = torch.cat([guided[:, :guidance_channels], conditional[:, guidance_channels:]], dim=1)
        return -guided

    def decode(self, x: Tensor) -> Tensor:
        """Decodes samples `(B, C, H, W)` to images `(B, channels, height, width)` in [0, 1], with gradients."""
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def check_guidance(self, guidance_scale: float) -> None:
        if guidance_scale != 1.0 and self.transformer.config.class_dropout_prob == 0:
            raise ValueError(f"guidance_scale={guidance_scale} needs a null class, but class_dropout_prob=0: set 1.0.")

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 250,
        sampler: str = "ode",
        solver: str = "euler",
        noise_level: float = 1.0,
        last_step_size: float = 0.04,
        guidance_channels: int | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        num_images_per_prompt: int = 1,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Generates images by the ODE or the SDE.

        Args:
            class_labels (`int` or `list[int]`): labels from 0 to `num_classes - 1`.
            guidance_scale (`float`, *optional*, defaults to 1.0): classifier-free guidance; 1.0 for none.
            sampler (`str`, *optional*, defaults to `"ode"`):
                `"ode"`, or `"sde"` for Euler-Maruyama with SiT's `sigma` diffusion and a last step without noise.
            solver (`str`, *optional*, defaults to `"euler"`):
                solver of the ODE: `"euler"`; `"heun"`, with Euler's last step; `"heun2"`, Heun's method in every step;
                or `"dopri5"`, which chooses its own steps (needs torchdiffeq).
            noise_level (`float`, *optional*, defaults to 1.0): η of the SDE, in `s² = 2 η² t`; SiT has 1.0.
            last_step_size (`float`, *optional*, defaults to 0.04): size of the SDE's last step, "Mean" in SiT's code.
            guidance_channels (`int`, *optional*): guides only the first channels; SiT's code guides 3.
            rtol, atol (`float`, *optional*, default to 1e-3 and 1e-6): tolerances of `"dopri5"`, as in SiT's code.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images per label, next to each other.
            generator (`torch.Generator` or list of them, one per image, *optional*): source of the noise.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): starting noise; samples are in float32.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (B, H, W, C), `"pt"` (B, C, H, W), both in [0, 1], or `"latent"`.
            callback_on_step_end (`Callable`, *optional*):
                called as `callback(pipeline, i, t, {"latents": x})` after each step but those of `"dopri5"`. Returns
                a dict, whose `"latents"` replace the samples. It may set `pipeline._guidance_scale`, and
                `pipeline._interrupt = True` skips the steps to come.

        Example:
            >>> from trl_distreward import SiTPipeline, SiTTransformer2DModel
            >>> pipeline = SiTPipeline(SiTTransformer2DModel.from_size("S/8", in_channels=3))  # with random weights
            >>> pipeline([207, 360], num_inference_steps=4).images[0].size
            (32, 32)
        """
        device, config = self._execution_device, self.transformer.config
        labels = torch.as_tensor(class_labels, device=device).reshape(-1).repeat_interleave(num_images_per_prompt)
        self.check_guidance(guidance_scale)
        if any(not 0 <= label < config.num_classes for label in labels.tolist()):
            raise ValueError(f"class_labels={labels.tolist()} must be integers from 0 to {config.num_classes - 1}.")
        if num_inference_steps < (2 if sampler == "sde" else 1):
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1, or 2 for sampler='sde'.")
        if sampler not in ("ode", "sde") or solver not in ("euler", "heun", "heun2", "dopri5"):
            choices = "'ode' or 'sde', and solver 'euler', 'heun', 'heun2' or 'dopri5'"
            raise ValueError(f"sampler={sampler!r} or solver={solver!r} is unknown: choose sampler {choices}.")
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(generator)} generators for {len(labels)} images: give one of each per image.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but these labels and model need {shape}.")
        x = latents.to(device, torch.float32)
        self._guidance_scale, self._interrupt = guidance_scale, False

        def velocity(x: Tensor, t: float) -> Tensor:
            times = torch.full((len(labels),), t, device=device)
            v = self.predict_velocity(self.transformer, x, times, labels, self.guidance_scale, guidance_channels)
            return v.to(x.dtype)

        if sampler == "sde":
            rest, points = 1 - last_step_size, num_inference_steps - 1
            times = [1 - rest * i / points for i in range(points)] + [last_step_size, 0.0]
        else:
            times = [1 - i / num_inference_steps for i in range(num_inference_steps)] + [0.0]
        if sampler == "ode" and solver == "dopri5":
            x, times = dopri5(velocity, x, rtol, atol), []
        self._num_timesteps = max(len(times) - 1, 0)
        for i, (t, t_next) in enumerate(self.progress_bar(list(pairwise(times)))):
            if self._interrupt:
                continue
            dt, v = t_next - t, velocity(x, t)
            if sampler == "sde":
                # s² = 2 η² t: drift v + s²/(2t) (x + (1-t) v), variance s² |dt|
                x = x + (v + noise_level**2 * (x + (1 - t) * v)) * dt
                if t_next > 0:
                    noise = randn_tensor(shape, generator=generator, device=device, dtype=x.dtype)
                    x = x + noise_level * (2 * t * -dt) ** 0.5 * noise
            elif solver == "heun2" or (solver == "heun" and t_next > 0):
                x = x + 0.5 * (v + velocity(x + v * dt, t_next)) * dt
            else:
                x = x + v * dt
            if callback_on_step_end is not None:
                tensors = {name: {"latents": x}[name] for name in callback_on_step_end_tensor_inputs}
                x = callback_on_step_end(self, i, t, tensors).get("latents", x)

        images = x if output_type == "latent" else self.decode(x)
        if output_type not in ("latent", "pt"):
            images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=[False] * len(x))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
