# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""A run as one HTML page that needs nothing else."""

from .page import render_report, write_report

__all__ = ["render_report", "write_report"]
