"""Full-size models on a GPU, side by side with diffusers: `python -m benchmarks gpu --preset sd15`.

A *side* is a way to draw the same pictures: diffusers eager and compiled, ONNX Runtime and TensorRT through latentrt.
Each is a child process that stays alive, so its memory is its own and its end is nobody else's; rounds go through the
sides in turn. What cannot be measured is recorded with the reason. Whatever touches a GPU is opened by `hardware`, for
which the tests have a stand-in.
"""
