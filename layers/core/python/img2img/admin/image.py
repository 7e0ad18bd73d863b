"""The command `image`: the endpoint's image is built with Docker and goes to ECR."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2img.admin.commands import Options, add_command
from img2img.errors import AlreadyExists, InvalidRequest

if TYPE_CHECKING:
    from img2img.admin.stack import Operator

_CONTEXT = Path("endpoint")
# SageMaker reads no image index, which attestations would make of the image. A variable, for Docker's older builder
# does not know `--provenance`; set by `env`, which passes on the rest of the environment.
_DOCKER = ("env", "BUILDX_NO_DEFAULT_ATTESTATIONS=1", "docker")


def add_commands(commands: Any) -> None:
    """Declare the command."""
    more = "Needs Docker; run it at the root of the repository."
    parser = add_command(
        commands, "image", run, "push the endpoint's image to ECR and print its EndpointImageUri", more
    )
    parser.add_argument("repository", metavar="REPOSITORY", help="name at ECR, without a slash; made when missing")
    parser.add_argument("tag", metavar="TAG", help="a new one: the stack would not see that an image has changed")


def run(use: Operator, options: Options) -> int:
    """Build and push an image and print its URI."""
    print(f"EndpointImageUri: {push(use.client('ecr'), options.repository, options.tag)}")
    return 0


def push(ecr: Any, repository: str, tag: str) -> str:
    """Build the image of the folder `endpoint`, push it, and return its URI; the repository is made when missing.

    Raises `InvalidRequest` when the repository's name has a slash, `AlreadyExists` when the tag is taken, `OSError`
    when Docker or the folder is not there or Docker fails, and botocore's errors.
    """
    if "/" in repository:
        raise InvalidRequest(f"The repository's name {repository} has a slash: the template does not take its images")
    if not shutil.which("docker"):
        raise FileNotFoundError("Docker is needed to build the image: https://docs.docker.com/get-docker/")
    if not (_CONTEXT / "Dockerfile").is_file():
        raise FileNotFoundError(f"There is no {_CONTEXT}/Dockerfile here; run this at the root of the repository")
    address = _make_repository(ecr, repository)
    image = f"{address}:{tag}"
    # Before minutes of building. Pushed again, the stack would not see that its image has changed.
    if ecr.batch_get_image(repositoryName=repository, imageIds=[{"imageTag": tag}])["images"]:
        raise AlreadyExists(f"{image} was pushed already; choose another tag")
    _docker("build", "--platform", "linux/amd64", "--tag", image, str(_CONTEXT))
    user, password = _login(ecr)
    # The password never stands on a command line, where `ps` would show it.
    _docker("login", "--username", user, "--password-stdin", address.partition("/")[0], text=password)
    _docker("push", image)
    return image


def _make_repository(ecr: Any, name: str) -> str:
    """Return a repository's address; make it when there is none."""
    try:
        made = ecr.create_repository(
            repositoryName=name,
            imageTagMutability="IMMUTABLE",
            imageScanningConfiguration={"scanOnPush": True},
        )
        return str(made["repository"]["repositoryUri"])
    except ecr.exceptions.RepositoryAlreadyExistsException:
        return str(ecr.describe_repositories(repositoryNames=[name])["repositories"][0]["repositoryUri"])


def _login(ecr: Any) -> tuple[str, str]:
    token = ecr.get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, _, password = base64.b64decode(token).decode().partition(":")
    return user, password


def _docker(*arguments: str, text: str | None = None) -> None:
    """Run Docker, with `text` to read. What it says goes to stderr: stdout is for the result."""
    ended = subprocess.run([*_DOCKER, *arguments], input=text, stdout=sys.stderr, text=True)  # noqa: S603
    if ended.returncode:
        raise ChildProcessError(f"docker {arguments[0]} failed with exit status {ended.returncode}")
