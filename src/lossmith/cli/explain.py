"""`lossmith explain`: why the tokens of a completion were pushed."""

from __future__ import annotations

from pathlib import Path

from lossmith.cli.losses import Json, example
from lossmith.cli.replay import mapping_of
from lossmith.cli.streams import print_json
from lossmith.explanation import explain as explained
from lossmith.files import check_writable, write_atomically
from lossmith.report.explanation.page import explanation_page
from lossmith.report.explanation.terminal import show
from lossmith.terminal import Terminal

__all__ = ["explain"]


def explain(
    path: Path,
    /,
    *,
    step: int | None = None,
    prompt: str | None = None,
    sample: int | None = None,
    token: int | None = None,
    loss: str | None = None,
    model: str | None = None,
    device: str = "auto",
    map: str = "",
    html: Path | None = None,
    as_json: Json = False,
) -> None:
    """Why the tokens of a completion were pushed up or down: every number from its score to its gradient.

    Each token has its pull, -dL/dlogp: above 0, a step down the loss makes it more likely.

    Parameters
    ----------
    path
        A run's folder, or rollouts as `lossmith replay` reads them, of other trainers too.
    step
        Which step of several, as the file numbers it (step-00012 is 12). Otherwise the last.
    prompt
        The prompt: its number in the step from 0, its id, or a part of its text. Otherwise that of the most pushed
        completion.
    sample
        Which of the prompt's completions. Otherwise the most pushed.
    token
        Show the whole chain of this token, counted from 0. Otherwise that of the most pushed.
    loss
        The loss to explain it by, as in --loss "grpo@trl(beta=0.04)". Otherwise the run's own.
    model
        A policy to explain it at (a folder, such as the run's policy/, or a hub name): ratios and trust region are then
        of that policy against the recorded ones. Otherwise the policy that the update began with, whose ratio is 1.
    device
        Where that model is computed.
    map
        Which column is which field, for a file of your own: reward=score,completion=text,group=question.
    html
        A page to write: one file, to be opened in a browser, that needs no network.
    as_json
        Print JSON, with every token's chain.
    """
    if html is not None:
        html = check_writable(html)
    found = explained(
        path, step=step, prompt=prompt, sample=sample, loss=None if loss is None else example(loss),
        mapping=mapping_of(map), model=model, device=device,
    )  # fmt: skip
    if html is not None:
        write_atomically(html, explanation_page(found))
    if as_json:
        print_json(found.as_dict(), indent=2)
        return
    show(Terminal(), found, token)
    if html is not None:
        Terminal().print(f"wrote {html}", markup=False, highlight=False, soft_wrap=True)
