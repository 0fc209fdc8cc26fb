"""The Inception network of FID: TensorFlow's of 2015-12-05, in PyTorch, with the public weights.

The architecture is that of Szegedy et al. 2016 (arXiv 1512.00567, table 1) as TensorFlow's published graph has it,
which is not quite torchvision's: averages leave out the padding, the last block takes a maximum where the others
average, and there are 1,008 classes. Parameters have the names of the public files.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The same file at two addresses; torch-fidelity's and pytorch-fid's.
WEIGHTS_URLS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# Side of the images that the network takes.
SIDE = 299


class ConvUnit(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    def __init__(self, channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int, same: bool):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(channels, out_channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """TensorFlow's average over 3x3, which does not count the padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _shrink(x: Tensor) -> Tensor:
    """The maximum over 3x3 that halves the side."""
    return F.max_pool2d(x, 3, stride=2)


# A unit of a branch: its name, output channels and kernel; a stride of 2 where a fourth value says so, without padding.
Unit = tuple[str, int, int | tuple[int, int]] | tuple[str, int, int | tuple[int, int], int]
# A branch: pooling functions and units one after the other; a list at its end holds units side by side.
Branch = tuple["Callable[[Tensor], Tensor] | Unit | list[Unit]", ...]


class Branches(nn.Module):
    """Branches that see the same input; their outputs are concatenated."""

    def __init__(self, channels: int, *branches: Branch):
        super().__init__()
        self.branches: list[list] = []
        self.out_channels = 0
        for branch in branches:
            width, steps = channels, []
            for step in branch:
                if callable(step):
                    steps.append(step)
                    continue
                units = step if isinstance(step, list) else [step]
                steps.append([unit[0] for unit in units])
                for name, out_channels, kernel, *stride in units:
                    self.add_module(name, ConvUnit(width, out_channels, kernel, stride[0] if stride else 1, not stride))
                width = sum(unit[1] for unit in units)
            self.branches.append(steps)
            self.out_channels += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], dim=1)

    def _run(self, branch: list, x: Any) -> Tensor:
        for step in branch:
            x = step(x) if callable(step) else torch.cat([getattr(self, name)(x) for name in step], dim=1)
        return x


def _block_35(channels: int, pooled: int) -> Branches:
    """A block of 35x35."""
    return Branches(
        channels,
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (_average, ("branch_pool", pooled, 1)),
    )


def _block_17(width: int) -> Branches:
    """A block of 17x17, whose 7x7 kernels are two one after the other."""
    row, column = (1, 7), (7, 1)
    return Branches(
        768,
        (("branch1x1", 192, 1),),
        (("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)),
        (
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, column),
            ("branch7x7dbl_3", width, row),
            ("branch7x7dbl_4", width, column),
            ("branch7x7dbl_5", 192, row),
        ),
        (_average, ("branch_pool", 192, 1)),
    )


def _block_8(channels: int, pool: Callable[[Tensor], Tensor]) -> Branches:
    """A block of 8x8, whose 3x3 kernels are two side by side."""
    row, column = (1, 3), (3, 1)
    return Branches(
        channels,
        (("branch1x1", 320, 1),),
        (("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]),
        (
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)],
        ),
        (pool, ("branch_pool", 192, 1)),
    )


class Inception(nn.Module):
    """The network up to its last features, and the product with the weights of its classes."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, 1, same=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, 1, same=True)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1, 1, same=False)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, 1, same=False)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = Branches(
            288,
            (("branch3x3", 384, 3, 2),),
            (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)),
            (_shrink,),
        )
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        self.Mixed_7a = Branches(
            768,
            (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
            (
                ("branch7x7x3_1", 192, 1),
                ("branch7x7x3_2", 192, (1, 7)),
                ("branch7x7x3_3", 192, (7, 1)),
                ("branch7x7x3_4", 192, 3, 2),
            ),
            (_shrink,),
        )
        self.Mixed_7b = _block_8(1280, _average)
        self.Mixed_7c = _block_8(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images.

        Args:
            images: (N, 3, H, W) in 0..255, of any size.

        Returns:
            "features": (N, 2048), the mean over the last positions.
            "spatial": (N, 2023), 7 channels at 17x17 positions, channels last: those of sFID (Nash et al. 2021).
            "probabilities": (N, 1008), of the classes. Their biases are left out, as in ADM's Inception Score.
        """
        x = (resize_as_tensorflow(images.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_shrink(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_shrink(x)))))
        x = self.Mixed_6c(self.Mixed_6b(x))  # (N, 768, 17, 17)
        # Its first branch is computed twice, less than 1 % of the work.
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :7].permute(0, 2, 3, 1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        features = x.mean(dim=(2, 3))
        probabilities = (features @ self.fc.weight.T).softmax(dim=1)
        return {"features": features, "spatial": spatial.flatten(1), "probabilities": probabilities}


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) -> (N, C, side, side), bilinear as TensorFlow 1 computes it, operation by operation.

    Its grid has no half-pixel offset and positions are float32 products, so that no mode of PyTorch agrees.
    """
    height, width = images.shape[2:]
    top, bottom, down = _sources(height, side, images)
    left, right, across = _sources(width, side, images)
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


def _sources(length: int, target: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each position of a resized side, the two that it lies between, and its distance from the first."""
    scale = torch.tensor(length / target, dtype=torch.float32)
    positions = torch.arange(target, dtype=torch.float32) * scale
    first = positions.long()
    second = (first + 1).clamp(max=length - 1)
    return first.to(like.device), second.to(like.device), (positions - first).to(like)


def load_inception(weights: str | Path | None = None) -> Inception:
    """The network with its public weights, ready to compute.

    Args:
        weights: the path of the public file; None downloads it to PyTorch's cache, once.

    Raises:
        ValueError: there is no such file, or it is another one.
        OSError: the weights cannot be downloaded.
    """
    path = Path(weights) if weights is not None else _download()
    if not path.is_file():
        raise ValueError(f"There is no file {path}. FID's Inception weights are at {WEIGHTS_URLS[0]}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(f"{path} is not FID's Inception network: its SHA-256 begins with {digest[:8]}, not "
                         f"{WEIGHTS_SHA256[:8]}. The file is at {WEIGHTS_URLS[0]}")  # fmt: skip
    return inception_from(torch.load(path, map_location="cpu", weights_only=True))


def inception_from(state: dict[str, Tensor]) -> Inception:
    """The network with the weights of a state dict, frozen."""
    with torch.device("meta"):
        network = Inception()
    counters = {name: torch.zeros((), dtype=torch.long) for name in network.state_dict() if name.endswith("_tracked")}
    network.load_state_dict({**counters, **state}, assign=True)
    return network.eval().requires_grad_(False)


def _download() -> Path:
    """The path of the public weights in PyTorch's cache, downloaded if they are not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URLS[0]).name)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = None
    for url in WEIGHTS_URLS:
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=WEIGHTS_SHA256[:8], progress=False)
            return path
        except (OSError, RuntimeError) as error:  # no network; a file that was cut
            problem = error
    raise OSError(f"FID's Inception weights could not be downloaded ({problem}). Fetch {WEIGHTS_URLS[0]} where there "
                  "is a network, and give its path with --inception.")  # fmt: skip
