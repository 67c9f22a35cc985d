"""Does Stage I help a pretrained model? SmolLM2-135M and Gemma 3 270M, arm by arm.

    nice -n 19 python benchmarks/pretrained/study.py --state ~/.cache/anchor/study     # the same line continues it
    python benchmarks/pretrained/study.py --state STATE --only full --only gemma3 --jobs 8      # on a card: minutes
    python benchmarks/pretrained/study.py --state ~/.cache/anchor/study --draw          # the page and its picture

It runs on a CPU or a card, resumable anywhere. The tasks of `tasks()` are done in order; the result of each is appended
to STATE/results.jsonl, and what is there is not done again. Training is `anchor train`, which resumes by itself: a
killed study loses ten steps at most. The order is chosen so that whatever has been run means something: a pass is
complete before a larger one begins, and goes over all arms in rounds; the second seed follows the first. `--jobs` runs
that many arms side by side instead.

On a card training is bfloat16 with the attention kernel that `anchor train` chooses; on a CPU float32 with SDPA.
Evaluation is float32 with SDPA on either.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent))
from make_models import SOURCES, make_model

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO

DOCS = Path(__file__).parents[2] / "docs" / "real-weights"
PAIRS = {"en.jsonl": {"en": INSTRUCTION_EN}, "train_ko_en": {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN}}
"""Training pairs in STATE/data, and their instructions; `anchor prepare` tells the language of a row."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A start of Stage II; `targets` None is the untrained model."""

    name: str
    targets: str | None = None
    d2q: float = 0.8
    q2d: float = 0.2


ARMS = (
    Arm("untrained"),
    Arm("text-0.8-0.2", "text"),
    Arm("content-0.8-0.2", "content"),
    Arm("content-0.5-0.5", "content", 0.5, 0.5),
)


@dataclass(frozen=True)
class Pass:
    """Sizes; the same for every arm."""

    name: str
    max_seq_length: int
    pairs_per_step: int
    rounds: tuple[int, ...]
    """Stage I steps after which every arm is evaluated; the last is the length of the schedule."""
    stage_two_after: tuple[int, ...]
    """Rounds after which Stage II is trained from every arm."""
    steps_two: int
    _: KW_ONLY
    vaswani: tuple[int, int] | None = None
    """Queries, and documents besides those judged for them; None: not evaluated on vaswani, which costs most."""
    model: str = "smollm2"
    pairs: str = "en.jsonl"
    main_set: str = "en:xquad-held-out"
    """Language and folder of the benchmark that every evaluation has."""
    rate_one: float = 1e-4
    rate_two: float = 5e-5
    warmup: float = 0.1
    temperature: float = 0.05
    steps_two_alone: int = 0
    """The control: Stage II from the untrained model for as many steps as both stages have; 0: not run."""

    @property
    def steps_two_of(self) -> dict[str, int]:
        """Steps of Stage II that the results of each stage have."""
        return {"I": 0, "II": self.steps_two, "II alone": self.steps_two_alone}


PASSES = (
    Pass("pilot", 48, 8, (20,), (20,), 10),
    Pass("full", 96, 16, (80, 160, 240), (240,), 60, vaswani=(93, 1000), steps_two_alone=300),
    Pass(
        "gemma3",
        128,
        16,
        (500, 2000),
        (2000,),
        100,
        vaswani=(93, 1000),
        model="gemma3",
        pairs="train_ko_en",
        main_set="ko:welfare-ko",
        steps_two_alone=2100,
    ),
)
SEEDS = (1, 2)
Named = TypeVar("Named", Arm, Pass)


# -- data --------------------------------------------------------------------------------------------------------------


def write_data(shared: Path, state: Path) -> None:
    """STATE/data: the pairs (PAIRS), and in BEIR's layout xquad-held-out/, welfare-ko/, a vaswani sample a pass."""
    out = state / "data"
    if (out / "done").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    xquad = read_lines(shared / "pairs" / "xquad.en.jsonl")
    paragraphs = list(dict.fromkeys(row["document"] for row in xquad))
    # XQuAD takes five paragraphs of each of 48 articles, in order: every fourth article is held out, whole.
    held_out = {text for index, text in enumerate(paragraphs) if index // 5 % 4 == 3}
    train = [row for row in xquad if row["document"] not in held_out]
    train += read_lines(shared / "pairs" / "pubmedqa.en.jsonl")
    write_lines(out / "en.jsonl", [{"anchor": row["query"], "positive": row["document"]} for row in train])
    for folder in ("pairs/train_ko_en", "beir/welfare-ko"):
        shutil.copytree(shared / folder, out / Path(folder).name, copy_function=shutil.copyfile)
    number = {text: f"p{index}" for index, text in enumerate(paragraphs)}
    asked = [row for row in xquad if row["document"] in held_out]
    random.Random(0).shuffle(asked)
    queries = {f"q{index}": row for index, row in enumerate(asked[:300])}
    write_beir(
        out / "xquad-held-out",
        {key: text for text, key in number.items()},
        {key: row["query"] for key, row in queries.items()},
        [(key, number[row["document"]], 1) for key, row in queries.items()],
    )
    for each in PASSES:
        if each.vaswani:
            sample_vaswani(shared / "beir" / "vaswani", out / f"vaswani-{each.name}", *each.vaswani)
    (out / "done").touch()


def sample_vaswani(source: Path, out: Path, num_queries: int, num_others: int) -> None:
    """The first queries, all documents judged for them, and others drawn with a fixed seed."""
    queries = {row["_id"]: row["text"] for row in read_lines(source / "queries.jsonl")[:num_queries]}
    judged = [line.split("\t") for line in (source / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    qrels = [(query, document, int(grade)) for query, document, grade in judged if query in queries]
    corpus = {
        row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in read_lines(source / "corpus.jsonl")
    }
    kept = {document for _, document, _ in qrels}
    others = [document for document in corpus if document not in kept]
    kept |= set(random.Random(0).sample(others, num_others))
    write_beir(out, {key: text for key, text in corpus.items() if key in kept}, queries, qrels)


def write_beir(
    folder: Path, corpus: dict[str, str], queries: dict[str, str], qrels: list[tuple[str, str, int]]
) -> None:
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [{"_id": key, "text": text} for key, text in corpus.items()])
    write_lines(folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in queries.items()])
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t{grade}" for query, document, grade in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepared(state: Path, sizes: Pass) -> Path:
    """The training pairs of a pass, prepared once."""
    from anchor_cli.data.prepare.prepare import prepare

    out = state / f"prepared-{sizes.model}-{sizes.max_seq_length}"
    if not out.is_dir():
        prepare(
            [str(state / "data" / sizes.pairs)],
            out,
            tokenizer=make_model(sizes.model),
            max_seq_length=sizes.max_seq_length,
            text_template=SOURCES[sizes.model].text_template,
            instructions=PAIRS[sizes.pairs],
            training_instructions=PAIRS[sizes.pairs],
        )
    return out


def place() -> Result:
    """Where training runs here, and how."""
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu", "precision": "float32", "threads": os.environ["OMP_NUM_THREADS"]}
    return {"device": torch.cuda.get_device_name(), "precision": "bfloat16"}


# -- what is done ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Where the study keeps its state."""

    state: Path

    def train(self, run: str, sizes: Pass, start: Path, steps: int, **keys: Any) -> Result:
        """`anchor train` to step `steps` of the run, from where it stands. Returns the metrics of the steps."""
        here = place()
        on_card = here["device"] != "cpu"
        spec = {
            "model_name_or_path": str(start),
            "dataset_file_path": str(prepared(self.state, sizes)),
            "output_dir": str(self.state / "runs"),
            "experiment_id": run,
            "max_seq_length": sizes.max_seq_length,
            "text_template": SOURCES[sizes.model].text_template,
            "instructions": PAIRS[sizes.pairs],
            "warmup_ratio": sizes.warmup,
            "global_batch_size": sizes.pairs_per_step,
            "precision": here["precision"],
            "attn_implementation": "auto" if on_card else "sdpa",
            "gradient_checkpointing": False,
            "torch_compile": False,  # takes longer than a round here
            "liger": False,
            "save_steps": 0 if on_card else 10,
            "save_total_limit": 1,
            "logging_steps": 1,
            "stop_after_n_steps": steps,
            **keys,
        }
        (self.state / "specs").mkdir(exist_ok=True)
        path = self.state / "specs" / f"{run}.json"
        path.write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
        if not self.checkpoint(run, steps).is_dir():
            with open(self.state / "specs" / f"{run}.log", "a", encoding="utf-8") as log:
                subprocess.run(
                    [sys.executable, "-m", "anchor_cli", "train", str(path)], stdout=log, stderr=log, check=True
                )
        lines = read_lines(self.state / "runs" / run / "metrics.jsonl")
        return {"loss": {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}}

    def checkpoint(self, run: str, steps: int) -> Path:
        return self.state / "runs" / run / f"checkpoint-{steps}"

    def start_of(self, arm: Arm, sizes: Pass, seed: int, steps: int) -> Path:
        return self.checkpoint(stage_one_run(arm, sizes, seed), steps) if arm.targets else make_model(sizes.model)

    def stage_one(self, arm: Arm, sizes: Pass, seed: int, steps: int) -> Result:
        """Stage I of an arm to a round's step, evaluated."""
        trained = {}
        if arm.targets:
            trained = self.train(
                stage_one_run(arm, sizes, seed), sizes, make_model(sizes.model), steps,
                max_steps=sizes.rounds[-1], learning_rate=sizes.rate_one, seed=seed,
                reconstruction_targets=arm.targets, d2q_weight=arm.d2q, q2d_weight=arm.q2d,
            )  # fmt: skip
        return trained | self.evaluate(self.start_of(arm, sizes, seed, steps), sizes)

    def stage_two(self, arm: Arm, sizes: Pass, seed: int, steps: int, steps_two: int) -> Result:
        """`steps_two` steps of Stage II from an arm's checkpoint, evaluated; its own checkpoint is removed then."""
        run = f"{stage_one_run(arm, sizes, seed)}-{steps}-stage-two-{steps_two}"
        trained = self.train(
            run, sizes, self.start_of(arm, sizes, seed, steps), steps_two,
            stage="II", max_steps=steps_two, learning_rate=sizes.rate_two, seed=seed,
            temperature=sizes.temperature,
        )  # fmt: skip
        checkpoint = self.checkpoint(run, steps_two)
        scores = self.evaluate(checkpoint, sizes)
        shutil.rmtree(checkpoint)
        return trained | scores

    def evaluate(self, folder: Path, sizes: Pass) -> Result:
        """Scores and embedding health under the contract of the pass, which an untrained folder does not have."""
        import torch

        from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
        from anchor_cli.data.pairs import PreparedPairs
        from anchor_cli.data.text import load_tokenizer
        from anchor_cli.evaluate.embedder import PackedEmbedder
        from anchor_cli.evaluate.evaluate import evaluate
        from anchor_cli.evaluate.search import device_of
        from anchor_cli.model.backbone import load_backbone
        from anchor_cli.model.encoder import PackedEncoder

        device = torch.device(device_of(None))
        model = PackedEncoder(load_backbone(folder, dtype=torch.float32), kernel="sdpa").to(device)
        embedder = PackedEmbedder(
            model.encode,
            load_tokenizer(make_model(sizes.model)),
            PreparedPairs.open(prepared(self.state, sizes)).contract,
            name="study",
            dimension=int(model.language_model.config.hidden_size),
            device=device,
        )
        sets = [sizes.main_set, *([f"en:vaswani-{sizes.name}"] if sizes.vaswani else [])]
        places = [each.split(":") for each in sets]
        benchmarks = load_benchmarks([f"{language}:{self.state / 'data' / name}" for language, name in places])
        with torch.inference_mode():
            return {"scores": evaluate(embedder, benchmarks)["results"]}


def stage_one_run(arm: Arm, sizes: Pass, seed: int) -> str:
    return f"{sizes.name}-seed-{seed}-{arm.name}"


Key = dict[str, Any]
"""What identifies a result: pass, stage, arm, seed, steps_one."""


def tasks() -> Iterator[Key]:
    """All that is to be done, in the order of the work."""
    untrained, *trained = ARMS
    for sizes in PASSES:
        for seed in SEEDS:
            if seed == SEEDS[0]:
                yield key_of("I", untrained, sizes, 0, 0)  # no seed: nothing is trained
            for steps in sizes.rounds:
                for arm in trained:
                    yield key_of("I", arm, sizes, seed, steps)
                if steps in sizes.stage_two_after:
                    for arm in ARMS:
                        if arm.targets or steps == sizes.stage_two_after[0]:
                            yield key_of("II", arm, sizes, seed, steps if arm.targets else 0)
            if sizes.steps_two_alone:
                yield key_of("II alone", untrained, sizes, seed, 0)


def key_of(stage: str, arm: Arm, sizes: Pass, seed: int, steps: int) -> Key:
    return {"pass": sizes.name, "stage": stage, "arm": arm.name, "seed": seed, "steps_one": steps}


def named(things: Sequence[Named], name: str) -> Named:
    return next(each for each in things if each.name == name)


def do(study: Study, keys: list[Key]) -> None:
    """Tasks one after another; the result of each goes to STATE/results.jsonl."""
    for key in keys:
        began = time.monotonic()
        print(time.strftime("%H:%M:%S"), json.dumps(key), file=sys.stderr, flush=True)
        arm, sizes = named(ARMS, key["arm"]), named(PASSES, key["pass"])
        run = (arm, sizes, key["seed"], key["steps_one"])
        steps_two = sizes.steps_two_of[key["stage"]]
        row = key | (study.stage_two(*run, steps_two) if steps_two else study.stage_one(*run))
        row |= {"seconds": round(time.monotonic() - began), **place()}
        with (study.state / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def side_by_side(study: Study, keys: list[Key], jobs: int) -> None:
    """Runs of an arm and seed each in a process of its own; the data that they share are prepared before."""
    for name in dict.fromkeys(key["pass"] for key in keys):
        prepared(study.state, named(PASSES, name))
    runs: dict[tuple[Any, ...], list[Key]] = {}
    for key in keys:
        runs.setdefault((key["pass"], key["arm"], key["seed"]), []).append(key)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(do, study), runs.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache" / "anchor" / "study")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds pairs/ and beir/")
    parser.add_argument(
        "--draw", action="store_true", help="write the page and its picture from the results that are there"
    )
    parser.add_argument("--only", action="append", metavar="PASS", help="these passes alone")
    parser.add_argument("--jobs", type=int, default=1, help="arms side by side, where one does not fill the machine")
    args = parser.parse_args()
    args.state.mkdir(parents=True, exist_ok=True)
    results = args.state / "results.jsonl"
    if args.draw:
        from study_page import draw

        if results.is_file():  # else from those in the documentation
            DOCS.mkdir(exist_ok=True)
            shutil.copyfile(results, DOCS / "results.jsonl")
        draw(read_lines(DOCS / "results.jsonl"))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_data(args.data.absolute(), args.state)
    done = read_lines(results) if results.is_file() else []
    left = [key for key in tasks() if not any(key.items() <= row.items() for row in done)]
    left = [key for key in left if not args.only or key["pass"] in args.only]
    study = Study(args.state.absolute())
    if args.jobs > 1:
        side_by_side(study, left, args.jobs)
    else:
        do(study, left)


if __name__ == "__main__":
    main()
