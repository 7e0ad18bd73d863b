"""The commands of `python -m local`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import requests

from local.container import PYTHON, EndpointError
from local.demo import DEFAULT_PROMPT, SAMPLE, DemoFailed, demo
from local.functions import FunctionError
from local.stack import API_KEY, BACKENDS, INVOCATIONS, LOGS, PRESET, ROOT, TEAM, Stack
from local.template import TemplateError

PORT = 3000
_ENV = ROOT / ".local" / "aws.env"
_SHORTEST_KEY = 20
_VARIABLES = """environment variables:
  SEGMIND_API_KEY       calls the real Segmind instead of a simulated one
  SEGMIND_API           which of its APIs is called: v1 (the default) or v2
  BACKEND               segmind (the default), sagemaker, or auto for both
  MODEL                 what the endpoint serves: a folder, or a name on a hub; without it random weights
  SAGEMAKER_INVOCATION  how the endpoint is called: async (the default) or realtime
  API_KEY               the API's first key
"""


class Unusable(Exception):
    """What the environment chose cannot be had."""


_SAID_PLAINLY = (DemoFailed, EndpointError, FunctionError, TemplateError, Unusable, requests.RequestException)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.action(options))
    except _SAID_PLAINLY as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        print(f"error: port {options.port} is in use; choose another with --port", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m local", description="The whole system on one machine.")
    commands = parser.add_subparsers(required=True, metavar="run|demo")
    run = commands.add_parser(
        "run",
        help="run the system until Ctrl-C",
        epilog=_VARIABLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(action=_run)
    run.add_argument("--port", type=_port, default=PORT, help="where the API listens (default: %(default)s)")
    run.add_argument(
        "--latency", type=float, default=1.0, help="seconds that a simulated picture takes (default: %(default)s)"
    )
    run.add_argument(
        "--endpoint-python",
        type=Path,
        default=PYTHON,
        help="interpreter that has the endpoint's packages (default: .venv-endpoint/bin/python)",
    )
    run.add_argument("--verbose", action="store_true", help="the functions' logs on the terminal instead of in files")
    run.add_argument("--logs", type=Path, default=LOGS, help="folder of the logs (default: .local/logs)")
    run.add_argument(
        "--env",
        type=Path,
        default=_ENV,
        help="file to source for `make admin` and the AWS CLI, while it runs (default: .local/aws.env)",
    )
    show = commands.add_parser("demo", help="turn one image into another")
    show.set_defaults(action=_demo, port=0)
    show.add_argument("image", nargs="?", type=Path, default=SAMPLE, help="default: events/sample.jpg")
    show.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT, help="default: %(default)s")
    show.add_argument(
        "--url",
        default=f"http://127.0.0.1:{PORT}/v1",
        help="the API; when nobody listens there, a system of its own is started (default: %(default)s)",
    )
    show.add_argument("--out", type=Path, default=Path("out"), help="folder of the result (default: %(default)s)")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError("must be a number from 0 (any free port) to 65535")
    return int(text)


def _new_stack(
    port: int, *, latency: float, logs: Path = LOGS, verbose: bool = False, endpoint_python: Path = PYTHON
) -> Stack:
    api_key = _api_key()
    if len(api_key) < _SHORTEST_KEY:
        raise Unusable(f"API_KEY must have at least {_SHORTEST_KEY} characters, as in API Gateway")
    return Stack(
        port,
        segmind_key=os.environ.get("SEGMIND_API_KEY"),
        latency=latency,
        api_key=api_key,
        backend=_chosen("BACKEND", BACKENDS),
        parameters={"SegmindApi": _chosen("SEGMIND_API", ("v1", "v2"))},
        invocation=_chosen("SAGEMAKER_INVOCATION", INVOCATIONS),
        model=os.environ.get("MODEL") or None,
        endpoint_python=endpoint_python.absolute(),
        progress=lambda text: print(text, flush=True),
        logs=logs,
        verbose=verbose,
    )


def _chosen(name: str, choices: tuple[str, ...]) -> str:
    """Return what a variable of the environment says, the first choice where it says nothing."""
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise Unusable(f"{name} must be one of {', '.join(choices)}")
    return value


def _api_key() -> str:
    return os.environ.get("API_KEY") or API_KEY


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    logs, env = options.logs.resolve(), options.env.resolve()
    with (
        _new_stack(
            options.port,
            latency=options.latency,
            logs=logs,
            verbose=options.verbose,
            endpoint_python=options.endpoint_python,
        ) as stack,
        _env_file(env, stack),
    ):
        shown = "on this terminal" if options.verbose else _short(logs)
        print(_welcome(stack, time.monotonic() - started, shown, env), flush=True)
        while stack.alive:
            time.sleep(0.5)
    print(f"error: a part of the system ended by itself; see {_short(logs)}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def _env_file(path: Path, stack: Stack) -> Iterator[None]:
    """Keep a file that a shell sources to work on the stack's AWS and on no other."""
    # A profile of the caller's would be looked for, and not found.
    lines = ["unset AWS_PROFILE AWS_DEFAULT_PROFILE"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in stack.shell.items()]
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    try:
        yield
    finally:
        # Another stack may have written its own since.
        if path.is_file() and path.read_text() == text:
            path.unlink()


def _demo(options: argparse.Namespace) -> int:
    demo(
        options.url,
        _api_key(),
        options.image,
        options.prompt,
        options.out,
        fresh_stack=lambda: _new_stack(0, latency=2.0),
    )
    return 0


def _welcome(stack: Stack, seconds: float, logs: str, env: Path) -> str:
    # Through pipes: one argument of a command may not be as long as an image is.
    sample, shell = _short(SAMPLE), shlex.quote(_short(env))
    curl = (
        f"""(printf '{{"prompt": "{DEFAULT_PROMPT}", "image": "'; base64 < {sample} | tr -d '\\n'; printf '"}}') |\n"""
        f"    curl -s {stack.url}/sd1.5-img2img -H 'x-api-key: {stack.api_key}'"
        " -H 'content-type: application/json' -d @-"
    )
    return (
        f"API      {stack.url}   (ready after {seconds:.1f} s, Ctrl-C stops it)\n"
        f"Drop-in  {stack.compatible_url}   (for Segmind's own clients, with the same key)\n"
        f"Key      {stack.api_key}   (header x-api-key; team {TEAM})\n"
        f"{_backends(stack)}"
        f"Logs     {logs}\n"
        f'Admin    . {shell}; make admin ARGS="team list"\n'
        f"Inbox    . {shell}; aws s3 cp {sample} s3://{stack.resources['UploadsBucket']}/inbox/{TEAM}/{PRESET}/\n"
        f"Outbox   aws s3 ls s3://{stack.resources['ResultsBucket']}/outbox/{TEAM}/{PRESET}/\n"
        f"Try\n  {curl}"
    )


def _backends(stack: Stack) -> str:
    if stack.segmind:
        lines = [f"Segmind  simulated; its answers are controlled at {stack.segmind.control_url}"]
    elif stack.backend != "sagemaker":
        lines = ["Segmind  the real API, with the key of SEGMIND_API_KEY"]
    else:
        lines = []
    if stack.sagemaker:
        kind = "asynchronous" if stack.sagemaker.endpoint.asynchronous else "real-time"
        model = stack.model or "a tiny one with random weights: its pictures are noise (MODEL=... serves another)"
        after = ", for what Segmind does not take" if stack.backend == "auto" else ""
        lines += [
            f"Endpoint SageMaker, {kind}{after}; controlled at {stack.sagemaker.control_url}",
            f"Model    {model}",
        ]
    return "".join(f"{line}\n" for line in lines)


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
