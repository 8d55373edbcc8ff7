"""Objects that take device memory: kept for the next use, closed for something else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.errors import DeviceMemoryError
from latentrt.run.pool import Pool


class Memory:
    """So many bytes; values take some and free them."""

    def __init__(self, free: int) -> None:
        self.free = free

    def take(self, size: int) -> Value:
        if size > self.free:
            raise DeviceMemoryError(f"{size} of {self.free}", needed="more")
        return Value(self, size)


class Value:
    def __init__(self, memory: Memory, size: int) -> None:
        self.memory, self.size, self.busy = memory, size, False
        memory.free -= size

    def close(self) -> None:
        self.memory.free += self.size


def test_the_one_that_was_used_longest_ago_makes_place() -> None:
    memory = Memory(100)
    pool: Pool[str, Value] = Pool(2)
    first = pool("a", lambda: memory.take(1))
    pool("b", lambda: memory.take(1))
    assert pool("a", lambda: memory.take(1)) is first
    pool("c", lambda: memory.take(1))
    assert len(pool) == 2
    assert pool("a", lambda: memory.take(1)) is first
    assert memory.free == 98
    pool.close()
    assert memory.free == 100


def test_all_that_are_not_in_use_make_place_for_memory() -> None:
    memory = Memory(10)
    pool: Pool[str, Value] = Pool(8, lambda value: value.busy)
    pool("busy", lambda: memory.take(4)).busy = True
    pool("idle", lambda: memory.take(4))
    assert pool("large", lambda: memory.take(6)).size == 6
    assert len(pool) == 2
    with pytest.raises(DeviceMemoryError):
        pool("larger", lambda: memory.take(7))
    assert len(pool) == 1  # values closed to make room are gone, those in use are not
    assert pool["busy"].busy


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=60), st.integers(1, 5))
def test_memory_that_is_taken_is_that_of_what_is_kept(asked: list[tuple[int, int]], most: int) -> None:
    memory = Memory(60)
    pool: Pool[int, Value] = Pool(most)
    for key, size in asked:
        pool(key, lambda size=size: memory.take(size))
        assert len(pool) <= most
        assert 60 - memory.free == sum(pool._values[key].size for key in list(pool._values))
    pool.close()
    assert memory.free == 60
