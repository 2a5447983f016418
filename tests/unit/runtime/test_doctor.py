"""What the doctor says of damaged models, tight memory, full disks, slow links and nodes that differ."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from realloc.errors import InputError
from realloc.plan import Predictions, read_plan
from runtime.doctor_files import file_findings, model_hash
from runtime.doctor_host import disk_findings, host_findings, output_bytes
from runtime.doctor_links import judged
from runtime.doctor_report import DoctorRequest, Finding, LinkExpectation, NodeReport, gathered
from tests.run.workplace import Workplace


@pytest.fixture
def request_(tmp_path: Path) -> DoctorRequest:
    plan = read_plan(Workplace(tmp_path).plan("plan"))
    return DoctorRequest(plan, tmp_path / "out", trust=True)


def status(findings: list[Finding], check: str) -> str:
    return max((f.status for f in findings if f.check == check), key=["ok", "warning", "failure"].index)


def test_a_sound_plan_has_no_failures(request_: DoctorRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(request_.out.parent))
    findings = [*host_findings(request_)[0], *file_findings(request_)[0]]
    assert {f.check for f in findings if f.status == "failure"} == set(), findings
    assert {"versions", "devices", "memory", "disk", "models", "data", "functions"} <= {
        f.check for f in findings
    }
    assert not list(request_.out.parent.glob(".realloc-doctor*"))


def test_memory_beyond_what_is_free(request_: DoctorRequest) -> None:
    assert request_.plan is not None
    plan = replace(request_.plan, predictions=Predictions(1.0, 1.0, peak_bytes={"weights": 1 << 50}))
    found = [f for f in host_findings(replace(request_, plan=plan))[0] if f.check == "memory"]
    assert [f.status for f in found] == ["failure"]
    assert "1048576.00 GiB" not in found[0].advice
    assert "2097152.00 GiB predicted" in found[0].found  # two ranks on this host


def test_disk(request_: DoctorRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_.plan is not None
    need = output_bytes(request_.plan, 2)
    shapes = [request_.plan.experiment.role_shape(request_.plan.graph, r) for r in ("actor", "critic")]
    params = sum(shape.num_params for shape in shapes)
    assert need > 3 * 12 * params + 4 * params  # three checkpoints of fp32 weights and two moments, models
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(need, 1, need - 1))
    (found,) = disk_findings(request_)
    assert (found.status, "--keep" in found.advice) == ("failure", True)
    request_.out.write_text("")
    (found,) = disk_findings(request_)
    assert found.found.endswith("is a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(request_: DoctorRequest) -> None:
    request_.out.mkdir(mode=0o500)
    (found,) = disk_findings(request_)
    assert found.status == "failure"


def test_models_are_told_apart_and_damage_is_found(tmp_path: Path) -> None:
    def make(name: str, value: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": torch.full((64, 64), value)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        return folder

    one, two = make("one", 1.0), make("two", 2.0)
    assert model_hash(one, thorough=False) == model_hash(two, thorough=False)  # headers and sizes agree
    assert model_hash(one, thorough=True) != model_hash(two, thorough=True)
    (two / "config.json").write_text('{"a": 1}')
    assert model_hash(one, thorough=False) != model_hash(two, thorough=False)
    weights = one / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1], content + b"\0", b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(InputError):
            model_hash(one, thorough=False)


def test_nodes_that_differ_or_are_silent() -> None:
    marks = {"torch": "2.13", "model of actor": "abc"}
    same = [NodeReport(n, f"h{n}", (), marks) for n in range(2)]
    assert all(f.status == "ok" for f in gathered(same, 2))
    other = [same[0], replace(same[1], marks={**marks, "model of actor": "xyz"})]
    (bad,) = [f for f in gathered(other, 2) if f.status == "failure"]
    assert "model of actor differs: node 0: abc; node 1: xyz" in bad.found
    (silent,) = [f for f in gathered(same[:1], 2) if f.status == "failure"]
    assert (silent.node, silent.check) == (1, "reachability")


@pytest.mark.parametrize(("rate", "status"), [(9e8, "ok"), (4e8, "warning"), (0.5e8, "failure")])
def test_links_against_the_profile(rate: float, status: str) -> None:
    found = judged("inter_node", {"bytes_per_s": rate, "latency_s": 1e-4}, LinkExpectation(1e-4, 1e9))
    assert found.status == status
    assert bool(found.advice) == (status != "ok")


def test_two_nodes_as_a_user_starts_them(tmp_path: Path) -> None:
    """Both commands on this machine; the second has another version of the model."""
    place = Workplace(tmp_path)
    port = _free_port()
    shared = ["doctor", "--ranks", "1", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--json"]
    first = place.start(*shared, "--node-rank", "0")
    code, _, err = place.run(*shared, "--node-rank", "1")
    assert code == 0, err
    out, err = first.communicate(timeout=100)
    assert first.returncode == 0, err
    findings = json.loads(out)["findings"]
    assert {"reachability", "link inter node", "shared folder", "same everywhere"} <= {
        f["check"] for f in findings if f["status"] == "ok"
    }
    assert sorted(path.name for path in tmp_path.glob(".realloc-doctor*")) == []


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    arguments = ["--ranks", "1", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{_free_port()}"]
    code, out, _ = Workplace(tmp_path).run("doctor", *arguments, "--timeout", "1")
    assert code == 2
    assert "node 1 has not reported" in out
    assert "ranks 1 (nodes 1) have not come" in out


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
