"""When what the kernel caches of the mount is dropped: soon, once, and ever less often what comes back."""

from udedup.vdi.regions import (
    FIRST_SECONDS,
    LEVEL_MAX,
    LOOKS_MAX,
    REGION_BLOCKS,
    REGIONS_MAX,
    RETURN_DELAYS,
    Regions,
)

HOUR = 3600.0


def numbers(regions: Regions, now: float) -> list[int]:
    return [region.number for region in regions.due(now, 100)]


def test_a_read_is_looked_at_once_a_little_later() -> None:
    regions = Regions()
    regions.read(3, 5, 1, 100.0)
    assert not regions.due(100.0 + FIRST_SECONDS - 0.1, 100)
    (region,) = regions.due(100.0 + FIRST_SECONDS, 100)
    assert (region.number, region.blocks, region.epoch) == (0, 0b11111000, 1)
    regions.dropped(region, region.blocks, 103.0)
    assert not regions.due(100.0 + HOUR, 100)


def test_a_read_across_regions() -> None:
    regions = Regions()
    regions.read(REGION_BLOCKS - 1, REGION_BLOCKS + 2, 1, 0.0)
    found = regions.due(HOUR, 100)
    assert [(region.number, region.blocks.bit_count()) for region in found] == [(0, 1), (1, REGION_BLOCKS), (2, 1)]
    assert found[0].blocks == 1 << (REGION_BLOCKS - 1)
    assert found[2].blocks == 1


def test_no_more_than_asked_for_and_the_rest_later() -> None:
    regions = Regions()
    regions.read(0, 5 * REGION_BLOCKS, 1, 0.0)
    assert [region.number for region in regions.due(HOUR, 2)] == [0, 1]
    assert numbers(regions, HOUR) == [2, 3, 4]


def test_reads_put_it_off() -> None:
    regions = Regions()
    for second in range(100):
        regions.read(second, 1, 1, float(second))
        assert not regions.due(float(second), 100)
    (region,) = regions.due(99.0 + FIRST_SECONDS, 100)
    assert region.blocks == (1 << 100) - 1


def test_what_is_read_all_the_time_is_dropped_a_few_times_only() -> None:
    """The refetch storm: a reader that comes back at once, whenever it is dropped, for a day."""
    regions = Regions()
    drops = 0
    regions.read(0, 1, 1, 0.0)
    for second in range(24 * 3600):
        for region in regions.due(float(second), 100):
            regions.dropped(region, region.blocks, float(second))
            drops += 1
            regions.read(0, 1, 1, float(second))
    assert LEVEL_MAX < drops < LEVEL_MAX + 24 * HOUR / (FIRST_SECONDS * 2**LEVEL_MAX) + 2


def test_patience_is_forgotten_where_it_was_not_needed() -> None:
    regions = Regions()
    now = 0.0
    for _ in range(3):
        regions.read(0, 1, 1, now)
        (region,) = regions.due(now + HOUR, 100)
        regions.dropped(region, 1, now)
    assert region.level == 2
    for level in (1, 0, 0):
        now += 2 * RETURN_DELAYS * region.delay
        regions.read(0, 1, 1, now)
        (region,) = regions.due(now + HOUR, 100)
        assert region.level == level
        regions.dropped(region, 1, now)


def test_what_cannot_be_dropped_is_given_up() -> None:
    regions = Regions()
    regions.read(0, 1, 1, 0.0)
    looks = 0
    for second in range(int(HOUR)):
        for region in regions.due(float(second), 100):
            regions.kept(region, float(second))
            looks += 1
    assert looks == LOOKS_MAX
    regions.read(0, 1, 1, 2 * HOUR)
    assert numbers(regions, 3 * HOUR) == [0]


def test_what_is_left_of_a_region_is_looked_at_again() -> None:
    regions = Regions()
    regions.read(0, 4, 1, 0.0)
    (region,) = regions.due(HOUR, 100)
    regions.dropped(region, 0b0011, HOUR)
    (again,) = regions.due(2 * HOUR, 100)
    assert again.blocks == 0b1100


def test_one_that_is_read_while_it_is_looked_at() -> None:
    regions = Regions()
    regions.read(0, 1, 1, 0.0)
    (region,) = regions.due(HOUR, 100)
    assert regions.undisturbed(region)
    regions.read(1, 1, 1, HOUR)
    assert not regions.undisturbed(region)
    regions.kept(region, HOUR)
    assert not regions.due(HOUR, 100)
    (region,) = regions.due(HOUR + FIRST_SECONDS, 100)
    assert region.blocks == 0b11


def test_what_was_read_of_another_state_of_the_file_is_forgotten() -> None:
    regions = Regions()
    regions.read(0, 2, 1, 0.0)
    regions.read(2, 1, 2, 1.0)
    (region,) = regions.due(HOUR, 100)
    assert (region.blocks, region.epoch) == (0b100, 2)


def test_they_are_bounded() -> None:
    regions = Regions()
    for number in range(REGIONS_MAX):
        regions.read(number * REGION_BLOCKS, 1, 1, float(number))
    regions.read(0, 1, 1, float(REGIONS_MAX))
    regions.read(REGIONS_MAX * REGION_BLOCKS, 1, 1, float(REGIONS_MAX))
    assert len(regions) == REGIONS_MAX
    found = [region.number for region in regions.due(1e9, 2 * REGIONS_MAX)]
    assert sorted(found) == [0, *range(2, REGIONS_MAX + 1)]
