"""Keys: who a client is, and what holds after the file was read again."""

from __future__ import annotations

from pathlib import Path

import structlog

from latentrt.serve.process.config import Settings
from latentrt.serve.process.keys import Keys


def test_an_owner_stays_the_same_when_keys_come_and_go(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    keys = Keys(Settings(keys=("zero",), keys_file=file))
    zero, two = keys.owner("Bearer zero"), keys.owner("Bearer two")
    assert None not in (zero, two)
    assert zero != two
    file.write_text("two\nthree\n")
    keys.read_again()
    assert [keys.owner(f"Bearer {key}") for key in ("zero", "one", "two")] == [zero, None, two]
    assert keys.owner("Bearer three")


def test_keys_that_cannot_be_read_again_stay(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    keys = Keys(Settings(keys_file=file))
    for broken in ("# none\n", None):
        if broken is None:
            file.unlink()
        else:
            file.write_text(broken)
        with structlog.testing.capture_logs() as log:
            keys.read_again()
        assert [line["log_level"] for line in log] == ["error"]
        assert keys
        assert keys.owner("Bearer one")
