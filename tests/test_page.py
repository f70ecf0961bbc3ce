# pytest tests/test_page.py
"""The page of a comparison: its numbers and rows by hand, hostile texts as letters, runs that lack
something, and clicks in a browser, if one is installed."""
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest
from test_compare import COMPENSATING, SAFE, evaluation, write_jsonl, write_run

from companions.page import PageSettings, run as write, write_page
from companions.shared import command
from companions.shared.runs import grouped, load_runs

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<!-- <script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "&lt;b&gt; $title \u2028 \ud800 \u202e",
]
EMPTY = {"meta", "input", "img"}  # elements that have no end


class Page(HTMLParser):
    """A page's elements, and what stands in its cells, notes and data."""

    def __init__(self, written: str):
        super().__init__()
        self.written, self.elements, self.open = written, [], []
        self.rows, self.notes, self.data = [], [], ""
        self.feed(written)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if dict(attributes).get("class") == "note":
            self.notes.append("")

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            opened, _ = self.open.pop()
            assert opened == tag

    def handle_data(self, text):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if attributes.get("id") == "data":
            self.data += text
        elif attributes.get("class") == "note":
            self.notes[-1] += text
        elif tag in ("td", "th"):
            self.rows[-1][-1] += text
        elif tag == "small":
            self.rows[-1][-1] += f" [{text}]"

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    def runs(self) -> list[dict]:
        return json.loads(self.data)

    def scores(self) -> dict[str, list[str]]:
        return {title: cells for title, *cells in self.rows}


def page_of(out, *folders) -> Page:
    pictures = {"a.png": b"png"}
    return Page(write_page(grouped(load_runs(folders)), pictures, out).read_text())


def change(folder, name="summary.json", **values):
    """Other values in a run's file."""
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(found | values))


@pytest.fixture
def run(tmp_path):
    """Before: costs 3 and 1 for the first prompt; after: -2 and 1."""
    folder = write_run(tmp_path / "run", "repo", 0, [[-2.0, 1.0], [-1.0, -3.0]])
    change(folder, intervals={"cost": [-2.5, 0.75], "over_refusal_rate": None}, confidence=0.95)
    before = evaluation([[3.0, 1.0], [-1.0, -3.0]], [[0.5, 1.5], [1.0, 1.0]])
    write_jsonl(folder / "eval_before.jsonl", before)
    return folder


# ---- what it shows

def test_prompts_of_one_text_are_told_apart_by_their_pictures(run, tmp_path):
    for name, order in (("eval.jsonl", "ab"), ("eval_before.jsonl", "ba")):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        rows = [row | {"prompt": "this?", "image": f"{image}.png"}
                for row, image in zip(rows, order)]
        write_jsonl(run / name, rows)
    [shown] = page_of(tmp_path, run).runs()
    assert [(row["prompt"], row["before"]["cost"], row["after"]["cost"]) for row in shown["rows"]
            ] == [("this? a.png", -2.0, -0.5), ("this? b.png", 2.0, -2.0)]


def test_scores_are_those_of_the_summary_with_their_intervals(run, tmp_path):
    change(run, before={"cost": 0.125, "reward": None})
    scores = page_of(tmp_path, run).scores()
    assert scores[""] == ["before", "RePO"]
    assert scores["cost"] == ["0.125", "-1.250 [-2.500 to 0.750]"]  # (-2 + 1 - 1 - 3) / 4
    assert scores["responses safe"] == ["-", "0.750"]
    assert scores["final λ"] == ["-", "2.000"]
    assert "over-refusal" not in scores  # which nothing has


def test_a_prompt_has_its_means_and_responses_before_and_after(run, tmp_path):
    (shown,) = page_of(tmp_path, run).runs()
    assert shown["name"] == f"RePO, {run}"
    first, second = shown["rows"]
    before, after = first["before"], first["after"]
    assert first["prompt"] == "prompt 0" and second["prompt"] == "prompt 1"
    assert (before["cost"], before["rectified_cost"], before["unsafe"]) == (2.0, 2.0, 2)
    assert (after["cost"], after["rectified_cost"], after["unsafe"]) == (-0.5, 0.5, 1)
    assert before["reward"] == 1.0
    assert before["responses"][1] == {
        "response": "answer 1.0", "rectified_cost": 1.0, "cost": 1.0, "reward": 1.5, "kl": 0.5,
        "safe": False, "refused": False}
    assert [each["response"] for each in after["responses"]] == ["answer -2.0", "answer 1.0"]


def test_several_seeds_have_mean_and_spread_and_a_choice_of_runs(tmp_path):
    folders = [write_run(tmp_path / "lag-0", "ppo_lag", 0, COMPENSATING),
               write_run(tmp_path / "lag-1", "ppo_lag", 1, COMPENSATING),
               write_run(tmp_path / "repo-0", "repo", 0, SAFE)]
    for folder in folders:
        change(folder, intervals={"cost": [-3.0, -1.0]})
    page = page_of(tmp_path, *folders)
    scores = page.scores()
    assert scores[""] == ["before [2 seeds]", "PPO-Lag [2 seeds]", "RePO"]
    assert scores["final λ"][1] == "2.500 ± 0.707"
    assert scores["cost"][1] == "-2.875 ± 0.000"
    assert scores["cost"][2] == "-1.113 [-3.000 to -1.000]"  # -8.9 / 8
    assert [shown["name"] for shown in page.runs()] == [
        f"PPO-Lag, {folders[0]}", f"PPO-Lag, {folders[1]}", f"RePO, {folders[2]}"]


# ---- what cannot harm

def test_what_models_and_users_wrote_stays_letters(run, tmp_path):
    tame = page_of(tmp_path, run)

    rows = evaluation([[1.0, -1.0]] * len(HOSTILE), [[1.0, 1.0]] * len(HOSTILE))
    for row, text in zip(rows, HOSTILE):
        row |= {"prompt": text, "category": text}
        for response in row["responses"]:
            response["response"] = text
    for name in ("eval.jsonl", "eval_before.jsonl"):
        write_jsonl(run / name, rows)
    change(run, "config.json", eval_only=None, kl_coeff=HOSTILE[2])
    hostile_run = run.rename(tmp_path / HOSTILE[2])
    other = write_run(tmp_path / "other", "repo", 0, SAFE, kl_coeff=0.1)
    page = page_of(tmp_path, hostile_run, other)

    allowed = set(tame.tags())
    assert set(page.tags()) == allowed and page.tags().count("script") == 2
    assert "<" not in page.data and "onerror" not in str(page.elements)
    assert page.written.count("</script>") == 2 and page.written.count("<!") == 1  # the doctype
    (shown, _) = page.runs()
    for row, text in zip(shown["rows"], HOSTILE):
        assert row["prompt"] == row["category"] == text
        assert {each["response"] for each in row["before"]["responses"]} == {text}
    assert not set(page.written) & {"\u202e", "\ud800", "\u2028"}


def test_it_asks_nothing_of_any_other_file(run, tmp_path):
    page = page_of(tmp_path, run)
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"href", "srcset", "action"}, tag
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or tag != "img"
        assert tag not in ("link", "iframe", "object", "embed", "base")
    without_data = page.written.replace(page.data, "")
    for word in ("http:", "https:", "//cdn", "url(", "@import", "fetch(", "XMLHttpRequest",
                 "innerHTML"):
        assert word not in without_data
    (policy,) = [attributes["content"] for tag, attributes in page.elements
                 if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'")


# ---- runs that lack something

def told(page: Page, run) -> list[str]:
    return [note.removeprefix(f"{run}: ") for note in page.notes if str(run) in note]


def test_what_a_run_lacks_is_said_and_left_out(run, tmp_path):
    assert not told(page_of(tmp_path, run), run)

    write_jsonl(run / "eval_before.jsonl", evaluation([[3.0]] * 3, [[1.0]] * 3))  # other prompts
    (run / "metrics.jsonl").unlink()
    summary = json.loads((run / "summary.json").read_text())
    del summary["intervals"]
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(tmp_path, run)
    assert told(page, run) == [
        "has no metrics.jsonl, so there are no curves.",
        "has no eval_before.jsonl with the prompts of eval.jsonl, so there are no responses before "
        "training.",
        "has no intervals in its summary.json; an earlier version wrote it.",
    ]
    assert not any("before" in row for row in page.runs()[0]["rows"])
    assert page.scores()["cost"][-1] == "-1.250"


def test_an_evaluation_alone(tmp_path):
    folder = write_run(tmp_path / "e", "repo", 0, SAFE, before=False, eval_only="runs/x")
    for name in ("eval_before.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    change(folder, intervals={"cost": [-2.0, -1.0]})
    page = page_of(tmp_path, folder)
    assert told(page, folder) == [
        "was evaluated only, so it has neither curves nor responses before training."]
    assert page.scores()[""] == ["x, evaluated"]
    assert "before" not in page.runs()[0]["rows"][0]


def test_the_command_writes_it_with_pictures(run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert command.main(PageSettings, write, [str(run), "--out", str(tmp_path / "seen")]) == 0
    file = tmp_path / "seen" / "report.html"
    assert f"a page for the browser: {file}" in capsys.readouterr().out
    assert Page(file.read_text()).tags().count("img") == 2


# ---- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
CLICKS = """
<pre id="seen"></pre><script>
const seen = {};
function look(name) {
  seen[name] = {
    prompts: [...document.querySelectorAll("summary .written")].map(each => each.textContent),
    open: document.querySelectorAll("details[open]").length,
    count: part("count").textContent,
    titles: [...part("head").rows[0].cells].map(each => each.textContent + " " + each.ariaSort),
  };
}
function header(title) {
  [...document.querySelectorAll("th button")].find(each => each.textContent === title).click();
}
look("first");
header("cost before"); look("by cost before");
header("cost before"); look("by cost before, up");
header("prompt"); look("by prompt");
part("unsafe").click(); look("unsafe");
part("unsafe").click(); part("open").click();
part("search").value = "ONERROR"; part("search").oninput(); look("search");
part("search").value = ""; part("search").oninput();
seen.texts = [...document.querySelectorAll(".response .written")].map(each => each.textContent);
seen.first_row = part("body").rows[0].textContent;
seen.wider_by = document.documentElement.scrollWidth - innerWidth;
if (innerWidth < 600) {  // the least that a window without a screen has is 500
  document.body.style.width = "400px";
  seen.wider_by = document.body.scrollWidth - 400;
}
seen.width = innerWidth;
seen.images = document.images.length;
seen.scripts = document.scripts.length;
seen.title = document.title;
part("run").selectedIndex = 1; part("run").onchange(); look("other run");
seen.hidden = part("after").hidden;
part("seen").textContent = JSON.stringify(seen);
</script>
"""


def in_browser(page, tmp_path, width: int) -> dict:
    """What the clicks above have seen in a window of that width."""
    copy = page.with_name("clicked.html")
    copy.write_text(page.read_text().replace("</body>", CLICKS + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900",
               copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search('<pre id="seen">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.skipif(not BROWSER, reason="no chromium here to open the page with")
def test_sorted_and_filtered_in_a_browser(tmp_path):
    """Five prompts: unsafe after; worst before, safe after; always safe, with hostile texts."""
    costs_before = [[1.0, 1.0], [6.0, 4.0], [-1.0, -1.0], [-2.0, -2.0], [-3.0, -3.0]]
    costs_after = [[0.5, 2.5], [-3.0, -3.0], [-1.0, -1.0], [-2.0, -2.0], [-3.0, 0.5]]
    folder = write_run(tmp_path / "run", "repo", 0, costs_after)
    before, after = (evaluation(costs, [[1.0, 2.0]] * 5) for costs in (costs_before, costs_after))
    for rows in (before, after):
        for row, text in zip(rows[2:4], (HOSTILE[0], HOSTILE[2])):
            row["responses"][1]["response"] = text
    write_jsonl(folder / "eval_before.jsonl", before)
    write_jsonl(folder / "eval.jsonl", after)
    other = write_run(tmp_path / "other", "ppo_lag", 0, COMPENSATING)
    (other / "eval_before.jsonl").unlink()
    page_of(tmp_path, folder, other)
    seen = in_browser(tmp_path / "report.html", tmp_path, 1600)

    def prompts(name):
        return [int(prompt.removeprefix("prompt ")) for prompt in seen[name]["prompts"]]

    assert prompts("first") == [0, 4, 1, 2, 3]  # 1.5, 0.25, then 0: the worst before first
    assert seen["first"]["open"] == 3 and seen["first"]["count"] == "5 of 5 prompts"
    assert "rectified cost after descending" in seen["first"]["titles"]
    assert prompts("by cost before") == [1, 0, 2, 3, 4]
    assert prompts("by cost before, up") == [4, 3, 2, 0, 1]
    assert "cost before ascending" in seen["by cost before, up"]["titles"]
    assert prompts("by prompt") == [0, 1, 2, 3, 4]
    assert prompts("unsafe") == [0, 4] and seen["unsafe"]["count"] == "2 of 5 prompts"
    assert prompts("search") == [3]
    assert prompts("other run") == [2, 3, 0, 1]
    assert seen["other run"]["titles"][0] == "rectified cost descending"  # without a before

    assert seen["first_row"].startswith("1.001.501.001.501.501.502 of 22 of 2prompt 0before")
    assert {HOSTILE[0], HOSTILE[2]} <= set(seen["texts"]) and len(seen["texts"]) == 20
    assert seen["images"] == 1 and seen["scripts"] == 3  # data, the page's, the clicks
    assert seen["title"] == "RePO, PPO-Lag"
    assert seen["hidden"] and seen["wider_by"] <= 0

    narrow = in_browser(tmp_path / "report.html", tmp_path, 400)
    assert narrow["wider_by"] <= 0 and narrow["width"] < 600
    assert narrow["first"] == seen["first"]
