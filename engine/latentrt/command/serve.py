"""`latentrt serve`: its options are the fields of `latentrt.serve.process.config.Settings`, read when the verb runs."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin

import click

from latentrt.errors import MissingDependencyError, RequestError

# Read when Ray is imported: no usage reports to its makers, no line of the log left out as a duplicate, and proxies
# that answer as the server does.
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "latentrt.serve.ray_proxy:middlewares",
}


class ServeCommand(click.Command):
    """Options come from the settings, under their headings. Secrets are no options: others can read a command line."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the verb's own options, then one for each setting."""
        own = super().get_params(ctx)
        return [*own[:-1], *(option for group in _options().values() for option in group), *own[-1:]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one heading for each section of the settings."""
        sections = {**_options(), "Options": super().get_params(ctx)}
        for section, options in sections.items():
            with formatter.section(section):
                formatter.write_dl([record for option in options if (record := option.get_help_record(ctx))])


@click.command(cls=ServeCommand)
@click.argument("bundles", nargs=-1, metavar="[BUNDLE | NAME=BUNDLE...]")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with settings, as max_steps = 50.")
@click.option("--print-config", is_flag=True, help="Print the settings that hold, as JSON, and serve nothing.")
def serve(bundles: tuple[str, ...], config: Path | None, print_config: bool, **flags: Any) -> None:
    """Serve a bundle: a page at /, the OpenAI Images API, and /sdapi/v1.

    Several bundles have names, by which requests choose: photo=FOLDER emoji=emoji. The first is the default.

    Flags have precedence over LATENTRT_* variables (LATENTRT_MAX_STEPS=50), those over a TOML file. Keys come
    from LATENTRT_KEYS (with commas between them), the TOML file or --keys-file; the secret that signs webhooks
    from LATENTRT_WEBHOOK_SECRET or the TOML file. Needs the extra `serve`.
    """
    load_settings = _config().load_settings
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    settings = load_settings({**given, **_bundles(bundles, given)}, config)
    if print_config:
        print(json.dumps(settings.model_dump(mode="json"), indent=2))
        return
    sys.exit(_server(settings.ray)(settings))


def _bundles(typed: tuple[str, ...], flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the command's own words stand for.

    Raises:
        RequestError: there are several bundles without names, or --bundle too.
    """
    if typed and "bundle" in flags:
        raise RequestError(f"there are {typed[0]} and --bundle", needed="one of them")
    if len(typed) == 1 and "=" not in typed[0]:
        return {"bundle": typed[0]}
    for text in typed:
        if "=" not in text:
            fix = f"give it a name, as {Path(text).name}={text}"
            raise RequestError(f"there are {len(typed)} bundles, and {text} has no name", "NAME=BUNDLE", fix)
    return {"models": list(typed)} if typed else {}


def _server(by_ray: bool) -> Any:
    """Return the server: this process, or replicas of Ray Serve."""
    if not by_ray:
        return _imported("server", "serve").serve
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    return _imported("ray_app", "ray").serve


def _config() -> Any:
    return _imported("process.config", "serve")


def _imported(module: str, extra: str) -> Any:
    """Return a module of the server. Raise MissingDependencyError where its extra is not installed."""
    try:
        return import_module(f"latentrt.serve.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            f"the module {error.name} is not installed",
            needed=f"the extra `{extra}`",
            fix=f"pip install 'latentrt[{extra}]'",
        ) from error


def _options() -> dict[str, list[click.Parameter]]:
    """Return an option for each setting, by section. Their values are text: the settings check them."""
    sections: dict[str, list[click.Parameter]] = {}
    for name, field in _config().Settings.model_fields.items():
        if name in (*_config().SECRET, "models"):
            continue
        flag = f"--{name.replace('_', '-')}"
        boolean = field.annotation is bool
        several = get_origin(field.annotation) is tuple
        option = click.Option(
            [f"{flag}/--no-{flag[2:]}" if boolean else flag, name],
            default=None,
            multiple=several,
            metavar=None if boolean else _metavar(field.annotation),
            help=_help(field),
        )
        sections.setdefault(field.json_schema_extra["section"], []).append(option)
    return sections


def _help(field: Any) -> str:
    default = field.default
    if default in (None, (), False):
        return str(field.description)
    shown = ",".join(default) if isinstance(default, tuple) else default
    return f"{field.description}  [default: {'the embedded model' if isinstance(shown, Path) else shown}]"


def _metavar(annotation: Any) -> str:
    """Return the placeholder of the value in the help."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if isinstance(kinds[0], str):
        return "|".join(kinds)
    names = {int: "N", float: "X", Path: "PATH"}
    return next((name for known, name in names.items() if known.__name__ in str(kinds[0])), "TEXT")
