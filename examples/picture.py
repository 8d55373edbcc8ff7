"""A picture in six lines: the embedded model, no torch."""

from engine import Engine, save

with Engine.load() as sd:
    images = sd("a red apple", steps=20, solver="dpmpp-2m", seed=7, guidance=3.0)
    save(images[0], "apple.png")  # with its settings; images[0].save("apple.png") writes the pixels alone
