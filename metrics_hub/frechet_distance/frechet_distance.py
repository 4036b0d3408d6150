# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""Fréchet distance between two sets of features, as a module of Hugging Face `evaluate`."""

import evaluate

import trl_distreward
import trl_distreward.metrics.feature_module as feature_module

DESCRIPTION = """\
The Fréchet distance between Gaussians fitted to features of generated and of real images (Heusel et al., 2017). With
the 2048 pooled features of Inception-v3 it is the FID.
"""

INPUTS = """
    statistics (`str`, *optional*): file of the real images' statistics in place of references: `.safetensors` of
        trl-distreward, or `.npz` with `mu` and `sigma`.
Returns:
    `frechet_distance` (`float`).
Example:
    >>> import evaluate, numpy as np
    >>> frechet_distance = evaluate.load("metrics_hub/frechet_distance")
    >>> rng = np.random.default_rng(0)
    >>> features = {"predictions": rng.normal(size=(500, 8)), "references": rng.normal(size=(400, 8)) + 1}
    >>> round(frechet_distance.compute(**features)["frechet_distance"], 4)
    8.6919

"""

CITATION = """\
@inproceedings{heusel2017gans,
  title = {{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
  author = {Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class FrechetDistance(feature_module.FeatureModule):
    """Computed from float64 moments; both sets need at least 2 rows, and should have many more than d."""

    def _info(self):
        return self.describe(DESCRIPTION, INPUTS, CITATION)

    def _compute(self, predictions, references, statistics=None):
        generated = feature_module.to_features(predictions, "predictions")
        if statistics is None:
            real = feature_module.to_features(references, "references")
        else:
            real = trl_distreward.FeatureStatistics.load(statistics)
        return {"frechet_distance": trl_distreward.feature_metrics(real, generated)["frechet"]}
