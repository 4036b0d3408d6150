# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Kernel distance between two sets of features, as a module of Hugging Face `evaluate`."""

import evaluate

import trl_distreward.metrics as metrics
import trl_distreward.metrics.feature_module as feature_module

DESCRIPTION = """\
The kernel distance between features of generated and of real images: the unbiased squared maximum mean discrepancy
under a cubic polynomial kernel (Bińkowski et al., 2018), mean and standard deviation over random subsets. With the
2048 pooled features of Inception-v3 it is the KID.
"""

INPUTS = """
    num_subsets (`int`, *optional*, defaults to 100): number of pairs of subsets.
    subset_size (`int`, *optional*, defaults to 1000): rows of a subset; neither set may have fewer.
    seed (`int`, *optional*, defaults to 0): seed of the subsets, drawn as torch-fidelity draws them.
Returns:
    `kernel_distance` (`float`), `kernel_distance_std` (`float`).
Example:
    >>> import evaluate, numpy as np
    >>> kernel_distance = evaluate.load("metrics_hub/kernel_distance")
    >>> rng = np.random.default_rng(0)
    >>> features = {"predictions": rng.normal(size=(500, 8)), "references": rng.normal(size=(400, 8)) + 1}
    >>> results = kernel_distance.compute(**features, subset_size=100)
    >>> round(results["kernel_distance"], 4), round(results["kernel_distance_std"], 4)
    (8.8538, 0.9207)

"""

CITATION = """\
@inproceedings{binkowski2018demystifying,
  title = {Demystifying {MMD} {GANs}},
  author = {Bi{\\'n}kowski, Miko{\\l}aj and Sutherland, Danica J. and Arbel, Michael and Gretton, Arthur},
  booktitle = {International Conference on Learning Representations},
  year = {2018}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class KernelDistance(feature_module.FeatureModule):
    """Unbiased distance with the kernel `(x·y / d + 1)^3`; it can be slightly negative for similar sets."""

    def _info(self):
        return self.describe(DESCRIPTION, INPUTS, CITATION)

    def _compute(self, predictions, references, num_subsets=100, subset_size=1000, seed=0):
        real = feature_module.to_features(references, "references")
        generated = feature_module.to_features(predictions, "predictions")
        mean, std = metrics.kernel_inception_distance(real, generated, num_subsets, subset_size, seed)
        return {"kernel_distance": mean, "kernel_distance_std": std}
