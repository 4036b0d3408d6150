# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Precision, recall, density and coverage of a set of features, as a module of Hugging Face `evaluate`."""

import evaluate

import trl_distreward
import trl_distreward.metrics.feature_module as feature_module

DESCRIPTION = """\
Precision and recall (Kynkäänniemi et al., 2019), density and coverage (Naeem et al., 2020) of features of generated
images among those of real ones. Results equal those of the prdc package.
"""

INPUTS = """
    nearest_k (`int`, *optional*, defaults to 5): k of density and coverage.
    precision_recall_k (`int`, *optional*, defaults to `nearest_k`): k of precision and recall.
Returns:
    `precision`, `recall`, `density`, `coverage` (`float`).
Example:
    >>> import evaluate, numpy as np
    >>> prdc = evaluate.load("metrics_hub/prdc")
    >>> rng = np.random.default_rng(0)
    >>> features = {"predictions": rng.normal(size=(500, 8)), "references": rng.normal(size=(400, 8))}
    >>> {name: round(value, 3) for name, value in prdc.compute(**features, nearest_k=3).items()}
    {'precision': 0.88, 'recall': 0.86, 'density': 1.041, 'coverage': 0.925}

"""

CITATION = """\
@inproceedings{naeem2020reliable,
  title = {Reliable Fidelity and Diversity Metrics for Generative Models},
  author = {Naeem, Muhammad Ferjad and Oh, Seong Joon and Uh, Youngjung and Choi, Yunjey and Yoo, Jaejun},
  booktitle = {International Conference on Machine Learning},
  year = {2020}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class PRDC(feature_module.FeatureModule):
    """Computed in blocks, without a matrix of all pairs."""

    def _info(self):
        return self.describe(DESCRIPTION, INPUTS, CITATION)

    def _compute(self, predictions, references, nearest_k=5, precision_recall_k=None):
        return trl_distreward.precision_recall_density_coverage(
            feature_module.to_features(references, "references"),
            feature_module.to_features(predictions, "predictions"),
            nearest_k,
            precision_recall_k=precision_recall_k,
        )
