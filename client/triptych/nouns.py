"""The API's nouns, one class each, as `Client` offers them.

`{server}`, `{image}` and the like take an id or a name. What starts long work returns the
`Operation` at once; `Client.wait` waits for its end.
"""

from collections.abc import Iterator
from typing import Any, cast

from triptych.problem import Problem
from triptych.transport import Transport, path_of
from triptych.types import (
    Clone,
    Domain,
    Event,
    Farm,
    Forgotten,
    Host,
    Image,
    Operation,
    Page,
    Quiesce,
    Require,
    Runs,
    Schedule,
    ScheduleKind,
    Server,
    Snapshot,
    SourceKind,
    Weekday,
)


def _given(**fields: Any) -> dict[str, Any]:
    """The fields that were given: the API refuses unknown ones and has its own defaults."""
    return {name: value for name, value in fields.items() if value is not None}


class Noun:
    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def _start(
        self, *segments: str, body: dict[str, Any] | None = None, method: str = "POST"
    ) -> Operation:
        return cast(Operation, self._http.start(path_of(*segments), body, method=method))


class Hosts(Noun):
    """libvirt hosts and what each can do."""

    def list(self) -> Page[Host]:
        return self._http.list(path_of("hosts"))

    def get(self, host: str) -> Host:
        return cast(Host, self._http.get(path_of("hosts", host)))

    def drain(self, host: str) -> Host:
        """The host takes no new work from now on. `Client.wait_drained` waits for the rest."""
        return cast(Host, self._http.post(path_of("hosts", host, "drain")))

    def resume(self, host: str) -> Host:
        """The host takes new work again."""
        return cast(Host, self._http.post(path_of("hosts", host, "resume")))


class Domains(Noun):
    """libvirt domains of a host, registered or not."""

    def list(self, host: str) -> Page[Domain]:
        return self._http.list(path_of("hosts", host, "domains"))


class Servers(Noun):
    """libvirt domains that are registered with Triptych."""

    def list(self, *, unprotected: bool | None = None, limit: int | None = None) -> Page[Server]:
        """All, or only those that lack (True) or have (False) what their schedules promise."""
        asked = {} if unprotected is None else {"unprotected": str(unprotected).lower()}
        return self._http.list(path_of("servers"), limit=limit, **asked)

    def get(self, server: str) -> Server:
        return cast(Server, self._http.get(path_of("servers", server)))

    def add(self, host: str, domain: str) -> Server:
        body = {"host": host, "domain": domain}
        return cast(Server, self._http.post(path_of("servers"), body))

    def forget(self, server: str) -> Forgotten:
        """Ends the registration. The VM stays, and so do its images; the answer counts them."""
        return cast(Forgotten, self._http.delete(path_of("servers", server)))


class Snapshots(Noun):
    """The one snapshot a server may have, kept 48 hours."""

    def get(self, server: str) -> Snapshot:
        return cast(Snapshot, self._http.get(path_of("servers", server, "snapshot")))

    def take(
        self,
        server: str,
        *,
        replace: bool = False,
        with_memory: bool = False,
        quiesce: Quiesce = "auto",
        description: str | None = None,
    ) -> Operation:
        body = _given(
            replace=replace, with_memory=with_memory, quiesce=quiesce, description=description
        )
        return self._start("servers", server, "snapshot", body=body)

    def revert(self, server: str, *, with_memory: bool = True) -> Operation:
        body = None if with_memory else {"with_memory": False}
        return self._start("servers", server, "snapshot", "revert", body=body)

    def promote(
        self,
        server: str,
        *,
        name: str | None = None,
        description: str | None = None,
        pinned: bool | None = None,
    ) -> Operation:
        """Makes an image of the snapshot; the snapshot stays."""
        body = _given(name=name, description=description, pinned=pinned)
        return self._start("servers", server, "snapshot", "promote", body=body or None)

    def delete(self, server: str) -> Operation:
        return self._start("servers", server, "snapshot", method="DELETE")


class Images(Noun):
    """Full copies of servers' disks, kept until deleted."""

    def list(self, server: str | None = None, *, limit: int | None = None) -> Page[Image]:
        path = path_of("servers", server, "images") if server else path_of("images")
        return self._http.list(path, limit=limit)

    def get(self, image: str) -> Image:
        return cast(Image, self._http.get(path_of("images", image)))

    def create(
        self,
        server: str,
        *,
        name: str | None = None,
        description: str | None = None,
        pinned: bool = False,
        quiesce: Quiesce = "auto",
    ) -> Operation:
        body = _given(name=name, description=description, pinned=pinned, quiesce=quiesce)
        return self._start("servers", server, "images", body=body)

    def update(
        self,
        image: str,
        *,
        name: str | None = None,
        description: str | None = None,
        pinned: bool | None = None,
    ) -> Image:
        body = _given(name=name, description=description, pinned=pinned)
        return cast(Image, self._http.patch(path_of("images", image), body))

    def restore(self, image: str) -> Operation:
        """Puts the original server back as it was when the image was made."""
        return self._start("images", image, "restore")

    def verify(self, image: str, *, boot: bool = False) -> Operation:
        """Checks hashes and structure; with `boot` a throw-away VM must come up from it."""
        return self._start("images", image, "verify", body={"boot": boot})

    def delete(self, image: str) -> Operation:
        return self._start("images", image, method="DELETE")


class Clones(Noun):
    """Living servers made from a server, its snapshot or an image."""

    def list(self, *, limit: int | None = None) -> Page[Clone]:
        return self._http.list(path_of("clones"), limit=limit)

    def get(self, clone: str) -> Clone:
        return cast(Clone, self._http.get(path_of("clones", clone)))

    def create(
        self,
        source: str,
        *,
        name: str,
        source_kind: SourceKind = "server",
        count: int = 1,
        first: int | None = None,
        vcpus: int | None = None,
        memory_mib: int | None = None,
        with_memory: bool = False,
        linked: bool = False,
        start: bool | None = None,
        identity: str | None = None,
        quiesce: Quiesce | None = None,
        expires_in_h: float | None = None,
    ) -> Operation:
        """Makes `count` clones, named by a pattern such as `qa-{n:03}`: a farm.

        They are numbered from `first` on, or from 1.
        `source` is a server (also for its snapshot) or an image. `linked` ones share one copy of
        its disks where these cannot share extents. `quiesce` is for a server that runs. With
        `expires_in_h` the farm is deleted so many hours after it was made.
        """
        segments = {
            "server": ("servers", source),
            "snapshot": ("servers", source, "snapshot"),
            "image": ("images", source),
        }[source_kind]
        body = _given(
            name=name,
            count=count,
            first=first,
            vcpus=vcpus,
            memory_mib=memory_mib,
            with_memory=with_memory,
            linked=linked or None,
            start=start,
            identity=identity,
            quiesce=quiesce,
            expires_in_h=expires_in_h,
        )
        return self._start(*segments, "clones", body=body)

    def delete(self, clone: str) -> Operation:
        """Removes its VM and the files that were made for it."""
        return self._start("clones", clone, method="DELETE")


class Farms(Noun):
    """The clones that were made by one request, as one. A farm goes by its id or its pattern."""

    def list(self, *, limit: int | None = None) -> Page[Farm]:
        return self._http.list(path_of("farms"), limit=limit)

    def get(self, farm: str) -> Farm:
        """The farm with its clones in `items`."""
        return cast(Farm, self._http.get(path_of("farms", farm)))

    def extend(self, farm: str, expires_in_h: float | None) -> Farm:
        """Lets it end so many hours from now, or with None not at all."""
        body = {"expires_in_h": expires_in_h}
        return cast(Farm, self._http.patch(path_of("farms", farm), body))

    def start(self, farm: str) -> Operation:
        return self._start("farms", farm, "start")

    def stop(self, farm: str, *, timeout_s: int | None = None, force: bool = False) -> Operation:
        """Has the guests shut down; `force` cuts the power of those still on after `timeout_s`."""
        body = _given(timeout_s=timeout_s, force=force)
        return self._start("farms", farm, "stop", body=body)

    def retry(self, farm: str) -> Operation:
        """Makes the clones that failed again, and no others."""
        return self._start("farms", farm, "retry")

    def delete(self, farm: str) -> Operation:
        """Removes its VMs and the files that were made for them."""
        return self._start("farms", farm, method="DELETE")


class Schedules(Noun):
    """A server's daily and weekly image schedules."""

    def get(self, server: str, kind: ScheduleKind) -> Schedule:
        return cast(Schedule, self._http.get(path_of("servers", server, "schedules", kind)))

    def list(self, server: str) -> Page[Schedule]:
        """Those of the two that are set. Raises `Problem` where there is no such server."""
        found: Page[Schedule] = Page()
        kinds: tuple[ScheduleKind, ...] = ("daily", "weekly")
        for kind in kinds:
            try:
                found.append(self.get(server, kind))
            except Problem as problem:
                if problem.status != 404:
                    raise
        if not found:
            self._http.get(path_of("servers", server))
        return found

    def set(
        self,
        server: str,
        kind: ScheduleKind,
        *,
        at: str,
        timezone: str = "UTC",
        keep: int = 7,
        weekday: Weekday | None = None,
        require: Require | None = None,
        enabled: bool = True,
        catch_up: int | None = None,
        dry_run: bool = False,
    ) -> Schedule:
        """`at` is HH:MM in `timezone`, `keep` 1 to 50 images, `catch_up` seconds.

        `goes_next` of the answer names the images that go with the next run. With `dry_run` the
        answer is what it would be, and nothing is set.
        """
        body = _given(
            at=at,
            timezone=timezone,
            keep=keep,
            weekday=weekday,
            require=require,
            enabled=enabled,
            catch_up=catch_up,
        )
        path = path_of("servers", server, "schedules", kind)
        asked = {"dry_run": "true"} if dry_run else {}
        return cast(Schedule, self._http.put(path, body, **asked))

    def runs(self, server: str, kind: ScheduleKind) -> Runs:
        """`upcoming` (the next ten) and `items` (the last ones, with their outcome)."""
        path = path_of("servers", server, "schedules", kind, "runs")
        return cast(Runs, self._http.get(path))

    def delete(self, server: str, kind: ScheduleKind) -> None:
        """Ends the schedule; the images it made stay."""
        self._http.delete(path_of("servers", server, "schedules", kind))


class Operations(Noun):
    """Pieces of long work. `Client.wait` waits for one."""

    def list(self, *, limit: int | None = None) -> Page[Operation]:
        return self._http.list(path_of("operations"), limit=limit)

    def each(self) -> Iterator[Operation]:
        """All operations in the API's order, fetched as they are read."""
        return self._http.items(path_of("operations"))

    def get(self, operation: str, *, wait: float | None = None) -> Operation:
        """The operation now, or when it ends, or after `wait` seconds, whichever is first."""
        patience = None if wait is None else wait + self._http.timeout
        # A whole number of seconds where it is one: `wait=30`, as the API documents it.
        seconds = int(wait) if wait is not None and wait == int(wait) else wait
        path = path_of("operations", operation)
        return cast(Operation, self._http.get(path, timeout=patience, wait=seconds))

    def cancel(self, operation: str) -> Operation:
        return self._start("operations", operation, "cancel")

    def undo(self, operation: str) -> Operation:
        """Takes a revert or restore back; the answer is a new operation."""
        return self._start("operations", operation, "undo")


class Events(Noun):
    """Facts that happened, as CloudEvents. `Client.follow` streams them."""

    def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Event]:
        return self._http.list(path_of("events"), limit=limit, after=after)
