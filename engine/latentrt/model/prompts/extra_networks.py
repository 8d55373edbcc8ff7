"""LoRAs in prompts of AUTOMATIC1111's web UI: <lora:name>, <lora:name:0.8>, <lora:name:0.5:0.8>.

    <lora:name:0.8>      0.8 of the UNet and of the text encoders
    <lora:name:0.5:0.8>  0.5 of the text encoders, 0.8 of the UNet: in this order
    te=0.5, unet=0.8     the same by name, in any place after the LoRA's name

A tag is no part of the text. <lyco:...> is the same. Source: modules/extra_networks.py and
extensions-builtin/Lora/extra_networks_lora.py of stable-diffusion-webui 1.10.
"""

from __future__ import annotations

import re

from latentrt.errors import RequestError

TAG = re.compile(r"<(\w+):([^<>]+)>")
KINDS = ("lora", "lyco")
FORM = "<lora:name:0.8>, or <lora:name:0.5:0.8> of the text encoders and of the UNet"
NAMES = ("te", "unet")


def loras_in(prompt: str) -> dict[str, tuple[float, float]]:
    """Return the LoRAs of a prompt by name, with their strengths of the UNet and of the text encoders.

    Raises:
        RequestError: a tag has another form, or a name stands twice.
    """
    found: dict[str, tuple[float, float]] = {}
    for match in TAG.finditer(prompt):
        if match[1] not in KINDS:
            continue
        name, strengths = _read(match[0], match[2].split(":"))
        if name in found:
            raise RequestError(f"the prompt has two tags of the LoRA {name!r}", needed="one for each LoRA")
        found[name] = strengths
    return found


def without_loras(prompt: str) -> str:
    """Return a prompt without the tags of LoRAs."""
    return TAG.sub(lambda match: "" if match[1] in KINDS else match[0], prompt)


def _read(tag: str, parts: list[str]) -> tuple[str, tuple[float, float]]:
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    name, *plain = [part for part in parts if "=" not in part] or [""]
    if not name or len(plain) > len(NAMES) or not set(named) <= set(NAMES):
        raise RequestError(f"the prompt has {tag}", needed=FORM)
    try:
        text = float(named.get("te", plain[0] if plain else 1.0))
        unet = float(named.get("unet", plain[1] if len(plain) > 1 else text))
    except ValueError as error:
        raise RequestError(f"the prompt has {tag}", needed=FORM) from error
    return name, (unet, text)
