"""What a container does before it serves: keys where there are none, samples where the demo is served,
a password for Grafana where one is asked for.

Then it becomes `promptplex`, so that the server is the container's first process and hears SIGTERM
itself. Arguments are those of `promptplex serve`, or any other command of `promptplex`.
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
    """Keys and samples, as the settings of `serve` ask for."""
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
    """What the operator chose: the last flag, else the variable, else None."""
    flag = f"--{setting}"
    value = os.environ.get(f"PROMPTPLEX_{setting.upper().replace('-', '_')}")
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == flag and following is not None:
            value = following
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
    return value


def make_keys(keys_file: Path, metrics_key_file: Path | None) -> None:
    """A key for the operator and one for Prometheus, where there is no key file yet.

    The keys themselves go into files of their own, never into the log. The key file appears last:
    whatever is cut short begins anew with the next start.
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
    say(f"made {keys_file}; the key that may do everything is in {admin_key_file}")


def make_password(path: Path) -> None:
    """A random one in a file of its own, where there is none; it appears whole, and once for all replicas."""
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
    say(f"Grafana's password, for its user admin, is in {path}")


def add_key(name: str, scopes: tuple[str, ...], keys_file: Path) -> str:
    """Add a key to the file; its text."""
    command = ["promptplex", "keys", "add", name, "--keys-file", str(keys_file)]
    for scope in scopes:
        command += ["--scope", scope]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"no key could be made: {done.stderr.strip()}")
    return done.stdout.strip()


def write_secret(path: Path, text: str, *, mode: int) -> None:
    """A file that only `mode` may read, from its first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(f"{text}\n")


def add_samples(store: Path) -> None:
    """The demo's tasks, where the store holds none. Tasks appear at once, after the prompts they name."""
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
    """To the container's log."""
    print(f"entrypoint: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        say(f"{error}; docs/deployment.md tells what a container needs")
        sys.exit(1)
