"""Which way to use several GPUs, by the model of costs `dit_hub.scaling`: the tables of docs/scaling-out.md.

python examples/scaling_out.py [--figure scaling-out.png]
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_hub import DiTConfig
from dit_hub.scaling import H100, Cost, Machine, Plan, cost, plans, recommend

MODELS: dict[str, dict[str, Any]] = {
    "DiT-XL/2, 0.7 G parameters": {},
    "a DiT/2 of 6.8 G parameters": {"hidden_size": 3072, "num_hidden_layers": 40, "num_attention_heads": 24},
}
SIZES = (512, 1024, 2048, 4096)
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)

# Links without NVLink and InfiniBand: PCIe 4 with 16 lanes, and Ethernet of 25 Gbit/s for each GPU.
SLOW = Machine(bandwidth=25e9, bandwidth_between=3e9, latency_between=50e-6)
HUGE = DiTConfig.from_name("DiT-XL/2", 1024, hidden_size=12288, num_hidden_layers=48, num_attention_heads=96)


def config_of(model: str, size: int) -> DiTConfig:
    return DiTConfig.from_name("DiT-XL/2", image_size=size, **MODELS[model])


def table(*rows: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown; the first row is the head."""
    for number, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if number == 0:
            yield f"|{'---|' * len(row)}"


def seconds(value: float) -> str:
    return f"{value:.3g} s"


def alone(plan: Plan) -> str:
    """A plan without its replicas."""
    return str(Plan(**{**plan.__dict__, "replicas": 1}))


def by_gpus(model: str) -> Iterator[str]:
    """The exact plan of the least latency, by size and GPUs."""
    rows = [["pixels", *(f"{count} GPUs" if count > 1 else "1 GPU" for count in GPUS)]]
    for size in SIZES:
        best = [recommend(config_of(model, size), count)[0] for count in GPUS]
        rows.append([str(size), *(f"{seconds(one.latency)}<br>{alone(plan)}" for plan, one in best)])
    return table(*rows)


def ways(config: DiTConfig, machine: Machine, gpus: int = 8) -> Iterator[str]:
    """Every plan for so many GPUs without replicas of it, the quickest first."""
    found: list[tuple[Plan, Cost]] = [(plan, cost(config, plan, machine)) for plan in plans(config, gpus)
                                      if plan.replicas == 1 or plan.per_replica == 1]  # fmt: skip
    rows = [["8 GPUs", "seconds an image", "images per second", "MB sent in a step", "GB of memory", "exact"]]
    for plan, one in sorted(found, key=lambda entry: entry[1].latency):
        rows.append([str(plan), f"{one.latency:.3g}", f"{one.throughput:.3g}", f"{one.sent / 1e6:.3g}",
                     f"{one.memory / 1e9:.3g}" + (" (too much)" if one.memory > machine.memory else ""),
                     "yes" if plan.is_exact else "no"])  # fmt: skip
    return table(*rows)


def by_size(
    heading: list[str], found: Callable[[DiTConfig, int], list[tuple[Plan, Cost]]], model: str
) -> Iterator[str]:
    """What two choices on 8 and on 64 GPUs take, by size."""
    rows = [["pixels", *(f"{count} GPUs{said}" for count in (8, 64) for said in heading)]]
    for size in SIZES:
        pairs = [pair for count in (8, 64) for pair in found(config_of(model, size), count)]
        rows.append([str(size), *(f"{seconds(one.latency)}, {alone(plan)}" for plan, one in pairs)])
    return table(*rows)


def patches(model: str) -> Iterator[str]:
    """What is gained by pipelines of patches, which are not exact."""

    def found(config: DiTConfig, count: int) -> list[tuple[Plan, Cost]]:
        every = recommend(config, count, is_exact=False)
        return [next(entry for entry in every if entry[0].is_exact == is_exact) for is_exact in (True, False)]

    return by_size([", exact", ", patches"], found, model)


def overlapped(model: str) -> Iterator[str]:
    """The bound of what is gained by hiding all transfers behind computing, as PipeDiT sets out to do."""

    def found(config: DiTConfig, count: int) -> list[tuple[Plan, Cost]]:
        return [recommend(config, count, machine)[0] for machine in (H100, replace(H100, overlap=1.0))]

    return by_size(["", ", transfers hidden"], found, model)


def draw(file: Path) -> None:
    """Latency against GPUs, for both models."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    for panel, model in zip(panels, MODELS, strict=True):
        for number, size in enumerate(SIZES):
            config, colour = config_of(model, size), f"C{number}"
            exact = [recommend(config, count)[0][1].latency for count in GPUS]
            every = [recommend(config, count, is_exact=False)[0][1].latency for count in GPUS]
            panel.loglog(GPUS, exact, "o-", color=colour, label=f"{size} pixels")
            panel.loglog(GPUS, every, ":", color=colour)
            panel.loglog(GPUS, [exact[0] / count for count in GPUS], color=colour, alpha=0.2)
        panel.set_title(model)
        panel.set_xlabel("GPUs; those that no image gains from hold replicas")
        panel.set_xticks(GPUS, [str(count) for count in GPUS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_ylim(0.02, 1000)
    panels[0].set_ylabel("seconds an image, 50 guided steps")
    panels[0].legend(fontsize=8, loc="upper right")
    panels[1].plot([], [], "k:", label="patch pipelines too")
    panels[1].plot([], [], "k", alpha=0.2, label="shared out perfectly")
    panels[1].legend(handles=panels[1].lines[-2:], fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    for model in MODELS:
        print(f"\n{model}: the least latency\n", *by_gpus(model), sep="\n")
    model = next(iter(MODELS))
    print(f"\n{model}, 1024 pixels\n", *ways(config_of(model, 1024), H100), sep="\n")
    print(f"\n{model}, 1024 pixels, slow links\n", *ways(config_of(model, 1024), SLOW), sep="\n")
    print("\n130 G parameters, 1024 pixels, slow links\n", *ways(HUGE, SLOW), sep="\n")
    print(f"\n{model}: pipelines of patches\n", *patches(model), sep="\n")
    print(f"\n{model}: transfers hidden\n", *overlapped(model), sep="\n")
    if arguments.figure:
        draw(arguments.figure)


if __name__ == "__main__":
    main()
