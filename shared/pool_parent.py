"""What a worker's fork server does when it has imported all; nobody else imports this.

It goes with the worker's main process at once, however that ends, and its children go with it
(Celery sees to that), as children of that process itself would. Signals to the whole group, from
Ctrl-C or systemd, are for the main process, which has the children finish.
"""

import gc
import signal

from celery.platforms import set_pdeathsig

set_pdeathsig("SIGKILL")
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
gc.freeze()  # a collection would write to every page, and so give each child one of its own
