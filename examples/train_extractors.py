"""Trains the small networks that evaluate the toy and the digits model: src/dit_hub/assets/extractors.

    python examples/train_extractors.py src/dit_hub/assets/extractors

Inception has seen photographs; on 16x16 shapes it tells little. These are classifiers of the real images, 22,000
parameters each, whose features get unit variance on them.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dit_hub.evaluation.extractors import SmallNetwork
from dit_hub.training.loader import open_dataset

EPOCHS, BATCH_SIZE, HELD_OUT = 30, 64, 5  # of five images one is held out


def pixels_and_labels(name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) in 0..255 and labels."""
    dataset = open_dataset(name, 16, 200, 0)
    batch = dataset.read([(position, False) for position in range(len(dataset))])
    return ((batch.data + 1) * 127.5).round().expand(-1, 3, -1, -1), batch.labels


def train(name: str) -> tuple[SmallNetwork, float]:
    """A network for a data set, and its accuracy on images that it has not seen."""
    torch.manual_seed(0)
    images, labels = pixels_and_labels(name)
    unseen = torch.arange(len(images)) % HELD_OUT == 0
    x, y = images[~unseen], labels[~unseen]
    network = SmallNetwork(int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, EPOCHS * (len(x) // BATCH_SIZE))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH_SIZE)[: len(x) // BATCH_SIZE]:
            loss = F.cross_entropy(network(x[rows])["logits"], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        right = network(images[unseen])["logits"].argmax(dim=1) == labels[unseen]
        features = network(images)["features"]
        network.shift, network.scale = features.mean(dim=0), 1 / features.std(dim=0)
    return network, float(right.float().mean())


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("shapes", "digits"):
        network, accuracy = train(name)
        file = folder / f"{name}.safetensors"
        save_file({key: value.half() for key, value in network.state_dict().items()}, file)
        file.chmod(0o644)  # safetensors writes files that only their owner can read
        print(f"{name}: {accuracy:.1%} of the held-out images recognised")


if __name__ == "__main__":
    main()
