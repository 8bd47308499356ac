"""Serve until Ctrl-C or SIGTERM, for `python -m service` and `glimpse serve`."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

from service.logs import configure_log, stream_to, tell
from service.settings import SettingsError, read_settings
from service.system.heap import GATEWAY
from service.system.output import Output
from service.triton_server.installation import StartFailed

if TYPE_CHECKING:
    from service.admission.scheduler import Scheduler


def main(scheduling: type[Scheduler] | None = None) -> int:
    """Serve. Exit status: 0 after SIGINT or SIGTERM, 1 if the service cannot run, 2 for wrong settings."""
    GATEWAY.take()
    output = Output()
    try:
        settings = read_settings()
        configure_log(settings, stream_to(output, sys.stderr))
        gc.disable()  # modules are no garbage
        from service.serving import run  # noqa: PLC0415 - takes a second, which wrong settings need not wait

        gc.enable()
        run(settings, output, scheduling)
    except SettingsError as exc:
        sys.stderr.write(f"glimpse: {exc}\n")
        return 2
    except StartFailed as exc:
        tell(settings, stream_to(output, sys.stderr), "start_failed", f"glimpse: {exc}\n", error=str(exc))
        return 1
    finally:
        output.close()
    tell(settings, stream_to(output, sys.stdout), "stopped", "Glimpse has stopped.\n")
    output.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
