"""The network that a row calls: the denoiser, with the other inputs beside "sample" and "timestep"."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from latentrt.model.inputs import Inputs
from latentrt.runtime.base import Network, call

Float32 = NDArray[np.float32]
OWN = ("sample", "timestep")  # inputs that a row fills itself


class Predictor:
    """The denoiser on host arrays."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, sample: Float32, timestep: Float32, inputs: Inputs) -> Float32:
        """Predict.

        Args:
            sample: (lanes, channels, height, width), already scaled by c_in.
            timestep: (lanes,), in training timesteps, fractions allowed.
            inputs: the others by name, each with a leading lane axis.

        Returns:
            The denoiser's output, float32 of the sample's shape.
        """
        return call(self.network, {"sample": sample, "timestep": timestep, **inputs})["out"]
