"""What keeps a page on this machine private to it: who may ask, what is served, how much is taken.

Gradio answers any Host and takes uploads from any Origin; a web page elsewhere could reach a server on the loopback
that way (DNS rebinding, CSRF). `Guard` refuses both. Files are served from one folder that holds only pictures written
here; everything uploaded lies in a private folder that goes with the settings below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ADDRESS = "127.0.0.1"
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.ASCII)
UPLOAD = "20mb"
QUEUE = 16
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware: 403 for a foreign Host or Origin, on every route and for websockets.

    The port may be any, since an ssh tunnel has one of its own: a page elsewhere cannot make a browser say that it asks
    for this machine's name. An Origin is a page, and the only one that may ask is the page at the very Host that is asked.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = dict(scope.get("headers", ()))
        if not self.allows(headers):
            return await refuse(scope, send)
        return await self.app(scope, receive, self.sealed(send))

    def allows(self, headers: Mapping[bytes, bytes]) -> bool:
        """Tell whether a request comes from this page; programs send no Origin."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        return HOST.fullmatch(host) is not None and origin in ("", f"http://{host}")

    def sealed(self, send: Send) -> Send:
        """Return `send` with the headers that keep other sites' pages out."""

        async def seal(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message.get("headers", ())}
                new = [(name, value) for name, value in SECURITY_HEADERS if name not in present]
                message["headers"] = [*message.get("headers", ()), *new]
            await send(message)

        return seal


async def refuse(scope: Scope, send: Send) -> None:
    """Answer 403, or close a websocket."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": b"This page answers only on this machine."})


def prepare(folder: Path) -> None:
    """Make the private folder for uploads and switch off everything that phones home; before gradio is imported."""
    if os.environ.get("GRADIO_SHARE", "").lower() in ("1", "true"):
        raise ValueError("GRADIO_SHARE is set; this page is never shared over the internet: unset GRADIO_SHARE")
    uploads = folder / "uploads"
    try:
        uploads.mkdir(parents=True, exist_ok=True)
        uploads.chmod(0o700)
    except OSError as error:
        raise ValueError(f"cannot make the folder {uploads} ({error.strerror}); choose another --output_dir") from None
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.resolve())
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("NO_PROXY", "no_proxy"):  # gradio looks whether the page answers, which is nothing for a proxy
        os.environ[name] = ",".join(filter(None, [os.environ.get(name, ""), "127.0.0.1", "localhost"]))
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def blocked(served: Sequence[Path]) -> list[str]:
    """Return folders that are never served, whatever else is said: the home folder, unless what is served lies in it."""
    home = Path.home()
    return ["/etc", *([] if any(folder.resolve().is_relative_to(home) for folder in served) else [str(home)])]


def launch_settings(port: int, served: Sequence[Path]) -> dict[str, Any]:
    """Return how `Blocks.launch` must be called; `served` are the only folders that files are served from."""
    from starlette.middleware import Middleware

    return {
        "server_name": ADDRESS,
        "server_port": port,
        "share": False,
        "strict_cors": True,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,
        "mcp_server": False,
        "pwa": False,
        "show_error": False,
        "max_file_size": UPLOAD,
        "allowed_paths": [str(folder.resolve()) for folder in served],
        "blocked_paths": blocked(served),
        "footer_links": ["api", "settings"],
        "app_kwargs": {
            "middleware": [Middleware(Guard)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
        "quiet": True,
    }
