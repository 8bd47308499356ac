import re

import pytest
from pydantic import ValidationError

from service.app import build, require_keys
from service.edges.proxies import Proxies
from service.settings import PREFIX, Settings, SettingsError, read_settings


def test_defaults_serve_an_embedded_triton():
    settings = read_settings({})
    assert settings.embedded
    assert (settings.http_port, settings.grpc_port, settings.triton_grpc_port) == (8080, 8081, None)
    assert settings.model_repository.name == "model_repository"


def test_a_variable_sets_its_knob_and_its_case_does_not_matter():
    settings = read_settings({"GLIMPSE_HTTP_PORT": "9000", "glimpse_log_format": "json", "HTTP_PORT": "1"})
    assert settings.http_port == 9000
    assert settings.log_format == "json"


def test_an_empty_variable_is_as_good_as_none():
    assert read_settings({"GLIMPSE_VISION_URL": "", "GLIMPSE_LLM_URL": ""}).embedded


def test_a_mistyped_variable_names_near_matches():
    with pytest.raises(SettingsError, match=r"GLIMPSE_TRITON_HTTP_PORT is no longer a setting: unset it.*no HTTP port"):
        read_settings({"GLIMPSE_TRITON_HTTP_PORT": "8000"})
    assert read_settings({"GLIMPSE_TRITON_HTTP_PORT": ""}).triton_grpc_port is None
    with pytest.raises(SettingsError, match="GLIMPSE_HTTP_PROT is not a setting: did you mean GLIMPSE_HTTP_PORT"):
        read_settings({"GLIMPSE_HTTP_PROT": "9000"})


def test_what_the_command_reads_is_left_alone():
    assert read_settings({"GLIMPSE_URL": "http://elsewhere", "GLIMPSE_DEBUG": "1"}) == read_settings({})


def test_a_variable_like_no_other_lists_the_known_ones():
    with pytest.raises(SettingsError, match=r"the known ones are .*GLIMPSE_FEATURE_CACHE_BYTES"):
        read_settings({"GLIMPSE_ZZZZZZZZ": "1"})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"GLIMPSE_HTTP_PORT": "many"}, "GLIMPSE_HTTP_PORT: .*integer"),
        ({"GLIMPSE_HTTP_PORT": "70000"}, "GLIMPSE_HTTP_PORT: .*65535"),
        ({"GLIMPSE_VISION_URL": "triton:8001"}, "set both GLIMPSE_VISION_URL and GLIMPSE_LLM_URL"),
        ({"GLIMPSE_DEFAULT_TIMEOUT_S": "500"}, "over GLIMPSE_MAX_TIMEOUT_S"),
        ({"GLIMPSE_REDIS_URL": "127.0.0.1:6379"}, "GLIMPSE_REDIS_URL: must start with redis://"),
        ({"GLIMPSE_IMAGE_STORE_BYTES": "20000000"}, "must hold at least one image"),
        ({"GLIMPSE_MAX_BYTES_IN_FLIGHT": "10"}, "must hold at least one body"),
        ({"GLIMPSE_MAX_BYTES_IN_FLIGHT": "30000000"}, "3/4 of GLIMPSE_MAX_BYTES_IN_FLIGHT must hold at least one body"),
        ({"GLIMPSE_MAX_PIXELS_IN_FLIGHT": "10"}, "must hold at least one image"),
        ({"GLIMPSE_VISION_SLOTS": "0"}, "GLIMPSE_VISION_SLOTS: .*greater than 0"),
    ],
)
def test_a_wrong_value_is_named(environ, message):
    with pytest.raises(SettingsError, match=message):
        read_settings(environ)


NUMBERS = [
    name for name, field in Settings.model_fields.items() if field.annotation in (int, float, int | None, float | None)
]


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e300", "1" + 300 * "0", "1" + 9_000 * "0", "-1"])
def test_a_number_that_nothing_can_count_to_is_told(number):
    for name in NUMBERS:
        with pytest.raises(SettingsError, match=f"^{PREFIX}{name.upper()}: [^\\n]{{1,200}}$"):
            read_settings({PREFIX + name.upper(): number})


def test_every_number_is_tried():
    assert len(NUMBERS) > 40
    assert {"stop_grace_s", "image_ttl_s", "redis_ttl_s", "max_connections", "vision_slots"} <= set(NUMBERS)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://h:notaport", "its host or port cannot be read"),
        ("redis://h:700000", "its host or port cannot be read"),
        ("redis://:secret#word@h:6379", "its host or port cannot be read"),
        ("redis://:pa[ss]w@h:6379", "its host or port cannot be read"),
        ("redis://:se\u2100cret@h:6379", "its host or port cannot be read"),
        ("redis://[::1", "its host or port cannot be read"),
        ("redis://h?foo=1", "an option that Redis's client does not know .*foo"),
        ("redis://h?db=x", "'db'"),
        ("rediss://h?ssl_cert_reqs=some", "Invalid SSL Certificate Requirements"),
        ("redis+cluster://", "at least one node"),
        ("redis+cluster://h:7000/3", "'db' must be 0"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"GLIMPSE_VARIANTS": "redis"}, {"GLIMPSE_KEYS": "redis"}])
def test_an_address_of_redis_that_cannot_be_used_is_one_line(url, said, more):
    with pytest.raises(SettingsError, match=f"^GLIMPSE_REDIS_URL: [^\n]*{said}[^\n]*$") as caught:
        build(read_settings({"GLIMPSE_REDIS_URL": url} | more))
    assert not any(part in str(caught.value) for part in ("secret", "cret", "ss]", "'ss'"))


@pytest.mark.parametrize("name", ["GLIMPSE_VISION_URL", "GLIMPSE_LLM_URL"])
@pytest.mark.parametrize(
    "address",
    [
        *("http://triton:8001", "grpc://triton:8001", "triton", "triton:", ":8001", "triton:http", "triton:0"),
        *("triton:70000", "::1:8001", "[::1]", "triton:8001/", "tri ton:8001", "[::1:8001"),
        *("triton..svc:8001", ".svc:8001", f"{'a' * 64}.svc:8001"),  # as without a variable of a shell
    ],
)
def test_an_address_that_is_none_is_told_what_to_write(name, address):
    environ = {"GLIMPSE_VISION_URL": "triton:8001", "GLIMPSE_LLM_URL": "triton:8001", name: address}
    with pytest.raises(SettingsError, match=f"{name}: '{re.escape(address)}' is not a gRPC address: write HOST:PORT"):
        read_settings(environ)


@pytest.mark.parametrize(
    "address", ["triton:8001", "127.0.0.1:1", "unix:/run/triton.sock", "[::1]:8001", "a-b.example.com:65535"]
)
def test_an_address_is_a_host_and_a_port(address):
    settings = read_settings({"GLIMPSE_VISION_URL": address, "GLIMPSE_LLM_URL": address})
    assert (settings.vision_url, settings.llm_url) == (address, address)


@pytest.mark.parametrize(
    ("host", "meant"), [("[::1]", "::1"), ("::", "::"), ("0.0.0.0", "0.0.0.0"), ("localhost", "localhost")]
)
def test_a_host_may_stand_in_brackets(host, meant):
    assert read_settings({"GLIMPSE_HTTP_HOST": host}).http_host == meant


@pytest.mark.parametrize("host", ["http://127.0.0.1", "127.0.0.1:8080", "no such host", "[::1", "0.0.0.0/0"])
def test_a_host_that_is_none_is_told(host):
    with pytest.raises(SettingsError, match=f"GLIMPSE_HTTP_HOST: '{re.escape(host)}' is not a host"):
        read_settings({"GLIMPSE_HTTP_HOST": host})


def test_a_host_that_nobody_knows_is_told():
    with pytest.raises(SettingsError, match=r"GLIMPSE_HTTP_HOST: 'nowhere\.invalid' is not known"):
        read_settings({"GLIMPSE_HTTP_HOST": "nowhere.invalid"})


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"GLIMPSE_HTTP_PORT": "8002"}, "GLIMPSE_HTTP_PORT and GLIMPSE_TRITON_METRICS_PORT are both 8002"),
        ({"GLIMPSE_TRITON_METRICS_PORT": "8080"}, "GLIMPSE_HTTP_PORT and GLIMPSE_TRITON_METRICS_PORT are both 8080"),
        ({"GLIMPSE_HTTP_PORT": "9", "GLIMPSE_TRITON_GRPC_PORT": "9"}, "and GLIMPSE_TRITON_GRPC_PORT are both 9"),
        ({"GLIMPSE_HTTP_PORT": "8081"}, "GLIMPSE_HTTP_PORT and GLIMPSE_GRPC_PORT are both 8081"),
        (
            {"GLIMPSE_TRITON_METRICS_PORT": "9", "GLIMPSE_TRITON_GRPC_PORT": "9"},
            "GLIMPSE_TRITON_METRICS_PORT are both 9",
        ),
    ],
)
def test_two_ports_that_are_one_are_named(environ, names):
    with pytest.raises(SettingsError, match=names):
        read_settings(environ)


def test_any_free_port_is_no_port_of_another():
    settings = read_settings({"GLIMPSE_HTTP_PORT": "0", "GLIMPSE_GRPC_PORT": "0"})
    assert (settings.http_port, settings.grpc_port) == (0, 0)


def test_ports_of_no_embedded_triton_do_not_matter():
    environ = {"GLIMPSE_VISION_URL": "triton:8001", "GLIMPSE_LLM_URL": "triton:8001", "GLIMPSE_HTTP_PORT": "8002"}
    assert read_settings(environ).http_port == 8002


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "rediss+cluster"])
def test_redis_is_one_server_or_a_cluster_with_tls_or_without(scheme):
    url = f"{scheme}://redis:6379/0"
    assert read_settings({"GLIMPSE_REDIS_URL": url}).redis_url.get_secret_value() == url


def test_the_password_of_redis_is_not_shown():
    settings = read_settings({"GLIMPSE_REDIS_URL": "redis://:secret@redis:6379/0"})
    assert "secret" not in repr(settings)


def test_settings_cannot_change():
    with pytest.raises(ValidationError):
        Settings().http_port = 1


def test_the_body_limit_holds_the_largest_image_as_base64():
    settings = Settings(max_image_bytes=3_000)
    assert settings.max_body_bytes > 4_000


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"GLIMPSE_KEYS": "redis"}, "GLIMPSE_KEYS is redis: set GLIMPSE_REDIS_URL"),
        ({"GLIMPSE_WITHOUT_KEYS": "yes"}, "GLIMPSE_WITHOUT_KEYS: Input should be 'anyone-may-ask'"),
        ({"GLIMPSE_KEYS": "keys.json", "GLIMPSE_WITHOUT_KEYS": "anyone-may-ask"}, "are both set: unset one"),
    ],
)
def test_keys_that_do_not_fit_together_are_told(told, said):
    with pytest.raises(SettingsError, match=said):
        read_settings(told)


@pytest.mark.parametrize(
    "networks",
    [
        "10.1.0.9/16",
        "proxy.example",
        "10.0.0.0/8;10.1.0.0/16",
        "0.0.0.0/0",
        "10.0.0.0/8,::/0",
        "0.0.0.0/1,128.0.0.0/1",
        "0.0.0.0/1",
        "128.0.0.0/2,192.0.0.0/2",
        "2000::/4,3000::/4",
        "::ffff:10.0.0.0/104",
        "::ffff:192.0.2.7",
    ],
)
def test_a_network_of_proxies_that_is_none_or_everybody_is_refused(networks):
    with pytest.raises(
        SettingsError,
        match=r"GLIMPSE_TRUSTED_PROXIES: '.*' (is not a network|is everybody|holds IPv4 addresses in IPv6)",
    ):
        read_settings({"GLIMPSE_TRUSTED_PROXIES": networks})


def test_networks_of_proxies_are_of_both_kinds_and_one_address_is_one():
    told = read_settings({"GLIMPSE_TRUSTED_PROXIES": "10.0.0.0/8, fc00::/7,192.0.2.7"})
    proxies = Proxies(told.trusted_proxies)
    assert all(address in proxies for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "192.0.2.7"))
    assert "192.0.2.8" not in proxies


def test_a_first_token_budget_needs_tritons_elsewhere():
    with pytest.raises(SettingsError, match="FIRST_TOKEN_BUDGET_MS needs Tritons that run elsewhere"):
        read_settings({"GLIMPSE_FIRST_TOKEN_BUDGET_MS": "500"})
    plain = {"GLIMPSE_VISION_URL": "triton:8001", "GLIMPSE_LLM_URL": "triton:8001"}
    assert read_settings(plain | {"GLIMPSE_FIRST_TOKEN_BUDGET_MS": "500"}).first_token_budget_s == 0.5


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_only_this_machine_may_ask_unless_it_is_said(host, tmp_path):
    with pytest.raises(SettingsError, match="`glimpse keys create`"):
        require_keys(read_settings({"GLIMPSE_HTTP_HOST": host}))
    for more in ({"GLIMPSE_KEYS": "keys.json"}, {"GLIMPSE_WITHOUT_KEYS": "anyone-may-ask"}):
        require_keys(read_settings({"GLIMPSE_HTTP_HOST": host} | more))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_this_machine_needs_no_keys(host):
    require_keys(read_settings({"GLIMPSE_HTTP_HOST": host}))
