"""Checkpoints as files: what is whole, what is damaged, who writes what; no ranks are needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from realloc.errors import InputError
from realloc.layout import Box, Layout, layout, optimizer_layout
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.params import parameters
from realloc.strategy import parse_strategy
from runtime.checkpoint_files import (
    MANIFEST,
    Manifest,
    Piece,
    RoleRecord,
    checkpoints_folder,
    choose,
    index_text,
    list_checkpoints,
    manifest_text,
    name_of,
    read_manifest,
    remove_checkpoint,
    remove_partial,
    verify,
)
from runtime.checkpoint_shares import Stored, shares
from runtime.restore import CheckpointReader
from runtime.run_folder import prepare_folder, rewind_folder, run_lock
from runtime.tensor_file import FileRecord, measure_file, write_synced, write_tensors

SHAPE = ModelShape(
    family="llama",
    hidden=32,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    vocab=101,
    max_positions=64,
    tied_embeddings=True,
)
WHOLE = torch.arange(6 * 4, dtype=torch.float32).view(6, 4)


def write_checkpoint(out: Path, iteration: int) -> Path:
    """A checkpoint of one tensor in two files; rank 1 has its last two rows."""
    folder = checkpoints_folder(out) / name_of(iteration)
    folder.mkdir(parents=True)
    files: dict[str, FileRecord] = {}
    for rank, (start, stop) in enumerate(((0, 4), (4, 6))):
        piece = Piece("actor", "weight", "w", Box((start, 0), (stop, 4)))
        name = f"rank-{rank}.safetensors"
        files[name] = write_tensors(folder / name, {piece.key: WHOLE[start:stop].contiguous()})
        files[f"rank-{rank}.json"] = write_synced(folder / f"rank-{rank}.json", index_text(name, [piece]))
    manifest = Manifest(
        iteration=iteration,
        experiment={"algorithm": "ppo", "seed": 3, "rate": 1e-5},
        placements={"actor_train": "node0 d2t1p1"},
        world_size=2,
        roles={"actor": RoleRecord({"model_type": "llama"}, "lm", 4)},
        files=files,
    )
    write_synced(folder / MANIFEST, manifest_text(manifest))
    assert read_manifest(folder) == manifest
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 10)
    return tmp_path


def newest(out: Path) -> Path:
    return checkpoints_folder(out) / "iteration-10"


def test_newest_is_by_number_and_older_ones_by_name(out: Path) -> None:
    assert choose(out, None)[0].name == "iteration-10"
    assert choose(out, "iteration-2")[1].iteration == 2


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


DAMAGES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (
        lambda f: flip(f / "rank-1.safetensors", -1),
        "rank-1.safetensors: is corrupted: its checksum is",
    ),
    "a cut file": (
        lambda f: cut(f / "rank-0.safetensors", 100),
        "rank-0.safetensors: is truncated: 100 bytes, expected",
    ),
    "an empty file": (
        lambda f: cut(f / "rank-0.json", 0),
        "rank-0.json: is truncated: 0 bytes",
    ),
    "a missing file": (
        lambda f: (f / "rank-1.json").unlink(),
        "rank-1.json: no such file, but the checkpoint's manifest lists it",
    ),
    "a missing manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json: no such file"),
    "a cut manifest": (lambda f: cut(f / MANIFEST, 50), "manifest.json: is damaged"),
    "another number in the manifest": (
        lambda f: change_manifest(f, lambda c: c.update(iteration=9)),
        "manifest.json: is damaged: its content does not match its own checksum",
    ),
    "a newer version": (
        lambda f: change_manifest(f, lambda c: c.update(realloc="checkpoint/7")),
        "checkpoint version 7; this realloc reads version 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_names_the_file_and_an_intact_checkpoint(out: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(newest(out))
    with pytest.raises(InputError) as caught:
        choose(out, None)
    assert message in str(caught.value)
    assert "iteration-2 is intact: continue from it with --from iteration-2." in str(caught.value)


def test_when_all_are_damaged_the_message_says_so(out: Path) -> None:
    for folder in list_checkpoints(checkpoints_folder(out)):
        flip(folder / "rank-0.safetensors", -3)
    with pytest.raises(InputError, match="No other checkpoint of this run is intact"):
        choose(out, "iteration-2")


@settings(max_examples=60, deadline=None)
@given(file=st.sampled_from(["rank-0.safetensors", "rank-1.json", MANIFEST]), data=st.data())
def test_every_flipped_bit_is_found(
    file: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("flip"), 1)
    content = bytearray((folder / file).read_bytes())
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    content[at // 8] ^= 1 << at % 8
    (folder / file).write_bytes(content)
    try:
        manifest = verify(folder)
    except InputError:
        return
    # white space between the values of a manifest means nothing
    assert file == MANIFEST
    shutil.rmtree(folder)
    assert manifest == verify(write_checkpoint(tmp_path_factory.mktemp("again"), 1))


MISSING: Mapping[str, tuple[str, str | None, str]] = {
    "no folder": ("nowhere", None, "no such folder"),
    "no checkpoint": ("empty", None, "has no checkpoint in checkpoints/"),
    "no such checkpoint": (
        ".",
        "iteration-3",
        "has no checkpoint 'iteration-3'; there are: iteration-2, iteration-10",
    ),
    "a path for a name": (".", "../checkpoints/iteration-2", "has no checkpoint"),
}


@pytest.mark.parametrize("name", MISSING)
def test_nothing_to_choose(out: Path, name: str) -> None:
    (out / "empty").mkdir()
    folder, checkpoint, message = MISSING[name]
    with pytest.raises(InputError) as caught:
        choose(out / folder, checkpoint)
    assert message in str(caught.value)


def test_a_manifest_cannot_lead_out_of_its_folder(out: Path) -> None:
    manifest = read_manifest(newest(out))
    files = {"../../secret": FileRecord(1, 1)}
    changed = Manifest(**(vars(manifest) | {"files": files}))
    (newest(out) / MANIFEST).write_text(manifest_text(changed))
    with pytest.raises(InputError, match="is not the name of a checkpoint's file"):
        read_manifest(newest(out))


def test_boxes_are_put_together_from_the_files_that_overlap(out: Path) -> None:
    with CheckpointReader(newest(out)) as reader:
        box = Box((3, 1), (6, 3))
        got = torch.zeros(3, 2)
        reader.read("actor", "weight", "w", box, got)
        assert torch.equal(got, WHOLE[3:6, 1:3])
        with pytest.raises(InputError, match=r"holds 24 of the 28 elements needed of actor's w \(weight\)"):
            reader.read("actor", "weight", "w", Box((0, 0), (7, 4)), torch.zeros(7, 4))
        with pytest.raises(InputError, match="holds 0 of the 4"):
            reader.read("actor", "exp_avg", "w", Box((0, 0), (1, 4)), torch.zeros(1, 4))


def test_a_box_within_one_file_opens_that_file_alone(out: Path) -> None:
    (newest(out) / "rank-1.safetensors").unlink()
    with CheckpointReader(newest(out)) as reader:
        got = torch.zeros(2, 4)
        reader.read("actor", "weight", "w", Box((1, 0), (3, 4)), got)
        assert torch.equal(got, WHOLE[1:3])


def test_tensor_file_is_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b/c@1": torch.randn(7, generator=generator).bfloat16(),
        "big": torch.randn(1_500_000, generator=generator),
        "none": torch.empty(0, 4),
    }
    record = write_tensors(tmp_path / "file", tensors)
    assert record == measure_file(tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


STRATEGIES = ("d4t1p1", "d2t2p1z1", "d2t1p2", "d1t4p1", "d4t1p1z3", "d1t2p2", "d4t1p1z2", "d1t1p4")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shares_cover_everything_once_and_evenly(strategy: str) -> None:
    shape = SHAPE
    mesh, parsed = DeviceMesh(4, 4, 8), parse_strategy(strategy, "test")
    everything = [
        Stored("actor", "weight", layout(shape, mesh, parsed), 4),
        Stored("actor", "exp_avg", optimizer_layout(shape, mesh, parsed), 4),
    ]
    made = shares(everything)
    assert set(made) <= set(range(4, 8))
    for stored in everything:
        counts = {spec.name: np.zeros(spec.shape, int) for spec in parameters(shape)}
        for rank, pieces in made.items():
            for piece in pieces:
                if piece.state == stored.state:
                    counts[piece.param][piece.box.slices] += 1
                    assert _holds(stored.layout, rank, piece)
        assert all((count == 1).all() for count in counts.values())
    loads = [sum(piece.box.num_elements for piece in pieces) for pieces in made.values()]
    if "p1" in strategy:  # stages differ by what they hold
        assert max(loads) <= 1.2 * sum(loads) / 4


def _holds(where: Layout, rank: int, piece: Piece) -> bool:
    held = where.boxes[rank][piece.param]
    return held.intersect(piece.box) == piece.box


def test_large_boxes_are_cut_among_replicas() -> None:
    box = Box((0, 0), (1001, 512))
    made = shares([Stored("actor", "weight", Layout({rank: {"w": box} for rank in range(3)}), 4)])
    rows = [pieces[0].box.shape[0] for pieces in made.values()]
    assert sorted(rows) == [333, 334, 334]


def test_leftovers_are_removed_and_checkpoints_stay(out: Path) -> None:
    folder = checkpoints_folder(out)
    for name in (".iteration-11.partial", ".iteration-1.removed"):
        shutil.copytree(newest(out), folder / name)
    remove_partial(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["iteration-10", "iteration-2"]
    remove_checkpoint(newest(out))
    assert [path.name for path in folder.iterdir()] == ["iteration-2"]


def test_rewinding_drops_what_came_later(out: Path) -> None:
    lines = [json.dumps({"iteration": i, "loss": i / 2}) for i in range(5)]
    (out / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 5, "lo']))
    (out / "trace.jsonl").write_text("earlier")
    (out / "errors").mkdir()
    (out / "errors" / "rank-0.json").write_text("{}")
    rewind_folder(out, 2)
    assert (out / "metrics.jsonl").read_text().splitlines() == lines[:2]
    assert (out / "trace-before-2.jsonl").read_text() == "earlier"
    assert not (out / "trace.jsonl").exists()
    assert not list((out / "errors").iterdir())
    assert [path.name for path in list_checkpoints(checkpoints_folder(out))] == ["iteration-2"]


def test_a_folder_is_for_one_run_at_a_time(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.run_folder.LOCK_WAIT_S", 0.2)
    (out / "plan.yaml").write_text("")
    with run_lock(out):
        with pytest.raises(InputError, match="another run is still at work"), run_lock(out):
            pass
        with pytest.raises(InputError, match="another run is still at work"):
            prepare_folder(out, overwrite=True)
    prepare_folder(out, overwrite=True)
    assert not list_checkpoints(checkpoints_folder(out))
