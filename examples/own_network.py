"""Bring your own network: any solver as a table, advanced by numpy.

The "network" here knows the answer: it returns the noise that a picture of one value, 0.5, would hold.
"""

import numpy as np

from latentrt import Schedule, advance, noise_source, tabulate

schedule = Schedule.from_config(
    {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    | {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing", "prediction_type": "epsilon"}
)
alphas_cumprod = schedule.alphas_cumprod(schedule.settings("DDIMScheduler"))


def network(x: np.ndarray, timestep: float) -> np.ndarray:
    """The noise in x if the clean latents are 0.5 everywhere."""
    alpha_cumprod = np.float32(alphas_cumprod[int(timestep)])
    return (x - np.sqrt(alpha_cumprod) * 0.5) / np.sqrt(1 - alpha_cumprod)


table = tabulate("ddim", schedule, steps=20, eta=0.0)
x = noise_source("torch-cpu", seed=0).normal((4, 64, 64)) * table.start
memory = np.zeros((4, *x.shape), np.float32)
for row in table.rows:
    x = advance(row, x, network(row.c_in * x, row.timestep), memory)
print(f"{table.solver}, {len(table)} rows: mean {x.mean():.6f}, spread {x.std():.1e}")
