"""Shares: between clients the work is divided, within a client the earliest due is first."""

from __future__ import annotations

from itertools import count

import pytest

from latentrt.errors import RequestError
from latentrt.serve.core.handle import Handle, Slot, Stage
from latentrt.serve.core.rules.shares import Shares
from latentrt.serve.core.rules.terms import Terms, key_and_terms
from tests.support.serve.fake_engine import handle_of

CLOCK = count()


def pictures(shares: Shares, owner: str, number: int, *, terms: Terms = Terms(), **settings: int) -> list[Slot]:  # noqa: B008
    handle: Handle = handle_of(**settings)
    handle.owner, handle.terms, handle.due = owner, terms, float(next(CLOCK))
    shares.enter(handle)
    return [Slot(handle, index, 0.0) for index in range(number)]


def served(shares: Shares, waiting: list[Slot], most: int) -> str:
    """Give lanes to so many, one after the other; return their owners."""
    owners = ""
    for _ in range(most):
        slot = shares.ordered(waiting)[0]
        assert shares.ordered(waiting)[0] is slot
        shares.begin(slot)
        waiting.remove(slot)
        owners += slot.handle.owner
    return owners


def test_one_picture_stands_behind_one_of_sixty() -> None:
    shares = Shares()
    waiting = pictures(shares, "a", 60)
    assert served(shares, waiting, 20) == "a" * 20
    waiting += pictures(shares, "b", 2)
    order = "".join(slot.handle.owner for slot in shares.ordered(waiting))
    assert order.startswith("baba")
    assert served(shares, waiting, 4) == "baba"


def test_work_is_divided_by_shares_and_size_and_priority_goes_before_both() -> None:
    shares = Shares()
    waiting = [*pictures(shares, "a", 40), *pictures(shares, "b", 40, terms=Terms(share=3))]
    assert served(shares, waiting, 40).count("b") == pytest.approx(30, abs=1)
    shares, large = Shares(), {"width": 256, "height": 256}
    waiting = [*pictures(shares, "a", 40, **large), *pictures(shares, "b", 40)]
    assert served(shares, waiting, 40).count("b") == pytest.approx(32, abs=1)
    waiting += pictures(shares, "c", 2, terms=Terms(priority=1))
    assert served(shares, waiting, 2) == "cc"


def test_of_one_client_the_earliest_due_is_first_whatever_came_before() -> None:
    shares = Shares()
    late, soon = pictures(shares, "a", 3), pictures(shares, "a", 1)
    soon[0].handle.due = -1.0
    assert shares.ordered(sorted([*late, *soon], key=lambda one: one.handle.due)) == [*soon, *late]


def test_absence_earns_nothing_and_what_ends_early_is_given_back() -> None:
    shares = Shares()
    waiting = pictures(shares, "a", 60)
    served(shares, waiting, 30)
    waiting += pictures(shares, "b", 30)
    assert served(shares, waiting, 20).count("a") == 10
    left, shares = list[Slot](), Shares()
    waiting = [*pictures(shares, "a", 10), *pictures(shares, "b", 10)]
    for slot in [slot for slot in waiting if slot.handle.owner == "a"][:5]:
        shares.begin(slot)
        waiting.remove(slot)
        left.append(slot)
    for slot in left:  # none of their rows has run
        shares.end(slot, ("a", "b"))
    assert served(shares, waiting, 8).count("a") == 4


def test_nothing_is_kept_of_clients_that_left_without_debts() -> None:
    shares = Shares()
    for owner in ("a", "b"):
        (slot,) = pictures(shares, owner, 1)
        shares.begin(slot)
        slot.stage = Stage.OVER  # all its rows have run
        shares.end(slot, ("c",))
    assert set(shares._ends) == {"a", "b"}  # they had more than the clients that are there
    (slot,) = pictures(shares, "c", 1)
    slot.start = 0.0
    shares._ends["c"], shares._now = 1e12, 1e12
    shares.end(slot, ("d",))
    assert set(shares._ends) <= {"c"}
    shares.end(pictures(shares, "d", 1)[0], ())
    assert shares._ends == {}


# ---- What stands behind a key


def test_terms_stand_behind_keys_and_old_lines_are_keys() -> None:
    assert key_and_terms("secret") == ("secret", Terms())
    assert key_and_terms("my  secret key= a=b") == ("my  secret key= a=b", Terms())
    assert key_and_terms("k1== share=2.5 places=8 priority=-1") == ("k1==", Terms(2.5, -1, 8))
    assert key_and_terms("share=2") == ("share=2", Terms())


@pytest.mark.parametrize("bad", ["share=0", "share=inf", "share=nan", "share=x", "priority=1.5", "places=0", "places="])
def test_terms_that_cannot_be_are_refused_and_the_key_is_not_told(bad: str) -> None:
    with pytest.raises(RequestError, match=bad) as refused:
        key_and_terms(f"secret {bad}")
    assert "secret" not in str(refused.value)
