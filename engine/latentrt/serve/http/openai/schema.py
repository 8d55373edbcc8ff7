"""The OpenAI Images API as the newest client speaks it: every field it may send, and the answers.

A field whose type is None alone is one that the client knows and that is not supported: null passes, anything else is
refused by name. `seed`, `negative_prompt`, `num_inference_steps`, `guidance_scale`, `scheduler`, `class_label`,
`strength`, `depth`, `control`, `ip_adapter`, `timeout`, `webhook_url`, `background` as a truth, OWN and OF_EDITS are
latentrt's own (`extra_body` in the client).

Source: openai.types.image_generate_params, image_edit_params, images_response and the stream events, openai 3.54.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from latentrt.request import MAX_SEED
from latentrt.serve.http.controls import Shown, Unit


def _whole(value: object) -> object:
    """Take JSON's 2.0 for a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _json(value: object) -> object:
    """Take JSON for what it says: a form has texts."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError("it is no JSON") from error


def _without_null(schema: dict[str, Any]) -> None:
    """Describe a form, which cannot say null: optional fields are left out, and fields that are always null vanish."""
    fields = schema["properties"]
    for name, field in list(fields.items()):
        if field.get("type") == "null":
            del fields[name]
        kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
        if kinds:
            del field["anyOf"]
            field.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})
            field.pop("default", None)


OWN = (  # named as a Request names them
    *("prompt_syntax", "clip_skip", "cache_interval"),
    *("hires_scale", "hires_steps", "hires_strength", "handoff"),
)
OF_EDITS = ("image_guidance", "noise_level")  # the same
WHOLE = BeforeValidator(_whole)  # last in its type: bounds must stand next to int to be in the schema
Text = Annotated[str, Field(min_length=0)]  # with any bound, half a surrogate pair is refused
Count = Annotated[int, Field(ge=1), WHOLE]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE]
Label = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
Guidance = Annotated[float, Field(ge=0, le=100)]
Percent = Annotated[int, Field(ge=0, le=100), WHOLE]
Part = Annotated[float, Field(gt=0, le=1)]
ImageGuidance = Annotated[float, Field(ge=1, le=100)]
NoiseLevel = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
OutputFormat = Literal["png", "jpeg", "webp"]


class Wanted(BaseModel):
    """What both kinds of requests for pictures have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[Text | None, Field(description="What to draw; needed, except by models that read none.")] = None
    model: Annotated[str | None, Field(description="A name that /v1/models lists.")] = None
    n: Annotated[Count | None, Field(description="How many pictures.")] = None
    size: Annotated[str | None, Field(description="WIDTHxHEIGHT, or auto for the model's own.")] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="Pictures always come as base64; with url also as data: URLs."),
    ] = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[
        Percent | None, Field(description="Quality of jpeg and webp; 100 is all that png takes.")
    ] = None
    background: Annotated[
        Literal["opaque", "auto"] | bool | None,
        Field(description="true: answer at once with a job, whose result is fetched later."),
    ] = None
    webhook_url: Annotated[
        Annotated[str, Field(max_length=2048)] | None,
        Field(description="Is told when the background job is over; of a host that the server's operator lists."),
    ] = None
    stream: Annotated[bool | None, Field(description="Answer with server-sent events.")] = None
    partial_images: Annotated[
        Annotated[int, Field(ge=0, le=3), WHOLE] | None,
        Field(description="Previews of each picture in a stream or of a background job."),
    ] = None
    # Accepted, and without effect here.
    moderation: Literal["low", "auto"] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # Known to the client, not supported.
    frame_count: None = None
    frame_duration_ms: None = None
    svg: None = None
    # latentrt's own.
    seed: Annotated[Seed | None, Field(description="Of the first picture; the others count up. None: any.")] = None
    negative_prompt: Text | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Guidance | None = None
    scheduler: Annotated[str | None, Field(description="A name of `latentrt solvers`, or a diffusers class.")] = None
    prompt_syntax: Annotated[
        Literal["plain", "a1111", "compel"] | None, Field(description="How prompts are read: with which weights.")
    ] = None
    class_label: Annotated[Label | None, Field(description="Number of a class, for models that have classes.")] = None
    cache_interval: Annotated[
        Annotated[int, Field(ge=1, le=10_000), WHOLE] | None,
        Field(description="Compute only every Nth row in full: faster, and another picture."),
    ] = None
    clip_skip: Annotated[
        Annotated[int, Field(ge=0, le=1000), WHOLE] | None,
        Field(description="Layers of the text encoders to leave out at the end, as diffusers counts."),
    ] = None
    hires_scale: Annotated[
        Annotated[float, Field(ge=1, le=8)] | None,
        Field(description="Enlarge the latents by this and draw on (hires fix); `size` is that before."),
    ] = None
    hires_steps: Count | None = None
    hires_strength: Annotated[Part | None, Field(description="How much of the second run is made.")] = None
    handoff: Annotated[
        Part | None, Field(description="Part of the run after which the server's refiner takes over.")
    ] = None
    timeout: Annotated[
        Annotated[float, Field(gt=0, le=86_400)] | None, Field(description="Seconds: refuse what would take longer.")
    ] = None

    @property
    def previews(self) -> int:
        """How many of each picture are delivered."""
        return self.partial_images or 0 if self.stream or self.background is True else 0

    @property
    def kind(self) -> OutputFormat:
        """The format of the pictures' files."""
        return self.output_format or "png"


class GenerateRequest(Wanted):
    """Body of POST /v1/images/generations."""

    model_config = ConfigDict(strict=True)

    control: Annotated[
        dict[str, Unit] | None, Field(description="What ControlNets do, by the names that /latentrt/model lists.")
    ] = None
    ip_adapter: Annotated[
        dict[str, Shown] | None, Field(description="What IP-Adapters show, by the names that /latentrt/model lists.")
    ] = None
    style: Annotated[Literal["vivid", "natural"] | None, Field(description="Without effect here.")] = None
    lora: Annotated[
        dict[str, float | list[float]] | None,
        Field(description="This server's LoRAs by name: 0.8, or [0.8, 0.5] of the UNet and of the text encoders."),
    ] = None


class EditRequest(Wanted):
    """Form of POST /v1/images/edits. Files only: nothing is ever fetched from a URL."""

    model_config = ConfigDict(json_schema_extra=_without_null)

    image: Annotated[list[UploadFile], Field(description="The picture to edit: PNG, JPEG or WebP.")] = []
    images: Annotated[list[UploadFile], Field(alias="image[]", description="The same, as arrays are sent.")] = []
    mask: Annotated[
        UploadFile | None,
        Field(
            description="PNG or WebP of the picture's size; where its alpha is 0 is edited. Without one, where the"
            " picture's own alpha is 0, if it is anywhere."
        ),
    ] = None
    lora: Annotated[str | None, Field(description='This server\'s LoRAs as JSON: {"name": 0.8}.')] = None
    strength: Annotated[Part | None, Field(description="How far to leave the picture: 1 keeps nothing.")] = None
    depth: Annotated[
        UploadFile | None,
        Field(description="The picture's depth map, grey, near is white: for models that draw by depth."),
    ] = None
    control: Annotated[
        dict[str, Unit] | None, BeforeValidator(_json), Field(description="As of generations, as JSON.")
    ] = None
    ip_adapter: Annotated[
        dict[str, Shown] | None, BeforeValidator(_json), Field(description="As of generations, as JSON.")
    ] = None
    image_guidance: Annotated[
        ImageGuidance | None,
        Field(description="How closely to stay to the picture: for models that edit it as the prompt says."),
    ] = None
    noise_level: Annotated[
        NoiseLevel | None, Field(description="How much noise the picture gets: for models that enlarge it.")
    ] = None
    input_fidelity: Annotated[Literal["low", "high"] | None, Field(description="Without effect here.")] = None
    markup: None = None


class ImageData(BaseModel):
    """One picture."""

    b64_json: str
    url: Annotated[str | None, Field(description="The same as a data: URL, if url was asked for.")] = None
    seed: Annotated[int, Field(description="What makes this picture again, alone.")]


class ImagesResponse(BaseModel):
    """The answer to a request without `stream`."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    usage: Annotated[dict[str, Any], Field(description="Zeros: no tokens are counted.")]
    safety_identifier: str | None = None
    warnings: Annotated[list[str], Field(description="What the model did not read of a prompt, if anything.")] = []


class Model(BaseModel):
    """One name of the model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: Annotated[str, Field(description="The name that this one stands for.")]


class ModelList(BaseModel):
    """The model under all its names."""

    object: Literal["list"] = "list"
    data: list[Model]


# No tokens are counted here, but the client's type wants a number of them.
USAGE: dict[str, Any] = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
