"""Every peer is the function that the operator's definition says, and one that is not is found and not timed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import bench.conftest
import bench.peers
from bench import upstream
from bench.operators import Measurement
from bench.problems import Cell, Problem
from bench.trains import wave_cores
from loretta_kernels import TT, TTShape, reference

CPU = torch.device("cpu")
CELLS = (Cell("adp", 768, 64, 5, 5), Cell("rep", 768, 8, 4, 5), Cell("cls", 768, 0, 5, 5))


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_waves_are_one_matrix_in_every_shape_and_of_full_rank(rank):
    shapes = TTShape((4, 4, 4), (3, 8, 4), rank), TTShape((8, 8), (2, 48), rank), TTShape((64,), (96,), rank)
    first, *others = (
        reference.tt_matrix(TT(torch.cat([core.reshape(-1) for core in wave_cores(shape.modes, rank, 0.5, 3)]), shape))
        for shape in shapes
    )
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(first) == rank


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.kind)
def test_every_peer_here_is_right_and_timed(cell):
    measurement = Measurement(cell, torch.float32, CPU)
    measurement.rounds()
    found = measurement.record()
    assert found["red"] == {}
    absent = {"upstream"} if not upstream.FOLDER.is_dir() else set()
    assert set(found["unavailable"]) == absent
    compared = {"LoRA r=8", "LoRA r=16"} if cell.kind == "rep" else {"dense"}
    assert set(found["peers"]) == {"loretta", "upstream", "copy", "base linear"} - absent | compared
    assert all(peer["both"] > 0 for peer in found["peers"].values())


def test_a_wrong_peer_is_named_and_has_no_time(monkeypatch):
    right = bench.peers._linear
    monkeypatch.setattr(bench.peers, "_linear", lambda W, bias, dtype: right(W * 1.01, bias, dtype))
    measurement = Measurement(CELLS[0], torch.float32, CPU)
    measurement.rounds()
    found = measurement.record()
    assert found["red"]["dense"] > 1e-4
    assert "dense" not in found["peers"]
    assert "loretta" in found["peers"]


def test_a_wrong_gradient_alone_is_enough():
    problem = Problem(CELLS[1], torch.float32, CPU)
    peer = dict(bench.peers.peers_of(problem))["loretta"]()
    assert peer.error(problem) < 1e-5
    problem.truth["x"] = problem.truth["x"] * 1.01
    assert peer.error(problem) > 1e-3


@pytest.mark.skipif(not upstream.FOLDER.is_dir(), reason="make peers installs upstream")
def test_upstream_is_loaded_under_another_name():
    ours = sys.modules.get("loretta")
    assert upstream.load().__name__ == "upstream_loretta"
    assert sys.modules.get("loretta") is ours


@pytest.mark.skipif(not upstream.FOLDER.is_dir(), reason="make peers installs upstream")
def test_a_size_that_upstream_lacks_says_so():
    with pytest.raises(upstream.Unavailable, match="no shape for 2048"):
        upstream.projections("adp", 2048, 64, 5)


@pytest.mark.skipif(not bench.peers.LYCORIS.is_dir(), reason="make peers installs LyCORIS")
def test_lycoris_computes_the_same():
    problem = Problem(CELLS[1], torch.float32, CPU)
    assert bench.peers._lycoris(problem).error(problem) < 1e-5


def test_without_lycoris_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    bench.peers.lycoris_delta.cache_clear()
    monkeypatch.setattr(bench.peers, "LYCORIS", tmp_path / "absent")
    with pytest.raises(upstream.Unavailable, match="make peers"):
        bench.peers.lycoris_delta()


def test_without_upstream_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    upstream.load.cache_clear()
    monkeypatch.setattr(upstream, "FOLDER", tmp_path / "absent")
    with pytest.raises(upstream.Unavailable, match="make peers"):
        upstream.load()


@pytest.mark.parametrize("installed", [None, "0.1.0"], ids=["absent", "installed"])
def test_the_results_name_the_upstream_that_is_there(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "FOLDER", tmp_path / "peer" / "loretta")
    if installed:
        (tmp_path / "peer" / "loretta-0.1.0.dist-info").mkdir(parents=True)
        (tmp_path / "peer" / "loretta-0.1.0.dist-info" / "METADATA").write_text(
            f"Name: loretta\nVersion: {installed}\n"
        )

    class Config:
        def getoption(self, name: str):
            return {"--device": "cpu", "--part": "", "--grid": "quick", "--results": tmp_path}[name]

    bench.conftest._write(Config(), "tt_linear", [])
    (results,) = tmp_path.rglob("tt_linear.json")
    assert json.loads(results.read_text())["versions"]["upstream"] == (installed and f"loretta {installed}")
