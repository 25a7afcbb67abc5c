"""The program's own books of bytes, held against the storages that are alive.

Between two actions, whatever a step has made and still keeps must be the activation store's, a
message's, or what a weight gradient waits for. A few numbers are nobody's: those by which an
exchange is undone, and statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from k2train.rehearsal.observer import Living, Observer
from k2train.trainer.build import Run


@dataclasses.dataclass(frozen=True)
class Audit:
    """One look between two actions. Bytes.

    stored, alive: of the activation store, as it says and as its storages are. nobodys: in no
    books, largest first.
    """

    after: str
    stored: int
    alive: int
    nobodys: tuple[Living, ...]

    @property
    def nobodys_bytes(self) -> int:
        return sum(living.birth.num_bytes for living in self.nobodys)


def audit(run: Run, observer: Observer, start: int, after: str) -> Audit:
    """start: `Observer.mark` of the step's begin."""
    store = () if run.activations is None else tuple(run.activations.tensors())
    kept = {id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in store}
    known = kept.keys() | {id(tensor.untyped_storage()) for tensor in run.training.tensors()}
    made = [living for living in observer.alive if living.birth.serial >= start]
    nobodys = sorted(
        (living for living in made if living.birth.key not in known),
        key=lambda living: -living.birth.num_bytes,
    )
    says = 0 if run.activations is None else run.activations.device_bytes
    alive = {living.birth.key for living in observer.alive}
    return Audit(after, says, sum(size for key, size in kept.items() if key in alive), tuple(nobodys))


class Auditor:
    """Audits a step after some of its actions: every `interval`-th OFFLOAD, or action where nothing
    is offloaded."""

    def __init__(self, run: Run, observer: Observer, interval: int) -> None:
        self.audits: list[Audit] = []
        self._run, self._observer, self._interval = run, observer, interval
        self._start, self._seen = observer.mark(), 0
        self._offloads = run.config.activations.offloads

    def after(self, action: str) -> None:
        """An action has ended."""
        if self._offloads and not action.startswith("OFFLOAD"):
            return
        if self._seen % self._interval == 0:
            self.audits.append(audit(self._run, self._observer, self._start, action))
        self._seen += 1

    def worst(self) -> Audit | None:
        """With the most bytes in nobody's books."""
        return max(self.audits, key=lambda audit: audit.nobodys_bytes, default=None)

    def disagreements(self) -> Iterator[Audit]:
        """Where the store says something else than its storages."""
        return (audit for audit in self.audits if audit.stored != audit.alive)
