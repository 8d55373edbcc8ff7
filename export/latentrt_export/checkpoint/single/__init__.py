"""Single files: from one .safetensors with the names of latent diffusion (LDM) to a diffusers folder, without torch."""
