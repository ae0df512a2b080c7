"""What the shell starts. It is installed as ``bernprune_command``, so that it runs before the package is imported.

That takes seconds. Ctrl-C meanwhile would come as an exception out of the midst of libraries, some of which abort.
"""

import atexit
import gc
import os
import signal
from types import FrameType


def main() -> None:
    """Import the package, and run a command as the shell gave it."""
    # Torch's threads otherwise wait for each other in busy loops, also for one whose core another process is using.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as after nohup
        signal.signal(signal.SIGINT, _leave)
    gc.disable()  # or a quarter of the time of imports goes into the search for garbage, of which there is none
    from bernprune.cli import main as run

    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries that look for leaks when Python ends would find some
    gc.enable()
    signal.signal(signal.SIGINT, before)
    run()


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has been begun."""
    os.write(2, b"interrupted\n")
    os._exit(130)
