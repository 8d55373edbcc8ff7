"""TensorRT, as far as the tests need it."""
