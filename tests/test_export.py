"""The export side: checkpoints in, bundles out, compared with the networks of diffusers and transformers."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from engine.bundle import EMBEDDED, Bundle
from engine.errors import ExportError, OutputError, UnsafeWeightsError
from engine.prompt import Tokenizer
from engine.spec import Golden, GraphSpec
from export import passes, to_bundle
from export.source import open_checkpoint
from export.to_bundle import NetworkSummary, export_bundle
from export.to_onnx import quiet, trace
from export.weights import share_weights
from export.wrap import load_network

Arrays = dict[str, np.ndarray]
BUNDLES = ("sd", "sd2", "sdxl", "emoji")
# (batch, height, width) of the latents; odd sizes need upsamplers that look at the skip connections.
SIZES = ((1, 16, 16), (3, 13, 10))
# Greatest absolute difference to torch in float32; measured 7.0e-6 (the embedded VAE decoder) over all of them.
BOUND = 2e-5


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Make, once each, a checkpoint and its bundle: (checkpoint, bundle)."""
    root = tmp_path_factory.mktemp("exported")

    def make(name: str) -> tuple[Path, Path]:
        if name == "emoji":
            return EMBEDDED, EMBEDDED
        source, target = root / name, root / f"{name}-bundle"
        if not target.exists():
            with quiet():
                _make_checkpoint(name, source)
            export_bundle(source, target)
        return source, target

    return make


def _make_checkpoint(name: str, folder: Path) -> None:
    if name == "sd":
        checkpoints.tiny_sd(folder)
        checkpoints.rename_as_of_old(folder)
    elif name == "sd2":
        checkpoints.tiny_sd2(folder, variant="fp16", max_shard_size="200KB")
    else:
        checkpoints.tiny_sdxl(folder)


# --- graphs against torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLES)
def test_graphs_give_what_torch_gives(exported: Callable[[str], tuple[Path, Path]], name: str) -> None:
    _, root = exported(name)
    spec = Bundle.open(root).spec
    for network, graph in spec.graphs.items():
        session = _session(root / graph.path)
        torch_network = _torch_network(root, network, spec.family)
        for size in SIZES:
            feeds = _feeds(root, graph, network, size, spec.latents.factor)
            with torch.no_grad():
                wanted = torch_network({k: torch.from_numpy(v) for k, v in feeds.items()})
            got = session.run(None, feeds)
            assert [o.name for o in session.get_outputs()] == list(wanted)
            for array, tensor in zip(got, wanted.values(), strict=True):
                assert array.dtype == np.float32
                np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=BOUND, err_msg=f"{network} {size}")


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _torch_network(root: Path, name: str, family: str) -> Callable[[Mapping[str, torch.Tensor]], dict[str, Any]]:
    """The network as its own library loads and calls it; `export.wrap` has no part in it."""
    load = {"dtype": torch.float32, "use_safetensors": True}
    with quiet():
        if name.startswith("text_encoder"):
            kind = CLIPTextModelWithProjection if name.endswith("_2") else CLIPTextModel
            text = kind.from_pretrained(root / name, **load).eval()
            return lambda x: _text_states(text, x["input_ids"], family)
        if name == "unet":
            unet = UNet2DConditionModel.from_pretrained(root / "unet", torch_dtype=torch.float32).eval()
            return lambda x: {"out": _noise(unet, x)}
        vae = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32).eval()
    if name == "vae_decoder":
        return lambda x: {"image": vae.decode(x["latents"]).sample}
    return lambda x: {"moments": vae.encode(x["image"]).latent_dist.parameters}


def _text_states(model: Any, ids: torch.Tensor, family: str) -> dict[str, torch.Tensor]:
    out = model(ids, output_hidden_states=True)
    if family == "sd":
        return {"text_states": out.last_hidden_state}
    states = {"text_states": out.hidden_states[-2]}
    return states | {"text_embeds": out.text_embeds} if hasattr(out, "text_embeds") else states


def _noise(unet: Any, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x}
    return unet(x["sample"], x["timestep"], x["encoder_hidden_states"], added_cond_kwargs=added).sample


def _feeds(root: Path, graph: GraphSpec, network: str, size: tuple[int, int, int], factor: int) -> Arrays:
    rng = np.random.default_rng(0)
    if network.startswith("text_encoder"):
        tokenizer = Tokenizer.open(root / network.replace("text_encoder", "tokenizer"))
        prompts = ["a cat on a dog", "", "can " * 90]
        return {"input_ids": np.stack([tokenizer.encode(p).ids for p in prompts[: size[0]]])}
    scale = factor if network == "vae_encoder" else 1
    sizes = {"batch": size[0], "height": size[1] * scale, "width": size[2] * scale}
    shapes = {t.name: [sizes[d] if isinstance(d, str) else d for d in t.shape] for t in graph.inputs}
    ranges = {"timestep": 999.0, "time_ids": 1024.0}
    return {
        name: rng.uniform(0, ranges[name], shape).astype(np.float32)
        if name in ranges
        else rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def test_names_and_free_axes_are_the_engines_contract(exported: Callable[[str], tuple[Path, Path]]) -> None:
    spec = Bundle.open(exported("sdxl")[1]).spec
    inputs = {name: {t.name: t.shape for t in graph.inputs} for name, graph in spec.graphs.items()}
    image = ("batch", 4, "height", "width")
    assert inputs == {
        "text_encoder": {"input_ids": ("batch", 77)},
        "text_encoder_2": {"input_ids": ("batch", 77)},
        "unet": {
            "sample": image,
            "timestep": ("batch",),
            "encoder_hidden_states": ("batch", 77, 80),
            "text_embeds": ("batch", 24),
            "time_ids": ("batch", 6),
        },
        "vae_decoder": {"latents": image},
        "vae_encoder": {"image": ("batch", 3, "height", "width")},
    }
    outputs = {name: [t.name for t in graph.outputs] for name, graph in spec.graphs.items()}
    assert outputs == {
        "text_encoder": ["text_states"],
        "text_encoder_2": ["text_states", "text_embeds"],
        "unet": ["out"],
        "vae_decoder": ["image"],
        "vae_encoder": ["moments"],
    }
    assert spec.graphs["unet"].outputs[0].shape == image


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLES)
def test_every_weight_is_read_from_the_safetensors(exported: Callable[[str], tuple[Path, Path]], name: str) -> None:
    """Whatever the names (2022's in sd), the file (shards in sd2) and the type (half precision in sd2 and emoji)."""
    _, root = exported(name)
    assert not list(root.rglob("*.extra.safetensors"))
    half = name in ("sd2", "emoji")
    for graph in Bundle.open(root).spec.graphs.values():
        model = onnx.load(root / graph.path, load_external_data=False)
        pointers = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert max(len(t.raw_data) for t in inside) <= 77 * 77  # the causal mask
        assert {t.data_type for t in pointers} == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
        assert len(pointers) >= 18  # of a text encoder of two layers, whose last SDXL does not use
        for tensor in pointers:
            location = next(e.value for e in tensor.external_data if e.key == "location")
            assert location.endswith(".safetensors")
            assert "/" not in location


def test_a_weight_that_matches_nothing_goes_to_a_sidecar(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, bundle = exported("sd")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(source / "text_encoder" / "model.safetensors")
    changed = "text_model.embeddings.token_embedding.weight"
    save_file(tensors | {changed: tensors[changed] + 1}, weights)
    with quiet():
        model = trace(load_network(source, "text_encoder", family="sd", tokens=77))
        passes.clean(model)
    shared = share_weights(model, [weights], tmp_path / "model.extra.safetensors")
    ir.save(model, tmp_path / "model.onnx")
    size = tensors[changed].nbytes
    assert list(load_file(tmp_path / "model.extra.safetensors")) == [changed.removeprefix("text_model.")]
    assert size < shared.sidecar < size + 200
    assert shared.shared == sum(t.nbytes for t in tensors.values()) - size
    feeds = {"input_ids": np.arange(77, dtype=np.int64)[None]}
    for array, wanted in zip(
        _session(tmp_path / "model.onnx").run(None, feeds),
        _session(bundle / "text_encoder" / "model.onnx").run(None, feeds),
        strict=True,
    ):
        np.testing.assert_array_equal(array, wanted)


# --- the bundle as a folder -------------------------------------------------------------------------------------------


def test_diffusers_opens_the_bundle_and_makes_the_same_latents(
    exported: Callable[[str], tuple[Path, Path]],
) -> None:
    source, bundle = exported("sd")
    latents = []
    for folder, absent in ((source, {"safety_checker": None, "feature_extractor": None}), (bundle, {})):
        with quiet():
            pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, **absent)
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(1)
            latents.append(pipe("a cat", num_inference_steps=2, generator=generator, output_type="latent").images)
    assert torch.isfinite(latents[0]).all()
    torch.testing.assert_close(latents[0], latents[1], rtol=0, atol=0)


def test_the_manifest_says_what_the_model_is(exported: Callable[[str], tuple[Path, Path]]) -> None:
    sd, sd2, sdxl = (Bundle.open(exported(name)[1]).spec for name in ("sd", "sd2", "sdxl"))
    assert (sd.id, sd.family, sd.zero_negative, sd.text_encoders) == ("sd", "sd", False, ("text_encoder",))
    assert (sdxl.family, sdxl.zero_negative) == ("sdxl", True)
    assert sdxl.tokenizers == ("tokenizer", "tokenizer_2")
    assert (sd.latents.channels, sd.latents.factor, sd.latents.height, sd.latents.width) == (4, 2, 8, 8)
    assert (sd.latents.scale, sd.latents.shift, sdxl.latents.scale) == (0.18215, 0.0, 0.13025)
    assert sd2.schedule == "scheduler/scheduler_config.json"
    assert sd.made["command"] == "latentrt export sd"
    assert {"torch", "diffusers", "transformers"} <= set(sd.made["versions"])
    text = (exported("sd")[1] / "manifest.json").read_text()
    assert str(exported("sd")[1].parent) not in text


def test_a_variant_gets_its_plain_name(exported: Callable[[str], tuple[Path, Path]]) -> None:
    files = Bundle.open(exported("sd2")[1]).files
    assert "text_encoder/model.safetensors" in files
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in files
    assert sum(name.startswith("unet/") and name.endswith(".safetensors") for name in files) == 3


def test_tokenizer_json_is_written_where_only_its_parts_are(exported: Callable[[str], tuple[Path, Path]]) -> None:
    source, bundle = exported("sd")
    assert not (source / "tokenizer" / "tokenizer.json").exists()
    prompt = "A cat on a dog"
    both = [Tokenizer.open(folder / "tokenizer").encode(prompt).ids for folder in (source, bundle)]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("network", ["text_encoder", "vae_decoder"])
def test_exporting_again_gives_the_same_bytes_and_prints_nothing(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str], network: str
) -> None:
    source, bundle = exported("sd")
    again = shutil.copytree(bundle, tmp_path / "again", ignore=shutil.ignore_patterns("*.onnx", "manifest.json"))
    capfd.readouterr()
    spec, summary = to_bundle._export_network(open_checkpoint(source), again, network)
    assert capfd.readouterr() == ("", "")
    assert (again / spec.path).read_bytes() == (bundle / spec.path).read_bytes()
    assert spec == Bundle.open(bundle).spec.graphs[network]
    assert summary.graph_bytes == (bundle / spec.path).stat().st_size
    assert summary.sidecar_bytes == 0


def _contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- putting it in its place (networks are not traced here) -----------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with quiet():
        return checkpoints.tiny_sd(tmp_path / "checkpoint")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Write a stand-in for each graph instead of tracing it."""

    def stand_in(checkpoint: Any, root: Path, name: str) -> tuple[GraphSpec, NetworkSummary]:
        path = to_bundle.GRAPHS[name]
        (root / path).write_bytes(b"graph")
        return GraphSpec(path, 23, 1, (), ()), NetworkSummary(0.0, 1, 5, 0, 0)

    monkeypatch.setattr(to_bundle, "_export_network", stand_in)
    return monkeypatch


def test_progress_and_summary(checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    summary = export_bundle(checkpoint, tmp_path / "one", progress=lambda *args: told.append(args))
    parts = ["copy", "text_encoder", "unet", "vae_decoder", "vae_encoder", "manifest"]
    assert told == [(part, done, 6) for done, part in enumerate(parts)]
    assert list(summary.networks) == parts[1:-1]
    assert summary.total_bytes == sum(len(data) for data in _contents(tmp_path / "one").values())
    export_bundle(checkpoint, tmp_path / "two")
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bad"), OSError(errno.ENOSPC, "disk full")])
def test_an_interrupted_export_leaves_the_old_bundle(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch, error: BaseException
) -> None:
    export_bundle(checkpoint, tmp_path / "bundle")
    before = _contents(tmp_path)

    def interrupt(part: str, done: int, total: int) -> None:
        if part == "vae_decoder":
            raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        export_bundle(checkpoint, tmp_path / "bundle", overwrite=True, progress=interrupt)
    assert _contents(tmp_path) == before
    Bundle.open(tmp_path / "bundle")


def test_the_next_export_mends_what_a_killed_one_left(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(checkpoint, bundle)
    half = tmp_path / ".bundle.latentrt-new"
    half.mkdir()
    (half / "half").write_bytes(b"written")
    bundle.rename(tmp_path / ".bundle.latentrt-old")  # killed between the two renames
    with pytest.raises(OutputError, match="overwrite"):
        export_bundle(checkpoint, bundle)
    Bundle.open(bundle)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_what_is_no_bundle_is_never_replaced(checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("dear")
    for target in (tmp_path / "notes", tmp_path, tmp_path / "notes" / "letter.txt"):
        with pytest.raises(OutputError, match="no bundle"):
            export_bundle(checkpoint, target, overwrite=True)
    assert (tmp_path / "notes" / "letter.txt").read_text() == "dear"


def test_graphs_can_be_added_to_the_checkpoint_itself(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    (checkpoint / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(OutputError, match="checkpoint itself"):
        export_bundle(checkpoint, checkpoint)
    export_bundle(checkpoint, checkpoint, overwrite=True)
    assert "unet/diffusion_pytorch_model.bin" not in Bundle.open(checkpoint).files
    assert (checkpoint / "unet" / "diffusion_pytorch_model.bin").read_bytes() == b"pickle"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_is_seen_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    fast.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"3 MB free.*Needed: 18 MB"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_golden_runs_are_measured_on_the_finished_bundle(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    run = Golden("a cat", "", "ddim", 4, 0, 1.0, 0.5, 1.0, (0.25, -1.0))
    seen = []

    def measure(root: Path, spec: Any) -> tuple[Golden, ...]:
        seen.append(Bundle.open(root).spec == spec)
        return (run,)

    export_bundle(checkpoint, tmp_path / "bundle", golden=measure)
    assert seen == [True]
    assert Bundle.open(tmp_path / "bundle").spec.golden == (run,)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/folder", "there is no folder no/such/folder"),
        ("owner/model", "cannot be downloaded"),
        (".", "has no model_index.json"),
    ],
)
def test_what_is_no_checkpoint(source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=words):
        open_checkpoint(source)


def test_single_files_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for name, kind, words in (
        ("model.safetensors", ExportError, "from_single_file"),
        ("model.ckpt", UnsafeWeightsError, "pickle"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(kind, match=words):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "'FluxPipeline'.*StableDiffusionXLPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "tokenizer_2"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ("unet/config.json", {"in_channels": 9}, "inpainting UNet with in_channels 9"),
        ("unet/config.json", {"in_channels": 8}, "in_channels 8"),
        ("unet/config.json", {"out_channels": 8}, "learned variance"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds 10"),
        ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        ("unet/config.json", {"attention_type": "gated"}, "attention_type 'gated'"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
        ("vae/config.json", {"latents_mean": [0.0]}, "latents_mean"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused_by_name(
    checkpoint: Path, file: str, change: dict[str, Any], words: str
) -> None:
    path = checkpoint / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=words):
        open_checkpoint(checkpoint)


def test_broken_and_missing_files_are_named(checkpoint: Path) -> None:
    (checkpoint / "vae" / "config.json").write_text("[1]")
    with pytest.raises(ExportError, match=r"vae/config\.json holds no JSON object"):
        open_checkpoint(checkpoint)
    (checkpoint / "unet" / "config.json").write_text("{")
    with pytest.raises(ExportError, match=r"unet/config\.json cannot be read"):
        open_checkpoint(checkpoint)


def test_pickled_weights_are_refused_unless_safetensors_stand_beside_them(checkpoint: Path) -> None:
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    pickle = weights.with_suffix(".bin")
    pickle.write_bytes(b"pickle")
    assert pickle not in open_checkpoint(checkpoint).files.values()
    weights.unlink()
    with pytest.raises(UnsafeWeightsError, match=r"unet/diffusion_pytorch_model\.bin"):
        open_checkpoint(checkpoint)
    pickle.unlink()
    with pytest.raises(ExportError, match="no weights"):
        open_checkpoint(checkpoint)


def test_a_missing_weight_is_named_and_never_made_up(checkpoint: Path) -> None:
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r"vae has no weights for decoder\.conv_in\.weight"), quiet():
        load_network(checkpoint, "vae_decoder", family="sd", tokens=77)


def test_weights_that_cannot_be_read_leave_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "text_encoder" / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ExportError, match="the text_encoder cannot be exported"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_variants(checkpoint: Path) -> None:
    def used(variant: str | None = None) -> set[str]:
        files = open_checkpoint(checkpoint, variant=variant).files
        return {path.name for name, path in files.items() if name.endswith(".safetensors")}

    plain = sorted(checkpoint.rglob("*.safetensors"))
    for path in plain:
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    assert used() == {"model.safetensors", "diffusion_pytorch_model.safetensors"}
    assert used("fp16") == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    with pytest.raises(ExportError, match=r"\(plain\), fp16.*variant bf16"):
        used("bf16")
    for path in plain:
        path.unlink()
    assert used() == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}


def test_a_shard_cannot_lead_out_of_the_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(ExportError, match=r"the shard '\.\./vae"):
        open_checkpoint(checkpoint)


def test_a_hub_id_is_downloaded_without_pickles_and_copied_out_of_the_cache(
    checkpoint: Path, tmp_path: Path, fast: pytest.MonkeyPatch
) -> None:
    """The hub's cache holds links: blobs under their hashes, names that point to them."""
    snapshot = tmp_path / "cache" / "snapshots" / "0123abcd"
    for path in [p for p in checkpoint.rglob("*") if p.is_file()]:
        link = snapshot / path.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (snapshot / "README.md").write_text("---\ntags: [x]\nlicense: openrail++\n---\n# A model\n")
    asked: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository} | options)
        return str(snapshot)

    fast.setattr("huggingface_hub.snapshot_download", download)
    export_bundle("owner/model", tmp_path / "bundle", revision="main")
    spec = Bundle.open(tmp_path / "bundle").spec
    assert (spec.id, spec.revision, spec.license) == ("owner/model", "0123abcd", "openrail++")
    assert not [p for p in (tmp_path / "bundle").rglob("*") if p.is_symlink()]
    assert [(a["repository"], a["revision"]) for a in asked] == [("owner/model", "main")]
    endings = {pattern.rpartition("*")[2].rpartition(".")[2] for pattern in asked[0]["allow_patterns"]}
    assert endings <= {"json", "txt", "md", "safetensors", ""}
    assert "*.fp16.*" in asked[0]["ignore_patterns"]


def test_a_hub_repository_of_variants_only_is_asked_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored: list[list[str]] = []

    def download(repository: str, **options: Any) -> str:
        ignored.append(options["ignore_patterns"])
        for path in checkpoint.rglob("diffusion_pytorch_model.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors") if options["ignore_patterns"] else path)
        if not options["ignore_patterns"]:
            return str(checkpoint)
        shutil.copytree(checkpoint, tmp_path / "part", ignore=shutil.ignore_patterns("*.fp16.*"))
        return str(tmp_path / "part")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = open_checkpoint("owner/model").files
    assert files["unet/diffusion_pytorch_model.safetensors"].name == "diffusion_pytorch_model.fp16.safetensors"
    assert [bool(patterns) for patterns in ignored] == [True, False]
