"""Between pixels and latents: the model's VAE, another one, tiles."""
