"""Class labels, of models that were trained with them."""

from __future__ import annotations

import numpy as np

from latentrt.errors import RequestError
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Sides
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource


class ClassLabel(Conditioner):
    """Fills "class_labels" (), the number of a class.

    Args:
        dtype: of the input: int64 where classes are embedded.
        classes: how many there are; None where the manifest does not say.
    """

    inputs = ("class_labels",)
    fields = ("class_label",)

    def __init__(self, dtype: str, classes: int | None) -> None:
        self._dtype, self._classes = dtype, classes

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        label, most = request.class_label, self._classes
        if label is None or (most is not None and label >= most):
            raise RequestError(
                "there is no class label" if label is None else f"class_label is {label}",
                needed="the number of a class" if most is None else f"a class from 0 to {most - 1}",
                fix="class_label=0, --class-label 0",
            )
        return Sides.same({"class_labels": np.array(label, self._dtype)})
