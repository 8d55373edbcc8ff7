"""Which ONNX folders are taken, without torch and with one copy of the weights, and which are refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.bundle.bundle import Bundle
from latentrt.errors import ExportError, LatentrtError, UnsafePathError
from latentrt_export import variants
from latentrt_export.checkpoint.onnx_folder import is_onnx_folder
from latentrt_export.existing.graph import open_graphs
from latentrt_export.to_bundle import export_bundle
from tests.export.existing.conftest import Make

Change = Callable[[onnx.ModelProto], None]
WITHOUT_TORCH = """
import sys
banned = ("torch", "diffusers", "transformers")
for name in banned:
    sys.modules[name] = None
from latentrt.command.main import main
sys.argv = ["latentrt", "export", sys.argv[1], sys.argv[2]]
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
assert not [name for name in sys.modules if name.partition(".")[0] in banned and sys.modules[name] is not None]
"""


def test_the_command_needs_no_torch(made: Make, tmp_path: Path) -> None:
    folder, bundle = made("sd").folder, made("sd").bundle
    code = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(folder), str(tmp_path / "bundle")]
    answer = subprocess.run(code, capture_output=True, text=True, env=dict(os.environ))
    assert answer.returncode == 0, answer.stderr
    assert "vae_encoder" in answer.stdout
    opened = Bundle.open(tmp_path / "bundle")
    assert len(opened.spec.golden) == 2
    assert set(opened.spec.made["versions"]) == {"onnx", "onnx-ir", "onnxscript"}
    assert opened.spec.networks == Bundle.open(bundle).spec.networks


@pytest.mark.parametrize("name", ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "half"))])
def test_weights_exist_once(made: Make, name: str) -> None:
    """All graphs of a network read the same file: the folder's own data, or one safetensors."""
    _, folder, bundle = made(name)
    for home, where in (("unet", "unet/model"), ("vae_decoder", "vae/decoder"), ("text_encoder", "text_encoder/model")):
        data, sidecar = (bundle / f"{where}{ending}" for ending in (".onnx_data", ".weights.safetensors"))
        own = folder / home / "model.onnx_data"
        assert data.exists() == own.exists() != sidecar.exists()
        assert not own.exists() or data.read_bytes() == own.read_bytes()
        size = sum(path.stat().st_size for path in (own, folder / home / "model.onnx") if path.exists())
        assert (data if own.exists() else sidecar).stat().st_size <= size
    spec = Bundle.open(bundle).spec
    for network in spec.networks.values():
        for variant in network.variants.values():
            model = ir.load(bundle / variant.path)
            tensors = [value.const_value for value in model.graph.initializers.values()]
            inside = sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor))
            assert inside < 40_000, variant.path


def test_what_is_left_out_is_said(made: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(made("sd").folder, tmp_path / "folder")
    shutil.rmtree(folder / "vae_encoder")
    summary = export_bundle(folder, tmp_path / "bundle")
    assert len(summary.notes) == 1
    assert summary.notes[0].startswith("vae_encoder: the folder has none")
    assert Bundle.open(tmp_path / "bundle").spec.named("encoder") == ()


def test_variants_that_compute_something_else_are_left_out(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: ir.Model, *_: object) -> None:
        raise AssertionError("another form")

    monkeypatch.setattr(variants, "to_half", broken)
    summary = export_bundle(made("sd").folder, tmp_path / "bundle")
    assert summary.notes == ("graphs in fp16 and fp16-ort-cuda: left out, AssertionError: another form",)
    assert not list((tmp_path / "bundle").rglob("*.fp16.onnx"))
    assert set(Bundle.open(tmp_path / "bundle").spec.networks["unet"].variants) == {"fp32"}


def test_a_checkpoint_with_graphs_beside_its_weights_is_a_checkpoint(made: Make, tmp_path: Path) -> None:
    assert is_onnx_folder(made("sd").folder)
    assert not is_onnx_folder(made("sd").checkpoint)
    assert not is_onnx_folder("owner/model")
    both = shutil.copytree(made("sd").checkpoint, tmp_path / "both")
    shutil.copy(made("sd").folder / "unet" / "model.onnx", both / "unet")
    assert not is_onnx_folder(both)
    with pytest.raises(ExportError, match="is a bundle"):
        open_graphs(made("sd").bundle)
    with pytest.raises(ExportError, match="--variant=fp16 for the ONNX graphs"):
        export_bundle(made("sd").folder, tmp_path / "bundle", variant="fp16")


# ---- Refusals, before a network is exported


def _fixed(model: onnx.ModelProto, axis: int) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 2 if axis == 0 else 64


def _masked(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", 77]))


def _fused(model: onnx.ModelProto) -> None:
    model.graph.node[-1].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _branching(model: onnx.ModelProto) -> None:
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(1, np.float32)))],
        "branch", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["d"], then_branch=branch, else_branch=branch))


def _read_as_a_number(model: onnx.ModelProto) -> None:
    sample = model.graph.input[0].name
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == sample and node.op_type == "Conv":
                node.input[index] = "moved"
                model.graph.node.insert(0, helper.make_node("Add", [sample, "timestep"], ["moved"]))
                return


@pytest.mark.parametrize(
    ("graph", "change", "words"),
    [
        ("unet", lambda model: _fixed(model, 0), "sample of .*its batch is fixed"),
        ("unet", lambda model: _fixed(model, 2), "its height is fixed"),
        ("vae_decoder", lambda model: _fixed(model, 3), "its width is fixed"),
        ("text_encoder", lambda model: _fixed(model, 1), "text_encoder/model.onnx has input_ids of .*64"),
        ("text_encoder", _masked, "the input 'attention_mask'"),
        ("vae_encoder", _fused, "the operator com.microsoft"),
        ("unet", _branching, "the operator If"),
    ],
)
def test_graphs_that_cannot_be_served(made: Make, tmp_path: Path, graph: str, change: Change, words: str) -> None:
    folder = shutil.copytree(made("sd").folder, tmp_path / "folder")
    model = onnx.load(folder / graph / "model.onnx")
    change(model)
    onnx.save(model, folder / graph / "model.onnx")
    with pytest.raises(ExportError, match=words):
        open_graphs(folder)


def test_a_timestep_that_is_read_as_a_number_is_refused(made: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(made("sd").folder, tmp_path / "folder")
    model = onnx.load(folder / "unet" / "model.onnx")
    _read_as_a_number(model)
    onnx.save(model, folder / "unet" / "model.onnx")
    with pytest.raises(ExportError, match=r"a timestep .* that Add reads as one number"):
        export_bundle(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def _leads_out(folder: Path) -> None:
    model = onnx.load(folder / "unet" / "model.onnx", load_external_data=False)
    entry = next(e for t in model.graph.initializer for e in t.external_data if e.key == "location")
    entry.value = "../../secret"
    onnx.save(model, folder / "unet" / "model.onnx")


def _links_out(folder: Path) -> None:
    data = folder / "unet" / "model.onnx_data"
    data.rename(folder.parent / "secret")
    data.symlink_to(folder.parent / "secret")


@pytest.mark.parametrize("change", [_leads_out, _links_out])
def test_data_outside_of_the_folder_is_never_read(made: Make, tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = shutil.copytree(made("sd2").folder, tmp_path / "folder")
    change(folder)
    with pytest.raises(UnsafePathError, match=r"a graph in .*unet names the file"):
        open_graphs(folder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _json(changes: dict[str, object]) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes)) and None


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("unet/model.onnx_data", _cut, "model.onnx_data has .* bytes"),
        ("unet/model.onnx_data", Path.unlink, "model.onnx_data is missing"),
        ("unet/model.onnx", _pointer, "Git LFS pointer.*git lfs pull"),
        ("unet/model.onnx", _cut, "unet/model.onnx cannot be read"),
        ("vae_decoder/model.onnx", Path.unlink, "has no vae_decoder/model.onnx"),
        ("unet/config.json", Path.unlink, "unet/config.json cannot be read"),
        ("unet/config.json", _json({"time_cond_proj_dim": 2}), "time_cond_proj_dim 2"),
        ("model_index.json", _json({"_class_name": "ORTFluxPipeline"}), "'ORTFluxPipeline'"),
        ("model_index.json", _json({"_class_name": ["a"]}), r"names the pipeline"),
        ("model_index.json", _json({"tokenizer": "a"}), "tokenizer 'a' in model_index.json"),
        ("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json cannot be read"),
    ],
)
def test_broken_folders(made: Make, tmp_path: Path, file: str, change: Callable[[Path], None], words: str) -> None:
    folder = shutil.copytree(made("sd2").folder, tmp_path / "folder")
    change(folder / file)
    with pytest.raises(LatentrtError, match=words):
        open_graphs(folder)


@pytest.mark.slow
def test_xl_needs_the_states_before_the_last_layer(made: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(made("sdxl").folder, tmp_path / "folder")
    path = folder / "text_encoder" / "model.onnx"
    model = onnx.load(path)
    kept = [value for value in model.graph.output if not value.name.startswith("hidden_states")]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"hidden_states\.1, which SDXL's UNet reads"):
        open_graphs(folder)


def test_the_names_of_optimum_s_pipelines_are_known(made: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(made("sd").folder, tmp_path / "folder")
    _json({"_class_name": "ORTStableDiffusionPipeline", "unet": ["optimum.onnxruntime.modeling_diffusion", "ORTUnet"]})(
        folder / "model_index.json"
    )
    checkpoint = open_graphs(folder)
    assert checkpoint is not None
    assert checkpoint.pipeline == "StableDiffusionPipeline"
    assert list(checkpoint.graphs) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
