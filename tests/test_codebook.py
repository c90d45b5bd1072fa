"""Neighbours of image codes: found, written, read back, and refused where something is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from vllm_spec_plugins.calibration import codebook as calibration
from vllm_spec_plugins.calibration.codebook import Codebook, nearest_codes
from vllm_spec_plugins.cli.main import app
from vllm_spec_plugins.codebook_neighbours import (
    NeighbourCard,
    read_neighbours,
    write_neighbours,
)
from vllm_spec_plugins.errors import SpecPluginsError
from vllm_spec_plugins.image_token_range import image_token_range


def embeddings(codes: int = 50, width: int = 3) -> Tensor:
    return torch.randn(codes, width, generator=torch.Generator().manual_seed(0))


def card(**changes: Any) -> NeighbourCard:
    known = NeighbourCard(5, 2, 3, None, 0, "", "toy")
    return dataclasses.replace(known, **changes)


def table() -> Tensor:
    return torch.tensor([[1, 2], [0, 5], [3, 1], [5, 5], [0, 3]])


def brute_force(codebook: Tensor, count: int) -> Tensor:
    distances = (codebook[:, None] - codebook[None]).double().norm(dim=2).float()
    distances.fill_diagonal_(torch.inf)
    return distances.sort(dim=1, stable=True).indices[:, :count]


# Finding them.


@pytest.mark.parametrize("block", [1 << 24, 120, 1])
def test_the_nearest_by_distance_whatever_the_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_BLOCK_ELEMENTS", block)
    seen: list[int] = []
    found = nearest_codes(embeddings(), 7, on_codes=seen.append)
    assert torch.equal(found.long(), brute_force(embeddings(), 7))
    assert seen[-1] == 50
    assert seen == sorted(seen)


def test_far_from_the_origin_and_close_together() -> None:
    shifted = embeddings().double() * 1e-2 + 1000
    found = nearest_codes(shifted.float(), 5)
    assert torch.equal(found.long(), brute_force(shifted.float(), 5))


def test_duplicates_are_neighbours_at_distance_zero_and_no_code_is_its_own() -> None:
    codebook = embeddings(20)
    codebook[[3, 7, 11]] = codebook[0].clone()
    found = nearest_codes(codebook, 19)
    assert found[0, :3].tolist() == [3, 7, 11]
    assert found[7, :3].tolist() == [0, 3, 11]
    every = torch.arange(20)
    for code, row in enumerate(found.long()):
        assert torch.equal(row.sort().values, every[every != code])
    assert Codebook(codebook, "").num_duplicates == 4


def test_codes_further_away_than_asked_are_none() -> None:
    line = torch.tensor([[0.0], [1.0], [2.5], [9.0]])
    found = nearest_codes(line, 3, max_distance=1.5)
    assert found.tolist() == [[1, 4, 4], [0, 2, 4], [1, 4, 4], [4, 4, 4]]


# The file.


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    write_neighbours(path, card(), table())
    read_card, read_table = read_neighbours(path)
    assert read_card == card()
    assert torch.equal(read_table, table().int())
    assert load_file(path)["neighbours"].dtype == torch.uint16


def test_65536_codes_take_wider_numbers(tmp_path: Path) -> None:
    codes = 1 << 16
    ring = ((torch.arange(codes) + 1) % codes).unsqueeze(1)
    for count, dtype in ((codes, torch.uint32), (codes - 1, torch.uint16)):
        path = tmp_path / f"{count}.safetensors"
        write_neighbours(path, card(num_codes=count, num_neighbours=1), ring[:count] % count)
        assert load_file(path)["neighbours"].dtype == dtype
        assert int(read_neighbours(path)[1].max()) == count - 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((0, 0, 0), "its own neighbour"),
        ((0, 1, 6), "outside"),
        ((0, 1, 1), "twice"),
        ((0, 0, 5), "goes on after its end"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, change: tuple[int, int, int], said: str) -> None:
    row, column, value = change
    broken = table()
    broken[row, column] = value
    with pytest.raises(ValueError, match=said):
        write_neighbours(tmp_path / "n.safetensors", card(), broken)
    path = rewritten(tmp_path, broken.to(torch.uint16))
    with pytest.raises(SpecPluginsError, match=said):
        read_neighbours(path)


def rewritten(folder: Path, stored: Tensor, name: str = "neighbours") -> Path:
    """A file whose card is right and whose tensor is `stored`."""
    path = folder / "broken.safetensors"
    values = {"format_version": 1, **dataclasses.asdict(card())}
    save_file({name: stored}, path, {"codebook_neighbours": json.dumps(values)})
    return path


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (table().to(torch.int64), "of torch.int64, that of 5 codes must be of torch.uint16"),
        (table().float(), "of torch.float32"),
        (table()[:4].to(torch.uint16), r"is \[4, 2\], its card says \[5, 2\]"),
        (table().flatten().to(torch.uint16), r"is \[10\], its card says"),
    ],
)
def test_a_table_of_another_shape_or_type(tmp_path: Path, stored: Tensor, said: str) -> None:
    with pytest.raises(SpecPluginsError, match=said):
        read_neighbours(rewritten(tmp_path, stored.contiguous()))


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(SpecPluginsError, match=r"no neighbour table .*calibrate codebook"):
        NeighbourCard.read(tmp_path / "absent.safetensors")
    plain = tmp_path / "plain.safetensors"
    save_file({"neighbours": table()}, plain)
    with pytest.raises(SpecPluginsError, match="is not a neighbour table: it has no card"):
        NeighbourCard.read(plain)
    with pytest.raises(SpecPluginsError, match='no tensor "neighbours"'):
        read_neighbours(rewritten(tmp_path, table().to(torch.uint16), "others"))


# The range of a model.


def test_the_range_a_config_says() -> None:
    assert image_token_range({"image_token_range": [16, 528]}) == (16, 528)
    assert image_token_range({}) is None
    for wrong in ([5, 5], [-1, 4], [1, 2, 3], "1:2", [0.0, 4.0]):
        assert image_token_range({"image_token_range": wrong}) is None


def test_the_range_of_named_tokens() -> None:
    chameleon = {"<s>": 0, "IMGIMGAZ": 4, "IMGIMGBZ": 5, "IMGIMGCZ": 6, "<image>": 9}
    emu = {"<|visual token 000000|>": 70, "<|visual token 000001|>": 71, "<|image start|>": 3}
    assert image_token_range({"vocabulary_map": chameleon}) == (4, 7)
    assert image_token_range({"vocabulary_map": emu}) == (70, 72)
    # Numbers that do not follow the ids are no range.
    assert image_token_range({"vocabulary_map": {**chameleon, "IMGIMGCZ": 8}}) is None
    assert image_token_range({"vocabulary_map": {"<s>": 0}}) is None


# The command.


def calibrate(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["calibrate", "codebook", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"vocab_size": 80, "image_token_range": [20, 70]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def codebook(tmp_path: Path) -> Path:
    path = tmp_path / "codebook.safetensors"
    save_file({"quantize.embedding": embeddings(), "bias": torch.zeros(50)}, path)
    return path


def test_the_command_writes_a_table_of_a_model(tmp_path: Path, model: Path, codebook: Path) -> None:
    output = tmp_path / "n.safetensors"
    result = calibrate(codebook, "--model", model, "--neighbours", 6, "--output", output)
    assert result.exit_code == 0, result.output
    read_card, found = read_neighbours(output)
    assert torch.equal(found.long(), brute_force(embeddings(), 6))
    assert (read_card.vocab_size, read_card.first_token_id) == (80, 20)
    assert read_card.source == "codebook.safetensors:quantize.embedding"
    assert read_card.codebook_sha256 == Codebook(embeddings(), "").sha256
    assert '"num_neighbours": 6' in result.output


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({}, ["--neighbours", "50"], "--neighbours must be from 1 to 49"),
        ({}, ["--tensor", "quantize.embeding"], 'Did you mean "quantize.embedding"?'),
        ({}, ["--tensor", "bias"], "has shape [50]"),
        ({}, ["--output", "n.json"], "must end in .safetensors"),
        ({}, ["--first-token-id", "19"], "its image codes are [20, 70)"),
        ({"image_token_range": [20, 69]}, [], "its image codes are [20, 69)"),
        ({"image_token_range": None}, [], "give --first-token-id"),
        ({"image_token_range": None}, ["--first-token-id", "31"], "do not fit"),
        ({"vocab_size": None}, [], "does not say its vocab_size"),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path,
    model: Path,
    codebook: Path,
    change: dict[str, Any],
    arguments: list[str],
    said: str,
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    always = ["--model", model, "--output", tmp_path / "n.safetensors", "--neighbours", 5]
    result = calibrate(codebook, *always, *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.count("error:") == 1
    assert not (tmp_path / "n.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.zeros(4, 2), "b": torch.zeros(4, 2)}, "holds 2 matrices"),
        ({"a": torch.zeros(4)}, "holds 0 matrices"),
        ({"a": torch.zeros(4, 2, dtype=torch.int64)}, "is of torch.int64"),
        ({"a": torch.tensor([[1.0], [torch.nan], [torch.inf]])}, "2 rows hold NaN"),
    ],
)
def test_codebooks_that_are_none(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    path = tmp_path / "codebook.safetensors"
    save_file(tensors, path)
    result = calibrate(path, "--output", tmp_path / "n.safetensors")
    assert result.exit_code == 1
    assert said in result.stderr
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for name, said in (("text", "is not a safetensors file"), ("absent", "no codebook file")):
        result = calibrate(tmp_path / f"{name}.safetensors")
        assert result.exit_code == 1
        assert said in result.stderr
