"""Settings of a server: from flags, LATENTRT_* variables or a TOML file, in this order of precedence."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from latentrt.bundle.bundle import EMBEDDED
from latentrt.errors import RequestError
from latentrt.serve.core.rules.terms import Terms, key_and_terms
from latentrt.serve.process.tables import check_table, split, tables_of
from latentrt.serve.process.webhooks.hosts import Hosts
from latentrt.serve.process.webhooks.signature import secret_of

PREFIX = "LATENTRT_"
SECRET = ("keys", "webhook_secret")  # no flags: others can read a command line
# Model names that clients send by default: LibreChat's tool gpt-image-1, Open WebUI dall-e-2.
OTHER_NAMES = ("gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "gpt-image-2", "dall-e-2", "dall-e-3")
MIB = 2**20


Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s?#]+)$")]
Endpoint = Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")]
Origins = Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(split)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split)]
Listed = Annotated[str, Field(pattern=r"^(?i)(https?://)?([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?$")]
HostNames = Annotated[tuple[Listed, ...], NoDecode, BeforeValidator(split)]
Count = Annotated[int, Field(ge=1)]
Range = Annotated[str, BeforeValidator(str), Field(pattern=r"^[1-9][0-9]{0,3}(:[1-9][0-9]{0,3})?$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ModelName = Annotated[str, Field(pattern=r"^[^\s,=]{1,64}$")]
# Each model's own settings, by its name; text, or a list of it, is NAME=BUNDLE.
ModelTables = Annotated[dict[ModelName, dict[str, Any]], NoDecode, BeforeValidator(tables_of)]


def _field(default: Any, section: str, description: str) -> Any:
    return Field(default, description=description, json_schema_extra={"section": section})


class Settings(BaseSettings):
    """All settings of `latentrt serve`: `max_steps` is --max-steps, LATENTRT_MAX_STEPS, and max_steps in TOML."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=False)

    host: str = _field("127.0.0.1", "Network", "Address to listen on; 0.0.0.0 for all.")
    port: Annotated[int, Field(ge=0, le=65_535)] = _field(8000, "Network", "Port; 0 for any that is free.")
    keys: Secrets = _field((), "Network", "Keys that clients need one of; not a flag. None: all may draw.")
    keys_file: Path | None = _field(
        None, "Network", "File with one key a line, as KEY share=2 priority=1 places=8; # for comments."
    )
    cors_origin: Origins = _field(
        (), "Network", "Origins whose pages may use this server from a browser, as https://example.org; * for all."
    )
    allowed_host: Texts = _field(
        (), "Network", "Names by which clients call a server without keys, as example.org; * for any."
    )
    drain_timeout: Seconds = _field(60.0, "Network", "Seconds that running requests get after SIGTERM.")
    body_timeout: Seconds = _field(60.0, "Network", "Seconds in which a request's body must have come.")
    stall_timeout: Seconds = _field(
        60.0, "Network", "Seconds in which a client must take its answer, or a MiB of it, or it is given up."
    )
    heartbeat: Seconds = _field(10.0, "Network", "Seconds between comments that keep a stream alive.")

    ray: bool = _field(False, "Ray", "Serve by replicas of Ray Serve; needs the extra `ray`.")
    replicas: Range = _field(
        "1", "Ray", "How many replicas: a number, or MIN:MAX by load. Each has a GPU of its own, if it runs on one."
    )

    ray_name: Annotated[str, Field(min_length=1)] = _field("latentrt", "Ray", "The application's name in the cluster.")
    ray_route: Annotated[str, Field(pattern=r"^/([^/?#\s]+(/[^/?#\s]+)*)?$")] = _field(
        "/", "Ray", "Path below which Ray serves the application, as /draw; / for all."
    )

    bundle: Path = _field(EMBEDDED, "Model", "Bundle to serve.")
    model_name: str | None = _field(None, "Model", "The model's name for clients; the bundle's id if none is named.")
    aliases: Texts = _field(OTHER_NAMES, "Model", "Other names for it, with commas between them.")
    refiner: Path | None = _field(None, "Model", "Bundle of a model that may draw the last part of a run.")
    backend: str = _field("onnxruntime", "Model", "onnxruntime, openvino, tensorrt or tensorrt-rtx.")
    device: str | None = _field(None, "Model", "cpu, cuda or cuda:1.")
    precision: Literal["fp32", "fp16", "int8"] | None = _field(None, "Model", "Of the graphs: fp32, fp16 or int8.")
    plans: Path | None = _field(None, "Model", "Folder of TensorRT plans; the user's cache if none is named.")
    threads: Count | None = _field(
        None, "Model", "CPU threads of a network call; the cores that the process may use if not given."
    )
    spin: bool = _field(
        False, "Model", "CPU threads wait for each other by spinning: for cores that serve nothing else."
    )
    cache: bool = _field(True, "Model", "Keep graphs that are optimized for this CPU in the user's cache.")
    lanes: Count | None = _field(None, "Model", "Most lanes of a UNet call; guidance takes two a picture.")
    vae: Path | None = _field(None, "Model", "Bundle whose VAE takes the place of the model's.")
    preview_vae: Path | None = _field(None, "Model", "Bundle whose decoder makes the previews.")
    tile: Count | None = _field(
        None, "Model", "Decode and encode pictures with a longer side in tiles of so many pixels: less memory."
    )
    lora_dir: Path | None = _field(None, "Model", "Folder of LoRAs that requests may have by name.")
    lora_rank: Count | None = _field(None, "Model", "Largest rank of a picture's LoRAs together; 64 if not given.")
    embedding: Texts = _field((), "Model", "Files of textual inversion, FILE or NAME=FILE, with commas between them.")
    controlnet: Texts = _field((), "Model", "Bundles of ControlNets, NAME=BUNDLE, with commas between them.")
    ip_adapter_model: Texts = _field((), "Model", "Bundles of IP-Adapters, NAME=BUNDLE, with commas between them.")
    lora: Texts = _field((), "Model", "LoRAs for all pictures, FILE[:STRENGTH[:TEXT]], with commas between them.")
    allow_unmatched: bool = _field(False, "Model", "Leave out keys of LoRAs that have no place.")
    edits: bool = _field(True, "Model", "Take pictures to edit; without it the VAE's encoder is not loaded.")

    models: ModelTables = _field({}, "Several models", "NAME=BUNDLE of each; in TOML a table [models.NAME].")
    preload: bool = _field(False, "Several models", "Load all of them at the start, and not at their first request.")
    model_memory: Count | None = _field(
        None, "Several models", "Most MiB that those that are loaded may take; half of what is free if not given."
    )
    idle_unload: Seconds | None = _field(
        None, "Several models", "Seconds after which a model that nobody uses is dropped; never if not given."
    )

    queue: Count = _field(64, "Load", "Most pictures that wait.")
    memory: Count | None = _field(
        None, "Load", "Most MiB that network calls may take at once; half of what is free at the start if not given."
    )
    queue_timeout: Seconds = _field(120.0, "Load", "Most seconds that a request waits.")
    run_timeout: Seconds = _field(300.0, "Load", "Most seconds that a request runs.")
    hang_timeout: Seconds = _field(60.0, "Load", "Seconds after which a step counts as hung.")

    keep_results: Seconds = _field(600.0, "Background", "Seconds that a background job is kept once it is over.")
    max_results: Count = _field(1000, "Background", "Most jobs that are kept; a quarter of them of one client.")
    results_memory: Count = _field(
        256, "Background", "Most MiB of results that are kept; a quarter of them of one client."
    )
    webhook_host: HostNames = _field(
        (), "Background", "Hosts that are told of ended jobs, as hooks.example.org or http://hooks.example.org:8080."
    )
    webhook_private_host: HostNames = _field(
        (), "Background", "The same, for those whose address is private or this machine's."
    )
    webhook_secret: Secrets = _field(
        (), "Background", "Secrets that sign webhooks, as whsec_ and base64; not a flag. All of them sign."
    )

    max_n: Count = _field(10, "Limits", "Most pictures of one request.")
    max_steps: Count | None = _field(
        None, "Limits", "Most steps of a picture; 150 if not given, or the default where that is more."
    )
    max_side: Count | None = _field(
        None, "Limits", "Longest side of a picture, in pixels; 2048, or the model's own, if not given."
    )
    max_pixels: Count | None = _field(
        None,
        "Limits",
        "Most pixels of a picture; 1536x1024, or 512x512 enlarged, within the memory, if not given.",
    )
    sizes: Texts = _field((), "Limits", "The only sizes drawn, as 512x512,768x512; any within the limits if none.")
    max_prompt: Count = _field(32_000, "Limits", "Most characters of a prompt.")
    max_body: Count = _field(64 * MIB, "Limits", "Most bytes of a request with a picture to edit.")
    max_image_bytes: Count = _field(32 * MIB, "Limits", "Most bytes of a picture that is sent here.")
    max_image_pixels: Count = _field(4096 * 4096, "Limits", "Most pixels of a picture that is sent here.")

    steps: Count | None = _field(None, "Defaults", "Steps, for clients that name none; the model's own if not given.")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = _field(
        None, "Defaults", "Guidance scale, for clients that name none; the model's own if not given."
    )
    scheduler: str | None = _field(
        None, "Defaults", "Solver, for clients that name none; the model's own if not given."
    )

    log_format: Literal["auto", "console", "json"] = _field("auto", "Logs", "auto: console on a terminal, else json.")
    log_level: Literal["debug", "info", "warning", "error"] = _field("info", "Logs", "debug, info, warning or error.")
    otlp_endpoint: Endpoint | None = _field(
        None, "Logs", "Collector of traces, OTLP over HTTP, as http://localhost:4318; needs the extra `otel`."
    )
    log_prompts: bool = _field(False, "Logs", "Write prompts into the log.")

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.fewest_replicas > self.most_replicas:
            raise ValueError(f"replicas ({self.replicas}) is from more to fewer")
        if self.most_replicas > 1 and not self.ray:
            raise ValueError(f"replicas ({self.replicas}) needs ray")
        listed = self.webhook_host or self.webhook_private_host
        if listed and not self.webhook_secret:
            raise ValueError("webhook_host needs webhook_secret")
        if listed and self.most_replicas > 1:
            raise ValueError(f"webhook_host needs one replica: {self.replicas} take no background jobs")
        self.signing_secrets()
        self.hosts()
        if self.ray and self.idle_unload:
            raise ValueError("idle_unload is for a server without ray: Ray ends replicas by load")
        if self.models:
            self._check_models()
        return self

    def _check_models(self) -> None:
        for name in ("bundle", "model_name"):
            if name in self.model_fields_set:
                raise ValueError(f"{name} and models are both set: take one of them")
        several = self.each()
        if len(several) == 1:
            return
        if self.ray:
            raise ValueError(f"there are {len(several)} models, and a server by Ray has one: start one for each")
        for one in several:
            if not one.on_cpu:
                device = one.device or one.backend
                raise ValueError(f"{one.model_name} is on {device}: several models are served on a CPU, one on a GPU")

    def each(self) -> tuple[Settings, ...]:
        """Return the settings of each model, the first one's first: the server's, with the model's own in their place.

        Raises:
            ValueError: a model has a setting that models have none of, or a value that it cannot have.
        """
        if not self.models:
            return (self,)
        shared = self.model_dump() | {"models": {}}
        found: list[Settings] = []
        for name, own in self.models.items():
            check_table(name, own, {key: field.json_schema_extra for key, field in type(self).model_fields.items()})
            aliases = {} if not found else {"aliases": ()}
            try:
                found.append(Settings(**{**shared, **aliases, "model_name": name, **own}))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                raise ValueError(f"{name}: {'.'.join(map(str, first['loc'][:1]))}: {first['msg']}") from error
        return tuple(found)

    @property
    def on_cpu(self) -> bool:
        """Whether the backend runs on the CPU."""
        return (self.device or "cpu").lower() == "cpu" and not self.backend.startswith("tensorrt")

    @property
    def takes_maps(self) -> bool:
        """Whether requests may have pictures for ControlNets or IP-Adapters, whose pictures are fields of forms."""
        owns = (own.get(name) for own in self.models.values() for name in ("controlnet", "ip_adapter_model"))
        return bool(self.controlnet or self.ip_adapter_model) or any(owns)

    @property
    def fewest_replicas(self) -> int:
        """MIN of `replicas`."""
        return int(self.replicas.partition(":")[0])

    @property
    def most_replicas(self) -> int:
        """MAX of `replicas`."""
        return int(self.replicas.rpartition(":")[2])

    @property
    def most_pictures(self) -> int:
        """The largest n: what does not fit into an empty queue never will."""
        return min(self.max_n, self.queue)

    @property
    def max_text(self) -> int:
        """Most bytes of a request without a picture: two prompts as long as JSON can write them, and the rest."""
        return min(self.max_body, 2 * 12 * self.max_prompt + MIB // 16)

    def hosts(self) -> Hosts:
        """Return the hosts that are told of ended jobs. Raise ValueError where one cannot be."""
        return Hosts(self.webhook_host, self.webhook_private_host)

    def signing_secrets(self) -> tuple[bytes, ...]:
        """Return the secrets that sign webhooks. Raise ValueError where one cannot be."""
        return tuple(secret_of(each.get_secret_value()) for each in self.webhook_secret)

    def secrets(self) -> tuple[bytes, ...]:
        """Return all keys, those of the file too. Raise as `clients`."""
        return tuple(self.clients())

    def clients(self) -> dict[bytes, Terms]:
        """Return all keys, those of the file too, with what their clients have been promised.

        Raises:
            RequestError: the file cannot be read or has no key, or the terms of a key cannot be.
        """
        keys = [key.get_secret_value() for key in self.keys]
        if self.keys_file is not None:
            keys += _keys_of(self.keys_file)
        return {key.encode(): terms for key, terms in map(key_and_terms, keys)}


def _keys_of(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the keys' file {path} cannot be read ({error})", needed="a text file") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise RequestError(
            f"{path} has no key", needed="one key a line", fix=f"write one into {path}, or leave --keys-file out"
        )
    return keys


def load_settings(flags: dict[str, Any], config: Path | None = None) -> Settings:
    """Return the settings of a server.

    Args:
        flags: what the command line says, by field.
        config: a TOML file; None is what LATENTRT_CONFIG names, if anything.

    Raises:
        RequestError: a value is out of range, a name is unknown, the file cannot be read.
    """
    path = config or os.environ.get(f"{PREFIX}CONFIG")
    variables = {name.upper() for name in os.environ}
    lines = _lines_of(Path(path)) if path else {}
    lines = {name: value for name, value in lines.items() if f"{PREFIX}{name}".upper() not in variables}
    try:
        return Settings(**{**lines, **flags})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"][:1]))
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(
            f"{name}: {message}" if name else message,
            needed="settings that `latentrt serve --help` lists, within their ranges",
            fix=_fix(name),
        ) from error


def _fix(name: str) -> str:
    """Return where a setting may come from."""
    if not name:
        return "change one of them"
    flag = "NAME=BUNDLE" if name == "models" else f"--{name.replace('_', '-')}"
    return f"change {flag}, {PREFIX}{name.upper()} or {name} in the TOML file"


def _lines_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RequestError(f"there is no file {path}", needed="a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path} cannot be read ({error})", needed="a TOML file", fix="correct it, or change --config"
        ) from error
