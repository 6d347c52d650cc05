"""The house rules that no linter knows: documents and tree agree, files stay small, one door."""

import ast
import itertools
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from app import __version__
from app.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parent.parent
APP = ROOT / "app"
MAX_LINES = 400
# Files over the bound, each with its reason.
LONG_FILES: dict[str, str] = {}


def _sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def _document(*names: str) -> str:
    return "\n".join((ROOT / name).read_text() for name in names)


def test_the_architecture_describes_every_package_and_no_other() -> None:
    packages = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in APP.rglob("__init__.py")}
    table = _document("docs/architecture.md").split("\n## Packages\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z_/]+)` \|", table, re.MULTILINE)) == packages - {"app/"}


def test_no_file_outgrows_its_noun() -> None:
    sources = _sources("app", "benchmarks", "demo")
    long = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources}
    assert {name for name, count in long.items() if count > MAX_LINES} == set(LONG_FILES)


def test_there_is_no_utils_module() -> None:
    assert not [path for path in _sources("app", "demo") if path.stem in {"utils", "helpers", "misc"}]


def test_every_module_says_what_it_is() -> None:
    silent = [path for path in _sources("app") if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    assert f"| `{name}` |" in _document("docs/operations.md")


def test_no_other_setting_is_documented() -> None:
    table = _document("docs/operations.md").split("## Settings")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE))
    assert documented == set(Settings.model_fields)
    mentioned = re.findall(
        ENV_PREFIX + r"[A-Z_]+", _document("README.md", "docs/operations.md", "docs/cli.md")
    )
    known = {ENV_PREFIX + field.upper() for field in Settings.model_fields} | {
        ENV_PREFIX + "SERVER",
        ENV_PREFIX + "KEY",
    }
    assert set(mentioned) - {ENV_PREFIX} <= known


def test_every_command_and_flag_is_documented() -> None:
    from typer.main import get_group

    from app.cli import cli

    text = _document("docs/cli.md")
    commands = get_group(cli).commands
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == set(commands)
    for name, command in commands.items():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        flags = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
        if name == "serve":  # its flags are the settings, which have their own table
            flags = {"--model", "--store", "--port"}
        missing = sorted(flag for flag in flags if flag not in section)
        assert not missing, f"docs/cli.md, {name}: {missing}"


def test_every_route_is_documented() -> None:
    from app.api.app import create_app
    from app.api.state import ApiConfig, ServerState

    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    paths = create_app(ServerState(), ApiConfig()).openapi()["paths"]
    missing = sorted(path for path in paths if f"`{path}`" not in text and f" {path}`" not in text)
    assert not missing


def test_the_changelog_is_kept() -> None:
    text = _document("CHANGELOG.md")
    assert "keepachangelog.com" in text
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)
    assert re.search(r"^### (Added|Changed|Fixed|Removed|Deprecated|Security)$", text, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_the_licence_is_apache() -> None:
    assert "Apache License" in _document("LICENSE")
    assert "APPENDIX" in _document("LICENSE")


def test_every_dependency_is_pinned_exactly() -> None:
    pins = dict(
        line.split("==") for line in _document("constraints.txt").splitlines() if line and line[0] != "#"
    )
    assert all(re.fullmatch(r"[0-9][0-9.]*((post|b)\d+)?", version) for version in pins.values())
    project = tomllib.loads(_document("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in wanted} - {"promptplex"}
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    assert {name.lower() for name in names} <= normal


def test_nothing_of_a_particular_machine_is_committed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".toml", ".txt", ".json", ".yml", ""}
    files = [ROOT / name for name in listed.stdout.splitlines()]
    pattern = re.compile("/(work|opt|root)" + "/[a-z]|/tmp/" + "w/")
    texts = {
        path: path.read_text(errors="ignore") for path in files if path.suffix in suffixes and path.is_file()
    }
    assert not [path for path, text in texts.items() if pattern.search(text)]


def test_continuous_integration_has_one_door() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make check" in script.read_text()
    check = _document("Makefile").split("\ncheck:")[1].split("\n\n")[0]
    steps = ["ruff format --check", "ruff check", "mypy", "lint-imports", "$(MAKE) test"]
    positions = [check.index(step) for step in steps]
    assert positions == sorted(positions)
    assert "make test" in _document("README.md")
