"""A server of the Model Context Protocol for the tests: `python mcp_server.py` over stdio, with a port over HTTP. It ends by itself after five minutes."""
import os
import sys
import threading
import time

try:
    from mcp.server.mcpserver import MCPServer as Server   # mcp 2
    from mcp.server.mcpserver.exceptions import ToolError
except ModuleNotFoundError:
    from mcp.server.fastmcp import FastMCP as Server       # mcp 1
    from mcp.server.fastmcp.exceptions import ToolError

server, kept = Server("shop"), {}


@server.tool()
def put(item: str, price: float = 1.0) -> str:
    "Put something into the basket."
    kept[item] = price
    return f"{len(kept)} in the basket"


@server.tool()
def total() -> float:
    "Add the prices up."
    return sum(kept.values())


@server.tool(structured_output=True)
def basket() -> dict[str, float]:
    "List what is in the basket."
    return kept


@server.tool()
async def slow(seconds: float) -> str:
    "Answer late."
    import anyio
    await anyio.sleep(seconds)
    return f"after {seconds:g} s"


@server.tool()
def fail(why: str) -> str:
    "Fail."
    raise ToolError(f"no: {why}")


@server.tool()
def crash() -> str:
    "End the server."
    os._exit(1)


@server.tool()
def environment(name: str) -> str:
    "Return an environment variable."
    return os.environ.get(name, "none")


def stop():
    time.sleep(300)
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=stop, daemon=True).start()
    if len(sys.argv) == 1:
        server.run()
    elif Server.__name__ == "MCPServer":
        server.run("streamable-http" if len(sys.argv) == 2 else "sse", port=int(sys.argv[1]))
    else:
        server.settings.port = int(sys.argv[1])
        server.run("streamable-http" if len(sys.argv) == 2 else "sse")
