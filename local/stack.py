"""The composition root of `local/`: everything that runs, started and stopped as one.

with Stack() as stack:
    requests.get(f"{stack.url}/health")
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from img2img.money.credits import Credits
from img2img.teams.gateway_keys import GatewayKeys
from img2img.teams.presets import PresetStore
from img2img.teams.store import TeamStore
from local.api_keys import ApiKeys
from local.aws import STACK_NAME, Aws, provision
from local.container import PYTHON, Container, Progress, tiny_model
from local.functions import Function, FunctionError
from local.gateway import Gateway
from local.lambda_runtime import Result
from local.pollers import Clock, QueuePoller
from local.sagemaker import SageMaker
from local.segmind import SegmindStandIn
from local.template import Application, Blueprint, FunctionSpec

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".local" / "logs"
API_KEY = "local-development-key"
TEAM = "local"
BACKENDS = ("segmind", "sagemaker", "auto")
INVOCATIONS = ("async", "realtime")
PRESET = "soft"
_PRESET_FIELDS = {"prompt": "A soft watercolour painting", "strength": 0.4}
_CREDITS = 1_000_000  # thousandths
_STAND_IN_KEY = "simulated-segmind-key"
# Sandboxes of a function that no event source limits.
_CONCURRENCY = 40


class Stack:
    """The whole system on one machine.

    `url` is where the API listens, `compatible_url` what Segmind's own clients take for Segmind, `api_key` the key of
    the first team, which has a thousand credits and a preset, and `api_key_id` that key's id; `segmind` is the stand-in
    (None with a key of Segmind's: then the real API is called), `sagemaker` the front of the endpoint; what the backend
    does not use is None. `resources` are the physical ids by logical id, `logs` is the folder with a file for each
    function, `environment` what each function runs with. With `schedules=False` the clock stands still.

    The endpoint serves `model`, a folder or a name on a hub, or else a tiny one with random weights; it runs under the
    interpreter `endpoint_python`, unless `container` is the address of one that runs already.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        segmind_key: str | None = None,
        latency: float = 0.0,
        segmind_port: int = 0,
        api_key: str = API_KEY,
        backend: str = BACKENDS[0],
        invocation: str = INVOCATIONS[0],
        model: str | None = None,
        container: str | None = None,
        endpoint_python: Path = PYTHON,
        progress: Progress = lambda _: None,
        parameters: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        template: Path = ROOT / "template.yaml",
        logs: Path = LOGS,
        verbose: bool = False,
        schedules: bool = True,
    ) -> None:
        self.api_key = api_key
        self.api_key_id = ""
        self.logs = logs
        self.backend = backend
        self.model = model
        self.segmind: SegmindStandIn | None = None
        self.sagemaker: SageMaker | None = None
        self.resources: Mapping[str, str] = {}
        self.functions: dict[str, Function] = {}
        self.environment: dict[str, Mapping[str, str]] = {}
        self._port = port
        self._segmind_key = segmind_key
        self._segmind = (segmind_port, latency)
        self._container_url = container
        self._container: Container | None = None
        self._endpoint_python = endpoint_python
        self._progress = progress
        chosen = {} if backend == BACKENDS[0] else {"Backend": backend, "SageMakerInvocation": invocation}
        self._parameters = chosen | dict(parameters or {})
        self._overrides = dict(environment or {})
        self._template = template
        self._verbose = verbose
        self._schedules = schedules
        self._gateway: Gateway | None = None
        self._aws: Aws | None = None
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Stack:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return self._addresses["Api"]

    @property
    def compatible_url(self) -> str:
        return f"{self._addresses['CompatibleApi']}/v1"

    @property
    def _addresses(self) -> dict[str, str]:
        if self._gateway is None:
            raise RuntimeError("the stack is not started")
        return self._gateway.urls

    @property
    def aws(self) -> dict[str, Any]:
        """Keyword arguments for `boto3.client` and `boto3.resource`."""
        return self._moto.client_options

    @property
    def shell(self) -> dict[str, str]:
        """The environment in which an operator's tools work on this stack."""
        return {**self._moto.environment, "STACK": STACK_NAME}

    @property
    def _moto(self) -> Aws:
        if self._aws is None:
            raise RuntimeError("the stack is not started")
        return self._aws

    def client(self, service: str) -> Any:
        """Return a boto3 client of the stack's AWS."""
        return self._moto.client(service)

    def invoke(self, function: str, event: Any) -> Any:
        """Run a function with an event and return what it returned.

        Raises `FunctionError` when it raised, timed out or ended its process.
        """
        result = self.functions[function].invoke(json.dumps(event).encode())
        if result.failed:
            raise FunctionError(result.json())
        return result.json()

    @property
    def alive(self) -> bool:
        serving = self._container is None or self._container.alive
        return serving and self._moto.alive and all(function.alive for function in self.functions.values())

    def log_lines(self, function: str | None = None) -> Iterator[str]:
        """Return what the functions, or one of them, wrote so far."""
        for name in [function] if function else self.functions:
            yield from (self.logs / f"{name}.log").read_text().splitlines()

    def start(self) -> None:
        """Start everything, and return when all of it is ready.

        Raises `OSError` when the port is taken, `FunctionError` when a function cannot start, `EndpointError` when the
        endpoint cannot.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        # What is registered first is stopped last. The port comes first: whether it is free shows at once.
        gateway = self._gateway = Gateway(self._port, log=self.logs / "gateway.log")
        self._ending.callback(gateway.stop)
        aws = self._aws = Aws(self._fresh_log("moto"))
        self._ending.callback(aws.close)
        if self.backend != "segmind":
            self._start_container()  # first: it takes the longest
        blueprint = Blueprint.load(self._template, self._parameters)
        aws.wait_until_ready()
        self.resources, resolved = provision(aws, blueprint)
        application = Application.read(resolved, blueprint)
        shared = aws.environment | self._start_segmind() | self._start_sagemaker(application) | self._overrides
        for spec in application.functions:
            self._start_function(spec, shared, application)
        self._create_team()  # while the functions start
        for function in self.functions.values():
            function.wait_until_ready()
        if self._container:
            self._container.wait_until_ready(self._progress)
        self._start_triggers(application)
        keys = ApiKeys(self.client("apigateway"), self.resources["UsagePlan"])
        gateway.serve(application.apis, self._call, keys.id_of)

    def stop(self) -> None:
        """Stop everything; what was running is cut off."""
        self._ending.close()

    def _start_segmind(self) -> dict[str, str]:
        """Store the key, and return what the functions need to reach the backend."""
        secret = self.resources["SegmindSecret"]
        self.client("secretsmanager").put_secret_value(SecretId=secret, SecretString=self._segmind_key or _STAND_IN_KEY)
        if self._segmind_key or self.backend == "sagemaker":
            return {}
        port, latency = self._segmind
        self.segmind = self._ending.enter_context(SegmindStandIn(_STAND_IN_KEY, port=port, latency=latency))
        return {"SEGMIND_BASE_URL": self.segmind.url, "SEGMIND_OUTPUT_ORIGINS": self.segmind.origin}

    def _start_container(self) -> None:
        if self._container_url:
            return
        log, python = self._fresh_log("endpoint"), self._endpoint_python
        model = self.model or str(tiny_model(log, python, self._progress))
        self._container = Container(model, log, python)
        self._container_url = self._container.url
        self._ending.callback(self._container.close)

    def _start_sagemaker(self, application: Application) -> dict[str, str]:
        """Put SageMaker in front of the container, and return what the functions need to reach it."""
        if not (application.endpoint and self._container_url):
            return {}
        front = SageMaker(application.endpoint, self._container_url, self.client)
        self.sagemaker = self._ending.enter_context(front)
        if self._container:
            # Before the front, which waits for what it has asked of the container.
            self._ending.callback(self._container.close)
        return self.sagemaker.environment

    def _start_function(self, spec: FunctionSpec, shared: Mapping[str, str], application: Application) -> None:
        limits = [mapping.max_concurrency for mapping in application.mappings if mapping.function == spec.name]
        function = Function(
            spec,
            shared,
            log=None if self._verbose else self._fresh_log(spec.name),
            concurrency=sum(limits) or _CONCURRENCY,
        )
        self.functions[spec.name] = function
        self.environment[spec.name] = {**spec.environment, **shared}
        self._ending.callback(function.close)

    def _create_team(self) -> None:
        """Create the first team as an operator does, but with clients that are there already."""
        dynamodb, table = self.client("dynamodb"), self.resources["JobsTable"]
        teams = TeamStore(dynamodb, table, clock=time.time)
        teams.create(TEAM)
        Credits(dynamodb, table, clock=time.time).add(TEAM, _CREDITS)
        PresetStore(dynamodb, table, clock=time.time).save(TEAM, PRESET, _PRESET_FIELDS)
        keys = GatewayKeys(self.client("apigateway"), self.resources["UsagePlan"])
        with keys.new(TEAM, value=self.api_key) as key:
            teams.add_key(key.id, TEAM, label="development")
        self.api_key_id = key.id

    def _start_triggers(self, application: Application) -> None:
        clock = Clock(application.schedules if self._schedules else (), self._call)
        pollers: list[QueuePoller | Clock] = [clock]
        sqs = self.client("sqs")
        for mapping in application.mappings:
            url = self.resources[mapping.queue]
            arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
            pollers.append(QueuePoller(mapping, url, arn, sqs, self._call))
        for poller in pollers:
            self._ending.callback(poller.join)
        # What waits for AWS gives up when that is gone.
        self._ending.callback(self._moto.kill)
        for function in self.functions.values():
            self._ending.callback(function.close)
        for poller in pollers:
            self._ending.callback(poller.stop)
            poller.start()

    def _call(self, function: str, payload: bytes) -> Result:
        return self.functions[function].invoke(payload)

    def _fresh_log(self, name: str) -> Path:
        path = self.logs / f"{name}.log"
        path.write_bytes(b"")
        return path
