import pytest

from pico_fast.monitor.throughput import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_mean_time_between_steps_without_start_up() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    clock.now += 60  # compilation
    throughput.step()
    assert throughput.seconds_per_step() is None
    for gap in (1.0, 2.0):
        clock.now += gap
        throughput.step()
    assert throughput.seconds_per_step() == pytest.approx(1.5)


def test_restart_keeps_the_clock() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    throughput.step()
    throughput.restart()
    assert throughput.seconds_per_step() is None
    clock.now += 3
    throughput.step()
    assert throughput.seconds_per_step() == pytest.approx(3)


def test_pauses_do_not_count_even_nested_or_left_by_an_exception() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    throughput.step()
    clock.now += 1
    with throughput.paused():
        clock.now += 50
        with throughput.paused():
            clock.now += 50

    def failing() -> None:
        with throughput.paused():
            clock.now += 50
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    clock.now += 1
    throughput.step()
    assert throughput.seconds_per_step() == pytest.approx(2)
