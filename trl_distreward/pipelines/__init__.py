# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pipelines as single files that import only torch and diffusers, so that they can travel to the Hub."""

# diffusers loads a pipeline's third-party component only from a module that is already imported
from ..models import edm2 as edm2
from ..models import sit as sit
