"""Prepare a container: make keys if there are none, copy the samples if the demo is served, make a password
for Grafana if one is required.

Then become `promptplex`, so that the server is the container's first process and receives SIGTERM itself.
Arguments are those of `promptplex serve`, or any other command of `promptplex`.
"""

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = "demo/demo-causal"
SAMPLES = Path("prompts_store")  # beside the demo, in the image's working directory
EVERYTHING = ("generate", "upload", "admin", "metrics")


def main(arguments: list[str]) -> None:
    """Prepare, then become the command."""
    if not arguments or arguments[0].startswith("-"):
        arguments = ["serve", *arguments]
    if arguments[0] == "serve":
        prepare(arguments)
    os.execvp("promptplex", ["promptplex", *arguments])


def prepare(arguments: list[str]) -> None:
    """Make keys, password and samples, as the settings of `serve` require."""
    keys_file = chosen("keys-file", arguments)
    if keys_file is not None:
        metrics_key_file = os.environ.get("METRICS_KEY_FILE")
        make_keys(Path(keys_file), Path(metrics_key_file) if metrics_key_file else None)
    password_file = os.environ.get("GRAFANA_PASSWORD_FILE")
    if password_file:
        make_password(Path(password_file))
    if chosen("model", arguments) in (None, DEMO):
        add_samples(Path(chosen("store", arguments) or SAMPLES))


def chosen(setting: str, arguments: list[str]) -> str | None:
    """Return the setting's value: the last option, else the variable, else None."""
    flag = f"--{setting}"
    value = os.environ.get(f"PROMPTPLEX_{setting.upper().replace('-', '_')}")
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == flag and following is not None:
            value = following
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
    return value


def make_keys(keys_file: Path, metrics_key_file: Path | None) -> None:
    """Make a key for the operator and one for Prometheus, if there is no key file yet.

    The keys themselves go into files of their own, never into the log. The key file appears last, so that
    the next start repeats whatever was interrupted.
    """
    if keys_file.exists():
        if metrics_key_file is not None and not metrics_key_file.exists():
            say(f"Prometheus finds no key in {metrics_key_file}: put one with the scope metrics there")
        return
    with open(keys_file.with_name(".making-keys"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another replica may be doing the same
        if keys_file.exists():
            return
        unfinished = keys_file.with_name(f"{keys_file.name}.new")
        unfinished.unlink(missing_ok=True)
        admin_key_file = keys_file.with_name("admin.key")
        write_secret(admin_key_file, add_key("admin", EVERYTHING, unfinished), mode=0o600)
        if metrics_key_file is not None:
            write_secret(metrics_key_file, add_key("prometheus", ("metrics",), unfinished), mode=0o640)
        unfinished.replace(keys_file)
    say(f"made {keys_file}; the key with all scopes is in {admin_key_file}")


def make_password(path: Path) -> None:
    """Write a random password to a file if there is none: at once, and the same for all replicas."""
    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_secret(unfinished, secrets.token_urlsafe(24), mode=0o640)
    try:
        path.hardlink_to(unfinished)
    except FileExistsError:  # another replica was faster
        return
    finally:
        unfinished.unlink()
    say(f"Grafana's password for the user admin is in {path}")


def add_key(name: str, scopes: tuple[str, ...], keys_file: Path) -> str:
    """Add a key to the file and return its text. Raise OSError if that fails."""
    command = ["promptplex", "keys", "add", name, "--keys-file", str(keys_file)]
    for scope in scopes:
        command += ["--scope", scope]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"the key could not be made: {done.stderr.strip()}")
    return done.stdout.strip()


def write_secret(path: Path, text: str, *, mode: int) -> None:
    """Write a file that has this mode from its first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(f"{text}\n")


def add_samples(store: Path) -> None:
    """Copy the demo's tasks to a store without any. Tasks appear at once, after their prompts."""
    tasks = store / "tasks"
    if store.resolve() == SAMPLES.resolve() or (tasks.is_dir() and any(tasks.iterdir())):
        return
    try:
        (store / "blobs").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store, prefix=".samples-") as staging:
            copied = Path(shutil.copytree(SAMPLES, Path(staging) / "store"))
            for blob in (copied / "blobs").iterdir():
                blob.replace(store / "blobs" / blob.name)
            (copied / "tasks").rename(tasks)
    except OSError as error:  # a read-only store is served as it is, and another replica may be faster
        say(f"the demo's tasks were not added to {store}: {error.strerror}")


def say(line: str) -> None:
    """Print a line to the container's log."""
    print(f"entrypoint: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        say(f"{error}; docs/deployment.md describes what a container needs")
        sys.exit(1)
