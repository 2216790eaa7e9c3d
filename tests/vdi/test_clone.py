"""When a clone's writes are left to worker threads."""

from udedup.vdi.clone import REST, SLOW_SECONDS, Quickness


def test_slow_writes_take_a_small_part_of_the_time() -> None:
    quickness = Quickness()
    assert quickness.usual(0)
    quickness.took(10, SLOW_SECONDS / 2)
    assert quickness.usual(10)
    quickness.took(20, 0.2)
    assert not quickness.usual(20.2)
    assert not quickness.usual(20 + 0.2 * REST - 0.01)
    assert quickness.usual(20 + 0.2 * REST)
