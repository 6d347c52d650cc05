"""Carry out the Dockerfile's instructions without an engine, in clean roots made by debootstrap.

Needs root, debootstrap, unshare and chroot; mounts live in mount namespaces of their own and go with them.
What stands in for Docker here: base root for base image, copies for layers, directories below
DIRECTORY/volumes for volumes. pip's configuration of this machine is shown to RUN, as is its network.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """Arguments of the JSON form or of the plain one."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclass
class Stage:
    """What one FROM begins, and what its instructions have set so far."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    directory: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        """Its instructions of a kind."""
        return [instruction for instruction in self.instructions if instruction.name == name]

    def substitute(self, text: str) -> str:
        """`text` with $NAME and ${NAME} replaced."""
        return _VARIABLE.sub(lambda found: self.environment.get(found[1] or found[2], ""), text)

    def set_up(self, instruction: Instruction, arguments: dict[str, str]) -> None:
        """Take in an instruction that runs and copies nothing."""
        words = instruction.words if instruction.name != "HEALTHCHECK" else []
        if instruction.name == "ARG":
            name, _, default = instruction.text.partition("=")
            self.environment[name] = arguments.get(name, default)
        elif instruction.name == "ENV":
            pairs = [self.substitute(word).partition("=") for word in words]
            self.environment |= {name: value for name, _, value in pairs}
        elif instruction.name == "WORKDIR":
            self.directory = instruction.text
        elif instruction.name == "USER":
            self.user = instruction.text
        elif instruction.name == "HEALTHCHECK":
            self.healthcheck = json.loads(instruction.text.partition("CMD ")[2])
        elif instruction.name in ("SHELL", "VOLUME", "ENTRYPOINT", "CMD"):
            attribute = {"VOLUME": "volumes", "CMD": "command"}.get(
                instruction.name, instruction.name.lower()
            )
            setattr(self, attribute, words)


def parse(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name; ARG before the first FROM isn't kept."""
    stages: dict[str, Stage] = {}
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            name = instruction.text.split(" AS ")[1]
            stages[name] = Stage(name)
        elif stages:
            list(stages.values())[-1].instructions.append(instruction)
    return stages


def _instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield Instruction(name, re.sub(r"\s+", " ", rest.strip()))


def settled(name: str) -> Stage:
    """A stage with all its settings in place."""
    stage = parse((REPOSITORY / "Dockerfile").read_text())[name]
    for instruction in stage.instructions:
        stage.set_up(instruction, {})
    return stage


def make_base(directory: Path) -> None:
    """The stand-in for the base image."""
    root = directory / "base"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root)], check=True
    )


def build(directory: Path, arguments: dict[str, str]) -> None:
    """Each stage that the image is made of, in a root of its own, from the base."""
    stages = parse((REPOSITORY / "Dockerfile").read_text())
    for name in ("build", "serve"):
        stage, root = stages[name], directory / name
        subprocess.run(["cp", "--archive", str(directory / "base"), str(root)], check=True)
        for instruction in stage.instructions:
            _carry_out(instruction, stage, directory, arguments)


def _carry_out(instruction: Instruction, stage: Stage, directory: Path, arguments: dict[str, str]) -> None:
    stage.set_up(instruction, arguments)
    root = directory / stage.name
    if instruction.name == "WORKDIR":
        (root / stage.directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif instruction.name == "RUN":
        _run(root, stage, instruction.text)
    elif instruction.name == "COPY":
        _copy(instruction, stage, directory)


def _copy(instruction: Instruction, stage: Stage, directory: Path) -> None:
    """As COPY does: a directory's content, files into a directory that ends with a slash."""
    *sources, target = [word for word in instruction.words if not word.startswith("--")]
    options = dict(word[2:].split("=") for word in instruction.words if word.startswith("--"))
    begins = options.get("from")
    context = REPOSITORY if begins is None else directory / begins
    goal = os.path.normpath(os.path.join(stage.directory, target)).lstrip("/")
    for source in sources:
        origin, place = context / source.lstrip("/"), directory / stage.name / goal
        if origin.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc") if begins is None else None
            shutil.copytree(origin, place, symlinks=True, dirs_exist_ok=True, ignore=ignored)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, place)
        if "chmod" in options:
            subprocess.run(["chmod", "--recursive", options["chmod"], str(place)], check=True)


def _run(root: Path, stage: Stage, command: str) -> None:
    """In a mount namespace of its own, with /proc, /dev/null and what pip needs of this machine."""
    environment, shown = _pip_of_this_machine()
    mounts = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    for path in [*shown, Path("/etc/resolv.conf")]:
        inside = root / str(path).lstrip("/")
        if path.is_dir():
            inside.mkdir(parents=True, exist_ok=True)
        elif not inside.exists():
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.touch()
        mounts.append(f"mount --rbind {path} {inside}")
    change = f"cd {shlex.quote(stage.directory)} && exec {shlex.join([*stage.shell, command])}"
    script = " && ".join(mounts) + f" && exec chroot {root} /bin/sh -c {shlex.quote(change)}"
    subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-euc", script],
        env=environment | stage.environment,
        check=True,
    )


def _pip_of_this_machine() -> tuple[dict[str, str], list[Path]]:
    """pip's options as variables, and the directories and files that they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    options: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        options["PIP_" + name.rpartition(".")[2].upper().replace("-", "_")] = shlex.split(value)[0]
    named = (word.removeprefix("file://") for value in options.values() for word in value.split())
    return options, sorted({_top(Path(word)) for word in named if word.startswith("/")})


def _top(path: Path) -> Path:
    """The directory below the root's that holds `path`, except where that is a system's own."""
    return path if path.parts[1] in ("etc", "usr", "root", "home") else Path(*path.parts[:3])


def run_command(
    directory: Path,
    command: list[str],
    *,
    extra: dict[str, str] | None = None,
    readonly_volumes: tuple[str, ...] = (),
) -> list[str]:
    """The argv that runs `command` in the final root: as its user, read-only but for volumes and /tmp.

    The process that is started becomes the command (the chain is all exec), so signals reach it.
    """
    stage = settled("serve")
    root = directory / "serve"
    user, group = stage.user.split(":")
    mounts = [f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc"]
    mounts += [
        f"mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs {root}/tmp",
        f"mount --rbind /dev {root}/dev",
    ]
    for volume in stage.volumes:
        inside, outside = root / volume.lstrip("/"), directory / "volumes" / volume.lstrip("/")
        if not outside.exists():  # a new volume begins as what the image has there
            outside.parent.mkdir(exist_ok=True)
            subprocess.run(["cp", "--archive", str(inside), str(outside)], check=True)
        mounts.append(f"mount --bind {outside} {inside}")
        if volume in readonly_volumes:
            mounts.append(f"mount -o remount,bind,ro {inside}")
    mounts.append(f"mount -o remount,bind,ro {root}")
    variables = [f"{name}={value}" for name, value in (stage.environment | (extra or {})).items()]
    inside = shlex.join(command)
    become = [
        *("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--bounding-set=-all"),
        *("--no-new-privs", "--", "env", "-i", "HOME=/cache", *variables),
        *("/bin/sh", "-c", f"cd {stage.directory} && exec {inside}"),
    ]
    script = " && ".join(mounts) + f" && exec chroot {root} {shlex.join(become)}"
    return ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-euc", script]


def entrypoint(*arguments: str) -> list[str]:
    """What a container runs when it is given these arguments."""
    stage = settled("serve")
    return [*stage.entrypoint, *(arguments or stage.command)]
