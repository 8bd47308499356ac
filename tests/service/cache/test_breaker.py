from service.cache.breaker import FAILURES_TO_OPEN, LEAST_PAUSE_S, MOST_PAUSE_S, STEADY_S, Breaker


def closed(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    breaker.close(now)
    return breaker


def open_again(breaker: Breaker, now: float) -> None:
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(now)
    assert breaker.is_open


def test_what_was_never_reached_is_tried_at_once_and_then_less_and_less_often():
    breaker = Breaker()
    pauses = []
    for _ in range(8):
        pauses.append(breaker.pause_s)
        breaker.failed(0.0)
    assert pauses == [0.0, LEAST_PAUSE_S, 0.5, 1.0, *4 * [MOST_PAUSE_S]]
    assert breaker.is_open


def test_only_failures_in_a_row_open_it():
    breaker = closed()
    for _ in range(10):
        for _ in range(FAILURES_TO_OPEN - 1):
            breaker.failed(1.0)
        breaker.succeeded()
    assert breaker.is_open is False
    open_again(breaker, 2.0)


def test_failures_on_different_connections_are_not_in_a_row():
    breaker = closed()
    for connection in ("lookups", "writes", "quotas") * (FAILURES_TO_OPEN - 1):
        breaker.failed(1.0, connection)
    breaker.succeeded("lookups")
    assert not breaker.is_open
    breaker.failed(1.0, "lookups")
    assert not breaker.is_open
    breaker.failed(1.0, "writes")
    assert breaker.is_open
    breaker.close(2.0)
    breaker.failed(2.0, "quotas")
    assert not breaker.is_open


def test_a_late_success_does_not_close_it():
    breaker = closed()
    open_again(breaker, 1.0)
    breaker.succeeded()
    assert breaker.is_open


def test_one_that_opens_again_soon_is_tried_later_and_later():
    breaker = closed()
    pauses = []
    for now in range(1, 7):
        open_again(breaker, now)
        pauses.append(breaker.pause_s)
        breaker.close(now)
    assert pauses == [LEAST_PAUSE_S, 0.5, 1.0, *3 * [MOST_PAUSE_S]]


def test_after_a_steady_time_an_opening_counts_as_the_first():
    breaker = closed()
    for now in (1.0, 2.0, 3.0):
        open_again(breaker, now)
        breaker.close(now)
    open_again(breaker, 3.0 + STEADY_S)
    assert breaker.pause_s == LEAST_PAUSE_S


def test_a_moment_before_the_steady_time_is_over_it_is_not():
    breaker = closed()
    open_again(breaker, 1.0)
    breaker.close(1.0)
    open_again(breaker, 0.999 + STEADY_S)
    assert breaker.pause_s == 2 * LEAST_PAUSE_S
