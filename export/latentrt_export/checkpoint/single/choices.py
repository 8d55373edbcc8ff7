"""What a user decides about a checkpoint, over what its files say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentrt.adapters.given import Lora, Loras, loras_of
from latentrt.errors import ExportError

MODELS = ("sd1", "sd2", "xl", "xl-refiner")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of a single file, and a VAE and LoRAs for any checkpoint.

    Attributes:
        model: which model a single file is, one of MODELS; None: by its text encoders.
        prediction_type: what its UNet predicts, one of PREDICTIONS; None: by the rules of `prediction.py`.
        ema: whether to take the averaged weights of the UNet.
        vae: a safetensors file with the VAE to take instead of the checkpoint's.
        lora: LoRAs to merge into the weights, in this order; see `latentrt.adapters.given.loras_of`.
        allow_unmatched: whether keys of a LoRA without a place in the model are left out; they are an error otherwise.
        adapters: whether to write graphs that take LoRAs with each request, too.
        image_encoder: the folder of an IP-Adapter's image encoder; None: "image_encoder" beside its file.

    Raises:
        ExportError: there is no such model or prediction type.
        AdapterError: as of `loras_of`.
    """

    model: str | None = None
    prediction_type: str | None = None
    ema: bool = False
    vae: str | Path | None = None
    lora: Loras = ()
    allow_unmatched: bool = False
    adapters: bool = False
    image_encoder: str | Path | None = None

    def __post_init__(self) -> None:
        loras_of(self.lora, allow_unmatched=self.allow_unmatched)
        for what, value, known in (
            ("model", self.model, MODELS),
            ("prediction type", self.prediction_type, PREDICTIONS),
        ):
            if value not in (None, *known):
                raise ExportError(f"there is no {what} {value!r}", needed=f"one of {', '.join(known)}")

    @property
    def options(self) -> list[str]:
        """The options of `latentrt export` that say this, without folders."""
        named = {"model": self.model, "prediction-type": self.prediction_type}
        options = [f"--{name}={value}" for name, value in named.items() if value]
        options += ["--ema"] if self.ema else []
        options += [f"--vae={Path(self.vae).name}"] if self.vae else []
        options += [f"--lora={lora}" for lora in self.loras]
        options += ["--allow-unmatched"] if self.allow_unmatched else []
        options += [f"--image-encoder={Path(self.image_encoder).name}"] if self.image_encoder else []
        return [*options, *(["--adapters"] if self.adapters else [])]

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs, with their strengths."""
        return loras_of(self.lora)

    @property
    def vae_note(self) -> str:
        """What to say of the VAE."""
        return f"VAE of {Path(self.vae).name}" if self.vae else ""

    def check_folder(self, source: object) -> None:
        """Refuse options that only a single file has.

        Raises:
            ExportError: there is one of them.
        """
        if self.model or self.prediction_type or self.ema:
            option = self.options[0].partition("=")[0]
            raise ExportError(f"{option} with {source}", needed="a single .safetensors file", fix=f"leave out {option}")


AS_THEY_ARE = Choices()
