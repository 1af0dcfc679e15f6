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

IMAGE_NAMES = st.sampled_from(["a", "b", "c"])
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
        self.id = self.client.servers.add(self.site.host, self.guest.name)["id"]
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

    def image_name(self, name: str) -> str:
        """Image names are looked up over all servers: this example's own."""
        return f"{name}-{self.guest.name}"

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

    # What happens

    @rule()
    def write(self) -> None:
        self.disk = f"written {next(_numbers)}"
        with self.path.open("r+b") as file:
            file.write(self.disk.encode().ljust(4096, b"\0"))

    @rule(replace=st.booleans())
    def take(self, replace: bool) -> None:
        if self.snapshot is not None and not replace:
            self.refused("snapshot_exists", self.client.snapshots.take, self.id)
            return
        self.site.done(self.client.snapshots.take(self.id, replace=replace))
        self.snapshot = self.disk

    @rule()
    def revert(self) -> None:
        if self.snapshot is None:
            self.refused("snapshot_not_found", self.client.snapshots.revert, self.id)
            return
        operation = self.site.done(self.client.snapshots.revert(self.id))
        self.replaced[operation["id"]] = self.disk
        self.disk = self.snapshot

    @rule()
    def delete_snapshot(self) -> None:
        if self.snapshot is None:
            self.refused("snapshot_not_found", self.client.snapshots.delete, self.id)
            return
        self.site.done(self.client.snapshots.delete(self.id))
        self.snapshot = None

    @rule(name=IMAGE_NAMES)
    def create_image(self, name: str) -> None:
        name = self.image_name(name)
        if name in self.images:
            self.refused("image_name_taken", self.client.images.create, self.id, name=name)
            return
        self.site.done(self.client.images.create(self.id, name=name))
        self.images[name] = self.disk

    @rule(name=IMAGE_NAMES)
    def promote(self, name: str) -> None:
        name = self.image_name(name)
        if self.snapshot is None or name in self.images:
            code = "snapshot_not_found" if self.snapshot is None else "image_name_taken"
            self.refused(code, self.client.snapshots.promote, self.id, name=name)
            return
        self.site.done(self.client.snapshots.promote(self.id, name=name))
        self.images[name] = self.snapshot

    @rule(name=IMAGE_NAMES)
    def restore(self, name: str) -> None:
        name = self.image_name(name)
        if name not in self.images:
            self.refused("image_not_found", self.client.images.restore, name)
            return
        operation = self.site.done(self.client.images.restore(name))
        self.replaced[operation["id"]] = self.disk
        self.disk = self.images[name]

    @rule(name=IMAGE_NAMES)
    def delete_image(self, name: str) -> None:
        name = self.image_name(name)
        if name not in self.images:
            self.refused("image_not_found", self.client.images.delete, name)
            return
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

    @precondition(lambda self: self.spent)
    @rule()
    def undo_again(self) -> None:
        self.refused("not_undoable", self.client.operations.undo, self.spent[-1])

    @rule(kind=st.sampled_from(["server", "snapshot", "image"]), name=IMAGE_NAMES)
    def clone(self, kind: str, name: str) -> None:
        image = self.image_name(name)
        source = image if kind == "image" else self.id
        options = {"name": f"clone-{next(_numbers)}", "source_kind": kind, "start": False}
        expected = {"server": self.disk, "snapshot": self.snapshot, "image": self.images.get(image)}
        if expected[kind] is None:
            self.refused(f"{kind}_not_found", self.client.clones.create, source, **options)
            return
        operation = self.site.done(self.client.clones.create(source, **options))
        (made,) = operation["result"]["clones"]
        clone = attach(self.site.hypervisor, made["name"])
        assert text_of(clone.disks[0]) == expected[kind]
        clone.remove()


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
