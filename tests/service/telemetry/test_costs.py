"""What each tenant took: bounded labels, and a sum that is the process's CPU time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.payer import NOBODY, OTHERS, UNNAMED, Payer, current
from service.telemetry.costs import MOST_OF_NOMINAL, PROMOTED_FROM, REQUEST_S, Costs, Ended, TenantLabels


def ended(**changed: object) -> Ended:
    values = {"answered": True, "waits": False, "streamed": False, "encoded_images": 0}
    tokens = {"prompt_tokens": 13, "visual_tokens": 32, "generated_tokens": 0}
    return Ended(**(values | tokens | changed))  # type: ignore[arg-type]


class World:
    """A gateway's accounts, with its CPU time and its clock in the test's hands."""

    def __init__(self, tenant_labels: int = 3, hold_s: float = 0.0) -> None:
        self.cpu_s = self.now = 0.0
        self.costs = Costs(tenant_labels, hold_s, lambda: self.cpu_s, lambda: self.now)

    def ask(self, tenant: str, **changed: object) -> Payer:
        payer = self.costs.payer(tenant)
        self.costs.ended(payer, ended(**changed))
        return payer

    def samples(self) -> dict[tuple[str, ...], float]:
        """By metric without its prefix, and labels."""
        return {
            (sample.name.removeprefix("glimpse_tenant_"), *sample.labels.values()): sample.value
            for family in self.costs.collect()
            for sample in family.samples
        }

    def cpu_seconds(self) -> dict[str, float]:
        """Of the gateway, by tenant."""
        found = self.samples()
        return {key[1]: value for key, value in found.items() if key[0] == "cpu_seconds_total" and key[3] == "gateway"}


def test_requests_and_tokens_are_counted_by_tenant_and_variant():
    world = World()
    world.ask("a", generated_tokens=5)
    world.ask("a", answered=False)
    world.ask("")
    found = world.samples()
    assert found["requests_total", "a", "default", "ok"] == 1
    assert found["requests_total", "a", "default", "failed"] == 1
    assert found["tokens_total", "a", "default", "visual"] == 64
    assert found["tokens_total", "a", "default", "generated"] == 5
    assert found["requests_total", UNNAMED, "default", "ok"] == 1


def test_the_process_s_time_is_shared_by_what_requests_take():
    world = World()
    world.ask("a")
    world.ask("b")
    world.ask("b")
    world.cpu_s = 6 * REQUEST_S
    assert world.cpu_seconds() == pytest.approx({"a": 2 * REQUEST_S, "b": 4 * REQUEST_S, NOBODY.tenant: 0.0})
    world.ask("a")
    world.cpu_s += 2 * REQUEST_S
    assert world.cpu_seconds()["a"] == pytest.approx(4 * REQUEST_S)


def test_a_streamed_token_and_a_new_image_take_more():
    assert ended(streamed=True, generated_tokens=9).nominal_s > ended(generated_tokens=9).nominal_s
    assert ended(encoded_images=1).nominal_s > ended().nominal_s


def test_idle_time_is_no_tenant_s():
    world = World()
    world.ask("a")
    world.cpu_s = 100.0
    assert world.cpu_seconds() == pytest.approx(
        {"a": MOST_OF_NOMINAL * REQUEST_S, NOBODY.tenant: 100.0 - MOST_OF_NOMINAL * REQUEST_S}
    )


def test_a_decoder_s_time_is_the_current_payer_s_and_its_start_nobody_s():
    world = World()
    world.costs.payer("a")
    world.costs.decoded(0.25, 0.5)
    found = world.samples()
    assert found["cpu_seconds_total", "a", "default", "decoder"] == 0.25
    assert found["cpu_seconds_total", NOBODY.tenant, "default", "decoder"] == 0.5


def test_a_new_series_stays_at_zero_until_prometheus_has_seen_it():
    world = World(hold_s=20.0)
    world.ask("a")
    assert world.samples()["requests_total", "a", "default", "ok"] == 0
    world.now = 20.0
    assert world.samples()["requests_total", "a", "default", "ok"] == 1


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 0.1), st.integers(0, 9)), max_size=10
    ),  # too few for a label to change hands, whose series would end
    st.integers(0, 4),
)
def test_the_sum_over_tenants_is_the_process_s_time_and_labels_are_bounded(asked, labels):
    world = World(labels)
    whole = 0.0
    for tenant, cpu_s, tokens in asked:
        world.ask(tenant, generated_tokens=tokens)
        world.cpu_s += cpu_s
        whole += cpu_s
    tenants = world.cpu_seconds()
    assert len(tenants) <= labels + 2
    assert sum(tenants.values()) == pytest.approx(whole)


def test_others_share_one_label_and_a_tenant_that_asks_more_gets_its_own():
    labels = TenantLabels(2)
    for tenant in ("small", "big", "big", "big"):
        assert labels.of(tenant, 0.0) == tenant
    found = [labels.of("newcomer", 0.0) for _ in range(20)]
    assert found.index("newcomer") == PROMOTED_FROM + 2 * 1 - 1
    assert set(found[:11]) == {OTHERS}
    assert "small" not in labels
    assert "big" in labels


def test_names_that_are_used_once_take_no_label():
    labels = TenantLabels(2)
    for tenant in ("a", "b"):
        labels.of(tenant, 0.0)
    assert {labels.of(f"guess{number}", 0.0) for number in range(1000)} == {OTHERS}


def test_a_tenant_that_has_gone_makes_room():
    labels = TenantLabels(1)
    for _ in range(1000):
        labels.of("gone", 0.0)
    assert [labels.of("new", 0.0) for _ in range(100)] == [OTHERS] * 100
    assert labels.of("new", 20 * 3600.0) == OTHERS
    assert [labels.of("new", 20 * 3600.0) for _ in range(12)][-1] == "new"


def test_a_series_whose_tenant_lost_its_label_ends():
    world = World(1)
    world.ask("small")
    late = world.costs.payer("small")
    for _ in range(20):
        world.ask("big")
    world.costs.ended(late, ended())
    tenants = {key[1] for key in world.samples()}
    assert tenants == {"big", OTHERS, NOBODY.tenant}


def test_the_payer_is_known_to_later_work_and_is_read_as_it_is_written():
    world = World()
    assert world.costs.payer("a.b:c", "other") == current.get() == Payer("a.b:c", "other")
    assert Payer.read(str(current.get())) == current.get()
    assert Payer.read("") == NOBODY


def test_a_question_of_a_batch_that_waits_has_not_ended():
    world = World()
    world.ask("a", answered=False, waits=True)
    world.ask("a")
    counted = {key[-1]: value for key, value in world.samples().items() if key[0] == "requests_total" and "a" in key}
    assert counted.get("failed", 0.0) == 0.0
    assert counted["ok"] == 1.0
