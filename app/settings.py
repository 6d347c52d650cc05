"""Every setting of the server, from `PROMPTPLEX_*` variables and the flags of `promptplex serve`.

Nothing else reads the environment except OpenTelemetry, which has variables of its own. Each component
gets its own small frozen configuration; what is found at run time (such as the number of K/V blocks that
fit) is never written back.
"""

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.logs import LogFormat
from app.models.base_name import base_name
from app.store.cache.redis_url import parse_redis_url

if TYPE_CHECKING:
    from app.engine.engine import EngineConfig

ENV_PREFIX = "PROMPTPLEX_"

# Variables of the commands: the address of a server, and the key to send.
_OF_CLIENTS = {ENV_PREFIX + "SERVER", ENV_PREFIX + "KEY"}

# What Kubernetes puts into every container for a Service named `promptplex`.
_SERVICE_LINK = re.compile(r"SERVICE_(HOST|PORT)(_.*)?|PORT_.*")

_HOST = re.compile(r"[a-z0-9._\-]+|[0-9a-f:]*:[0-9a-f:.]*")
_ORIGIN = re.compile(r"https?://[a-z0-9._\-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")


def _without_service_link(value: Any) -> Any:
    """Ignore PROMPTPLEX_PORT=tcp://..., which Kubernetes sets for a Service of that name."""
    return 8000 if isinstance(value, str) and value.startswith("tcp://") else value


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Return hosts as they are compared: names in lower case, addresses bare."""
    for host in hosts:
        if not _HOST.fullmatch(host.lower()):
            raise ValueError(
                f"{host} isn't a host name; write it without scheme, port and brackets, such as "
                "prompts.example, 192.168.0.2 or ::1 (any port is answered)"
            )
    return tuple(host.lower() for host in hosts)


def _grantable(served_name: str | None, info: ValidationInfo) -> str | None:
    """Refuse an @, which begins a version in references and in keys' patterns."""
    name = served_name or base_name(info.data.get("model", ""))
    if "@" in name:
        raise ValueError(f"the base model can't be called {name}: leave out the @, which begins a version")
    return served_name


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Check origins as browsers send them. A wildcard would let every web page use this machine."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin} isn't an origin; name each one, such as https://app.example:8443")
    return origins


def _loopback_without_keys(host: str, info: ValidationInfo) -> str:
    """Refuse an address other than loopback without keys: any client could generate and upload."""
    if info.data.get("keys_file") is None and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines, and there are no API keys, so any client could "
            "generate and upload; make one (`promptplex keys add NAME --scope generate`) and name its file "
            "with --keys-file keys.json, or use 127.0.0.1"
        )
    return host


def _a_redis_url(url: SecretStr) -> SecretStr:
    """Refuse a malformed URL at once, not when the base model has been loaded."""
    parse_redis_url(url.get_secret_value())
    return url


class Settings(BaseSettings):
    """The operator's settings. Flags override variables, variables override these defaults."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    model: str = Field(
        "demo/demo-causal", description="Base model: a local directory or a Hugging Face hub id"
    )
    served_name: Annotated[str | None, AfterValidator(_grantable)] = Field(
        None,
        validate_default=True,
        description="Name of the base model in the API; default: the last part of the resolved --model",
    )
    store: Path = Field(Path("prompts_store"), description="Directory of the prompt store")
    import_dir: Path | None = Field(
        None,
        description="Directory to watch; each PEFT directory that appears in it becomes a version",
    )
    redis_url: Annotated[SecretStr, AfterValidator(_a_redis_url)] | None = Field(
        None,
        description="Redis cache in front of the store, such as redis://localhost:6379/0, "
        "rediss://user:pass@host or redis+sentinel://host:26379/master; default: none",
    )
    keys_file: Path | None = Field(
        None, description="File of API keys, written by `promptplex keys add`; default: no keys"
    )
    host: Annotated[str, AfterValidator(_loopback_without_keys)] = Field(
        "127.0.0.1", description="Address to listen on; without --keys-file only loopback is allowed"
    )
    port: Annotated[int, BeforeValidator(_without_service_link)] = Field(
        8000, ge=0, le=65535, description="Port to listen on; 0: any free port"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Weights and K/V cache: float32, bfloat16, float16, or auto (bfloat16 where native)",
    )
    weights: Literal["auto", "int8"] = Field(
        "auto",
        description="Weights of linear layers: auto (as loaded), or int8 (in bfloat16 on CPUs)",
    )
    device: str = Field(
        "auto", description="Device: auto, cpu, cuda or cuda:N; auto uses CUDA where it is available"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of the engine; default: torch's choice"
    )
    max_rows: int = Field(64, ge=1, le=4096, description="Maximum number of sequences in a step")
    token_budget: int = Field(
        2048,
        ge=16,
        le=1_048_576,
        description="Maximum number of tokens in a step; longer prefills are split into chunks, but an "
        "encoder's longer input is taken whole",
    )
    speculate: int = Field(
        0,
        ge=0,
        le=64,
        description="Maximum number of tokens guessed at once for a sequence, by looking up in its own text "
        "what followed the same tokens before; answers stay the same; 0: none",
    )
    block_size: int = Field(16, ge=1, le=512, description="Tokens in a K/V block")
    kv_cache_bytes: ByteSize | None = Field(
        None,
        description="Memory for the K/V cache, such as 2GiB; default: on a GPU all that the model and the "
        "largest step leave, on a CPU a quarter of the free memory",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of a GPU's memory for the model, steps and the K/V cache; the rest is for other "
        "programs, and for what the driver takes",
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU, record decode steps as CUDA graphs before the first request; false: launch "
        "every kernel by itself, such as where a driver's graphs fail",
    )
    max_context: int | None = Field(
        None,
        ge=2,
        description="Maximum virtual, prompt and new tokens of a request, in each stack of an "
        "encoder-decoder; default: the model's limit",
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="auto: use the defaults in the base's generation config (penalties, lengths, "
        "filters ...); none: only its EOS ids",
    )
    max_queue: int = Field(
        1024, ge=1, le=1_000_000, description="Maximum number of waiting requests; beyond it 503"
    )
    host_cache_bytes: ByteSize = Field(
        ByteSize(1 << 30), description="Host memory for prompts that aren't on the device, such as 1GiB"
    )
    max_body_bytes: ByteSize = Field(
        ByteSize(4 << 20),
        description="Maximum size of a request body but an upload's, such as 4MiB; beyond it 413",
    )
    max_upload_bytes: ByteSize | None = Field(
        None,
        description="Maximum size of an upload, all parts together, such as 64MiB; beyond it 413; "
        "default: room for a float32 prefix of 256 tokens, at least 64MiB",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_hosts)] = (
        Field(
            ("localhost", "127.0.0.1", "::1"),
            description="Accepted names in the Host header, separated by commas; prevents DNS rebinding",
        )
    )
    allowed_origins: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_origins)
    ] = Field(
        (),
        description="Origins of web pages that may call this server, separated by commas; default: its own",
    )
    request_timeout: float = Field(
        600.0, gt=0, le=86_400, description="Maximum seconds for a request; beyond it 504"
    )
    drain_timeout: float = Field(
        30.0, ge=0, le=86_400, description="Seconds for running requests to finish after Ctrl-C or SIGTERM"
    )
    training: bool = Field(
        False, description="Let clients start training runs, each in a process of the lowest priority"
    )
    training_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of a training run; default: half of the cores"
    )
    training_memory_bytes: ByteSize | None = Field(
        None,
        description="Memory of a training run, such as 4GiB; default: half of what is free when it starts",
    )
    training_device: str = Field(
        "cpu", description="Device of training runs: cpu, or cuda:N, which they then share with serving"
    )
    console: bool = Field(True, description="Serve the web console at /")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level to log: debug, info, warning or error"
    )
    log_format: LogFormat = Field(
        "text", description="Format of log lines: text, or json with an object on each line"
    )

    @property
    def base_name(self) -> str:
        """The base model's name for clients; no task may have it."""
        return self.served_name or base_name(self.model)

    @property
    def host_allow_list(self) -> tuple[str, ...] | None:
        """The accepted names in `Host`; None: any.

        A page that rebinds its name to this server has no key to send. So with keys and an address that
        other machines reach, only a list that the operator has set counts.
        """
        is_open = self.keys_file is not None and not is_loopback(self.host)
        return None if is_open and "allowed_hosts" not in self.model_fields_set else self.allowed_hosts

    def engine_config(self) -> "EngineConfig":
        """The engine's share of the settings."""
        from app.engine.engine import EngineConfig  # brings torch, which most commands don't need

        return EngineConfig(
            max_rows=self.max_rows,
            token_budget=self.token_budget,
            block_size=self.block_size,
            kv_cache_bytes=self.kv_cache_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_queue=self.max_queue,
            speculate=self.speculate,
            cuda_graphs=self.cuda_graphs,
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a port bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_settings(overrides: Mapping[str, Any]) -> Settings:
    """Read the environment, then apply the flags of the command line.

    Raises ValueError that names each setting at fault and what it accepts.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise ValueError("\n".join(_describe(problem) for problem in error.errors())) from None


def _describe(problem: Any) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{name} (--{name.replace('_', '-')} or {ENV_PREFIX}{name.upper()}): {reason}"


def unknown_variables(names: Iterable[str]) -> list[str]:
    """Return a line for each `PROMPTPLEX_*` variable that isn't a setting: most likely a typo."""
    known = {ENV_PREFIX + field.upper() for field in Settings.model_fields} | _OF_CLIENTS
    strange = sorted(
        name
        for name in names
        if name.startswith(ENV_PREFIX)
        and name not in known
        and not _SERVICE_LINK.fullmatch(name.removeprefix(ENV_PREFIX))
    )
    return [_suggest(name, known) for name in strange]


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"{name} is not a setting" + (f"; did you mean {close[0]}?" if close else "")
