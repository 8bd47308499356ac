"""Secrets from files, and the variables that Kubernetes adds for a Service called glimpse."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, read_settings

# What a pod gets beside Services called glimpse, glimpse-http and glimpse-redis.
OF_KUBERNETES = {
    "GLIMPSE_SERVICE_HOST": "10.96.0.7",
    "GLIMPSE_SERVICE_PORT": "8080",
    "GLIMPSE_SERVICE_PORT_HTTP": "8080",
    "GLIMPSE_PORT": "tcp://10.96.0.7:8080",
    "GLIMPSE_PORT_8080_TCP": "tcp://10.96.0.7:8080",
    "GLIMPSE_PORT_8080_TCP_PROTO": "tcp",
    "GLIMPSE_PORT_8080_TCP_PORT": "8080",
    "GLIMPSE_PORT_8080_TCP_ADDR": "10.96.0.7",
    "GLIMPSE_HTTP_PORT": "tcp://10.96.0.8:80",
    "GLIMPSE_REDIS_PORT_6379_TCP_ADDR": "10.96.0.9",
}


def test_the_addresses_of_services_are_no_settings() -> None:
    assert read_settings(OF_KUBERNETES) == read_settings({})


def test_they_are_no_settings_of_a_process_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OF_KUBERNETES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLIMPSE_GRPC_PORT", "9")
    settings = read_settings()
    assert (settings.http_port, settings.grpc_port) == (8080, 9)
    assert Settings().grpc_port == 8081  # only `read_settings` reads the environment


@pytest.mark.parametrize("name", ["GLIMPSE_PORT", "GLIMPSE_SERVICE", "GLIMPSE_REDIS_HOST"])
def test_a_variable_that_only_looks_like_them_is_mistyped(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is not a setting"):
        read_settings({name: "8080"})


def test_a_secret_stands_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "redis"
    secret.write_text("redis://:hidden@redis:6379/0\n")
    url = read_settings({"GLIMPSE_REDIS_URL_FILE": str(secret)}).redis_url
    assert url is not None
    assert url.get_secret_value() == "redis://:hidden@redis:6379/0"
    assert read_settings({"GLIMPSE_REDIS_URL_FILE": ""}).redis_url is None


def test_a_file_of_a_secret_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "long").write_text("x" * 70_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, reason in (
        ("none", "No such file or directory"),
        ("", "Is a directory"),
        ("empty", "is empty"),
        ("long", "is too long"),
        ("binary", "it is not text"),
    ):
        with pytest.raises(SettingsError, match=rf"GLIMPSE_REDIS_URL_FILE: {tmp_path}.*{reason}"):
            read_settings({"GLIMPSE_REDIS_URL_FILE": str(tmp_path / name)})


def test_a_secret_has_one_source_and_others_have_no_file(tmp_path: Path) -> None:
    file = tmp_path / "redis"
    file.write_text("redis://a:1")
    with pytest.raises(SettingsError, match="GLIMPSE_REDIS_URL and GLIMPSE_REDIS_URL_FILE are both set"):
        read_settings({"GLIMPSE_REDIS_URL_FILE": str(file), "GLIMPSE_REDIS_URL": "redis://b:1"})
    with pytest.raises(SettingsError, match="GLIMPSE_HTTP_HOST_FILE is not a setting"):
        read_settings({"GLIMPSE_HTTP_HOST_FILE": str(file)})
