"""Networks that the engine can serve: refuses configs that need inputs or arithmetic that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.errors import ExportError
from latentrt.values import is_number, is_whole

Config = Mapping[str, Any]
# Settings of a UNet2DConditionModel that must have these values.
CONDITIONAL = {
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "attention_type": "default",
}


INPAINTING, EDITING, DEPTH, LOW = "inpainting", "editing", "depth", "enlarging"  # what is read beside the latents
LOW_LATENTS = "enlarging latents"
INPUTS = {INPAINTING: "beside", EDITING: "beside", DEPTH: "depth_map", LOW: "low_picture", LOW_LATENTS: "low_latents"}
EXTRA = {  # what pipelines give their UNets; of others, UNets may read a picture to repaint
    "StableDiffusionInstructPix2PixPipeline": EDITING,
    "StableDiffusionXLInstructPix2PixPipeline": EDITING,
    "StableDiffusionDepth2ImgPipeline": DEPTH,
    "StableDiffusionUpscalePipeline": LOW,
    "StableDiffusionLatentUpscalePipeline": LOW_LATENTS,
}
KL, TINY = VAES = ("AutoencoderKL", "AutoencoderTiny")
LAYERS = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
)
CHANNELS = ("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels")
MOST = 65_536  # channels, and sides of a picture
NOISE_LEVELS = 128  # numbers before the pooled text in what the latent upscaler's timesteps are embedded with
K_BLOCKS = ("KDownBlock2D", "KCrossAttnDownBlock2D", "KUpBlock2D", "KCrossAttnUpBlock2D")
LEAST_EMBEDDING = 4  # numbers of a guidance embedding: fewer have no frequencies
MOST_LAYERS = 100  # far beyond any network; keeps a damaged config from making layers without end


def unsupported(found: str, needed: str) -> ExportError:
    """Return the error for a checkpoint that cannot be served."""
    return ExportError(f"the checkpoint has {found}", needed=needed)


def check_networks(configs: Mapping[str, Config], kind: str, pipeline: str) -> None:
    """Refuse networks that the engine cannot serve.

    Args:
        configs: by the networks' names.
        kind: the diffusers class that the UNet must have.
        pipeline: the diffusers class that draws with them.

    Raises:
        ExportError: one of them cannot be served; it is named.
    """
    for part, config in configs.items():
        _check_kinds(part, config)
    unet = configs["unet"]
    if unet.get("_class_name", kind) != kind:
        raise unsupported(f"a UNet of the class {unet['_class_name']!r}", kind)
    if kind == "UNet2DModel":
        _check_pixels(unet)
    else:
        xl = "text_encoder_2" in configs
        extra = EXTRA.get(pipeline, INPAINTING)
        _check_channels(unet, configs["vae"].get("latent_channels", 4), extra, pipeline)
        _check_latents(unet, configs["vae"], extra, xl=xl)
        if extra == LOW_LATENTS:
            _check_upscaler(unet, text_config(configs["text_encoder"]))
        else:
            _check_guidance(unet)
        if xl:
            _check_sizes(unet, configs["text_encoder_2"])
    for part, config in configs.items():
        if config.get("use_attention_mask"):
            raise unsupported(f"a {part} with use_attention_mask", "use_attention_mask false")
        if config.get("transformers_weights") is not None:
            raise unsupported(f"a {part} with weights of another name (transformers_weights)", "model.safetensors")
        if config.get("quantization_config") is not None:
            raise unsupported(f"a {part} with quantized weights (quantization_config)", "float32, float16 or bfloat16")


def text_config(config: Config) -> Config:
    """Return the text encoder's part of a config; older checkpoints have CLIP's whole one, with pictures too."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def beside(configs: Mapping[str, Config]) -> str | None:
    """Return what the UNet reads beside the latents, a key of INPUTS; None where it reads nothing."""
    if "unet" not in configs or "vae" not in configs:
        return None
    if upscales_latents(configs["unet"]):
        return LOW_LATENTS
    channels = configs["vae"].get("latent_channels", 4)
    return kind_beside(configs["unet"].get("in_channels", 4) - channels, channels)


def upscales_latents(unet: Config) -> bool:
    """Return whether a UNet is the latent upscaler's: it reads twice the latents, and gives a variance beside them."""
    twice = unet.get("in_channels", 4) == 2 * (unet.get("out_channels", 4) - 1)
    return twice and unet.get("time_embedding_type") == "fourier"


def kind_beside(extra: int, latents: int) -> str | None:
    """Return what so many channels beside those of the latents are, a key of INPUTS; None for any other number."""
    return next((kind for kind, count in _channels(latents).items() if count == extra), None)


def _channels(latents: int) -> dict[str, int]:
    return {INPAINTING: 1 + latents, EDITING: latents, DEPTH: 1, LOW: 3, LOW_LATENTS: latents}


def sizes_read(unet: Config, text: Config) -> int:
    """Return how many sizes an SDXL UNet reads: 6, or 5 where the last is an aesthetic score; 0 where there is no sum.

    Args:
        unet: its config.
        text: of the text encoder whose pooled text is embedded with them.
    """
    width = unet["projection_class_embeddings_input_dim"] - text.get("projection_dim", 512)
    numbers, rest = divmod(width, unet["addition_time_embed_dim"])
    return 0 if rest else int(numbers)


def vae_class(vae: Config) -> str:
    """Return the diffusers class of a VAE. Raise ExportError where it is not one of VAES."""
    kind = vae.get("_class_name", KL)
    if kind not in VAES:
        raise unsupported(f"a VAE of the class {kind!r}", " or ".join(VAES))
    return str(kind)


def vae_factor(vae: Config) -> int:
    """Return how many pixels a side each of a VAE's latents has."""
    key, default = ("block_out_channels", (64,)) if vae_class(vae) == KL else ("encoder_block_out_channels", (64,) * 4)
    return int(2 ** (len(vae.get(key, default)) - 1))


def check_vae(vae: Config) -> None:
    """Refuse a VAE that the engine cannot serve. Raise as `check_networks`."""
    _check_kinds("vae", vae)
    for key in ("latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise unsupported(f"a VAE with {key}", f"{key} null (scaling_factor and shift_factor are served)")
    if vae_class(vae) == KL:
        return
    if vae.get("upsampling_scaling_factor", 2) != 2:
        raise unsupported(f"a VAE with upsampling_scaling_factor {vae['upsampling_scaling_factor']!r}", "2")
    for key in ("decoder_block_out_channels", "block_out_channels"):
        if len(vae.get(key, (64,) * 4)) != len(vae.get("encoder_block_out_channels", (64,) * 4)):
            raise unsupported(f"a VAE with {key} {vae.get(key)!r}", "as many as encoder_block_out_channels has")


def _check_kinds(part: str, config: Config) -> None:
    """Refuse a value of another kind among those that are read here, or that say how many layers there are."""
    channels = f"a whole number from 1 to {MOST}"
    kinds = {
        **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), (is_size, channels)),
        "cross_attention_dim": (is_size, f"{channels} for all blocks"),
        "projection_dim": (is_size, channels),
        "num_class_embeds": (lambda value: value is None or is_size(value), f"null, or {channels}"),
        "sample_size": (_are_sides, f"null, {channels}, or two of them: height and width"),
        **dict.fromkeys(CHANNELS, (_are_sizes, "a list of whole numbers")),
        "scaling_factor": (lambda value: is_number(value) and value != 0, "a finite number, not 0"),
        "shift_factor": (lambda value: value is None or is_number(value), "null, or a finite number"),
        **dict.fromkeys(LAYERS, (_are_layers, f"a whole number up to {MOST_LAYERS}, or a list of them")),
    }
    for key, (fits, needed) in kinds.items():
        if key in config and not fits(config[key]):
            raise ExportError(f"{part}/config.json has {key} {config[key]!r}", needed=needed)


def is_size(value: Any) -> bool:
    """Return whether a value of a config is a number of channels."""
    return is_whole(value) and 1 <= value <= MOST


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_size, value))


def _are_sides(value: Any) -> bool:
    return value is None or is_size(value) or (_are_sizes(value) and len(value) == 2)


def _are_layers(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= MOST_LAYERS and all(map(_are_layers, value))
    return value is None or (is_whole(value) and value <= MOST_LAYERS)


def _check_pixels(unet: Config) -> None:
    """Refuse a UNet2DModel that does not denoise pixels, grey or RGB, with or without class labels."""
    inputs, outputs = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if inputs != outputs or inputs not in (1, 3):
        raise unsupported(f"a UNet2DModel from {inputs} to {outputs} channels", "1 or 3 channels, as many as it reads")
    if unet.get("class_embed_type") not in (None, "timestep"):
        raise unsupported(f"a UNet with class_embed_type {unet['class_embed_type']!r}", "null or 'timestep'")
    if unet.get("time_embedding_type", "positional") != "positional":
        raise unsupported(f"a UNet with time_embedding_type {unet['time_embedding_type']!r}", "'positional'")


def _check_latents(unet: Config, vae: Config, extra: str, *, xl: bool) -> None:
    check_vae(vae)
    levels = unet.get("num_class_embeds") if extra == LOW else None
    if extra == LOW and not is_size(levels):
        raise unsupported(f"a UNet with num_class_embeds {levels!r}", "the number of noise levels in this pipeline")
    wanted = {**CONDITIONAL, "num_class_embeds": levels, "addition_embed_type": "text_time" if xl else None}
    for key, value in wanted.items():
        if unet.get(key, value if key == "attention_type" else None) != value:
            raise unsupported(f"a UNet with {key} {unet.get(key)!r}", f"{key} {value!r} in this pipeline")
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim") if xl else ():
        if not is_size(unet.get(key)):
            raise unsupported(f"a UNet with {key} {unet.get(key)!r}", "a whole number in an SDXL pipeline")


def _check_guidance(unet: Config) -> None:
    """Refuse a UNet that reads something else with its timesteps than a guidance scale."""
    guidance = unet.get("time_cond_proj_dim")
    if guidance is not None and not (is_size(guidance) and guidance >= LEAST_EMBEDDING):
        needed = f"null, or a whole number from {LEAST_EMBEDDING} (LCM, TCD)"
        raise unsupported(f"a UNet with time_cond_proj_dim {guidance!r}", needed)


def _check_upscaler(unet: Config, text: Config) -> None:
    """Refuse a UNet that is not the latent upscaler's: k-diffusion's blocks, a condition of noise and pooled text."""
    condition = NOISE_LEVELS + text.get("hidden_size", 512)
    for key, value in {"time_cond_proj_dim": condition, "time_embedding_type": "fourier"}.items():
        if unet.get(key) != value:
            raise unsupported(f"a UNet with {key} {unet.get(key)!r}", f"{key} {value!r} in this pipeline")
    for key in ("down_block_types", "up_block_types"):
        if other := [kind for kind in unet.get(key, ["CrossAttnDownBlock2D"]) if kind not in K_BLOCKS]:
            raise unsupported(f"a UNet with a {other[0]} in this pipeline", f"blocks among {', '.join(K_BLOCKS)}")


def _check_channels(unet: Config, channels: int, extra: str, pipeline: str) -> None:
    """Refuse a UNet that does not denoise so many channels, with those that its pipeline gives it beside them."""
    inputs, outputs = unet.get("in_channels", 4), unet.get("out_channels", 4)
    whole = channels + _channels(channels)[extra]
    if inputs != whole and not (extra == INPAINTING and inputs == channels):
        needed = f"in_channels {whole} in a {pipeline}"
        if extra == INPAINTING:
            needed = f"in_channels {channels}, the VAE's latent channels, or {whole} for inpainting"
        raise unsupported(f"a UNet with in_channels {inputs} in a {pipeline}", needed)
    own, why = (channels + 1, "the last is left out") if extra == LOW_LATENTS else (channels, "no learned variance")
    if outputs != own:
        raise unsupported(f"a UNet with out_channels {outputs}", f"out_channels {own} ({why})")


def _check_sizes(unet: Config, text: Config) -> None:
    """Refuse a UNet that reads neither SDXL's six sizes beside the pooled text, nor the refiner's five."""
    if sizes_read(unet, text) not in (5, 6):
        own, width = unet["projection_class_embeddings_input_dim"], unet["addition_time_embed_dim"]
        found = f"a UNet with projection_class_embeddings_input_dim {own}"
        pooled = text.get("projection_dim", 512)
        raise unsupported(found, f"{pooled + 6 * width}, or {pooled + 5 * width} of a refiner: pooled text and sizes")
