"""ControlNets as single files: `network` reads one by its shapes, `file` makes a diffusers folder of it."""
