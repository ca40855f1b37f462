"""Serving the studio: pages, downloads, and the guard before both."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from polylens.artefacts import readable_storage_errors
from polylens.errors import MissingExtraError, PolyLensError, UsageError
from polylens.studio.downloads import REPORT_POLICY, download
from polylens.studio.folders import Folders
from polylens.studio.guard import App, Guard, is_local

PASSWORD_VARIABLE = "POLYLENS_STUDIO_PASSWORD"

_HERE = Path(__file__).parent


def make_app(folders: Folders, *, password: str | None = None, local: bool = True) -> App:
    """Make the studio as an ASGI application.

    Args:
        folders: which paths it may touch.
        password: asked for; None asks for none.
        local: it is served to this machine alone.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    # Read when Gradio is imported: nothing is reported to anyone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
        from fastapi import FastAPI
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, Response, StreamingResponse
    except ImportError as error:
        raise MissingExtraError("gradio", "studio", "the studio") from error
    from polylens.studio.pages import Studio, build

    site = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def send(request: Request) -> Response:
        name, what = request.path_params["name"], request.path_params["what"]
        try:
            found = download(folders.run(name), what)
        except PolyLensError as error:
            return PlainTextResponse(str(error), status_code=404)
        headers = {"content-length": str(found.n_bytes)}
        if found.file_name is None:
            headers["content-security-policy"] = REPORT_POLICY
        else:
            headers["content-disposition"] = f'attachment; filename="{found.file_name}"'
        return StreamingResponse(found.content, headers=headers, media_type=found.media_type)

    site.add_route("/runs/{name}/{what}", send)
    blocks = build(Studio(folders))
    blocks.queue(default_concurrency_limit=4)
    # The default fonts come from the network, and the default colours are pale.
    theme = gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        button_primary_background_fill="*primary_700",
    )
    mounted = gr.mount_gradio_app(
        site,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        blocked_paths=["/"],
        show_error=True,
        max_file_size=0,
        ssr_mode=False,
        enable_monitoring=False,
        theme=theme,
        css=(_HERE / "studio.css").read_text(encoding="utf-8"),
    )
    return Guard(mounted, password, local)


def read_password(host: str, file: Path | None) -> str | None:
    """Return the password to ask for: from a file, or from `POLYLENS_STUDIO_PASSWORD`.

    Args:
        host: address that the studio is to be bound to.
        file: holds the password in its first line; None reads the environment.

    Raises:
        UsageError: others could reach the studio, but there is no password; or it is empty.
    """
    if file is not None:
        with readable_storage_errors(file):
            password = (file.read_text(encoding="utf-8").split("\n") or [""])[0].strip()
        if not password:
            raise UsageError(f"{file} must hold a password in its first line, but it is empty")
        return password
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password and not is_local(host):
        raise UsageError(
            f"a studio that others can reach ({host}) must ask for a password; give "
            f"--password-file or set {PASSWORD_VARIABLE}"
        )
    return password or None


def serve(app: App, host: str, port: int) -> None:
    """Serve until Ctrl-C.

    Raises:
        UsageError: the port is taken, or the address is not this machine's.
    """
    import socket

    import uvicorn

    try:
        bound = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise UsageError(
            f"the studio must be able to listen at {host}, port {port}, but cannot "
            f"({error.strerror}); choose another --port"
        ) from error
    with bound, contextlib.suppress(KeyboardInterrupt):  # runs go on without it
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        server.run(sockets=[bound])
