"""How the command line explains that an operation has to wait."""

from conftest import Triptych
from fake_api import Fake, operation

SILENT = "Host kvm1 has not reported for 4 min; this starts when its workers are back."


def test_waiting_is_explained_while_it_is_waited_for(api: Fake, triptych: Triptych) -> None:
    """The progress line ends with the reason."""
    queued = operation(state="queued", progress=0, finished_at=None, waiting=SILENT)
    api.starts("POST /v1/images/golden/verify", queued, operation(kind="image.verify"))
    run = triptych("image", "verify", "golden")
    [line] = [each for each in run.err.splitlines() if SILENT in each]
    assert line.startswith("op_1: queued, 0 %")


def test_show_and_list_explain_waiting(api: Fake, triptych: Triptych) -> None:
    """A reason where there is one, and no empty field where there is none."""
    waits = operation(state="queued", finished_at=None, waiting=SILENT)
    done = operation("op_2", waiting=None)
    api.says("GET /v1/operations/op_1", waits)
    api.says("GET /v1/operations/op_2", done)
    api.says("GET /v1/operations", {"items": [waits, done], "next": None})
    assert SILENT in triptych("operation", "show", "op_1").out
    assert "waiting" not in triptych("operation", "show", "op_2").out
    first, second = triptych("operation", "list").out.splitlines()[1:]
    assert first.endswith(SILENT)
    assert second.endswith("ops")
