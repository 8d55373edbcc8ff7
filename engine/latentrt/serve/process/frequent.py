"""Labels for what clients choose, bounded in number: the most frequent names have their own, the rest share one."""

from __future__ import annotations

from collections import Counter

OTHER = "other"
TRACKED = 512  # names that are counted at all


class Frequent:
    """Chooses labels. The first names have one; later ones take over the rarest one's once they are twice as frequent.

    So a label changes hands seldom, and a crowd of names that come once takes none. When too many names are counted,
    all counts are halved, and those of one forgotten: what was frequent long ago counts for less. Takes no lock.

    Args:
        most: labels at a time, beside `OTHER`.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: Counter[str] = Counter()
        self._labelled: set[str] = set()

    def label(self, name: str, count: int = 1) -> tuple[str, str | None]:
        """Count a name; return its label, and the one that it took over and that is to be dropped, if any."""
        self._counts[name] += count
        if len(self._counts) > TRACKED:
            self._counts = Counter({one: times // 2 for one, times in self._counts.items() if times > 1})
        if name in self._labelled:
            return name, None
        dropped = None
        if len(self._labelled) >= self._most:
            dropped = min(self._labelled, key=lambda one: (self._counts[one], one))
            if self._counts[name] <= 2 * self._counts[dropped]:
                return OTHER, None
            self._labelled.remove(dropped)
        self._labelled.add(name)
        return name, dropped
