"""stable-diffusion.cpp through its Python bindings, on the diffusers folder itself."""

from protocol import serve

KEPT = []


def load(settings):
    """Load the checkpoint in its own precision."""
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(model_path=settings["model"], n_threads=settings["threads"])
    KEPT.append(model)  # to free a model that was not loaded would end the process
    if not model._model.model:  # a null pointer; it only logs why
        raise RuntimeError("it does not know the structure of this model")

    def draw(task):
        width, height = task["size"]
        return model.generate_image(
            prompt=task["prompts"][0],
            sample_method="euler",
            sample_steps=task["steps"],
            cfg_scale=task["guidance"],
            width=width,
            height=height,
            seed=task["seeds"][0],
            batch_count=len(task["prompts"]),
        )

    return draw


serve(load)
