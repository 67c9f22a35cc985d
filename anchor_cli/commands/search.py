"""`anchor search`: the documents nearest to a question.

Its function is longer than 50 lines: its signature holds the options and their help.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.base.errors import InputError
from anchor_cli.commands.options import AsJson, Device

if TYPE_CHECKING:
    from anchor_cli.evaluate.nearest import Neighbour

_ID_COLUMNS = 24  # of a longer id the rest is left out, so that the text has room


def search(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint, an export or another model, by path or name; a run: its best checkpoint.",
        ),
    ],
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS", help="A BEIR folder, nanobeir:ko/NanoNQ, or pairs as anchor prepare reads them."
        ),
    ],
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="QUERY", help="The question. [default: asked for on a terminal, else the lines of stdin]"
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, metavar="K", help="Documents for a question.")] = 10,
    language: Annotated[
        str | None,
        typer.Option(metavar="LANG", help="Of the question: chooses its instruction. [by its script: ko or en]"),
    ] = None,
    document_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the documents of pairs. [guessed]")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens encoded at once.")] = 16384,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show the documents nearest to a question, with their cosine similarity."""
    from anchor_cli.data.documents import read_documents
    from anchor_cli.evaluate.places import model_or_run

    if query is not None and not query.strip():
        raise InputError("QUERY: empty, expected a question")
    place = model_or_run(model)
    documents = read_documents(corpus, document_column)
    from anchor_cli.evaluate.models import load_model
    from anchor_cli.evaluate.nearest import Index
    from anchor_cli.evaluate.search import device_of

    with redirect_stdout(sys.stderr):  # libraries print when they load a model; stdout is for the result
        index = Index(load_model(place, batch_tokens, device), documents, device_of(device))
    results = []
    for question in [query] if query is not None else _questions():
        if any("\ud800" <= character <= "\udfff" for character in question):  # a byte that Python could not decode
            raise InputError(f"{question!a}: not UTF-8, expected a question")
        nearest = index.nearest(question, top_k, language)
        if as_json:
            results.append({"query": question, "results": [each.as_dict() for each in nearest]})
        else:
            _show(nearest, heading=question if query is None and not sys.stdin.isatty() else None)
    if as_json:
        answer = results[0] if query is not None else {"queries": results}
        print_json({"model": place.name, "corpus": corpus, "num_documents": len(documents)} | answer)


def _questions() -> Iterator[str]:
    """Lines of stdin that are not blank; on a terminal with a prompt, until an empty line or Ctrl-D."""
    if not sys.stdin.isatty():
        yield from filter(None, (line.strip() for line in sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - arrows and history for input()
    say("ask a question; an empty line ends")
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line


def _show(nearest: list[Neighbour], heading: str | None) -> None:
    """A line a document: rank, cosine, id, and as much of the text as the terminal is wide."""
    import shutil

    from anchor_cli.evaluate.files import cut

    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 200
    if heading is not None:
        print(heading)
    widest = min(_ID_COLUMNS, max(len(each.id) for each in nearest))
    for each in nearest:
        start = f"{each.rank:3d}  {each.score:7.4f}  {cut(each.id, widest):{widest}}  "
        print(start + cut(each.text, max(20, width - len(start))))
