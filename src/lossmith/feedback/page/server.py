"""The page, served until it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lossmith.errors import FeedbackError
from lossmith.feedback.judgement import Question
from lossmith.feedback.output_set import OutputSet
from lossmith.feedback.page.app import DEFAULT_CRITERIA, make_app
from lossmith.feedback.store import Store
from lossmith.serving.guard import is_loopback
from lossmith.serving.listening import listen
from lossmith.serving.server import run, spelled

__all__ = ["serve"]


def serve(
    sets: list[OutputSet],
    store_path: Path,
    *,
    sets_path: Path | None = None,
    question: Question,
    scale: str = "1-5",
    criteria: str = DEFAULT_CRITERIA,
    host: str = "127.0.0.1",
    port: int = 0,
    allow_remote: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Blocks until Ctrl+C. port 0: a free one. `on_ready` gets the link, and the next link each time one was used up.

    On an address that others can reach there is no such link: annotators sign in with their accounts, and `on_ready`
    gets the plain address once.
    FeedbackError: another server runs on the file, the port is taken, an open address without accounts, nothing to ask.
    """
    with Store(store_path) as store, store.served():
        accounts = not is_loopback(host)
        if accounts:
            _may_be_remote(host, allow_remote, store)
        listener = listen(host, port, FeedbackError)
        with listener:
            base = f"http://{spelled(host)}:{listener.getsockname()[1]}/"
            ready = on_ready or (lambda link: None)
            app = make_app(
                store,
                sets,
                question=question,
                scale=scale,
                criteria=criteria,
                sets_path=sets_path,
                accounts=accounts,
                host=host,
                announce=lambda token: ready(f"{base}?token={token}"),
            )
            ready(base if accounts else f"{base}?token={app.state.page.sessions.token}")
            run(app, listener, "Every answer that was acknowledged is stored.")


def _may_be_remote(host: str, allowed: bool, store: Store) -> None:
    if not allowed:
        raise FeedbackError(
            f"on {host} others can reach the page. If that is meant, say so (--allow-remote); annotators then need "
            "accounts with passwords. For yourself, leave the host at 127.0.0.1."
        )
    if not store.accounts():
        raise FeedbackError(
            f"on {host} others can reach the page, and {store.path} has no accounts. Add one for each annotator first."
        )
