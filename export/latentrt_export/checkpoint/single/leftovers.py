"""Tensors of a single file that found no place: known ones are left out, those of a network are an error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from latentrt.errors import ExportError

# What files have beside networks, and nothing reads: names, or beginnings that end with a point.
IGNORED = (
    *(
        "model_ema.",
        "loss.",
        "denoiser.",
        "global_step",
        "epoch",
        "scale_factor",
        "v_pred",
        "ztsnr",
        "edm_vpred.",
        "logvar",
        "betas",
    ),
    *("alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "lvlb_weights"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """A network as the file has it: what its names begin with, and which of them (or beginnings) nothing reads."""

    prefix: str
    ignored: Sequence[str] = ()


def leftovers(names: Iterable[str], placed: Iterable[str], parts: Sequence[Part], family: str) -> tuple[str, ...]:
    """Return a line on tensors that are of no network; empty where there are none.

    Args:
        names: of the file's tensors.
        placed: names that have a place.
        parts: the networks.
        family: the model's name, for the error.

    Raises:
        ExportError: a tensor of a network has no place: the network has another structure than its family's.
    """
    known = [*IGNORED, *(part.prefix + name for part in parts for name in part.ignored)]
    left = sorted(name for name in set(names) - set(placed) if not _is_one(name, known))
    inside = [name for name in left if name.startswith(tuple(part.prefix for part in parts))]
    if inside:
        raise ExportError(
            f"{len(inside)} tensors of the networks have no place in {family}: {_some(inside)}",
            needed="a model of this family's structure",
        )
    return (f"left out, of no network: {_some(left)}",) if left else ()


def _is_one(name: str, known: Sequence[str]) -> bool:
    return any(name == one or (one.endswith(".") and name.startswith(one)) for one in known)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
