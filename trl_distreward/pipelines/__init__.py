# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Pipelines, each in a single file that imports only torch and diffusers, so that it can travel to the Hub."""

# diffusers loads a component of another library only from a module that is already imported
from ..models import edm2 as edm2
from ..models import sit as sit
