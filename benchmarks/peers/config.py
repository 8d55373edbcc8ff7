"""The models, the peers, and the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.cases import Config as Defaults
from benchmarks.gpu.config import FOLDER as CACHE
from benchmarks.measures import OURS
from latentrt.bundle.bundle import EMBEDDED
from latentrt.sampling.solvers import SOLVERS

FOLDER = CACHE / "peers"
SCRIPTS = Path(__file__).with_name("scripts")
GOAL = 1.2
DEFAULTS = Defaults()


def here(*packages: str) -> tuple[str, ...]:
    """Return requirements for the versions that this environment has; of torch any build, so the CPU's where a registry
    has one.
    """
    return tuple(f"{package}=={version(package).partition('+')[0]}" for package in packages)


def requirements() -> dict[str, tuple[str, ...]]:
    """Return packages by environment. What converts a checkpoint for a peer may need others than what runs it."""
    return {
        "diffusers": here("torch", "diffusers", "transformers", "accelerate"),
        "optimum": (
            *here("torch", "onnxruntime", "accelerate"),
            *("optimum-onnx==0.1.0", "optimum==2.1.0", "diffusers==0.39.0"),  # the newest that work together
            *("transformers==4.57.6", "huggingface_hub==0.36.2", "onnx==1.23.2"),
        ),
        "openvino": ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "numpy==2.4.6", "pillow==13.0.0"),
        "openvino-convert": (
            *here("torch", "accelerate"),
            *("optimum-intel==2.2.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"),
            *("diffusers==0.39.0", "transformers==5.5.4"),
        ),
        "sdcpp": ("stable-diffusion-cpp-python==0.4.7",),
    }


@dataclass(frozen=True, slots=True)
class Peer:
    """Another engine.

    Attributes:
        title: its name in tables.
        environment: whose Python runs `script`.
        script: a file in `scripts/`; ours also has the command, which is its cold start.
        packages: whose versions the page states.
        differs: what it does not share with the others, in a sentence.
        options: for the script.
        conversion: the script and the environment that make its model's folder from a checkpoint.
        older_names: it reads a checkpoint whose text encoder's weights have the names that transformers 4 gave them.
        same_noise: it can be given the same first latents and the same solver, so that pictures can be compared.
        batches: it draws several pictures in one call of its networks.
    """

    title: str
    environment: str
    script: str
    packages: tuple[str, ...]
    differs: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    conversion: tuple[str, str] | None = None
    older_names: bool = False
    same_noise: bool = True
    batches: bool = True


PEERS: Mapping[str, Peer] = {
    "diffusers": Peer("diffusers", "diffusers", "run_diffusers.py", ("diffusers", "torch")),
    "compile": Peer(
        "torch.compile",
        "diffusers",
        "run_diffusers.py",
        ("diffusers", "torch"),
        "Compiled code of UNet and VAE decoder, one for each batch, is taken from its cache. Ready after a picture of "
        "one step, since it compiles at the first call.",
        {"compile": True},
    ),
    "optimum": Peer(
        "optimum-onnx",
        "optimum",
        "run_optimum.py",
        ("optimum-onnx", "onnxruntime"),
        conversion=("convert_optimum.py", "optimum"),
        older_names=True,
    ),
    "openvino": Peer(
        "OpenVINO GenAI",
        "openvino",
        "run_openvino.py",
        ("openvino-genai", "openvino"),
        "Shapes are dynamic, as in its samples; a batch is several pictures of one prompt. Its compiled networks are "
        "taken from its cache.",
        conversion=("convert_openvino.py", "openvino-convert"),
        older_names=True,
    ),
    "sdcpp": Peer(
        "stable-diffusion.cpp",
        "sdcpp",
        "run_sdcpp.py",
        ("stable-diffusion-cpp-python",),
        "Euler, with as many calls of the UNet; its own noise and tokenizer; weights stay in float16. It draws a batch "
        "one picture after the other, so a batch takes as long as its pictures and is not measured.",
        older_names=True,
        same_noise=False,
        batches=False,
    ),
}
THIS = Peer("latentrt", "", "run_latentrt.py", ("numpy", "onnxruntime"))


STARTS, LOADED = PARTS = "starts", "loaded"  # the rows of a process that starts, and of one that is loaded


@dataclass(frozen=True, slots=True)
class Model:
    """A model with its task.

    Attributes:
        title: the section's.
        size: of the pictures, width and height.
        steps: of the solver.
        rounds: that are kept.
        batch: pictures of the larger task.
        bundle: ours; None is exported from the preset of the model's name.
    """

    name: str
    title: str
    size: tuple[int, int]
    steps: int
    rounds: int
    batch: int = 8
    guidance: float = DEFAULTS.guidance
    seed: int = DEFAULTS.seed
    solver: str = "ddim"  # the one that most of the peers have
    bundle: Path | None = None

    @property
    def scheduler(self) -> str:
        """The solver's name in diffusers."""
        return SOLVERS[self.solver].scheduler

    def to_dict(self) -> dict[str, Any]:
        """Return what figures depend on, for JSON."""
        names = ("title", "size", "steps", "rounds", "batch", "guidance", "seed", "solver")
        return {name: getattr(self, name) for name in names}


MODELS: Mapping[str, Model] = {
    "emoji": Model("emoji", "The embedded model", (128, 128), steps=20, rounds=5, bundle=EMBEDDED),
    "sd15": Model("sd15", "Stable Diffusion 1.5's structure, random weights", (256, 256), steps=2, rounds=2, batch=4),
}


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a run.

    Attributes:
        models, peers: what is measured.
        threads: of every side.
        limit: seconds that one request to a peer may take; what takes longer is recorded as such.
        first_limit: the same while caches are filled, before the first round, and for ours.
        folder: of environments, converted models and the peers' caches.
        parts: of PARTS; samples of a part that is left out are kept from an earlier run.
    """

    models: tuple[Model, ...] = tuple(MODELS.values())
    peers: Mapping[str, Peer] = field(default_factory=lambda: PEERS)
    threads: int = DEFAULTS.threads
    limit: float = 300.0
    first_limit: float = 1200.0
    folder: Path = FOLDER
    parts: tuple[str, ...] = PARTS

    def titles(self) -> dict[str, str]:
        """Return the titles of all sides by name, ours first."""
        return {OURS: THIS.title} | {name: peer.title for name, peer in self.peers.items()}
