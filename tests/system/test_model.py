"""Random sequences of operations on one server, against a model in plain Python."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from live_site import Site
from triptych import Problem

from lab.filesystems import MIB
from lab.guest import Guest, attach, make_disk

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

NAMES = ("a", "b", "c")
_numbers = itertools.count()


class Server(RuleBasedStateMachine):
    """`disk`, `snapshot`, `images` and `replaced` are what the files must hold."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.client = site.client

    @initialize()
    def register(self) -> None:
        blank = make_disk(self.site.disks, "raw", "blank", MIB)
        self.guest = Guest.create(self.site.hypervisor, self.site.disks, disks=[str(blank)])
        self.id = self.site.register(self.guest)
        self.path = blank
        self.disk = ""
        self.snapshot: str | None = None
        self.images: dict[str, str] = {}
        self.replaced: dict[str, str] = {}
        """What each undoable revert or restore replaced, by the operation's id."""
        self.spent: list[str] = []
        self.write()

    def teardown(self) -> None:
        if hasattr(self, "guest"):
            self.site.assert_tidy()
            self.guest.remove()

    # What is expected

    def refused(self, code: str, ask: Any, *arguments: Any, **options: Any) -> None:
        with pytest.raises(Problem) as refusal:
            ask(*arguments, **options)
        assert refusal.value.code == code

    def free_names(self) -> list[str]:
        """Image names are looked up over all servers: these are this example's own."""
        own = (f"{name}-{self.guest.name}" for name in NAMES)
        return [name for name in own if name not in self.images]

    @invariant()
    def files_hold_what_the_model_says(self) -> None:
        if not hasattr(self, "disk"):
            return
        assert text_of(self.path) == self.disk
        vault = self.site.vault
        snapshots = list(vault.glob(f"snapshots/{self.id}/*/vda.raw"))
        assert [text_of(path) for path in snapshots] == (
            [] if self.snapshot is None else [self.snapshot]
        )
        images = sorted(text_of(path) for path in vault.glob(f"images/{self.id}/*/vda.raw"))
        assert images == sorted(self.images.values())
        assert self.guest.state() == "stopped"

    def write(self) -> None:
        self.disk = f"written {next(_numbers)}"
        with self.path.open("r+b") as file:
            file.write(self.disk.encode().ljust(4096, b"\0"))

    # What happens. Each copy is followed by a write, so that no two hold the same.

    @precondition(lambda self: self.snapshot is None)
    @rule()
    def take(self) -> None:
        self.site.done(self.client.snapshots.take(self.id))
        self.snapshot = self.disk
        self.write()

    @precondition(lambda self: self.snapshot)
    @rule()
    def replace(self) -> None:
        self.site.done(self.client.snapshots.take(self.id, replace=True))
        self.snapshot = self.disk
        self.write()

    @precondition(lambda self: self.snapshot)
    @rule()
    def revert(self) -> None:
        operation = self.site.done(self.client.snapshots.revert(self.id))
        self.replaced[operation["id"]] = self.disk
        self.disk = self.snapshot or ""

    @precondition(lambda self: self.snapshot)
    @rule()
    def delete_snapshot(self) -> None:
        self.site.done(self.client.snapshots.delete(self.id))
        self.snapshot = None

    @precondition(lambda self: len(self.images) < len(NAMES))
    @rule(data=st.data())
    def create_image(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.free_names()))
        self.site.done(self.client.images.create(self.id, name=name))
        self.images[name] = self.disk
        self.write()

    @precondition(lambda self: self.snapshot and len(self.images) < len(NAMES))
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.free_names()))
        self.site.done(self.client.snapshots.promote(self.id, name=name))
        self.images[name] = self.snapshot or ""

    @precondition(lambda self: self.images)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.images)))
        operation = self.site.done(self.client.images.restore(name))
        self.replaced[operation["id"]] = self.disk
        self.disk = self.images[name]

    @precondition(lambda self: self.images)
    @rule(data=st.data())
    def delete_image(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.images)))
        self.site.done(self.client.images.delete(name))
        del self.images[name]

    @precondition(lambda self: self.replaced)
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        """Any revert or restore of the last day, not only the last one."""
        operation = data.draw(st.sampled_from(sorted(self.replaced)))
        self.site.done(self.client.operations.undo(operation))
        self.disk = self.replaced.pop(operation)
        self.spent.append(operation)

    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        sources = {("server", self.id): self.disk}
        sources |= {("image", name): text for name, text in self.images.items()}
        if self.snapshot is not None:
            sources["snapshot", self.id] = self.snapshot
        kind, source = data.draw(st.sampled_from(sorted(sources)))
        operation = self.client.clones.create(
            source, name=f"clone-{next(_numbers)}", source_kind=kind, start=False
        )
        (made,) = self.site.done(operation)["result"]["clones"]
        clone = attach(self.site.hypervisor, made["name"])
        assert text_of(clone.disks[0]) == sources[kind, source]
        clone.remove()

    @rule()
    def ask_for_what_is_refused(self) -> None:
        """All that cannot be done as things stand; none of it changes anything."""
        snapshots, images = self.client.snapshots, self.client.images
        if self.snapshot is None:
            for ask in (snapshots.revert, snapshots.delete, snapshots.promote):
                self.refused("snapshot_not_found", ask, self.id)
        else:
            self.refused("snapshot_exists", snapshots.take, self.id)
        for name in self.images:
            self.refused("image_name_taken", images.create, self.id, name=name)
        for name in self.free_names():
            self.refused("image_not_found", images.restore, name)
        for operation in self.spent:
            self.refused("not_undoable", self.client.operations.undo, operation)
        name = self.guest.name
        self.refused("clone_name_taken", self.client.clones.create, self.id, name=name)


def text_of(disk: Path) -> str:
    with disk.open("rb") as file:
        return file.read(4096).rstrip(b"\0").decode()


@pytest.mark.parametrize("site", ["xfs"], indirect=True)
def test_any_sequence_of_operations_does_as_the_model(site: Site) -> None:
    """After each step disk, snapshot and images hold what the model says; refusals are right."""
    run_state_machine_as_test(
        lambda: Server(site),
        settings=settings(
            max_examples=12,
            stateful_step_count=15,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
