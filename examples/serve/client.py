"""A client that shows previews and comes again where the server has no room: it waits as long as `Retry-After` says."""

import base64
import os
from pathlib import Path

from openai import OpenAI

url, key = os.environ.get("LATENTRT_URL", "http://127.0.0.1:8000/v1"), os.environ.get("LATENTRT_KEY", "none")
extra = {"seed": 7, "num_inference_steps": 30, "negative_prompt": "blurry"}
with OpenAI(base_url=url, api_key=key, max_retries=5, timeout=600) as client:
    for event in client.images.generate(prompt="a red apple", stream=True, partial_images=2, extra_body=extra):
        last = event.type == "image_generation.completed"
        name = "apple.png" if last else f"apple-{event.partial_image_index}.png"
        Path(name).write_bytes(base64.b64decode(event.b64_json))
