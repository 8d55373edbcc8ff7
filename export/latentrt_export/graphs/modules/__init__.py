"""Torch modules with flat tensor inputs and outputs around the models of diffusers and transformers."""
