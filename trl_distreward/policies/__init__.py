# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Policies: diffusers pipelines seen as velocities."""

from .base import DiffusionPolicy as DiffusionPolicy
from .base import PipelinePolicy as PipelinePolicy
from .base import decode_slices as decode_slices
from .base import decode_uint8 as decode_uint8
from .base import diffusers_loads_adapter as diffusers_loads_adapter
from .base import to_uint8 as to_uint8
from .class_conditional import ClassConditionalPolicy as ClassConditionalPolicy
from .class_conditional import ClassLabelPolicy as ClassLabelPolicy
from .loading import Model as Model
from .loading import as_policy as as_policy
from .loading import load_pipeline as load_pipeline
from .loading import source_of as source_of
from .paths import DiscreteTimePolicy as DiscreteTimePolicy
from .paths import FlowPolicy as FlowPolicy
from .text_to_image import TextToImagePolicy as TextToImagePolicy
