"""MTEB's scores of an export, with the query prompt of each task's language.

    pip install "mteb>=2.26" "sentence-transformers>=6"
    python examples/mteb_export.py models/kure-stage1 AutoRAGRetrieval Ko-StrategyQA --language kor

`mteb run -m` loads models of the Hub only, and takes the prompt named `query` for every language. Here a task in
Korean gets `query_ko`, one in English `query_en`, any other `query`, the instruction of training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

try:
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer
except ImportError as error:
    raise SystemExit(f'{error}; pip install "mteb>=2.26" "sentence-transformers>=6"') from None

PROMPT_OF = {"kor": "query_ko", "eng": "query_en"}


def load(export: str, tasks: list[Any], device: str | None = None) -> SentenceTransformerEncoderWrapper:
    """The export with a query prompt for each task, by the language of the task's queries."""
    model = SentenceTransformer(export, device=device)
    prompts = {name: model.prompts[name] for name in ("query", "document")}
    for task in tasks:
        languages = {language.split("-")[0] for language in task.languages} & set(PROMPT_OF)
        if len(languages) == 1 and (name := PROMPT_OF[languages.pop()]) in model.prompts:
            prompts[f"{task.metadata.name}-query"] = model.prompts[name]
    return SentenceTransformerEncoderWrapper(model, model_prompts=prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder of anchor export")
    parser.add_argument("tasks", nargs="+", help="names of MTEB's retrieval tasks")
    parser.add_argument("--language", default="kor", help="ISO 639-3 code: which parts of multilingual tasks")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("mteb-results"), help="folder of MTEB's result files")
    options = parser.parse_args()
    tasks = list(mteb.get_tasks(tasks=options.tasks, languages=[options.language], exclusive_language_filter=True))
    cache = mteb.ResultCache(options.out)
    results = mteb.evaluate(
        load(options.export, tasks), tasks, cache=cache, encode_kwargs={"batch_size": options.batch_size}
    )
    for result in results.task_results:
        for split, scores in result.scores.items():
            for part in scores:
                print(f"{result.task_name:28} {split:5} {part['hf_subset']:20} nDCG@10 {part['ndcg_at_10']:.5f}")


if __name__ == "__main__":
    main()
