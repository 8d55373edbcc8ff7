"""Turn a diffusers checkpoint into a bundle: its own files, ONNX graphs beside them, and a manifest."""
