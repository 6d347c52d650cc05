"""Settings: where they come from, what they refuse, and how they say so."""

import pytest

from app.settings import Settings, is_loopback, load_settings, unknown_variables


def test_flags_win_over_variables_and_variables_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTPLEX_MAX_ROWS", "32")
    monkeypatch.setenv("PROMPTPLEX_TOKEN_BUDGET", "512")
    settings = load_settings({"max_rows": "8"})
    assert (settings.max_rows, settings.token_budget, settings.block_size) == (8, 512, 16)
    config = settings.engine_config()
    assert (config.max_rows, config.token_budget, config.block_size) == (8, 512, 16)


def test_sizes_take_units_and_lists_take_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTPLEX_ALLOWED_HOSTS", "prompts.example, localhost")
    settings = load_settings({"host_cache_bytes": "2GiB", "max_body_bytes": "1000"})
    assert settings.host_cache_bytes == 2 << 30
    assert settings.max_body_bytes == 1000
    assert settings.allowed_hosts == ("prompts.example", "localhost")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "localhost", "::1"])
def test_loopback_is_allowed_without_keys(host: str) -> None:
    assert is_loopback(host)
    assert load_settings({"host": host}).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "example.org"])
def test_other_addresses_are_refused_without_keys(host: str) -> None:
    assert load_settings({"host": host, "keys_file": "keys.json"}).host == host
    with pytest.raises(
        ValueError, match=r"--host or PROMPTPLEX_HOST.*no API keys.*promptplex keys add.*127\.0\.0\.1"
    ):
        load_settings({"host": host})


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", "70000"), ("max_rows", "0"), ("dtype", "int8"), ("kv_cache_bytes", "lots"), ("nonsense", "1")],
)
def test_a_bad_value_names_its_flag_and_variable(name: str, value: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} or PROMPTPLEX_{name.upper()}"):
        load_settings({name: value})


def test_kubernetes_service_links_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTPLEX_PORT", "tcp://10.0.0.1:8000")
    assert load_settings({}).port == 8000
    assert not unknown_variables(
        ["PROMPTPLEX_SERVICE_HOST", "PROMPTPLEX_PORT_8000_TCP", "PROMPTPLEX_SERVER", "PROMPTPLEX_KEY"]
    )


def test_a_list_of_hosts_counts_on_loopback_and_where_it_was_given() -> None:
    usual = Settings().allowed_hosts
    keys = {"keys_file": "keys.json"}
    assert load_settings({}).host_allow_list == usual
    assert load_settings(keys).host_allow_list == usual
    assert load_settings(keys | {"host": "0.0.0.0"}).host_allow_list is None
    given = keys | {"host": "0.0.0.0", "allowed_hosts": "prompts.example"}
    assert load_settings(given).host_allow_list == ("prompts.example",)


def test_a_mistyped_variable_is_pointed_out() -> None:
    assert unknown_variables(["PROMPTPLEX_MAX_ROW", "HOME"]) == [
        "PROMPTPLEX_MAX_ROW is not a setting; did you mean PROMPTPLEX_MAX_ROWS?"
    ]


def test_the_base_is_called_as_its_directory_unless_named() -> None:
    assert load_settings({"model": "hub/Some-Model"}).base_name == "Some-Model"
    assert load_settings({"model": "hub/Some-Model", "served_name": "base"}).base_name == "base"


@pytest.mark.parametrize("given", [{"served_name": "base@3"}, {"model": "hub/base@3"}])
def test_the_base_has_no_version_in_its_name(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"--served-name.*base@3.*leave out the @"):
        load_settings(given)
    assert load_settings(given | {"served_name": "org/base"}).base_name == "org/base"


def test_allowed_hosts_are_compared_in_lower_case() -> None:
    settings = load_settings({"allowed_hosts": "API.Example.com,192.168.0.2,FE80::1"})
    assert settings.allowed_hosts == ("api.example.com", "192.168.0.2", "fe80::1")


@pytest.mark.parametrize("host", ["a.example:8000", "[::1]", "http://a.example", "*", "a b", "[::1]:80"])
def test_only_names_are_allowed_hosts(host: str) -> None:
    with pytest.raises(ValueError, match=r"--allowed-hosts.*without scheme, port and brackets"):
        load_settings({"allowed_hosts": host})


@pytest.mark.parametrize(
    "url", ["http://h", "redis://:secret@h:port", "redis+sentinel://h:1", "rediss://h:1/x"]
)
def test_a_malformed_redis_url_is_told_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="--redis-url") as caught:
        load_settings({"redis_url": url})
    assert "secret" not in str(caught.value)


def test_a_redis_url_is_not_shown() -> None:
    settings = load_settings({"redis_url": "redis://user:secret@h:6379/0"})
    assert "secret" not in repr(settings)
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://user:secret@h:6379/0"


@pytest.mark.parametrize("origin", ["*", "null", "app.example", "https://app.example/", "ftp://app.example"])
def test_only_origins_are_allowed_origins(origin: str) -> None:
    with pytest.raises(ValueError, match=r"--allowed-origins.*name each one"):
        load_settings({"allowed_origins": origin})


def test_origins_come_with_commas_between() -> None:
    settings = load_settings({"allowed_origins": "https://app.example, http://[::1]:3000"})
    assert settings.allowed_origins == ("https://app.example", "http://[::1]:3000")
