"""A picture in three lines: the embedded model, no torch."""

from latentrt import Engine

with Engine.load() as sd:
    images = sd("a red apple", steps=20, solver="dpmpp-2m", seed=7, guidance=3.0)
    images[0].save("apple.png")
