"""OpenVINO GenAI's pipeline in float32, on the folder that optimum-intel made."""

from protocol import serve

SCHEDULERS = {"DDIMScheduler": "DDIM", "EulerDiscreteScheduler": "EULER_DISCRETE", "PNDMScheduler": "PNDM"}


def load(settings):
    """Load the pipeline and compile its networks, or take them from the cache."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    kind = getattr(genai.Scheduler.Type, SCHEDULERS[settings["scheduler"]])
    folder = settings["model"]
    pipe = genai.Text2ImagePipeline(
        folder,
        "CPU",
        INFERENCE_NUM_THREADS=settings["threads"],
        INFERENCE_PRECISION_HINT="f32",
        CACHE_DIR=settings["cache"],
    )
    pipe.set_scheduler(genai.Scheduler.from_config(f"{folder}/scheduler/scheduler_config.json", kind))

    class Given(genai.Generator):
        """A generator that returns the task's latents."""

        def __init__(self, latents):
            super().__init__()
            self.latents = latents

        def randn_tensor(self, shape):
            return openvino.Tensor(np.ascontiguousarray(self.latents.reshape(list(shape))))

    def draw(task):
        width, height = task["size"]
        pictures = pipe.generate(
            task["prompts"][0],
            num_images_per_prompt=len(task["prompts"]),
            num_inference_steps=task["steps"],
            guidance_scale=task["guidance"],
            width=width,
            height=height,
            generator=Given(np.load(task["latents"])),
        )
        return list(np.array(pictures.data))

    return draw


serve(load)
