# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The Space of this metric."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("kernel_distance.py"))
