"""Starting a qemu-img that writes: of a worker that dies nothing is left that goes on writing."""

import shutil

from shared.disks.errors import CopyFailed


def writing(*arguments: str) -> list[str]:
    """The command of a qemu-img that is killed with the thread that starts it, and must be waited
    for there (prctl(2), PR_SET_PDEATHSIG). Raises CopyFailed where there is no qemu-img.
    """
    if shutil.which("qemu-img") is None:
        raise CopyFailed("qemu-img is not installed; install qemu-utils.")
    return ["setpriv", "--pdeathsig", "KILL", "--", "qemu-img", *arguments]
