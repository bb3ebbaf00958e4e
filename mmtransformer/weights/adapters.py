"""Adapters: what was learned on top of a public captioner, saved small, beside the name and the hash of its base."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmtransformer.captioners.base import Captioner
from mmtransformer.serialization.checksums import KEY, checksum, refuse_damaged
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.pretrained import CONFIG, find_folder, open_weights, read_json
from mmtransformer.serialization.weight_files import read_safetensors, write_weights
from mmtransformer.serialization.writing import made_folder
from mmtransformer.weights.shared.folders import read_tensors

ADAPTER = "adapter.safetensors"
FORMAT_VERSION = 4
_A, _B = ".lora_A", ".lora_B"


@dataclass(frozen=True)
class Adapter:
    """What was learned: tensors that take the place of the base's, and low-rank products that are added to them.

    Attributes:
        base: the base: the name of a hub's repository, or a folder.
        base_hash: of its weights, see `hash_of`.
        tensors: by their names in the captioner here; of a product, NAME.lora_A (r in) and NAME.lora_B (out r).
        scaling: what products are multiplied by.
        revision: of the repository: a commit; None = of a folder.
    """

    base: str
    base_hash: str
    tensors: dict[str, Tensor]
    scaling: float = 1.0
    revision: str | None = None

    def apply(self, captioner: Captioner, where: str = ADAPTER) -> None:
        """Makes a base what was learned, in place; products are added to the weights beside them.

        Raises:
            ValueError: for tensors that the captioner does not have, or of other shapes.
        """
        own = dict(captioner.named_parameters())
        products = sorted(name.removesuffix(_A) for name in self.tensors if name.endswith(_A))
        plain = {name: tensor for name, tensor in self.tensors.items() if not name.endswith((_A, _B))}
        with torch.no_grad():
            for name, tensor in plain.items():
                if name not in own or own[name].shape != tensor.shape:
                    raise ValueError(f"{where}: the base has no tensor {name} of the shape {tuple(tensor.shape)}")
                own[name].copy_(tensor)
            for name in products:
                weight, a, b = own.get(f"{name}.weight"), self.tensors[name + _A], self.tensors.get(name + _B)
                if weight is None or b is None or weight.shape != (b.shape[0], a.shape[1]) or len(a) != b.shape[1]:
                    raise ValueError(f"{where}: the base has no place for the product {name}")
                weight += self.scaling * (b.float() @ a.float()).to(weight)

    def save(self, folder: str | Path) -> None:
        """Writes config.json and adapter.safetensors."""
        folder = made_folder(folder)
        written = write_weights(folder / ADAPTER, {name: x.detach().cpu() for name, x in self.tensors.items()})
        values = {"base": self.base, "base_hash": self.base_hash, "revision": self.revision, "scaling": self.scaling}
        config = {"adapter": {"format_version": FORMAT_VERSION, **values}, KEY: checksum(written)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        open_weights(folder, ADAPTER)

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """The adapter in a folder.

        Raises:
            ValueError: naming the file that is missing or damaged.
        """
        path = folder / CONFIG
        config = read_json(path)
        said = config.get("adapter")
        kinds: dict[str, Any] = {"base": str, "base_hash": str, "scaling": float, "revision": str | None}
        if not isinstance(said, dict) or said.get("format_version") != FORMAT_VERSION:
            version = said.get("format_version") if isinstance(said, dict) else None
            raise ValueError(
                f"{path}: no adapter of format_version {FORMAT_VERSION}, but of {version!r:.20}: train it again, or "
                "load it with the version that saved it"
            )
        if odd := [name for name, kind in kinds.items() if not isinstance(said.get(name), kind)]:
            raise ValueError(f"{path}: adapter.{odd[0]} is {said.get(odd[0])!r:.80}, not {kinds[odd[0]]}")
        tensors = read_safetensors(folder / ADAPTER)
        refuse_damaged(tensors, config, folder, folder / ADAPTER)
        return cls(tensors=tensors, **{name: said[name] for name in kinds})

    def find_base(self, folder: Path, options: HubOptions = HubOptions()) -> Path:  # noqa: B008 (frozen)
        """The folder of the base, fetched if it is a hub's.

        Args:
            folder: the adapter's, for errors.
            options: how a name is looked up.

        Raises:
            ValueError: if it is not there, or not the one that this was trained on.
        """
        remedy = f'"base" in {folder / CONFIG} may name the folder where it is now'
        try:
            if Path(self.base).is_absolute() and not Path(self.base).is_dir():
                raise ValueError("no such folder")
            beside = folder / self.base  # a relative one, wherever the command runs
            base = find_folder(beside if beside.is_dir() else self.base, replace(options, revision=self.revision))
        except ValueError as error:
            raise ValueError(f"{folder}: an adapter without its base, {self.base}: {error}; {remedy}") from error
        if (found := hash_of(base)) != self.base_hash:
            raise ValueError(
                f"{folder}: an adapter of another base: the weights in {base} have the hash {found[:12]}, and it was "
                f"trained on {self.base_hash[:12]}; {remedy}"
            )
        return base


def is_adapter(config: dict[str, Any]) -> bool:
    """Whether a folder's config.json is an adapter's."""
    return isinstance(config.get("adapter"), dict) and "model_type" not in config


def hash_of(folder: Path) -> str:
    """SHA-256 of a folder's tensors: names, formats, shapes and bytes, in whatever files they lie."""
    found: dict[str, bytes] = {}
    files = [*folder.glob("*.safetensors")]
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = _digest(file.get_tensor(name))
    if not files:
        found = {name: _digest(tensor) for name, tensor in read_tensors(folder).items()}
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(name.encode() + b"\0" + found[name])
    return total.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    data = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    data.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return data.digest()


def learned(captioner: Captioner) -> dict[str, Tensor]:
    """The tensors of a captioner that learn, as an `Adapter` names them."""
    names = {name: p for name, p in captioner.named_parameters() if p.requires_grad}
    plain = {name.replace(".default.weight", "").replace(".base_layer.", "."): p for name, p in names.items()}
    return {name: parameter.detach().clone() for name, parameter in plain.items()}


def part_of(captioner: Captioner, name: str) -> str:
    """The part that a parameter belongs to, by its name: "vision", "decoder", or "connector", which is all else.

    Cross-attention inside the language model is a connector.
    """
    if (own := getattr(captioner, "part_of", None)) is not None:
        return own(name)
    first = name.partition(".")[0]
    if first == "decoder" and "cross" in name:
        return "connector"
    return first if first in ("vision", "decoder") else "connector"
