"""Which model a single file is, by its text encoders; everything that is no whole model is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from latentrt.errors import ExportError
from latentrt_export.checkpoint.presets.configs import PRESETS, Preset
from latentrt_export.checkpoint.single.pieces import Shapes
from latentrt_export.checkpoint.single.text import Text, is_there

UNET = "model.diffusion_model."
PLAIN, INPAINTING, INSTRUCTED = 4, 9, 8  # channels that UNets read
EMA = "model_ema."  # before the averaged weights' names, which have lost their dots


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes:
        name: as people call it.
        preset: a published model of it, with all that shapes do not show.
        texts: its text encoders by the names of their folders.
        heads: attention heads of each of the UNet's blocks; None: one for each 64 channels.
        others: pipelines whose UNets read a picture too, by their channels.
    """

    name: str
    preset: Preset
    texts: Mapping[str, Text]
    heads: int | None
    others: Mapping[int, str]


_XL = PRESETS["sdxl"]
_REFINER = replace(
    _XL,
    model="stabilityai/stable-diffusion-xl-refiner-1.0",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    networks={name: network for name, network in _XL.networks.items() if name != "text_encoder"},
    tokenizers={"tokenizer_2": _XL.tokenizers["tokenizer_2"]},
    index={
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    },
)
_SECOND = Text("conditioner.embedders.1.model.", open_clip=True, projected=True)
FAMILIES: Mapping[str, Family] = {
    "sd1": Family(
        "Stable Diffusion 1",
        PRESETS["sd15"],
        {"text_encoder": Text("cond_stage_model.transformer.")},
        8,
        {INPAINTING: "StableDiffusionInpaintPipeline", INSTRUCTED: "StableDiffusionInstructPix2PixPipeline"},
    ),
    "sd2": Family(
        "Stable Diffusion 2",
        PRESETS["sd21"],
        {"text_encoder": Text("cond_stage_model.model.", open_clip=True, cut=True)},
        None,
        {INPAINTING: "StableDiffusionInpaintPipeline"},
    ),
    "xl": Family(
        "Stable Diffusion XL",
        _XL,
        {"text_encoder": Text("conditioner.embedders.0.transformer."), "text_encoder_2": _SECOND},
        None,
        {INPAINTING: "StableDiffusionXLInpaintPipeline", INSTRUCTED: "StableDiffusionXLInstructPix2PixPipeline"},
    ),
    "xl-refiner": Family(
        "Stable Diffusion XL refiner",
        _REFINER,
        {"text_encoder_2": replace(_SECOND, prefix="conditioner.embedders.0.model.")},
        None,
        {},
    ),
}
NEEDED = "a whole Stable Diffusion 1, 2 or XL model: UNet, VAE and text encoders"
_TOP = rf"^(?:{re.escape(UNET)})?"
# What else people have as single files: its name, names of its weights, what to do with it.
OTHERS = (
    ("a LoRA", r"\.lora_(?:up|down|mid|A|B)\.|\.lora\.(?:up|down)\.|\.hada_w1_|\.lokr_w1|\.dora_scale$", ""),
    ("a textual inversion", r"^(?:emb_params|string_to_param.*|clip_l|clip_g|<.*>)$", ""),
    ("a T2I-Adapter", r"^(?:adapter\.)?body\.\d+\.(?:block1|resnets)\.", ""),
    ("an IP-Adapter", r"^(?:ip_adapter|image_proj)\.", ""),
    ("a motion module (AnimateDiff)", r"\.motion_modules\.", ""),
    ("Stable Diffusion 3", rf"{_TOP}joint_blocks\.", ""),
    ("Flux", rf"{_TOP}double_blocks\.\d+\.img_attn\.|^(?:single_)?transformer_blocks\.\d+\.attn\.norm_added_q\.", ""),
    ("AuraFlow", rf"{_TOP}double_layers\.", ""),
    ("Hunyuan Video", rf"{_TOP}txt_in\.individual_token_refiner\.", ""),
    ("Qwen-Image", rf"{_TOP}transformer_blocks\.\d+\.(?:img|txt)_mod\.", ""),
    ("Lumina", rf"{_TOP}cap_embedder\.", ""),
    ("Wan", rf"{_TOP}(?:head\.modulation$|blocks\.\d+\.modulation$)", ""),
    ("LTX-Video", rf"{_TOP}patchify_proj\.", ""),
    ("PixArt or Sana", rf"{_TOP}(?:y_embedder|caption_projection)\.", ""),
    ("Stable Cascade", rf"{_TOP}(?:clip_txt_mapper|effnet_mapper)\.|\.channelwise\.", ""),
    ("Playground 2.5 (EDM)", r"^edm_(?:mean|std)$", ""),
    ("Stable Video Diffusion", rf"^conditioner\.embedders\.0\.open_clip\.|{_TOP}.*\.time_stack\.", ""),
    ("Stable Diffusion unCLIP", r"^embedder\.model\.visual\.|^noise_augmentor\.", ""),
    ("Stable Diffusion 2 depth", r"^depth_model\.", ""),
    ("the x4 upscaler", r"^low_scale_model\.", ""),
    ("a network in diffusers' names", r"^(?:unet\.)?(?:down_blocks|up_blocks|mid_block)\.", "export its whole folder"),
)
PARTS = (
    (
        "a model with averaged (EMA) weights only",
        rf"^{EMA}",
        "get the file that has both, or the EMA under plain names",
    ),
    ("a UNet without its text encoders", r"^input_blocks\.", ""),
    ("a VAE", r"^(?:first_stage_model\.|vae\.)?(?:encoder|decoder)\.(?:conv_in|mid|up|down|\d+)", "give it with --vae"),
    ("a text encoder", r"(?:^|\.)text_model\.|\.resblocks\.|^token_embedding\.", ""),
)
CHANNELS = {
    5: "a UNet of 5 channels (Stable Diffusion 2 depth)",
    7: "a UNet of 7 channels (the x4 upscaler)",
    8: "a UNet of 8 channels (pix2pix, or the x2 latent upscaler)",
}


def family_of(shapes: Shapes, model: str | None) -> tuple[Family, str]:
    """Return which family a file is of, and the rule that says so.

    Args:
        shapes: of the whole file.
        model: the user's word, a name of FAMILIES.

    Raises:
        ExportError: it is something else, which is named, or a part of a model.
    """
    _refuse(shapes, OTHERS)
    if not any(name.startswith(f"{UNET}input_blocks.") for name in shapes):
        if not any(name.startswith(UNET) for name in shapes):
            _refuse(shapes, PARTS)
        first = min(shapes, default="nothing")
        raise ExportError(f"a file of {len(shapes)} tensors that no known model has ({first}, ...)", needed=NEEDED)
    if model:
        return FAMILIES[model], "by --model"
    found = [family for family in FAMILIES.values() if all(is_there(text, shapes) for text in family.texts.values())]
    if not found:
        raise ExportError("the single file is a UNet without its text encoders", needed=NEEDED)
    family = found[0]
    kinds = ["OpenCLIP" if text.open_clip else "CLIP" for text in family.texts.values()]
    return family, f"by its text encoder{'s' if len(kinds) > 1 else ''}, {' and '.join(kinds)}"


def check_unet(family: Family, channels: int, shapes: Shapes) -> None:
    """Refuse UNets that are none of text to image, inpainting, or pix2pix.

    Raises:
        ExportError: it reads other channels than latents (and a picture), or labels that it should not.
    """
    if channels != PLAIN and channels not in family.others:
        found = CHANNELS.get(channels, f"a UNet of {channels} channels")
        raise ExportError(f"{family.name} with {found}", needed="4 channels, 9 for inpainting, or 8 for pix2pix")
    labels, xl = f"{UNET}label_emb.0.0.weight" in shapes, "text_encoder_2" in family.texts
    if labels != xl:
        found = "a label embedding (unCLIP?)" if labels else "no label embedding"
        raise ExportError(f"{family.name} with {found}", needed=f"{'one' if xl else 'none'} in this family")


def _refuse(shapes: Shapes, kinds: tuple[tuple[str, str, str], ...]) -> None:
    for what, pattern, fix in kinds:
        if any(re.search(pattern, name) for name in shapes):
            raise ExportError(f"the single file is {what}", needed=NEEDED, fix=fix)
