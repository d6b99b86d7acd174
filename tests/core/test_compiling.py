"""Compiling is told once, and only where something is compiled."""

from numba import njit

from actkit.core.ground.compiling import compiling


@njit
def double(x):
    return 2 * x


def test_it_is_told_where_something_compiles():
    told = []
    with compiling(lambda: told.append("first")):
        assert (double(3), double(2.5)) == (6, 5.0)  # two signatures
    with compiling(lambda: told.append("again")):
        assert double(4) == 8
    double(True)  # outside
    assert told == ["first"]
