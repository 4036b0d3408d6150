# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Compares a folder of generated images with a folder of real ones.

    python examples/evaluate_folder.py

The same as a command, which takes pipelines too: trl-distreward evaluate --model generated --real real
"""

from trl_distreward import feature_metrics, load_feature_extractor
from trl_distreward.evaluation import real_data

inception = load_feature_extractor("inception")
# (N, 2048) each, computed once and kept in the cache of Hugging Face
real, generated = (real_data(folder, inception, features=True) for folder in ("real", "generated"))
print(feature_metrics(real, generated, ["frechet", "precision", "recall"]))
