"""What a killed worker leaves in the vault's `.workers` goes at the next start."""

from operations.spine import World

from shared.operations import presence
from shared.settings import settings


def test_the_dead_are_found_once_and_leaves_the_living(world: World) -> None:
    """A file that nobody has locked goes; that of an attempt under way stays, and protects."""
    folder = settings().vault / ".workers"
    with presence.attempt("snapshotter") as owner:
        dead = folder / f"{settings().host}~snapshotter~0"
        dead.touch()

        assert presence.dead() == {f"{settings().host}/snapshotter/0"}

        assert not dead.exists()
        assert presence.of(owner) == "alive"
    assert list(folder.iterdir()) == []
