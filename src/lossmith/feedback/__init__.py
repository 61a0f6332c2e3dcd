"""Human feedback: output sets, judgements of them, and the preferences that a loss can read.

with Store(path, create=True) as store: store.add_sets(read_sets("outputs.jsonl"))
serve(sets, path); judge(scorer, sets, store, question="pair"); import_file(store, file); export_file(store, file)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossmith.lazy import lazy_names

if TYPE_CHECKING:
    from lossmith.feedback.agreement import AgreementReport, agreement_report
    from lossmith.feedback.distinct import sample_sets
    from lossmith.feedback.exchange import export_file, import_file
    from lossmith.feedback.judgement import Judgement
    from lossmith.feedback.judges import judge
    from lossmith.feedback.output_set import Output, OutputSet, read_sets
    from lossmith.feedback.page import add_account, serve
    from lossmith.feedback.preferences import Label, Pair, Preference, Ranking, Rating
    from lossmith.feedback.store import Store

__all__ = [
    "AgreementReport",
    "Judgement",
    "Label",
    "Output",
    "OutputSet",
    "Pair",
    "Preference",
    "Ranking",
    "Rating",
    "Store",
    "add_account",
    "agreement_report",
    "export_file",
    "import_file",
    "judge",
    "read_sets",
    "sample_sets",
    "serve",
]

if not TYPE_CHECKING:  # a type checker reads the names above
    __getattr__ = lazy_names(__name__, __file__)
