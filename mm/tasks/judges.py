"""Judges: scikit-learn classifiers of raw values, trained on real training data alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from mm.data.modalities.base import get_modality
from mm.data.modalities.image import image_features
from mm.errors import UserError


class Judge:
    """Support vector classifier (RBF kernel) of what `Modality.features` sees of raw values."""

    def __init__(self, modality: str):
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        self.features = get_modality(modality).features()
        classifier = SVC(C=10.0, gamma="scale", random_state=0)
        self.model: Any = (
            make_pipeline(StandardScaler(), classifier) if self.features.standardise else classifier
        )

    def fit(self, raws: Sequence[Any], labels: Sequence[str]) -> Judge:
        """Train on REAL training data. Raises UserError when there is only one class."""
        if len(set(labels)) < 2:
            raise UserError(
                f"a judge needs at least two classes, the training split has {sorted(set(labels))}"
            )
        self.model.fit(self.features.fit(raws)(raws), np.asarray(labels))
        return self

    def predict(self, raws: Sequence[Any]) -> list[str]:
        """Class of each raw value."""
        return [str(c) for c in self.model.predict(self.features(raws))]

    def accuracy(self, raws: Sequence[Any], labels: Sequence[str]) -> float:
        """Share of raw values that it classifies as ``labels``."""
        return float(np.mean([p == t for p, t in zip(self.predict(raws), labels, strict=True)]))


def linear_probe(
    train: Sequence[Any],
    train_labels: Sequence[str],
    test: Sequence[Any],
    test_labels: Sequence[str],
    modality: str = "image",
) -> float:
    """Accuracy on ``test`` of logistic regression on what `Modality.features` sees of ``train``.

    Of pictures: raw colour pixels (16 x 16). The bar that needs no model.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    seen: Any = partial(image_features, color=True)
    if modality != "image":
        seen = get_modality(modality).features().fit(train)
    probe.fit(seen(train), np.asarray(train_labels))
    return float(np.mean(probe.predict(seen(test)) == np.asarray(test_labels)))
