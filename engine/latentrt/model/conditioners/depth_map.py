"""A depth map beside the latents. Source: diffusers' StableDiffusionDepth2ImgPipeline."""

from __future__ import annotations

from latentrt.errors import RequestError
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Sides
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource


class DepthMap(Conditioner):
    """Fills "depth_map" (1, height, width), float32 in -1..1, of the latents' size."""

    inputs = ("depth_map",)
    pictures = ("image", "depth")

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        if given is None or given.depth is None:
            raise RequestError(
                "the model draws by depth, and there is no depth map" if given else "the model draws on pictures",
                needed="a picture and its depth map, near is white; a depth estimator makes one",
                fix="pass image= and depth=, --image and --depth",
            )
        return Sides.same({"depth_map": given.depth})
