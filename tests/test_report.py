"""`anchor report`: the numbers against the files they came from, the page against a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import BENCHMARKS, make_run

from anchor_cli.base.errors import InputError
from anchor_cli.report.charts import running_mean, running_median, thin
from anchor_cli.report.lengths import histogram
from anchor_cli.report.read import effective_lines, read_run, read_runs
from anchor_cli.report.render import duration, flatten, number, render
from anchor_cli.report.report import write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Checker(HTMLParser):
    """Collects ids, references and text; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            if key in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "큐레-0.6B", seed=1, torn=True)


@pytest.fixture(scope="module")
def single_page(crashed: Path) -> Path:
    return write_report([crashed])


def test_page_is_whole_self_contained_and_says_it_all(crashed: Path, single_page: Path) -> None:
    assert single_page == crashed / "report.html"
    text = single_page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids)), "ids of several SVGs collide"
    for link in checker.links:
        assert link.startswith("#") and link[1:] in checker.ids, link
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in checker.ids
    assert not re.search(r"https?://(?!www\.w3\.org/)", text) and "@import" not in text
    assert "script" not in checker.tags
    shown = "".join(checker.texts)
    for part in (
        "Rejected pairs",
        "1,862,922",
        "/data/질문-문서",
        "What happened",
        "Spec",
        "Environment",
        "resume",
        "incident",
    ):
        assert part in shown, part
    assert all(name in shown for name in BENCHMARKS)
    assert "큐레-0.6B" in shown and "주어진 질문에 대해 관련 문서를 검색하세요" in shown
    assert "NVIDIA H100 NVL" in shown and "메모리 부족일 수 있음" in shown


def figures(page: str) -> dict[str, str]:
    """The HTML of every figure, by its English title."""
    every = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    return {str(re.search(r"<h3>(.*?)\s*(<span|</h3>)", one).group(1)): one for one in every}  # type: ignore[union-attr]


def legend(figure: str) -> list[tuple[str, str]]:
    """(colour, text) of the lines that a figure names."""
    items = re.findall(r'<li><i style="background:(#\w+)"></i>(.*?)</li>', figure)
    return [(colour, " ".join(re.sub(r"<[^>]+>", " ", text).split())) for colour, text in items]


def test_every_metric_has_a_chart_with_its_data(crashed: Path, single_page: Path) -> None:
    """The legends say what a naive loop over metrics.jsonl finds, and every line in them is drawn."""
    rows = [json.loads(row) for row in (crashed / "metrics.jsonl").read_text().splitlines()[:-1]]
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    # in the order of the page; the last value of each metric, as the page writes numbers
    want = {
        "Loss": ["D2Q: query from its document (× 0.8) last " + number(last["train/d2q_loss"]),
                 "Q2D: document from its query (× 0.2) last " + number(last["train/q2d_loss"]),
                 "loss last " + number(last["train/loss"])],
        "Learning rate": ["last " + number(last["train/learning_rate"])],
        "Gradient norm": ["last " + number(last["train/grad_norm"])],
        "Pairs per second": ["last " + number(last["perf/pairs_per_s"])],
        "Tokens per second": ["last " + number(last["perf/tokens_per_s"])],
        "Model FLOPs utilisation": ["last " + number(100 * last["perf/mfu"])],
        "Peak memory": ["last " + number(last["perf/peak_memory_gb"])],
        "Embedding health": [f"{name} last " + number(last[f"eval/{name}/mean_cosine"]) for name in BENCHMARKS],
    }  # fmt: skip
    drawn = figures(single_page.read_text(encoding="utf-8"))
    both = ["nDCG@10 by evaluation set", *want, "Query length", "Document length"]
    both.insert(-3, "Progress on the clock")
    assert list(drawn) == both
    for title, texts in want.items():
        assert [text for _, text in legend(drawn[title])] == texts, title
    for title, figure in drawn.items():
        assert figure.count("<svg") == 1, title
        for colour, text in legend(figure):
            assert f"stroke: {colour}" in figure, (title, text)
    # curves fall, so on a screen (y grows downwards) their first point is the higher one
    curve = re.search(r'd="M \S+ (\S+)[^"]*L \S+ (\S+)\s*"[^>]*stroke: #1f2933; stroke-width: 2.2', drawn["Loss"])
    assert curve is not None and float(curve.group(1)) < float(curve.group(2))


def test_a_histogram_by_hand() -> None:
    drawn = histogram([[0, 9, 50], [10, 19, 200], [20, 300, 100]], limit=15)
    heights = [bar.height for bar in drawn.bars]
    assert [height / heights[1] for height in heights] == [0.25, 1.0, 0.5]
    assert [bar.label for bar in drawn.bars] == ["0", "10", "20+"]
    assert [bar.hint for bar in drawn.bars][2] == "20 to 300 tokens: 100"
    first, second, third = (bar.x for bar in drawn.bars)
    assert second - first == pytest.approx(third - second)
    assert drawn.limit_x == pytest.approx((second - 1 + third - 1) / 2)  # 15 is the middle of 10 to 19
    assert [label for _, label in drawn.ticks] == ["0", "50", "100", "150", "200"]
    assert histogram([[0, 9, 50]], limit=15).limit_x is None


def test_text_is_escaped_and_a_missing_name_is_an_error() -> None:
    from jinja2 import UndefinedError

    manifest: dict[str, object] = {"sources": [{"source": "<b>&"}], "anchor_version": "1"}
    with pytest.raises(UndefinedError):
        render("prepared.html.j2", num_rows=1, fingerprint="f", manifest=manifest)
    empty: dict[str, object] = {"share_longer_than": {}, "languages": {}, "rejected": {}}
    tokens, rows = {"query": 1, "document": 1}, {"in": 1, "kept": 1, "rejected": 0, "left_out": 0}
    manifest["counts"] = {**empty, "histogram": {"query": [], "document": []}, "tokens": tokens, "rows": rows}
    page = render("prepared.html.j2", num_rows=1, fingerprint="f", manifest=manifest, limit=64, reasons={}, samples=[])
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page


def test_best_is_the_best_of_the_file(crashed: Path, single_page: Path) -> None:
    """The marked score, found again by a naive loop over metrics.jsonl (this run repeats steps 1010 to 1130)."""
    want: dict[str, tuple[float, int]] = {}
    by_step = {}
    for row in (crashed / "metrics.jsonl").read_text().splitlines()[:-1]:
        line = json.loads(row)
        if "eval/avg/ndcg@10" in line:
            by_step[line["step"]] = line
    for name in (*BENCHMARKS, "avg"):
        key = f"eval/{name}/ndcg@10"
        want[name] = max((line[key], -step) for step, line in by_step.items())
    run = read_run(crashed)
    for name, (value, minus_step) in want.items():
        assert run.evaluation(name).best() == (-minus_step, value)
        label = "average" if name == "avg" else name
        text = re.sub(r"<[^>]+>", "", single_page.read_text(encoding="utf-8"))
        assert f"{label} best {value:.3f} at step {-minus_step:,}" in " ".join(text.split())


def test_a_crash_is_not_drawn_twice(crashed: Path) -> None:
    run = read_run(crashed)
    steps = run.series("train/loss").steps
    assert list(steps) == list(range(10, 2001, 10))
    assert run.superseded == 13  # steps 1010 … 1130, logged again after the resume at 1000
    assert run.state == "finished" and run.total_steps == 2000
    assert [event.kind for event in run.marked_events()] == ["incident", "resume"]
    assert 1300 < run.trained_seconds() < 1900  # 2130 steps of 0.635 s, 9 evaluations; the pause of 90 min is not in it


def test_effective_lines_by_hand() -> None:
    def train(step: int, mark: int) -> dict[str, int]:
        return {"step": step, "train/loss": mark}

    def evaluation(step: int, mark: int) -> dict[str, int]:
        return {"step": step, "eval/avg/ndcg@10": mark}

    lines = [evaluation(0, 1), train(1, 2), train(2, 3), evaluation(2, 4), train(3, 5),
             train(2, 6), evaluation(2, 7), train(3, 8)]  # fmt: skip
    assert effective_lines(lines) == [evaluation(0, 1), train(1, 2), train(2, 6), evaluation(2, 7), train(3, 8)]
    # a resume at the very checkpoint that was just evaluated keeps that evaluation
    kept = effective_lines([train(2, 1), evaluation(2, 2), train(3, 3), train(3, 4)])
    assert kept == [train(2, 1), evaluation(2, 2), train(3, 4)]


def test_several_runs_are_overlaid(crashed: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "only-content", seed=2, crash_at=None, spec={"learning_rate": 2e-5})
    out = write_report([crashed, other], tmp_path / "both.html")
    text = out.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and len(checker.ids) == len(set(checker.ids))
    differing = re.findall(r'<tr class="differs"><td class="mono">([^<]+)', text)
    assert differing == ["experiment_id", "learning_rate"]
    same = make_run(tmp_path / "b" / "only-content", num_steps=20, crash_at=None, logging_steps=5, eval_steps=10)
    assert [run.name for run in read_runs([other, same])] == [f"{tmp_path.name}/only-content", "b/only-content"]


def test_a_young_or_poor_run_has_a_page_too(tmp_path: Path) -> None:
    """No evaluation, no events, no spec, non-finite values: what is there is shown."""
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "train/loss": 3.5, "train/grad_norm": NaN}\n')
    text = write_report([folder]).read_text(encoding="utf-8")
    assert ">Loss" in text and ">Gradient norm" not in text and "nDCG" not in text
    (folder / "metrics.jsonl").write_text("")
    assert "young" in write_report([folder]).read_text(encoding="utf-8")


@pytest.mark.parametrize(("mean_cosine", "want"), [(0.95, True), (0.85, False)])
def test_a_collapse_is_shown(tmp_path: Path, mean_cosine: float, want: bool) -> None:
    steps = [(1, 0.3), (2, mean_cosine)]
    lines = [{"step": step, "eval/avg/ndcg@10": 0.5, "eval/avg/mean_cosine": cosine} for step, cosine in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([tmp_path]).read_text(encoding="utf-8")
    assert ("<b>collapsed</b><small>mean cosine of two documents 0.950, above 0.9, last evaluation" in page) == want


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: not found"),
        ('{"step": 1}\n{"step": 2, \n{"step": 3}\n', "metrics.jsonl:2: not JSON"),
        ("[1]\n", "metrics.jsonl:1: expected a JSON object, found list"),
        ('{"loss": 1}\n', 'metrics.jsonl:1: no integer "step"'),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError) as error:
        write_report([tmp_path])
    assert message in error.value.message


def test_no_folder_no_run_twice(tmp_path: Path, crashed: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        write_report([tmp_path / "absent"])
    with pytest.raises(InputError, match="given twice"):
        write_report([crashed, crashed])
    with pytest.raises(InputError, match="no run folder"):
        write_report([])


def test_data_report_is_the_one_trained_on(tmp_path: Path) -> None:
    """Prepared by `anchor train` below output_dir: found by the fingerprint that the newest checkpoint remembers."""
    run = make_run(tmp_path / "out" / "x", num_steps=20, crash_at=None, spec={"output_dir": str(tmp_path / "out")})
    (run / "prepare.json").unlink()
    assert read_run(run).data is None
    for name, rows in (("pairs-1", 11), ("pairs-2", 22)):
        folder = tmp_path / "out" / "prepared" / name
        folder.mkdir(parents=True)
        (folder / "prepare.json").write_text(json.dumps({"fingerprint": name, "num_rows": rows}))
    checkpoint = run / "checkpoint-20"
    checkpoint.mkdir()
    (checkpoint / "training_state.json").write_text(json.dumps({"data_fingerprint": "pairs-2", "total_steps": 50}))
    data = read_run(run).data
    assert data is not None and data["num_rows"] == 22
    assert "num_rows" in write_report([run]).read_text(encoding="utf-8")


def test_thinning_keeps_every_spike() -> None:
    values = [0.0] * 50_000
    values[12_345], values[40_000] = 9.0, -9.0
    steps, kept = thin(range(50_000), values, limit=100)
    assert len(kept) <= 100 and steps == sorted(steps)
    assert (12_345.0, 9.0) in zip(steps, kept, strict=True) and (40_000.0, -9.0) in zip(steps, kept, strict=True)


def test_running_mean_and_median_by_hand() -> None:
    assert running_mean([1, 2, 3, 4, 50], 3) == [1.5, 2, 3, 19, 27]
    assert running_median([1, 2, 3, 4, 50], 3) == [1.5, 2, 3, 4, 27]


def test_numbers_and_durations_as_text() -> None:
    assert [duration(s) for s in (0, 9, 250, 7500, 273_600)] == ["", "9 s", "4 min 10 s", "2 h 05 min", "3 d 4 h"]
    assert [number(x) for x in (0, 104_052.3, 196.2, 41.04, 2.4551, 0.0125, 4e-5)] == [
        "0", "104,052", "196", "41.0", "2.46", "0.0125", "4.0e-05"]  # fmt: skip
    assert flatten({"a": {"b": [1, 2]}, "c": [{"d": "x"}], "e": None}) == {
        "a.b": "[1, 2]", "c.0.d": "x", "e": "null"}  # fmt: skip


def browser() -> str | None:
    return next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)


@pytest.mark.skipif(browser() is None, reason="no chromium or chrome on this host")
def test_in_a_real_browser(single_page: Path, tmp_path: Path) -> None:
    """The browser lays out every panel, loads nothing, and the screenshot has the drawn lines' colours in it."""
    probe = """<script>
      const box = e => e.getBoundingClientRect();
      const panels = [...document.querySelectorAll('figure,table,.card')];
      const bad = panels.filter(e => box(e).right > innerWidth + 1).length;
      const small = e => box(e).width < 300 || box(e).height < 100;
      const unseen = [...document.querySelectorAll('figure')].filter(e => small(e.querySelector('svg'))).length;
      const hangul = [...document.querySelectorAll('h1')].map(e => box(e).height > 20).length;
      const loaded = performance.getEntriesByType('resource').length;
      document.title = JSON.stringify({bad, unseen, hangul, loaded});
    </script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(single_page.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'p'}"]
    dom = subprocess.run(
        [str(browser()), *flags, "--window-size=1280,3200", "--dump-dom", f"file://{probed}"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    assert json.loads(title.group(1)) == {"bad": 0, "unseen": 0, "hangul": 1, "loaded": 0}
    picture = tmp_path / "page.png"
    subprocess.run(
        [str(browser()), *flags, "--window-size=1280,3200", f"--screenshot={picture}", f"file://{single_page}"],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    from matplotlib.image import imread

    pixels = (imread(picture)[..., :3] * 255).round().astype(int)  # (H, W, 3)
    for colour in ((11, 105, 199), (217, 72, 15), (43, 138, 62), (134, 46, 156), (31, 41, 51), (201, 42, 42)):
        assert (abs(pixels - colour).max(axis=-1) <= 6).sum() > 100, f"nothing drawn in rgb{colour}"
