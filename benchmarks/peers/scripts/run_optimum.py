"""optimum-onnx's pipeline over ONNX Runtime, on the folder that its own exporter made."""

from protocol import serve


def load(settings):
    """Load the pipeline with so many threads in each session."""
    import diffusers
    import numpy as np
    import onnxruntime
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    pipe = ORTStableDiffusionPipeline.from_pretrained(settings["model"], session_options=options)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, settings["scheduler"]).from_config(pipe.scheduler.config)

    def draw(task):
        import torch

        width, height = task["size"]
        return pipe(
            task["prompts"],
            num_inference_steps=task["steps"],
            guidance_scale=task["guidance"],
            width=width,
            height=height,
            latents=torch.from_numpy(np.load(task["latents"])),
        ).images

    return draw


serve(load)
