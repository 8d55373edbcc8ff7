"""Full-size models on a GPU, side by side with diffusers: `python -m benchmarks gpu --preset sd15`.

A *side* is a way to draw the same pictures: diffusers eager and compiled, ONNX Runtime and TensorRT through latentrt.
Each is a child process that stays alive, so its memory is its own and its end stops no other; rounds go through the
sides in turn. What cannot be measured is recorded with the reason. `hardware` opens everything that touches a GPU; the
tests have a stand-in for it. `lease/` has the jobs that are worth a GPU that is lent for minutes.
"""
