"""`fraqtl-bench quality` from the command line: what it writes, resumes and refuses; the server as a stand-in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from fraqtl_bench.cli import main
from fraqtl_bench.quality import lab, page, through_server
from fraqtl_bench.quality.command import NOTES
from fraqtl_bench.quality.fitted import fit
from fraqtl_bench.quality.methods import parse
from fraqtl_bench.quality.schema import Report
from fraqtl_bench.quality.score import Score, score
from fraqtl_bench.quality.sensitivity import Below
from fraqtl_bench.quantizer.capture import demo_model
from fraqtl_kernels.errors import ConfigError
from fraqtl_serve.cli.layer_formats import read_profile
from tests.bench.quality_models import demo

pytestmark = pytest.mark.slow

SMALL = ["--quick", "--no-figures", "--threads", "1", "--tokens", "200", "--passages", "2", "--needle-repeats", "1"]


def quality(out: Path, *arguments: str) -> None:
    main(["quality", "demo", "--out", str(out), *SMALL, *arguments])


def fails(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    """The one sentence that a run ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["quality", *arguments, "--out", str(out), "--no-figures"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and said.startswith("fraqtl-bench: ")
    return said


def without_time(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "quality.json").read_text())
    return {k: v for k, v in found.items() if k not in ("provenance", "seconds")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality")
    quality(out, "--methods", "fp16", "int4-channel", "int2-token", "rank16", "k4v4", "k4v2", "--budget", "4")
    return out


def test_a_run_writes_its_report(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {"quality.json", "quality.md", "quality.html", "fraqtl-profile.json"}
    report = Report.model_validate_json((finished / "quality.json").read_text())
    assert report.schema_version == 1 and report.provenance["packages"]["torch"]
    model = report.models[0]
    assert (model.model, model.attention, model.group, model.head_size) == ("demo", "GQA", 2, 64)
    found = {row.method: row for row in model.rows}
    assert list(found) == ["fp16", "int4-channel", "int2-token", "rank16", "k4v4", "k4v2"]
    for row in found.values():
        assert row.perplexity and row.last_word_perplexity and row.needle and row.flips is not None
        assert row.perplexity_delta == pytest.approx(row.perplexity - found["fp16"].perplexity)
    assert found["fp16"].bits_per_dim == 16 and found["fp16"].flips_by_margin[0].decisions >= 0
    assert found["int4-channel"].vector_bits_per_dim == 4 < found["int4-channel"].bits_per_dim
    assert found["rank16"].bits_per_dim == 4 + (64 * 16 + 64) * 16 / (64 * 256)  # basis and mean, over 256 tokens
    assert found["k4v4"].vector_bits_per_dim == 68 * 8 / 128
    assert found["int4-channel"].margin == pytest.approx(found["rank16"].perplexity - found["int4-channel"].perplexity)
    assert model.law and {line.kind for line in model.law.lines} >= {"projection", "quantisation"}
    lines = (finished / "quality.md").read_text().splitlines()
    assert sum(line.startswith("| `") for line in lines) == 6 + 5 + 5  # divergences are of all but fp16, in two tables


def test_the_profile_says_which_format_each_layer_has(finished: Path) -> None:
    profile = json.loads((finished / "fraqtl-profile.json").read_text())
    assert profile["schema_version"] == 1 and [layer["layer"] for layer in profile["layers"]] == [0, 1, 2, 3]
    assert {layer["kv_format"] for layer in profile["layers"]} <= {
        "k3v3",
        "k4v2",
        "k4v3",
        "k4v4",
        "k4v4-channel",
        "k8v4",
        "k8v8",
    }
    assert profile["bits_per_dim"] <= 4
    found = json.loads((finished / "quality.json").read_text())["models"][0]["allocation"]
    assert found["formats"] == [layer["kv_format"] for layer in profile["layers"]]
    assert found["best_uniform_bits"] <= 4 and found["perplexity"] > 1


def test_a_server_reads_the_profile(finished: Path) -> None:
    formats = json.loads((finished / "quality.json").read_text())["models"][0]["allocation"]["formats"]
    read = read_profile(finished / "fraqtl-profile.json")
    assert [read["kv_layers"].get(i, read["kv_format"]) for i in range(read["kv_layer_count"])] == formats


def test_the_page_holds_its_data_and_asks_for_nothing(finished: Path) -> None:
    html = (finished / "quality.html").read_text()
    data = html.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["models"][0]["rows"][0]["method"] == "fp16"
    outside = html.replace(data, "").replace('"http://www.w3.org/2000/svg"', "")
    assert "http" not in outside and "src=" not in outside and "@import" not in outside


def test_hostile_names_stay_text_in_the_page(finished: Path) -> None:
    report = Report.model_validate_json((finished / "quality.json").read_text())
    report.models[0].model = "</script><script>alert(1)"
    report.models[0].rows[0].perplexity = math.inf
    html = page.page(report)
    assert html.count("</script>") == 2 and "∞" in html


def test_the_same_seed_gives_the_same_report_also_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "fp16", "int4-token@random", "rank16"]
    quality(tmp_path / "whole", *options)
    calls = 0

    def runs_out(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise MemoryError
        return score(*arguments)

    monkeypatch.setattr(lab, "score", runs_out)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        quality(tmp_path / "cut", *options)
    assert "memory ran out: go on with --resume" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "cut").iterdir()] == [NOTES]
    with pytest.raises(SystemExit):
        quality(tmp_path / "cut", *options)
    assert "unfinished run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality(tmp_path / "cut", *options, "--resume", "--seed", "7")
    assert "another seed" in capsys.readouterr().err
    calls = 100
    quality(tmp_path / "cut", *options, "--resume")
    assert calls < 100 + 3 * (1 + 2 + 3)  # four scores were in the notes
    assert without_time(tmp_path / "cut") == without_time(tmp_path / "whole")


def test_a_second_budget_finds_what_the_layers_cost_in_kept_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = ["--methods", "fp16", "--notes", str(tmp_path / "notes")]
    quality(tmp_path / "first", "--budget", "4", *notes)
    monkeypatch.setattr(Below, "divergence", None)  # nothing is measured again
    quality(tmp_path / "second", "--budget", "3.8", *notes)
    first, second = (
        json.loads((tmp_path / name / "quality.json").read_text())["models"][0]["allocation"]
        for name in ("first", "second")
    )
    assert first["sensitivity"] == second["sensitivity"]
    assert first["bits_per_dim"] > 3.8 >= second["bits_per_dim"]
    assert not (tmp_path / "first" / NOTES).exists()


def test_wrong_arguments_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for name, content in {"empty.txt": b"", "binary.txt": b"\0\1\2", "short.txt": b"a line of few words"}.items():
        (tmp_path / name).write_bytes(content)
    assert "model 'nowhere/none' was not found" in fails(capsys, out, "nowhere/none")
    assert "is empty" in fails(capsys, out, "demo", "--text", str(tmp_path / "empty.txt"))
    assert "is a binary file" in fails(capsys, out, "demo", "--text", str(tmp_path / "binary.txt"))
    assert "tokens: give a longer one" in fails(capsys, out, "demo", "--text", str(tmp_path / "short.txt"))
    assert "rank 65 is not possible at head size 64" in fails(capsys, out, "demo", "--methods", "rank65")
    assert "unknown method 'int5'" in fails(capsys, out, "demo", "--methods", "int5")
    assert "below the smallest format: k3v3 takes" in fails(capsys, out, "demo", "--budget", "1.5")
    assert "window 9000 is above the 8192 tokens" in fails(capsys, out, "demo", "--window", "9000")
    longer = ("--needle-lengths", "9000", "--needle-repeats", "1")
    assert "tokens, the model takes 8192: give shorter ones" in fails(capsys, out, "demo", *longer)
    assert "device 'nowhere' is not there: give cpu" in fails(capsys, out, "demo", "--device", "nowhere")
    nobody = ("--through-server", "http://127.0.0.1:9")
    assert "no server answers at 'http://127.0.0.1:9'" in fails(capsys, out, "demo", *nobody)
    assert "unknown dtype 'int8'" in fails(capsys, out, "demo", "--dtype", "int8")
    assert "suite 'none.yaml' was not found" in fails(capsys, out, "--suite", "none.yaml")
    assert not list(out.iterdir())


def test_a_text_is_not_measured_where_it_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "t.txt"
    text.write_text("".join(f"Line {i} is about {i * i} things.\n" for i in range(400)))
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    options = [*SMALL, "--methods", "fp16", "--measures", "perplexity"]
    said = fails(capsys, tmp_path / "a", "demo", *options, "--text", str(text), "--calibration", str(copy))
    assert "stands in the calibration text too: calibrate on another text" in said
    quality(tmp_path / "b", "--text", str(text), "--methods", "fp16", "--measures", "perplexity")


def test_the_suite_of_the_paper_is_valid() -> None:
    from argparse import Namespace

    from fraqtl_bench.quality.options import settings_of
    from fraqtl_bench.quality.schema import Settings

    suite = Path(__file__).parents[2] / "bench" / "paper.yaml"
    found, published = settings_of(Namespace(suite=suite, models=[], quick=False, seed=3), "cpu")
    settings = Settings(**found)
    assert len(settings.models) == 5 and settings.seed == 3 and settings.text == "wikitext"
    assert published["mistralai/Mistral-7B-v0.1"]["perplexity_delta_int4"] == 0.18


class StandIn:
    """Answers like a server whose cache is exact, by asking the model itself."""

    def __init__(self, kv_format: str = "fp16", kv_formats: list[str] | None = None) -> None:
        self.kv_format, self.kv_formats = kv_format, kv_formats

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo", "root": str(demo_model())}]})
        if request.url.path == "/plugins/fraqtl/capacity":
            return httpx.Response(200, json={"kv_format": self.kv_format, "kv_formats": self.kv_formats})
        body = json.loads(request.content)
        ids = body["prompt"]
        choice: dict[str, Any] = {"text": self._continue(ids, body["max_tokens"])}
        if "prompt_logprobs" in body:
            scores = [score(demo().model, ids[: i + 1], i, None) for i in range(1, len(ids))]
            logs = [{"logprob": -s.nll, "rank": 1 if s.right else 2} for s in scores]
            choice["prompt_logprobs"] = [None, *({str(i): x} for i, x in zip(ids[1:], logs, strict=True))]
        return httpx.Response(200, json={"choices": [choice], "fraqtl": {"kv_format": self.kv_format}})

    def _continue(self, ids: list[int], count: int) -> str:
        import torch

        said = demo().model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return str(demo().tokenizer.decode(said[0][len(ids) :]))


def small_lab(tmp_path: Path) -> lab.Lab:
    from argparse import Namespace

    from fraqtl_bench.quality.options import settings_of
    from fraqtl_bench.quality.schema import Settings
    from fraqtl_bench.reporting.progress import Progress

    given = {"tokens": 60, "window": 64, "needle_repeats": 1, "methods": ["fp16"], "calibration_tokens": 100}
    found, _ = settings_of(Namespace(suite=None, models=[], quick=True, stride=48, **given), "cpu")
    return lab.Lab(demo(), Settings(**found), Progress(tmp_path / NOTES, {}, resume=False), lab.Ticker())


def test_through_an_exact_server_the_numbers_are_those_of_the_simulation(tmp_path: Path) -> None:
    with httpx.Client(transport=httpx.MockTransport(StandIn())) as client:
        found = through_server.measure(small_lab(tmp_path), "http://server/v1", client)
    assert found.kv_format == "fp16" and found.tokens == 63
    assert abs(found.relative_difference) < 1e-4
    assert found.needle_accuracy == found.simulated_needle_accuracy == 1.0


def test_the_simulation_of_layers_in_formats_of_their_own(tmp_path: Path) -> None:
    formats = ["k4v2", "bf16", "fp16", "fp16"]
    own = small_lab(tmp_path)
    fitted = through_server.simulation(own, "k4v2+bf16+fp16", None, formats)
    x = torch.randn(1, own.subject.kv_heads, 5, own.subject.head_size)
    for layer, name in enumerate(formats):
        alone = through_server.simulation(own, name, None).layers[layer]
        assert torch.equal(fitted.layers[layer].key.round_trip(x), alone.key.round_trip(x))
        assert torch.equal(fitted.layers[layer].value.round_trip(x), alone.value.round_trip(x))
    server = httpx.MockTransport(StandIn("k4v2+bf16+fp16", formats))
    with httpx.Client(transport=server) as client:
        found = through_server.measure(own, "http://server/v1", client)
    assert found.kv_format == "k4v2+bf16+fp16"
    assert found.capacity is not None and found.capacity.kv_formats == formats
    assert abs(found.relative_difference) > 1e-4  # the server is exact, the simulation is not


def test_a_server_is_simulated_with_its_residuals(tmp_path: Path) -> None:
    own, formats = small_lab(tmp_path), ["k4v2", "bf16", "k8v8", "k4v2"]
    with httpx.Client(transport=httpx.MockTransport(StandIn("k4v4"))) as client:
        plain, served = (
            through_server.measure(own, "http://server", client, residual=residual) for residual in (False, True)
        )
    assert (plain.residual, served.residual) == (False, True)
    assert 0 < abs(served.relative_difference) < abs(plain.relative_difference)  # the server is exact
    mixed = through_server.simulation(own, "k4v2+bf16+k8v8", None, formats, residual=True)
    assert mixed.method.name == "k4v2+residual bf16 k8v8 k4v2+residual"


def test_the_error_of_a_difference_comes_from_how_windows_differ() -> None:
    here = [Score(30.0, 10, True), Score(60.0, 20, True)]
    there = [Score(31.0, 10, True), Score(61.0, 20, True)]  # 0.1 and 0.05 nats a token more, 1/15 on average
    error = through_server.standard_error(there, here)
    assert error == pytest.approx((2 * 2 * (1 / 3) ** 2) ** 0.5 / 30)
    assert through_server.standard_error(there[:1], here[:1]) is None


def test_simulations_take_the_constants_of_the_server(tmp_path: Path) -> None:
    import safetensors.torch

    own = small_lab(tmp_path)
    fitted = fit(parse("k4v4"), own.samples)
    doubled = {
        f"layer {i}/{name}": 2 * tensor
        for i, layer in enumerate(fitted.layers)
        for name, tensor in layer.key.constants.items()
    }
    path = tmp_path / "c.safetensors"
    names = json.dumps([f"layer {i}" for i in range(4)])
    safetensors.torch.save_file(doubled, path, {"layers": names})
    for layer, expected in zip(through_server.simulation(own, "k4v4", path).layers, fitted.layers, strict=True):
        assert set(layer.key.constants) == set(expected.key.constants) and layer.value.constants == {}
        assert all((layer.key.constants[k] == 2 * v).all() for k, v in expected.key.constants.items())
    assert through_server.simulation(own, "bf16", path).layers[0].key.constants == {}


def test_servers_that_can_not_be_measured(tmp_path: Path) -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    def stock(request: httpx.Request) -> httpx.Response:
        reply = StandIn()(request).json()
        reply.pop("fraqtl", None)
        return httpx.Response(200, json=reply)

    for handler, says in ((gone, "no server answers at"), (stock, "sends no fraqtl report")):
        with httpx.Client(transport=httpx.MockTransport(handler)) as client, pytest.raises(ConfigError, match=says):
            through_server.measure(small_lab(tmp_path / says), "http://server", client)
