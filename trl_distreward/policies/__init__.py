# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Policies: diffusers pipelines seen as velocities."""

from .base import DiffusionPolicy as DiffusionPolicy
from .base import PipelinePolicy as PipelinePolicy
from .base import decode_slices as decode_slices
from .base import decode_uint8 as decode_uint8
from .base import to_uint8 as to_uint8
from .class_conditional import ClassConditionalPolicy as ClassConditionalPolicy
from .class_conditional import ClassLabelPolicy as ClassLabelPolicy
from .class_conditional import DiTPolicy as DiTPolicy
from .class_conditional import EDM2Policy as EDM2Policy
from .class_conditional import UNetPolicy as UNetPolicy
from .discrete_text import PixArtSigmaPolicy as PixArtSigmaPolicy
from .discrete_text import StableDiffusionPolicy as StableDiffusionPolicy
from .discrete_text import StableDiffusionXLPolicy as StableDiffusionXLPolicy
from .flow_text import FluxPolicy as FluxPolicy
from .flow_text import Lumina2Policy as Lumina2Policy
from .flow_text import QwenImagePolicy as QwenImagePolicy
from .flow_text import SanaPolicy as SanaPolicy
from .flow_text import StableDiffusion3Policy as StableDiffusion3Policy
from .flow_text import ZImagePolicy as ZImagePolicy
from .loading import as_policy as as_policy
from .loading import load_pipeline as load_pipeline
from .paths import DiscreteTimePolicy as DiscreteTimePolicy
from .paths import FlowPolicy as FlowPolicy
from .text_to_image import TextToImagePolicy as TextToImagePolicy
