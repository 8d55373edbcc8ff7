"""The forward process: a picture under more and more noise, for each schedule of betas.

    python examples/forward_noise.py [PICTURE]

It writes forward-noise.png: in rows the linear, scaled-linear and squared-cosine schedules over 100 training timesteps,
in columns t = 0, 50 and 99. Without a picture it draws one.
"""

import sys

import numpy as np
from PIL import Image

from latentrt import Engine, Schedule, grid, noise_source, save
from latentrt.images.pixels import from_uint8, to_pil, to_uint8

KINDS, TIMESTEPS = ("linear", "scaled_linear", "squaredcos_cap_v2"), (0, 50, 99)


def noised(picture: Image.Image) -> Image.Image:
    """Return a contact sheet of the picture under noise."""
    clean = from_uint8(np.asarray(picture.convert("RGB"))[None])[0]
    noise = noise_source("torch-cpu", 0).normal(clean.shape)
    images, captions = [], []
    for kind in KINDS:
        config = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_schedule": kind}
        schedule = Schedule.from_config(config)
        for timestep in TIMESTEPS:
            images.append(to_pil(to_uint8(schedule.add_noise(clean, noise, timestep)[None])[0]))
            captions.append(f"{kind}, t = {timestep}")
    return grid(images, columns=len(TIMESTEPS), captions=captions)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        picture = Image.open(sys.argv[1])
    else:
        with Engine.load() as engine:
            picture = engine("an owl", seed=1)[0]
    save(noised(picture), "forward-noise.png", settings={})
