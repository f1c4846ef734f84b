"""The server that ``benchmarks.serve`` asks: ``python -m benchmarks.serve_child '[seconds or null, options]'``.

Prints its port. Light, because workers import the main module of their server.
"""

import asyncio
import functools
import json
import sys


def main() -> None:
    from nitrofusion.serve.app import create_app, engine
    from nitrofusion.serve.run import bind, server
    from tests.nitrofusion.serve.fake import FakeDrawer

    seconds, options = json.loads(sys.argv[1])
    make = functools.partial(engine, "world") if seconds is None else functools.partial(FakeDrawer, seconds)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    app = create_app(make=make, port=port, **options)

    async def run():
        await app.state.service.start()
        print(port, flush=True)
        await server(app).serve(sockets=[sock])

    asyncio.run(run())


if __name__ == "__main__":
    main()
