"""Hugging Face checkpoints in safetensors: reading the boxes a rank needs, writing whole models.

Decides how files are read and written. Knows names through `hf_names` and shapes through
`realloc.params`; it knows nothing of layouts beyond the boxes it is asked for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from realloc.errors import InputError, RunError
from realloc.layout import Box
from realloc.model_shape import ModelShape
from realloc.params import FINAL_NORM, HEAD, ParamSpec, parameters
from runtime.hf_names import FAMILIES, SCORE, source

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
NEW_SCORES = 0.2
"""Standard deviation of the scores, or values, that a new scalar head gives."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class Checkpoint:
    """The tensors of a Hugging Face folder, read piece by piece. Use as a context manager."""

    def __init__(self, folder: str | Path) -> None:
        """Raises InputError when the folder has no safetensors or a file of it is damaged."""
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self._where = self._tensor_files()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def slice(self, name: str) -> Any:
        """The tensor as an object with `get_shape()` and [slices]. Raises InputError."""
        file = self._open(self._where[name])
        try:
            return file.get_slice(name)
        except SafetensorError as error:
            raise InputError(
                f"{self.folder}: {self._where[name]} lacks '{name}', which its index lists: {error}."
            ) from None

    def _tensor_files(self) -> Mapping[str, str]:
        if (self.folder / INDEX).is_file():
            return self._read_index()
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such model folder.")
        pickled = sorted([*self.folder.glob("pytorch_model*.bin"), *self.folder.glob("*.pt")])
        if pickled:
            raise InputError(
                f"{self.folder}: holds its weights as {pickled[0].name}, which is a pickle and may run "
                f"code; convert it to safetensors (load it with transformers where you trust it, and "
                f"save_pretrained)."
            )
        raise InputError(f"{self.folder}: has no {SINGLE} (nor {INDEX}), so there are no weights to load.")

    def _read_index(self) -> Mapping[str, str]:
        path = self.folder / INDEX
        try:
            files = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a safetensors index: {error!r}.") from None
        # file names only: an index must not lead out of its folder
        for name in set(map(str, files.values())):
            if Path(name).name != name or not (self.folder / name).is_file():
                raise InputError(f"{path}: names the file '{name}', which is not in the folder.")
        return files

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                size = path.stat().st_size if path.exists() else 0
                raise InputError(
                    f"{path}: cannot be read as safetensors ({size} bytes): {error}. "
                    f"The file may be truncated; copy or download it again."
                ) from None
        return self._files[file]


def load_boxes(
    folder: str | Path,
    shape: ModelShape,
    boxes: Mapping[str, Box],
    dtype: torch.dtype,
    device: torch.device,
    *,
    new_head: bool = True,
) -> dict[str, torch.Tensor]:
    """The boxes of a model's parameters from a Hugging Face folder; reads only those.

    A scalar head that the folder lacks (a causal LM that becomes a critic or a reward model) is new, if
    `new_head` allows it: a small one, as `_new_scalar_head` says. Raises InputError for a missing or
    misshapen tensor, for a damaged file, and for weights that are not safetensors.
    """
    specs = {spec.name: spec for spec in parameters(shape)}
    with Checkpoint(folder) as checkpoint:
        return {
            name: _load(checkpoint, shape, specs[name], box, new_head).to(
                device=device, dtype=dtype, copy=True
            )
            for name, box in boxes.items()
        }


def _load(
    checkpoint: Checkpoint, shape: ModelShape, spec: ParamSpec, box: Box, new_head: bool
) -> torch.Tensor:
    where = source(FAMILIES[shape.family], spec)
    name = next((name for name in where.names if name in checkpoint), None)
    if name is None:
        if spec.name == HEAD and shape.head == "scalar":
            return _new_scalar_head(checkpoint, shape, box, new_head)
        raise InputError(
            f"{checkpoint.folder}: lacks the tensor '{where.names[0]}', which config.json asks for."
        )
    stored = checkpoint.slice(name)
    expected = spec.shape if where.part is None else (3 * spec.shape[0], *spec.shape[1:])
    if tuple(stored.get_shape()) != expected:
        raise InputError(
            f"{checkpoint.folder}: tensor '{name}' has the shape {tuple(stored.get_shape())}, "
            f"expected {expected} (from config.json"
            + (", with num_labels 1)." if spec.name == HEAD and shape.head == "scalar" else ").")
        )
    piece: torch.Tensor
    if where.part is None:
        piece = stored[box.slices]
        return piece
    # whole heads: rows of q, k and v of one head stand together
    rows = stored[(slice(3 * box.start[0], 3 * box.stop[0]), *box.slices[1:])]
    heads: torch.Tensor = rows.view(-1, 3, shape.head_dim, *rows.shape[1:])
    piece = heads[:, where.part].reshape(box.shape)
    return piece


def _new_scalar_head(checkpoint: Checkpoint, shape: ModelShape, box: Box, allowed: bool) -> torch.Tensor:
    """A normal draw, the same under every plan, that gives scores of deviation NEW_SCORES.

    The final norm's weights say how large hidden states are, so that a reward model's first loss is close to
    ln 2 and a critic's first values are close to 0 whatever the model. Drawn for hidden states of mean square
    1 and scores of deviation 1, as by Stiennon et al. 2020 (arXiv 2009.01325), scores are noise that training
    first has to unlearn. Zeros are no better: the layers below learn through the head, and wait for it.
    """
    if not allowed:
        raise InputError(
            f"{checkpoint.folder}: lacks the tensor '{SCORE}', a scalar head, and is not trained, so its "
            f"scores would be noise; take a trained reward model (algorithm: reward makes one)."
        )
    norm = next(spec for spec in parameters(shape) if spec.name == f"{FINAL_NORM}.weight")
    weights: torch.Tensor = checkpoint.slice(source(FAMILIES[shape.family], norm).names[0])[:]
    size = float(weights.float().norm()) or 1.0
    head = torch.randn(1, shape.hidden, generator=torch.Generator().manual_seed(0))
    return (head * (NEW_SCORES / size))[box.slices]


def save_hf(
    folder: str | Path,
    shape: ModelShape,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` loads as a causal LM, or as a classifier with one label.

    `tensors` are whole parameters by our names, in the dtype to write; `config` is the source's
    config.json. Models above `shard_bytes` are written in several files with an index. Raises
    RunError when the disk refuses.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(folder, hf_tensors(shape, tensors), shard_bytes)
        dtype = next(iter(tensors.values())).dtype
        text = json.dumps(_hf_config(shape, config, dtype), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        if tokenizer_from is not None:
            for name in TOKENIZER_FILES:
                if (Path(tokenizer_from) / name).is_file():
                    shutil.copyfile(Path(tokenizer_from) / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: the model cannot be written: {error}.") from None


def hf_tensors(shape: ModelShape, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole parameters by Hugging Face names, q, k and v fused where the family fuses them."""
    family = FAMILIES[shape.family]
    result: dict[str, torch.Tensor] = {}
    for spec in parameters(shape):
        where, tensor = source(family, spec), tensors[spec.name].detach().cpu()
        if where.part is None:
            result[where.names[0]] = tensor.contiguous()
            continue
        size = (shape.num_heads, 3, shape.head_dim, *spec.shape[1:])
        fused = result.setdefault(
            where.names[0], torch.empty(3 * spec.shape[0], *spec.shape[1:], dtype=tensor.dtype)
        )
        fused.view(size)[:, where.part] = tensor.view(-1, shape.head_dim, *spec.shape[1:])
    return result


def _write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> None:
    shards = list(_shards(tensors, shard_bytes))
    metadata = {"format": "pt"}
    # what an earlier save of another size left would be taken for this one's
    (folder / INDEX).unlink(missing_ok=True)
    (folder / SINGLE).unlink(missing_ok=True)
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _hf_config(shape: ModelShape, config: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """The source's config with what the saved model differs in."""
    family = FAMILIES[shape.family]
    content = {key: value for key, value in config.items() if key not in ("dtype", "_name_or_path")}
    scalar = shape.head == "scalar"
    content["architectures"] = [family.classifier if scalar else family.causal_lm]
    content["torch_dtype"] = str(dtype).removeprefix("torch.")
    if scalar:
        content["id2label"] = {"0": "LABEL_0"}
        content["label2id"] = {"LABEL_0": 0}
        content.pop("num_labels", None)
        # the classifier looks for the last token that is no padding: it would score the one before EOS
        ends = content.get("eos_token_id")
        if content.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
            content["pad_token_id"] = None
    return content
