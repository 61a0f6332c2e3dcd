"""`lossmith annotate`: judge output sets on a page, and bring judgements in and out."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lossmith.cli.streams import print_json
from lossmith.errors import FeedbackError
from lossmith.feedback.convert import effective_judgements
from lossmith.feedback.exchange import export_file, import_file
from lossmith.feedback.output_set import OutputSet, read_sets
from lossmith.feedback.store import Store
from lossmith.files import at_home, check_writable, read_text
from lossmith.project import Project, check_order
from lossmith.report.run.waiting import Busy
from lossmith.terminal import Terminal

__all__ = ["annotate"]

Form = Literal["pairs", "rankings", "ratings", "labels", "judgements"]


def annotate(
    sets: Path | None = None,
    /,
    *,
    db: Path | None = None,
    question: Literal["rating", "pair", "ranking"] = "pair",
    scale: Literal["1-5", "1-10", "binary"] = "1-5",
    criteria: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    allow_remote: Annotated[bool, Parameter(negative="")] = False,
    add_account: str | None = None,
    import_: Annotated[Path | None, Parameter(name="--import")] = None,
    export: Path | None = None,
    form: Form | None = None,
    ties: Annotated[bool, Parameter(negative="")] = False,
    format: str = "auto",
    annotator: str | None = None,
    skip_bad: Annotated[bool, Parameter(negative="")] = False,
    report: Annotated[bool, Parameter(negative="")] = False,
    judge: str | None = None,
    judge_model: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Judge output sets on a local web page; import, export and compare judgements.

    Parameters
    ----------
    sets
        The output sets to judge, as `lossmith sample -o` writes them. Not needed where the judgement file has them.
    db
        The judgement file. Default: the project's judgements.db, or beside the sets, with the suffix .db.
    question
        What is asked of each set: a rating of each output, a pair of them, or a ranking of all.
    scale
        Of ratings.
    criteria
        What to judge by, shown above each question; @FILE reads it from a file.
    host
        Address that the page is served on.
    port
        Port of the page; 0 takes a free one.
    allow_remote
        Serve other machines too: only with a --host that is not this machine, and with accounts.
    add_account
        Make an account of this name for the page. The password is asked for, or taken from LOSSMITH_PASSWORD.
    import_
        Bring in the judgements of a file: preferences (JSONL, JSON, CSV), Label Studio, Argilla, or our own.
    export
        Write the judgements to a new file: .jsonl, or .csv.
    form
        What to export; pairs if not given. judgements are everything, as it was said, with the sets.
    ties
        Export ties too, as pairs with probability 0.5.
    format
        Of the file to import: auto, preferences, label-studio, argilla or judgements.
    annotator
        Who judged, where the file to import does not say it.
    skip_bad
        Import a file without the rows that cannot be read.
    report
        Show how far the annotators agree.
    judge
        Let a program judge instead of a person: a scorer, or a judge that --judge-model is asked by.
    judge_model
        The model of --judge.
    as_json
        Print the report as JSON.
    """
    _check_options(import_, export, report, judge, add_account, form, ties, as_json)
    if sets is not None:
        check_order("annotate", sets)
    given = None if sets is None else read_sets(sets)
    path = _judgement_file(sets, db)
    text = _criteria(criteria)
    made_here = given is not None or import_ is not None or add_account is not None
    if made_here:
        check_writable(path, FeedbackError)
    with Store(path, create=made_here) as store:
        if given is not None:
            store.add_sets(given)
        if import_ is not None:
            _say(import_file(store, import_, format=format, annotator=annotator, skip_bad=skip_bad))
        elif export is not None:
            _say(export_file(store, export, form=form or "pairs", ties=ties))
        elif report:
            _report(store, as_json)
        elif judge is not None:
            _judge(judge, _sets(given, store), store, question=question, scale=scale, model=judge_model, criteria=text)
        elif add_account is not None:
            _add_account(store, add_account)
        else:
            more: dict[str, Any] = {"question": question, "scale": scale, "host": host, "port": port}
            more |= {"allow_remote": allow_remote} | ({} if text is None else {"criteria": text})
            _serve(_sets(given, store), path, sets, more)


def _check_options(
    import_: Path | None, export: Path | None, report: bool, judge: str | None, account: str | None,
    form: str | None, ties: bool, as_json: bool,
) -> None:  # fmt: skip
    actions = {"--import": import_, "--export": export, "--report": report or None, "--judge": judge}
    asked = [name for name, value in (actions | {"--add-account": account}).items() if value is not None]
    if len(asked) > 1:
        raise FeedbackError(f"{' and '.join(asked)} are separate steps: give one at a time.")
    if export is None and (form is not None or ties):
        raise FeedbackError("--form and --ties say what to --export FILE; no file is given.")
    if as_json and not report:
        raise FeedbackError("--json is for --report.")


def _judgement_file(sets: Path | None, db: Path | None) -> Path:
    """--db, or the project's, or beside the sets."""
    if db is not None:
        return at_home(db, FeedbackError)
    project = Project.around(sets if sets is not None else Path())
    if project is not None:
        return project.judgements
    if sets is None:
        raise FeedbackError("which judgements? Give the output sets, or the judgement file with --db.")
    return at_home(sets, FeedbackError).with_suffix(".db")


def _criteria(criteria: str | None) -> str | None:
    if criteria is None or not criteria.startswith("@"):
        return criteria
    return read_text(criteria[1:], FeedbackError, "criteria file")


def _sets(given: list[OutputSet] | None, store: Store) -> list[OutputSet]:
    found = list(store.sets().values()) if given is None else given
    if not found:
        raise FeedbackError(f"{store.path} holds no output set. Give some: lossmith annotate SETS --db {store.path}")
    return found


def _report(store: Store, as_json: bool) -> None:
    from lossmith.feedback.agreement import agreement_report

    found = agreement_report(store.judgements(), store.sets())
    if as_json:
        print_json(found.as_dict())
    else:
        _say(found.render())


def _judge(spec: str, sets: list[OutputSet], store: Store, **options: Any) -> None:
    from lossmith.feedback.judges import judge
    from lossmith.report.run.code import show_code

    if options["model"] is None:
        show_code(Terminal(), scorer=spec)
    with Busy(Terminal(stderr=True), "judging") as busy:
        said = judge(spec, sets, store, on_progress=busy.count, **options)
    _say(said)


def _add_account(store: Store, name: str) -> None:
    from lossmith.feedback.page import add_account

    password = os.environ.get("LOSSMITH_PASSWORD")
    if password is None:
        try:
            password, again = getpass.getpass(f"password for {name}: "), getpass.getpass("again: ")
        except EOFError:
            raise FeedbackError("no password came from the terminal: put it in LOSSMITH_PASSWORD.") from None
        if again != password:
            raise FeedbackError("the two passwords differ; no account was made.")
    add_account(store, name, password)
    _say(f"account {name} is in {store.path}")


def _serve(sets: list[OutputSet], path: Path, sets_path: Path | None, options: dict[str, Any]) -> None:
    """The page, until Ctrl+C; then how far the judging has come."""
    from lossmith.feedback.page import serve

    links: list[str] = []

    def ready(link: str) -> None:
        if not links:
            _say(f"{len(sets)} sets to judge at {link}\nCtrl+C stops; every answer is saved as it is given.")
        else:
            _say(f"that link is used; for another browser or annotator: {link}")
        links.append(link)

    with contextlib.suppress(KeyboardInterrupt):
        serve(sets, path, sets_path=sets_path, on_ready=ready, **options)
    with Store(path) as store:
        held = [j for j in effective_judgements(store.judgements()) if j.kind not in ("skip", "flag")]
    project = Project.around(path)
    following = project.next_stage() if project is not None and held else None
    file = shlex.quote(str(path))
    command = following.command if following else f"lossmith annotate --db {file} --report"
    if not held:
        command = (
            f"lossmith annotate {shlex.quote(str(sets_path))} --db {file}"
            if sets_path
            else f"lossmith annotate --db {file}"
        )
    _say(f"\n{len(held)} judgements in {path}\nnext: {command}")


def _say(text: Any) -> None:
    Terminal().print(text, highlight=False, markup=False, soft_wrap=True)
