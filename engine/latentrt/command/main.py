"""The command `latentrt`: one function for each verb. What a verb needs is imported when it runs."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import click

from latentrt import __version__
from latentrt.command.build import build
from latentrt.command.generate import generate
from latentrt.command.options import AT_LEAST_ONE, FOLDER, argument_bundle, option_json, options_single, runs_networks
from latentrt.command.serve import serve
from latentrt.command.terminal import show, table_of
from latentrt.errors import AdapterWarning, LatentrtError, PromptSyntaxWarning, PromptTruncatedWarning
from latentrt.values import parse_whole

INTERRUPTED, CRASHED = 130, 70  # 128 + SIGINT; EX_SOFTWARE of BSD's sysexits.h


def main() -> None:
    """Run the command. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 an interrupt, 70 a fault of latentrt."""
    with warnings.catch_warnings():
        for kind in (PromptTruncatedWarning, PromptSyntaxWarning, AdapterWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = _show_warning
        sys.exit(_run())


def _run() -> int:
    as_json = "--json" in sys.argv
    try:
        code = latentrt(prog_name="latentrt", standalone_mode=False)
    except LatentrtError as error:
        if not as_json:
            print(_told(error), file=sys.stderr)
        return _fail(error, error.parts, as_json, 2)
    except click.ClickException as error:
        if not as_json:
            error.show()
        parts = {"found": error.format_message(), "needed": "a call as --help shows", "fix": "latentrt --help"}
        return _fail(error, parts, as_json, error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return CRASHED
    return code if isinstance(code, int) else 0


def _told(error: LatentrtError) -> str:
    lines = [f"error: {error.found}", f"  needed: {error.needed}"]
    return "\n".join([*lines, f"  to fix it: {error.fix}"] if error.fix else lines)


def _fail(error: Exception, parts: dict[str, str], as_json: bool, code: int) -> int:
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, **parts}}))
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"note: {message}", file=sys.stderr)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(version)s")
def latentrt() -> None:
    """Stable Diffusion without the research stack: generate, export, verify."""


@latentrt.command()
@option_json
def solvers(as_json: bool) -> None:
    """List the solvers."""
    from latentrt.sampling.solvers import EDM_SOLVERS, SOLVERS

    facts: dict[str, dict[str, Any]] = {
        name: {"scheduler": s.scheduler, "settings": dict(s.settings), "arguments": dict(s.arguments)}
        for name, s in {**SOLVERS, **EDM_SOLVERS}.items()
    }
    if as_json:
        print(json.dumps(facts))
        return
    table = table_of("solver", "diffusers class", "its own arguments")
    for name, fact in facts.items():
        table.add_row(name, fact["scheduler"], ", ".join(f"{k}={v}" for k, v in fact["arguments"].items()))
    show(table)


@latentrt.command()
@click.argument("source")
@click.argument("target", type=FOLDER)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--variant", help="Weights variant, such as fp16; networks without it have their plain weights.")
@options_single
@click.option("--adapters", is_flag=True, help="Write graphs that take LoRAs with each request, too (docs/lora.md).")
@click.option(
    "--image-encoder", type=FOLDER, help="Folder of an IP-Adapter's image encoder  [default: image_encoder beside it]"
)
@click.option("--int8", is_flag=True, help="Also write the UNet with 8-bit numbers, for --precision int8 on a CPU.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@option_json
def export(
    source: str,
    target: Path,
    revision: str | None,
    variant: str | None,
    int8: bool,
    overwrite: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Turn the checkpoint SOURCE (a diffusers folder, a single .safetensors file or a hub id) into the bundle TARGET.

    SOURCE may also be optimum's ONNX export of one, or with --lora or --adapters a bundle: torch is then not used.
    Needs the extra `export`.
    """
    from latentrt_export.checkpoint.single.choices import Choices
    from latentrt_export.cli import run_export

    chosen = Choices(**choices)
    run_export(
        source,
        target,
        revision=revision,
        variant=variant,
        choices=chosen,
        overwrite=overwrite,
        int8=int8,
        as_json=as_json,
    )


@latentrt.command()
@argument_bundle
@click.option(
    "--against",
    help="Checkpoint (a folder, a single file or a hub id)  [default: BUNDLE itself, opened by diffusers]",
)
@click.option(
    "--base", type=FOLDER, help="Model's bundle, where BUNDLE is a ControlNet, a T2I-Adapter, or a LoRA: FILE:0.8."
)
@options_single
@click.option(
    "--steps", type=AT_LEAST_ONE, default=20, show_default=True, help="Solver steps of the step and image depths."
)
@option_json
def verify(bundle: Path, against: str | None, base: Path | None, steps: int, as_json: bool, **choices: Any) -> None:
    """Measure a bundle against diffusers; exit code 1 beyond a bound.

    A ControlNet, T2I-Adapter or LoRA is measured with the model of --base.

    Needs the extra `export`.
    """
    from latentrt_export.checkpoint.single.choices import Choices
    from latentrt_export.cli import run_verify

    chosen = Choices(**choices)
    sys.exit(run_verify(bundle, against, base=base, steps=steps, choices=chosen, as_json=as_json))


@latentrt.command()
@argument_bundle
@option_json
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds; its hashes are checked on the way."""
    from latentrt.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        files = {name: {"sha256": record.sha256, "bytes": record.bytes} for name, record in opened.files.items()}
        print(json.dumps({"model": opened.spec.to_dict(), "files": files}))
        return
    spec = opened.spec
    height, width = spec.latents.pixels_of(None, None)
    print(f"{spec.id}  ({width}x{height}, licence {spec.license or 'unknown'})")
    total = sum(record.bytes for record in opened.files.values()) / 1e6
    print(f"{total:.1f} MB in {len(opened.files)} files, hashes match")
    table = table_of("network", "role", "graphs (nodes)", "inputs", "outputs")
    for name, network in spec.networks.items():
        graphs = ", ".join(f"{variant} ({graph.nodes})" for variant, graph in network.variants.items())
        shapes = [
            ", ".join(f"{t.name} {t.dtype}[{', '.join(map(str, t.shape))}]" for t in ts)
            for ts in (network.inputs, network.outputs)
        ]
        table.add_row(name, network.role, graphs, *shapes)
    show(table)
    if spec.schedule is not None:
        schedule = opened.json(spec.schedule)
        print(f"schedule: {schedule['_class_name']}, {schedule.get('prediction_type', 'epsilon')}")
    for correction in spec.corrections:
        print(correction)


@latentrt.command()
@argument_bundle
@click.option("--steps", type=AT_LEAST_ONE, default=20, show_default=True, help="Steps of each run.")
@click.option(
    "--batches", help="Pictures at once, comma-separated  [default: 1,2,4,8; on a GPU as many as its lanes hold]"
)
@click.option(
    "--repeats", type=AT_LEAST_ONE, default=5, show_default=True, help="Runs of each batch; medians are shown."
)
@click.option(
    "--save",
    is_flag=True,
    help="Keep the latencies with the bundle: `latentrt serve` plans by them, and as there no thread spins by default.",
)
@runs_networks
@option_json
def bench(
    bundle: Path,
    steps: int,
    batches: str | None,
    repeats: int,
    save: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Time this machine: latency and throughput by batch, and the engine's share outside the networks."""
    from latentrt.command.bench import measure
    from latentrt.engine import Engine
    from latentrt.serve.core.measured import curve

    sizes = [parse_whole(size, "--batches") for size in batches.split(",")] if batches is not None else []
    spins = click.get_current_context().get_parameter_source("spin")
    if save and spins is click.core.ParameterSource.DEFAULT:
        loading["spin"] = False  # the default of the server, which plans by these figures
    with Engine.load(bundle, lanes=2 * max(sizes) if sizes else None, **loading) as engine:
        fitting = [size for size in (1, 2, 4, 8) if 2 * size <= engine.denoiser.lanes]
        results = measure(engine, sizes or fitting, steps=steps, repeats=repeats)
        if save:
            results["curve"] = str(curve.save(curve.of_bench(engine, results), engine))
    if as_json:
        print(json.dumps(results))
        return
    table = table_of("pictures at once", "ms a step (min, median, max)", "images/s", "host % of a step", "decode ms")
    for row in results["batches"]:
        low, middle, high = row["step_ms"]
        table.add_row(
            str(row["batch"]),
            f"{low:.1f}  {middle:.1f}  {high:.1f}",
            f"{row['images_per_second']:.2f}",
            "" if row["host_percent"] is None else f"{row['host_percent']:.1f}",
            f"{row['decode_ms']:.1f}",
        )
    show(table)
    if save:
        print(f"curve: {results['curve']}")


@latentrt.command()
@click.option(
    "--empty-cache",
    "emptied",
    type=click.Choice(["graphs", "kernels", "plans"]),
    multiple=True,
    help="Instead, remove from your cache optimized graphs, compiled kernels or TensorRT plans; repeatable.",
)
@option_json
def doctor(emptied: tuple[str, ...], as_json: bool) -> None:
    """Say what this machine can run, and what to install for the rest; exit code 1 if it cannot draw."""
    from rich.markup import escape

    from latentrt.command.doctor import empty, examine

    if emptied:
        freed = empty(emptied)
        print(json.dumps({"freed": freed}) if as_json else f"{freed / 1e6:,.0f} MB freed")
        return
    findings = examine()
    if as_json:
        print(json.dumps([finding.to_dict() for finding in findings]))
    else:
        table = table_of("", "what", "found", "to fix or gain it")
        for finding in findings:
            mark = "[green]yes[/]" if finding.good else "[yellow]no[/]"
            table.add_row(mark, finding.what, escape(finding.found), "" if finding.good else escape(finding.fix))
        show(table)
    sys.exit(any(finding.vital and not finding.good for finding in findings))


latentrt.add_command(generate)
latentrt.add_command(build)
latentrt.add_command(serve)

if __name__ == "__main__":
    main()
