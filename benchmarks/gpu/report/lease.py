"""The page's part on a lease: variants of the graph, the kernels that hold the time, and the state of the jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.report.figures import NOT_MEASURED, Goal
from benchmarks.gpu.variants import TOLERANCE, VARIANTS
from benchmarks.markdown import number, spread, table
from benchmarks.measures import Spread

KINDS = {  # of kernels, by words in their names; the first that fits
    "layout": r"nchw_?to_?nhwc|nhwc_?to_?nchw|transpose|permute",
    "attention": r"flash|fmha|attention|sdpa|softmax",
    "convolutions": r"conv|[fd]prop|wgrad",
    "matrix products": r"gemm|cutlass|nvjet|splitk|cublas",
    "norms": r"norm|welford",
    "copies": r"memcpy|memset|copy",
    "other light kernels": "",
}
COLUMNS = ("variant", "UNet, ms", "VAE, ms", "error", "first calls, s")
SHOWN = 12  # kernels of a profile


def variants(data: Mapping[str, Any]) -> str:
    """Return the table of variants."""
    rows, reasons = [], dict[str, list[str]]()
    for name, about in VARIANTS.items():
        record = data.get("variants", {}).get(name, {"missing": "It was not requested."})
        errors = [f"{error:.1e}" for error in record.get("relative", {}).values()]
        if "missing" in record:
            why = data.get("jobs", {}).get(f"variant {name}", {}).get("missing", record["missing"])
            reasons.setdefault(why, []).append(about.title)
            rows.append([about.title, NOT_MEASURED, "", ", ".join(errors), ""])
        else:
            alone = [spread(Spread.of(record["alone_ms"][part])) for part in ("unet", "vae")]
            rows.append([about.title, *alone, ", ".join(errors), number(record["open_seconds"])])
    text = (
        "The networks of one guided picture by themselves, each captured; *error* is relative to torch in float32, of "
        f"UNet and VAE. Above {TOLERANCE:g} a variant has no figure. *first calls* are the seconds until both had "
        "answered, their loading included. ONNX Runtime's other figures on this page, where "
        "a lease measured them, are those of the fastest."
    )
    why = "".join(f"\nNot measured: {'; '.join(titles)}. {reason}\n" for reason, titles in reasons.items())
    return f"{text}\n\n{table(COLUMNS, rows)}{why}"


def profiles(data: Mapping[str, Any], goals: Sequence[Goal]) -> str:
    """Return which kernels hold the time of a UNet call, where a goal is missed."""
    if all(goal.reached is not False for goal in goals):
        return ""
    found = data.get("profiles", {})
    if not found:
        return f"A goal is missed; which kernels hold the time was {NOT_MEASURED} yet."
    return "\n\n".join(_profile(VARIANTS[name].title, record["kernels"]) for name, record in found.items())


def _profile(title: str, kernels: Mapping[str, Sequence[float]]) -> str:
    total = sum(milliseconds for _, milliseconds in kernels.values())
    sums = dict.fromkeys(KINDS, 0.0)
    for name, (_, milliseconds) in kernels.items():
        kind = next(kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
        sums[kind] += milliseconds
    shares = sorted(((time, kind) for kind, time in sums.items() if time), reverse=True)
    said = ", ".join(f"{kind} {number(time)} ms ({100 * time / total:.0f} %)" for time, kind in shares)
    count = sum(calls for calls, _ in kernels.values())
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:SHOWN]
    rows = [
        (f"`{name.replace('|', '/').replace('`', '')}`", number(calls), number(time), f"{100 * time / total:.1f} %")
        for name, (calls, time) in longest
    ]
    head = f"**{title}**: {count:.0f} kernels take {number(total)} ms, by their names {said}. The longest:"
    return f"{head}\n\n{table(('kernel', 'calls', 'ms', 'share'), rows)}"


def loras(data: Mapping[str, Any]) -> str:
    """Return the table of LoRAs of each lane; empty where none was measured."""
    found = {int(rank): Spread.of(record["unet_ms"]) for rank, record in data.get("loras", {}).items()}
    if 0 not in found:
        return ""
    ratios = {rank: number(each.median / found[0].median) for rank, each in found.items()}
    rows = [(str(rank or "plain graph"), spread(found[rank]), ratios[rank]) for rank in sorted(found)]
    return table(("rank", "UNet, ms", "of the plain graph"), rows)


def jobs(data: Mapping[str, Any]) -> str:
    """Return how the jobs of the leases ended; empty where there was none."""
    states = data.get("jobs", {})
    rows = [
        (name, state.get("missing", "done"), number(state["seconds"]) if "seconds" in state else "")
        for name, state in states.items()
    ]
    return table(("job", "how it ended", "s"), rows) if rows else ""
