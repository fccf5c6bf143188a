"""The report is one well-formed file on its own, whatever the names in it, and is written whole or not at all."""

import errno
import html
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gfwsvd import figures
from gfwsvd.errors import GfwsvdError
from gfwsvd.figures import layers_by_kind, perplexity_by_size, stored_share
from gfwsvd.outcome import CompressionReport, LayerReport
from gfwsvd.report import write_report

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def layer(name: str, *, rank: int | None = 16, method: str = "gfwsvd") -> LayerReport:
    kronecker = 0.25 if method == "gfwsvd" else None
    return LayerReport(
        name=name, kind="dense" if rank is None else "lowrank", d_in=64, d_out=96, rank=rank,
        stored=64 * 96 if rank is None else rank * 160, dense=64 * 96, predicted_loss=0.0 if rank is None else 1e-3,
        damping_left=0.01, damping_right=0.01, condition_left=120.0, condition_right=80.0, convergence=kronecker,
        kronecker_residual=kronecker, reason="" if rank else "cheaper dense",
        spectrum=[2.0, 1.0, 0.5, 0.0], spectrum_index=[0, 21, 42, 63],
    )  # fmt: skip


def report(layers: list[LayerReport], *, method: str = "gfwsvd", **values: object) -> CompressionReport:
    stored, dense = sum(x.stored for x in layers), sum(x.dense for x in layers)
    fields = {
        "method": method, "keep": 0.8, "kept": stored / dense, "ranks": "global", "rank_multiple": 8,
        "storage": "pivoted", "damping": 0.01, "guard": True,
        "stored": stored, "dense": dense, "model_stored": stored + 1000, "model_dense": dense + 1000,
        "predicts_loss": method == "gfwsvd", "seconds": 2.5, "layers": layers,
        "provenance": {"settings": {"unit": "token"}, "unreached": ["a", "b"], "data_sha256": "0f"},
    }  # fmt: skip
    return CompressionReport(**{**fields, **values})


def test_the_report_says_by_which_metrics_layers_were_factored_and_which_are_stored_as_two_factors(tmp_path):
    layers = [layer(f"model.layers.{number}.mlp.up_proj") for number in range(3)]
    for number, choice in enumerate(("two-sided", "two-sided", "input-only")):
        layers[number].metrics = choice
        layers[number].heldout_losses = {"two-sided": 0.25, "input-only": 0.125}
    layers[0].reason = "two factors: smaller at so low a rank"
    write_report(tmp_path / "report.html", title="guard", reports=[report(layers)])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "3 layers were factored by these metrics: two-sided 2, input-only 1." in text
    assert "lowers their summed loss from 0.75 to 0.625." in text
    assert "1 of low rank stored as two factors: smaller at so low a rank." in text
    assert "left dense" not in text


def test_the_report_says_that_no_held_out_tokens_were_there_to_judge_metrics_unless_the_guard_was_off(tmp_path):
    bare = LayerReport("lm", "dense", 8, 8, None, 64, 64)
    told = {}
    for guard in (True, False):
        shown = report([bare], guard=guard, provenance={"num_sequences": 8})
        told[guard] = written(tmp_path, reports=[shown]).text
    assert "Metrics were not judged: no held-out tokens" in told[True] and "got none of 8; calibrate" in told[True]
    assert "judged" not in told[False]


def deep_report(depth: int, **values: object) -> CompressionReport:
    names = [f"model.layers.{number}.{kind}" for number in range(depth) for kind in KINDS]
    return report([layer(name, rank=None if index % 7 == 6 else 16) for index, name in enumerate(names)], **values)


EVALUATIONS = [
    {"name": "Dense", "method": "dense", "model_stored": 10_000_000, "perplexity": 13.5, "kl": 0.0, "top1": 1.0},
    {"name": "GFWSVD", "method": "gfwsvd", "ranks": "global", "keep": 0.8, "kept": 0.79987, "stored": 7_654_321,
     "model_stored": 8_000_000, "perplexity": 20.25, "kl": 0.4321, "top1": 0.7315, "seconds": 12.34},
    {"name": "SVD", "method": "svd", "ranks": "uniform", "keep": 0.8, "kept": 0.7999, "stored": 7_654_000,
     "model_stored": 8_000_000, "perplexity": 123456.7, "kl": 7.5, "top1": 0.02, "seconds": 1.0},
]  # fmt: skip


class Page(HTMLParser):
    """What a page holds; fails on tags that do not match."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def written(tmp_path: Path, **arguments: object) -> Page:
    file = tmp_path / "new" / "report.html"
    write_report(file, **{"title": "Title", "reports": [], **arguments})
    return Page(file)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    """A page with everything in it."""
    reports = [deep_report(3), deep_report(4, method="kfac")]
    return written(tmp_path_factory.mktemp("report"), reports=reports, evaluations=EVALUATIONS, samples={"A": "text"})


def test_report_needs_nothing_but_itself(page):
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    references = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in references)
    assert "://" not in page.source and "@import" not in page.source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))


def test_references_inside_figures_find_their_own_target(page):
    ids = Counter(value for _, name, value in page.attributes if name == "id")
    assert max(ids.values()) == 1
    used = {value[1:] for _, name, value in page.attributes if name == "xlink:href"}
    for _, _, value in page.attributes:
        used |= set(re.findall(r"url\(#([^)]*)\)", value))
    assert used and used <= ids.keys()


def test_figures_take_all_colours_of_text_and_series_from_the_page(page):
    styles = " ".join(value for _, name, value in page.attributes if name == "style")
    assert "currentColor" in styles and "var(--series-0)" in styles and "var(--grid)" in styles
    assert not re.search(r"#0000[ab]|#000000|#ffffff", styles)
    for variable in set(re.findall(r"var\((--[\w-]+)\)", page.source)):
        assert page.source.count(f"{variable}:") == 2, f"{variable} is defined for light and for dark"


def test_every_figure_has_words_for_those_who_cannot_see_it(page):
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert page.tags["svg"] == page.tags["figure"] == page.tags["figcaption"] == len(set(labels)) == 9
    assert page.tags["table"] == page.tags["caption"]
    assert ("html", "lang", "en") in page.attributes


def test_the_table_shows_the_numbers(tmp_path):
    text = written(tmp_path, evaluations=EVALUATIONS).text
    for cell in ["0.7999", "7,654,321", "20.25", "0.4321", "73.2%", "12.3", "1.235e+05"]:
        assert cell in text


@pytest.mark.parametrize(("depth", "method"), [(1, "svd"), (70, "gfwsvd")])
def test_one_report_alone_shows_every_layer(tmp_path, depth, method):
    page = written(tmp_path, reports=[deep_report(depth, method=method)])
    assert all(page.texts.count(f"model.layers.{number}.{kind}") == 1 for number in range(depth) for kind in KINDS)
    assert depth == 1 or "30 left dense, each because cheaper dense." in page.text
    assert page.tags["svg"] == 4 and "settings.unit" in page.text and "a, b" in page.text


def test_a_report_without_spectra_or_losses_has_fewer_figures(tmp_path):
    bare = LayerReport("lm", "dense", 8, 8, None, 64, 64)
    assert written(tmp_path, reports=[report([bare], method="svd", keep=1.0)]).tags["svg"] == 1


HOSTILE = [
    '<script>alert("x")</script>', "'\"><img src=x onerror=y>", "--><b>", "$\\frac{", "_hidden", "]]>", "", "名前" * 60,
    "\udc80\n",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("names", [HOSTILE, [""]])
def test_any_name_is_text(tmp_path, names):
    rows = [{**EVALUATIONS[2], "name": name, "method": name, "ranks": name} for name in names]
    shown = report([layer(f"{name}.{number}.{name}") for name in names for number in range(2)])
    shown.ranks = shown.provenance["text"] = "".join(names)
    samples = {name: name for name in names}
    page = written(tmp_path, title="".join(names), reports=[shown], evaluations=rows, samples=samples)
    assert page.tags["script"] == page.tags["img"] == page.tags["b"] == 0
    assert not any(attribute.startswith("on") for _, attribute, _ in page.attributes)
    for name in names:
        plain = name.encode("utf-8", "replace").decode()
        assert page.text.count(plain) >= 12, "title, heading, table, layers, samples, provenance"


def test_missing_and_infinite_numbers_leave_a_mark_and_no_point(tmp_path):
    rows = [
        {"name": "A", "method": "svd", "perplexity": math.inf, "model_stored": 10, "kl": math.nan},
        {"name": "B", "method": "dense", "perplexity": 3.0},
    ]
    page = written(tmp_path, evaluations=rows)
    assert "∞" in page.text and page.tags["svg"] == 0


def test_perplexity_plot_has_a_line_for_each_method_and_ranks():
    rows = [
        {"method": method, "ranks": ranks, "perplexity": 20.0 + keep, "model_stored": 1e6 * keep}
        for method in ("svd", "kfac") for ranks in ("uniform", "global") for keep in (1, 2)
    ]  # fmt: skip
    assert perplexity_by_size([]) == perplexity_by_size(EVALUATIONS[:1]) == ""
    figure = perplexity_by_size(rows)
    assert html.escape("Perplexity against model size") in figure
    assert {f"var(--series-{number})" for number in range(3)} & set(re.findall(r"var\(--series-\d\)", figure)) == {
        "var(--series-0)", "var(--series-1)"
    }  # fmt: skip


def test_what_rounds_gains_and_storage_bring_is_a_line_of_its_own(monkeypatch):
    def rows(**others):
        return [
            {"method": method, "ranks": "global", "perplexity": 20.0 + keep, "model_stored": 1e6 * keep, **others}
            for method in ("kfac", "gfwsvd") for keep in (2, 1)
        ]  # fmt: skip

    drawn = Figure()
    monkeypatch.setattr(figures, "_svg", lambda draw, *_: draw(drawn) or "")
    perplexity_by_size([*rows(), *rows(rounds=2, gains=8), *rows(storage="factors", gains=4)])
    lines = {line.get_label(): line for line in drawn.axes[0].lines}
    ends = ("", ", 2 rounds, 8 gains", ", two factors, 4 gains")
    assert sorted(lines) == sorted(f"{method}, global{end}" for method in ("kfac", "gfwsvd") for end in ends)
    assert all(list(line.get_xdata()) == [1, 2] for line in lines.values())
    for end in ends:
        one, other = (lines[f"{method}, global{end}"] for method in ("kfac", "gfwsvd"))
        assert one.get_linestyle() == other.get_linestyle() and one.get_color() != other.get_color()
    assert len({lines[f"kfac, global{end}"].get_linestyle() for end in ends}) == 3


def test_kinds_are_told_apart_by_the_shortest_end_of_their_names():
    names = ["h.0.attn.proj", "h.1.attn.proj", "h.0.mlp.proj", "h.0.mlp.experts.3.w1", "h.1.mlp.experts.0.w1", "pooler"]
    kinds = layers_by_kind([layer(name) for name in names])
    assert {kind: [depth for depth, _ in members] for kind, members in kinds.items()} == {
        "attn.proj": [0, 1], "mlp.proj": [0], "w1": [0, 1], "pooler": [5]
    }  # fmt: skip


def test_past_twelve_kinds_the_rest_goes_together():
    kinds = layers_by_kind([layer(f"name{'x' * number}") for number in range(40)])
    assert len(kinds) == 12 and len(kinds["other"]) == 29


def test_the_stored_share_is_one_where_nothing_is_saved():
    assert stored_share(layer("a", rank=None)) == 1
    even = LayerReport("a", "lowrank", 64, 64, 32, 32 * 128, 64 * 64)
    assert stored_share(even) == even.stored / even.dense == 1


def test_bounds_and_the_share_of_time_are_shown_where_there_are_any(tmp_path):
    layers = [layer("a"), layer("b")]
    layers[0].bound = [0.25, 0.875]
    write_report(tmp_path / "r.html", title="t", reports=[report(layers, time_kept=0.8125)])
    page = (tmp_path / "r.html").read_text()
    assert "0.25 to 0.875" in page and "they take 81.25% of the dense layers" in page
    write_report(tmp_path / "r.html", title="t", reports=[report([layer("a"), layer("b")])])
    assert "latency table" not in (tmp_path / "r.html").read_text()


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(GfwsvdError, match="at least one"):
        write_report(tmp_path / "r.html", title="t", reports=[])


@pytest.mark.parametrize("when", ["write", "replace"])
def test_a_full_disk_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch, when):
    file = tmp_path / "r.html"
    write_report(file, title="old", reports=[], evaluations=EVALUATIONS)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*(("os.fsync",) if when == "write" else (Path, "replace")), full)
    with pytest.raises(GfwsvdError, match="No space left on device; nothing half-written"):
        write_report(file, title="new", reports=[], evaluations=EVALUATIONS[:1])
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_ctrl_c_while_writing_leaves_the_old_report(tmp_path, monkeypatch):
    file = tmp_path / "r.html"
    file.write_text("old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report(file, title="new", reports=[], evaluations=EVALUATIONS[:1])
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "r.html").mkdir()
    with pytest.raises(GfwsvdError, match="could not write the report"):
        write_report(tmp_path / "r.html", title="new", reports=[], evaluations=EVALUATIONS[:1])
    assert list(tmp_path.iterdir()) == [tmp_path / "r.html"]


def test_the_same_numbers_give_the_same_file(tmp_path):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, title="t", reports=[deep_report(2)], evaluations=EVALUATIONS)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
