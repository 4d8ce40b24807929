"""`python -m serving MODEL …`: exit 0 after a drain, 1 after a failure, 2 for a refusal (docs/contracts.md)."""

import os
import signal
import sys


def main(argv: list[str]) -> int:
    from serving import logs, settings
    from serving.engine.client import EngineError
    from serving.errors import Refused
    from serving.package import resolve

    try:
        asked = settings.parse(argv)
        source = resolve(asked.model)
        import uvloop  # a server's processor time is 4 to 5 % less than with asyncio's own loop

        from serving.server import Sockets, serve  # the web framework: half a second that a refusal need not wait for

        logs.capture_standard_logging()
        return uvloop.run(serve(source, asked, Sockets(asked)))
    except Refused as error:
        return logs.end(error, code=2)
    except EngineError as error:
        return logs.end(error, code=1)


if __name__ == "__main__":
    # Until the event loop takes over nothing has been accepted, so there is nothing to drain.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.exit(main(sys.argv[1:]))
