"""Extractors: images to features, spatial features and class probabilities, by networks that can be exchanged."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ..configuration_dit import nearest
from ..sources import local_folder, plain_hub_errors
from .inception import load_inception

ASSETS = Path(__file__).parents[1] / "assets" / "extractors"

# Channels of spatial features, as many as sFID takes.
SPATIAL_CHANNELS = 7


class Extractor(Protocol):
    """A network that describes images; an object with these can be passed to `evaluate`.

    Attributes:
        name: of the extractor, which results carry.
        fingerprint: of its weights; results of two cannot be compared.
        outputs: what it gives, of "features", "spatial" and "probabilities".
    """

    name: str
    fingerprint: str
    outputs: tuple[str, ...]

    def __call__(self, images: np.ndarray) -> Mapping[str, Tensor]:
        """uint8 (N, H, W, 3) -> by output (N, D) floats."""
        ...


class NetworkExtractor:
    """An extractor whose network takes (N, 3, H, W) values in 0..255, of any size."""

    outputs: tuple[str, ...] = ("features", "spatial", "probabilities")

    def __init__(self, name: str, network: nn.Module, device: torch.device | str = "cpu"):
        self.name, self.fingerprint = name, fingerprint(network)
        self.network, self.device = network.to(device), device

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Mapping[str, Tensor]:
        pixels = torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2)
        with full_precision():
            return self.network(pixels)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block NVIDIA GPUs compute float32 as such; by themselves they convolve in tf32, which has 11 bits."""
    backends: Any = torch.backends
    parts = (backends.cudnn.conv, backends.cuda.matmul)
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def fingerprint(network: nn.Module) -> str:
    """The first 16 digits of a SHA-256 over names, shapes and values of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- Networks of transformers ----------------------------------------------------------------------------------------

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Pretrained:
    """A network of transformers.

    Args:
        model: its Hub id.
        kind: its class in transformers.
        side: of its input, in pixels.
        colours: mean and standard deviation by channel.
        output: of its output: "cls", the first token after the last normalisation; "mean" over positions; or a field.
        arguments: of the class, which leave out parts that the features do not need.
    """

    model: str
    kind: str
    side: int
    colours: tuple[tuple[float, ...], tuple[float, ...]]
    output: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


PRETRAINED = {
    # FD-DINOv2 (Stein et al. 2023).
    "dinov2": Pretrained("facebook/dinov2-large", "Dinov2Model", 224, _IMAGENET, "cls"),
    # CMMD (Jayasumana et al. 2024).
    "clip": Pretrained(
        "openai/clip-vit-large-patch14-336", "CLIPVisionModelWithProjection", 336, _CLIP, "image_embeds"
    ),
    # With the two above and Inception, the six of FDr6 (arXiv 2604.28190).
    "mae": Pretrained("facebook/vit-mae-large", "ViTModel", 224, _IMAGENET, "cls", {"add_pooling_layer": False}),
    "convnext": Pretrained("facebook/convnextv2-base-22k-224", "ConvNextV2Model", 224, _IMAGENET, "mean"),
    "siglip": Pretrained("google/siglip2-so400m-patch16-256", "SiglipVisionModel", 256, _HALF, "pooler_output"),
}


class PretrainedExtractor:
    """The features of a network of transformers, for images that PIL has scaled with its cubic filter."""

    outputs: tuple[str, ...] = ("features",)

    def __init__(self, name: str, source: str, facts: Pretrained, device: torch.device | str = "cpu"):
        import transformers

        kind: Any = getattr(transformers, facts.kind)
        with plain_hub_errors(f"load {source} from"):
            network, report = kind.from_pretrained(source, output_loading_info=True, **facts.arguments)
        if report["missing_keys"]:  # they would be drawn anew, and give other features each time
            raise ValueError(f"{source} is no {facts.kind}: it has no {sorted(report['missing_keys'])[0]}.")
        self.name, self.facts, self.device = name, facts, device
        self.network = network.eval().requires_grad_(False).to(device)
        self.fingerprint = fingerprint(network)
        self._mean, self._deviation = (torch.tensor(values)[:, None, None] for values in facts.colours)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Mapping[str, Tensor]:
        scaled = [np.asarray(_scaled(image, self.facts.side)) for image in images]
        pixels = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2) / 255  # (N, 3, side, side)
        with full_precision():
            output = self.network(pixel_values=((pixels - self._mean) / self._deviation).to(self.device))
        return {"features": self._pooled(output).float()}

    def _pooled(self, output: Any) -> Tensor:
        if self.facts.output == "cls":
            return output.last_hidden_state[:, 0]
        if self.facts.output == "mean":
            return output.last_hidden_state.mean(dim=(2, 3))
        return output[self.facts.output]


def _scaled(image: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)


# --- The embedded ones -----------------------------------------------------------------------------------------------


class SmallNetwork(nn.Module):
    """A classifier of small images, whose features are the means of all its layers, of unit variance on real images.

    The early layers notice noise, blur and colours that the last one, which knows classes, has learned to ignore.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, classes: int, widths: tuple[int, int, int] = (24, 32, 48)):
        super().__init__()
        channels = (3, *widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if index == 0 else 2, padding=1)
            for index, (before, after) in enumerate(itertools.pairwise(channels))
        )
        self.head = nn.Linear(widths[-1], classes)
        self.register_buffer("shift", torch.zeros(sum(widths)))
        self.register_buffer("scale", torch.ones(sum(widths)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) in 0..255 -> the outputs of an extractor, and the logits of the classes."""
        x, maps = images.float() / 127.5 - 1, []
        for layer in self.layers:
            x = F.silu(layer(x))
            maps.append(x)
        means = [part.mean(dim=(2, 3)) for part in maps]
        logits = self.head(means[-1])
        return {
            "features": (torch.cat(means, dim=1) - self.shift) * self.scale,  # (N, sum of widths)
            "spatial": maps[1][:, :SPATIAL_CHANNELS].flatten(1),
            "probabilities": logits.softmax(dim=1),
            "logits": logits,
        }


def small_network(state: Mapping[str, Tensor]) -> SmallNetwork:
    """The network with the weights of a state dict, frozen, in float32."""
    widths = tuple(state[f"layers.{index}.weight"].shape[0] for index in range(3))
    network = SmallNetwork(state["head.weight"].shape[0], (widths[0], widths[1], widths[2]))
    network.load_state_dict({name: value.float() for name, value in state.items()})
    return network.eval().requires_grad_(False)


# --- By name ---------------------------------------------------------------------------------------------------------


def embedded_extractors() -> list[str]:
    """The names of the extractors that come with the package, one for each small data set."""
    return sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def get_extractor(name: str, device: torch.device | str = "cpu", inception: str | Path | None = None) -> Extractor:
    """An extractor by name.

    Args:
        name: "inception", a name of `PRETRAINED` ("dinov2", "clip", …), or of an embedded one ("shapes", "digits").
            "dinov2=FOLDER" takes the weights from a folder or another Hub id.
        device: where it computes.
        inception: the path of FID's Inception weights; None downloads them once.

    Raises:
        ValueError: there is no such extractor, or the weights are others.
        OSError: weights cannot be downloaded.
    """
    name, _, source = name.partition("=")
    known = ["inception", *PRETRAINED, *embedded_extractors()]
    if name not in known:
        raise ValueError(f"There is no extractor {name!r}; the nearest names: {nearest(name, known)}.")
    if name == "inception":
        return NetworkExtractor(name, load_inception(source or inception), device)
    if name in PRETRAINED:
        facts = PRETRAINED[name]
        folder = local_folder(source) if source else None
        return PretrainedExtractor(name, str(folder) if folder else source or facts.model, facts, device)
    if source:
        raise ValueError(f"The extractor {name} comes with the package and takes no weights from elsewhere.")
    return NetworkExtractor(name, small_network(load_file(ASSETS / f"{name}.safetensors")), device)
