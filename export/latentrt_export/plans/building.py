"""Differences between TensorRT's versions, and RTX, in building plans; see latentrt/runtime/tensorrt/library.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from latentrt.errors import PlanError
from latentrt.runtime.tensorrt.library import Library
from latentrt.runtime.tensorrt.record import LEVEL, REFITTABLE, STRIPPED, VERSION_COMPATIBLE, PlanKey

LEVELS = tuple("012345")
BROKEN_REFIT = (11, 3)  # its own documentation: the bias of a product can get lost


def opset(library: Library) -> int:
    """Return the newest opset to hand to the parser. Before 11 it takes no `Attention`, or only one of four axes."""
    newest = hasattr(library.module, "IAttention") if library.rtx else library.numbers >= (11,)
    return 23 if newest else 18


def new_network(library: Library, builder: Any) -> Any:
    """Return an empty network whose own types decide where it computes in half."""
    flags = library.module.NetworkDefinitionCreationFlag
    return builder.create_network(1 << int(flags.STRONGLY_TYPED))


def new_parser(library: Library, network: Any, logger: Any) -> Any:
    """Return a parser that reads InstanceNormalization without a plugin, as is the default since 10."""
    parser = library.module.OnnxParser(network, logger)
    parser.flags = 1 << int(library.module.OnnxParserFlag.NATIVE_INSTANCENORM)
    return parser


def configure(library: Library, config: Any, options: Collection[str] = ()) -> None:
    """Set the flags of an IBuilderConfig for a key's options.

    Products of float32 are kept in float32 (no TF32), as on every other backend.

    Raises:
        PlanError: this version cannot build such a plan.
    """
    flag = library.module.BuilderFlag
    config.clear_flag(flag.TF32)
    if library.rtx:
        config.set_flag(flag.REQUIRE_USER_ALLOCATION)  # enqueueing allocates nothing, so that it can be captured
    for name in option_flags(library, options):
        config.set_flag(getattr(flag, name))


def option_flags(library: Library, options: Collection[str]) -> list[str]:
    """Return the names of the builder flags of a key's options.

    Weights that are set later are marked one by one (`mark_refittable`): all others, which no safetensors of a bundle
    holds, stay in the plan.

    Raises:
        PlanError: this version cannot build such a plan.
    """
    flags = []
    if STRIPPED in options:
        flags += ["STRIP_PLAN"]
    if {STRIPPED, REFITTABLE} & set(options):
        flags += ["REFIT_INDIVIDUAL"]
    if VERSION_COMPATIBLE in options:  # without the lean runtime a plan carries no host code
        flags += ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
    _check_options(library, options, flags)
    return flags


def set_level(config: Any, key: PlanKey) -> None:
    """Set the optimization level of an IBuilderConfig, where the key names one."""
    if any(option.startswith(LEVEL) for option in key.options):
        config.builder_optimization_level = key.level


def aim(library: Library, config: Any, compute_capability: str) -> None:
    """Have RTX build for a compute capability; TensorRT builds for the GPU in use."""
    if library.rtx:
        capability = getattr(library.module.ComputeCapability, f"SM{compute_capability.replace('.', '')}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)


def limit(library: Library, config: Any, workspace: int | None) -> None:
    """Bound the memory of a tactic, and where the version has it, of trying tactics too."""
    pools = library.module.MemoryPoolType
    for pool in ("WORKSPACE", "TACTIC_DRAM"):
        if workspace is not None and hasattr(pools, pool):
            config.set_memory_pool_limit(getattr(pools, pool), workspace)


def mark_refittable(network: Any, names: Iterable[str]) -> None:
    """Let weights of a parsed network be set in its plan, by the names that they have in the graph.

    Raises:
        PlanError: the network has no such weight.
    """
    for name in names:
        if not network.mark_weights_refittable(name):
            raise PlanError(
                f"the network has no weight {name}", needed="every weight of the graph", fix="export it again"
            )


def let_attention_decompose(library: Library, network: Any) -> None:
    """Let every attention be built from several kernels where no fused one exists; else the build fails there."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = library.module.IAttentionInputLayer
            layer.attention.decomposable = True


def _check_options(library: Library, options: Collection[str], flags: list[str]) -> None:
    asked = f"{library.name} {library.version} was asked for a plan that is {' and '.join(options)}"
    if lacking := [name for name in flags if not hasattr(library.module.BuilderFlag, name)]:
        raise PlanError(asked, needed=f"a version that has {lacking[0]}", fix="update it, or leave that option out")
    levels = [option for option in options if option.startswith(LEVEL)]
    if unknown := [option for option in levels if option.removeprefix(LEVEL) not in LEVELS]:
        raise PlanError(f"the option is {unknown[0]}", needed=f"{LEVEL}N with N from 0 to 5")
    if levels and library.rtx:  # it takes the number, and writes the same plan
        raise PlanError(
            asked, needed="tensorrt: a level changes nothing in RTX", fix="build without --optimization-level"
        )
    if VERSION_COMPATIBLE in options and library.rtx:
        raise PlanError(asked, needed="a plan for exactly this version", fix="build without --version-compatible")
    if VERSION_COMPATIBLE in options and {STRIPPED, REFITTABLE} & set(options):
        raise PlanError(asked, needed="one of the two, since the lean runtime cannot refit")
    if {STRIPPED, REFITTABLE} & set(options) and library.numbers[:2] == BROKEN_REFIT:
        raise PlanError(asked, needed="a version whose refittable plans compute right: not 11.3", fix="update it")
