# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Images and prompts in CLIP's space, and features of both together, which a distance sees unanswered prompts in."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .extractors import CLIP_MEAN, CLIP_STD, BackboneFeatures, FeatureExtractor, freeze, module_of
from .preprocessing import full_precision

TEXT_BATCH = 64  # prompts that go through the text encoder at a time


class CLIPEmbeddings(BackboneFeatures):
    """
    Embeddings of length 1 of images and of prompts by a CLIP model, in float32 without autocast or TF32.

    As a feature extractor it is that of images alone; gradients pass to images that are floating-point.

    Args:
        model ([`~transformers.CLIPModel`]): both towers.
        tokenizer: of its prompts, one of transformers' tokenizers. Longer prompts are cut off.
        name (`str`, *optional*, defaults to `"clip"`): what to call these features in metadata.
        resize (`str`, *optional*, defaults to `"pillow"`):
            `"pillow"` or `"torch"`, as in [`~metrics.BackboneFeatures`].
        mean, std (`tuple[float]` of length 3, *optional*): CLIP's own by default.
        cache_size (`int`, *optional*, defaults to 10000): prompts whose embeddings are kept, in CPU memory.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "clip",
        resize: str = "pillow",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        cache_size: int = 10_000,
    ):
        super().__init__(model, name, "image_embeds", model.config.vision_config.image_size, mean, std, resize)
        self.tokenizer = tokenizer
        self.max_length = model.config.text_config.max_position_embeddings
        self.cache_size = cache_size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def forward(self, images: Tensor) -> Tensor:
        with full_precision(images.device):
            outputs = self.model.get_image_features(pixel_values=self.prepare(images))
            return F.normalize(outputs.pooler_output, dim=1).float()

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """
        Embeddings `(B, d)` of prompts, on the model's device.

        Raises:
            ValueError: something else than strings.
        """
        wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a prompt: the images' conditions must be strings.")
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        for start in range(0, len(missing), TEXT_BATCH):
            part = missing[start : start + TEXT_BATCH]
            # always as many, or a prompt's last bits would depend on which others are known already
            filled = part + [""] * (TEXT_BATCH - len(part))
            self._cache.update(zip(part, self._embed(filled).cpu().unbind()[: len(part)], strict=True))
        embeddings = torch.stack([self._cache[prompt] for prompt in prompts])
        for prompt in dict.fromkeys(prompts):
            self._cache.move_to_end(prompt)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return embeddings.to(self.mean.device)

    def _embed(self, prompts: list[str]) -> Tensor:
        device = self.mean.device
        # to the full length: which other prompts are beside it would change a prompt's last digits
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        with full_precision(device):
            outputs = self.model.get_text_features(
                input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
            )
            return F.normalize(outputs.pooler_output, dim=1).float()


class JointTextFeatures(nn.Module):
    """
    Features of an image beside the embedding of its prompt: a distance between such features sees whether images
    answer their prompts.

    The distance of images alone is blind to prompts, as [`JointFeatures`] says of classes. Real statistics are those
    of real images beside their captions.

    Args:
        feature_extractor (`Callable`): images `(B, C, H, W)` to features `(B, d)`.
        text_encoder (`Callable`):
            prompts, a list of B strings, to embeddings `(B, e)`, e.g. [`~metrics.CLIPEmbeddings.prompts`].
        scale (`float`, *optional*, defaults to 1.0): what a prompt is worth: the embeddings are multiplied by it.

    Example:

    ```python
    >>> clip = load_clip("openai/clip-vit-large-patch14")
    >>> joint = JointTextFeatures(clip, clip.prompts)
    >>> reward = SubsetReplaceReward(joint, FeatureStatistics.from_features(joint(real_images, captions)))
    ```
    """

    needs_conditions = True

    def __init__(
        self, feature_extractor: FeatureExtractor, text_encoder: Callable[[Sequence[str]], Tensor], scale: float = 1.0
    ):
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale={scale} must be positive: at 0 the prompts are not seen.")
        self.extractor = freeze(feature_extractor)
        self.text_encoder = freeze(text_encoder)
        # methods and wrappers are no modules: theirs are named here, so that they are moved
        self.image_module, self.text_module = module_of(feature_extractor), module_of(text_encoder)
        self.scale = scale
        self.name = f"{getattr(feature_extractor, 'name', 'features')}+text-{scale:g}"
        self.resize = str(getattr(feature_extractor, "resize", self.name))

    def forward(self, images: Tensor, conditions: Sequence[str]) -> Tensor:
        features = self.extractor(images)  # (B, d)
        return torch.cat([features, self.scale * self.text_encoder(conditions).to(features)], dim=1)


def load_clip(
    source: str | os.PathLike,
    device: torch.device | str | None = None,
    *,
    tokenizer: str | os.PathLike | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> CLIPEmbeddings:
    """
    A CLIP model of transformers, for images and prompts.

    Args:
        source (`str` or path): Hub id or folder of a [`~transformers.CLIPModel`].
        device (`torch.device` or `str`, *optional*): where to put it; the trainer moves it by itself.
        tokenizer (`str` or path, *optional*): Hub id or folder of the tokenizer, if `source` has none.
        revision (`str`, *optional*): of `source`.
        kwargs: further arguments of [`~metrics.CLIPEmbeddings`].

    Raises:
        OSError: it is neither here nor to be had, with what to put where.
        ValueError: it lacks weights of a CLIP model.
    """
    from transformers import AutoTokenizer, CLIPModel

    source, text = str(source), str(tokenizer or source)
    at = {} if revision is None else {"revision": revision}
    try:
        model, report = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **at)
        tokens = AutoTokenizer.from_pretrained(text, **(at if text == source else {}))
    except OSError as error:
        raise OSError(
            f"{source} cannot be loaded ({error}): where there is a network, `hf download {source}` puts it into the "
            "cache of the Hub; or give a folder, and another tokenizer= if it has none."
        ) from error
    if report["missing_keys"]:
        raise ValueError(
            f"{source} lacks weights of CLIP, which would stay random: {list(report['missing_keys'])[:4]}."
        )
    name = Path(source).name if os.path.isdir(source) else source
    return CLIPEmbeddings(model, tokens, **{"name": name, **kwargs}).to(device)
