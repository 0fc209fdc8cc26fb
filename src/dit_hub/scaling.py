"""What several GPUs bring to sampling: a model of time, bytes sent and memory for the ways to split the work.

It counts what each GPU computes and sends in a step, which the tests compare with processes that really do it, and
divides by what a machine is said to do. The decoder is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, NamedTuple

from .configuration_dit import DiTConfig

_FLOAT32 = 4  # bytes: of the residual stream and of predictions, whatever the weights are


@dataclass(frozen=True)
class Machine:
    """GPUs and their links.

    Args:
        flops: operations of a GPU per second (two for a multiply-add), at its data sheet's best.
        efficiency: the share of `flops` that a model reaches.
        memory: bytes of a GPU.
        memory_bandwidth: bytes per second from a GPU's memory.
        block_seconds: the least time of a block, however small its work: its kernels must start.
        gpus_per_node: within a node the fast links hold, beyond it the slow ones.
        bandwidth, latency: of the fast links, bytes per second each way of a GPU, and seconds of a call.
        bandwidth_between, latency_between: of the slow links.
        overlap: the share of the transfers within a step that is hidden behind computing, where there is as much of it;
            1 is the bound of what PipeDiT's sequence parallelism (PipeSP) can reach. 0 is what the plans here do.
    """

    flops: float = 989e12
    efficiency: float = 0.5
    memory: float = 80e9
    memory_bandwidth: float = 3.35e12
    block_seconds: float = 30e-6
    gpus_per_node: int = 8
    bandwidth: float = 450e9
    latency: float = 15e-6
    bandwidth_between: float = 50e9
    latency_between: float = 30e-6
    overlap: float = 0.0


# NVIDIA's data sheets: 989 TFLOP/s in bf16 without sparsity; NVLink 900 GB/s, half of it each way; and an InfiniBand
# NDR port of 400 Gbit/s for each GPU. Efficiency, latencies and a block's least time are assumptions.
H100 = Machine()
H200 = Machine(memory=141e9, memory_bandwidth=4.8e12)


@dataclass(frozen=True)
class Plan:
    """How the work is split; the numbers multiply to the number of GPUs.

    Args:
        replicas: of everything else, each with images of its own.
        cfg: 2: the two halves of guidance on different GPUs (`dit_hub.parallel.CFGParallel`).
        ulysses, ring: context parallelism of diffusers: the tokens on different GPUs.
        tensor: tensor parallelism of transformers: the weights of each layer on different GPUs.
        stages: the blocks on different GPUs; the rows of a pass go through them one after the other (GPipe).
        patches: for stages: the tokens go through them in so many pieces, and attend to those of the step before
            (PipeFusion). Not exact. 0 for GPipe.
    """

    replicas: int = 1
    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    tensor: int = 1
    stages: int = 1
    patches: int = 0

    @property
    def per_replica(self) -> int:
        """GPUs of a replica."""
        return self.cfg * self.ulysses * self.ring * self.tensor * self.stages

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.replicas * self.per_replica

    @property
    def is_exact(self) -> bool:
        """Whether the images are those of one GPU, to rounding."""
        return not self.patches

    def __str__(self) -> str:
        names = {"cfg": "CFG", "ulysses": "Ulysses", "ring": "ring", "tensor": "tensor",
                 "stages": "patch pipeline" if self.patches else "pipeline"}  # fmt: skip
        parts = [f"{name} {getattr(self, field)}" for field, name in names.items() if getattr(self, field) > 1]
        counted = [f"{self.replicas} replicas"] * (self.replicas > 1)
        return " x ".join([*counted, *parts]) or "1 GPU"


class Transfer(NamedTuple):
    """Calls of one kind in a step, and the bytes of one GPU's part in all of them.

    Args:
        kind: "all_gather", "all_reduce", "all_to_all", "broadcast" or "send".
        calls: their number.
        size: bytes.
        group: GPUs that take part.
        span: neighbouring GPUs among which they lie, which says whether a node holds them.
    """

    kind: str
    calls: int
    size: int
    group: int
    span: int

    @property
    def sent(self) -> float:
        """Bytes that leave a GPU, by the ring algorithms of NCCL."""
        others = self.group - 1
        share = {"all_gather": others, "all_reduce": 2 * others / self.group, "all_to_all": others / self.group}
        return self.size * share.get(self.kind, 1.0)


@dataclass(frozen=True)
class Cost:
    """What a plan costs.

    Args:
        step_seconds: of one step.
        latency: seconds until the images of a batch are there.
        throughput: images per second of all GPUs.
        sent: bytes that leave a GPU in a step.
        memory: bytes on the fullest GPU; the activations' part is an estimate.
    """

    step_seconds: float
    latency: float
    throughput: float
    sent: float
    memory: float


# --- Counts ----------------------------------------------------------------------------------------------------------


def tokens(config: DiTConfig) -> int:
    """Patches of an image."""
    height, width = config.sample_height_width
    return (height // config.patch_size) * (width // config.patch_size)


class Work(NamedTuple):
    """Operations of one row, with the modulations computed ahead: `embed`, and of a block `linear` and `attention`."""

    embed: int
    linear: int
    attention: int
    final: int


def work(config: DiTConfig) -> Work:
    """The operations of one row of a pass."""
    count, width, patch = tokens(config), config.hidden_size, config.patch_size**2
    inner = int(width * config.mlp_ratio)
    return Work(
        embed=2 * count * patch * config.in_channels * width,
        linear=2 * count * width * (4 * width + 2 * inner),
        attention=4 * count**2 * width,
        final=2 * count * width * patch * config.out_channels,
    )


def operations(config: DiTConfig, plan: Plan, rows: int) -> float:
    """The operations of the busiest GPU in a step.

    Args:
        config: with the size of the image.
        plan: see there.
        rows: of a replica's pass; a guided image has two.
    """
    one, layers = work(config), config.num_hidden_layers
    rows = rows // plan.cfg
    split = plan.ulysses * plan.ring
    block = one.linear / plan.tensor / split + one.attention / split  # each GPU of `tensor` attends to all
    if plan.stages > 1:
        return rows * (ceil(layers / plan.stages) * block + max(one.embed, one.final))
    return rows * (one.embed + layers * block + one.final / split)


def transfers(config: DiTConfig, plan: Plan, rows: int, itemsize: int = 2) -> list[Transfer]:
    """What a GPU sends in a step, at most; `itemsize` is that of a weight in bytes, `rows` as for `operations`."""
    count, width, layers = tokens(config), config.hidden_size, config.num_hidden_layers
    rows = rows // plan.cfg
    values, found = rows * count * width, list[Transfer]()
    split, near = plan.ulysses * plan.ring, plan.per_replica // plan.cfg  # the halves of guidance are further apart
    if plan.ulysses > 1:  # query, key, value and output of each attention
        found.append(
            Transfer("all_to_all", 4 * layers, 4 * layers * values // split * itemsize, plan.ulysses, plan.ulysses)
        )
    if plan.ring > 1:  # key and value together
        found.append(Transfer("all_gather", layers, 2 * layers * values // split * itemsize, plan.ring, near))
    outputs = rows * count * config.patch_size**2 * config.out_channels
    if split > 1:
        found.append(Transfer("all_gather", 1, outputs // split * itemsize, split, near))
    if plan.tensor > 1:  # query, key and value gathered; the outputs of attention and MLP summed
        gathered = 3 * layers * values // plan.tensor * itemsize
        found.append(Transfer("all_gather", layers, gathered, plan.tensor, near))
        found.append(Transfer("all_reduce", 2 * layers, 2 * layers * values * itemsize, plan.tensor, near))
    if plan.stages > 1:
        found.append(Transfer("send", plan.patches or rows, values * _FLOAT32, 2, near))
        found.append(Transfer("broadcast", 1, outputs * _FLOAT32, plan.stages, near))
    if plan.cfg > 1:
        found.append(Transfer("all_gather", 1, outputs * _FLOAT32, plan.cfg, plan.per_replica))
    return found


def weights(config: DiTConfig, plan: Plan) -> int:
    """The parameters that the fullest GPU holds; tensor parallelism leaves modulations and embeddings whole."""
    width, patch, split = config.hidden_size, config.patch_size**2, plan.tensor
    inner, rows = int(width * config.mlp_ratio), config.modulation_rows
    attention = (3 * width * (width + 1) + width * width) // split + width
    mlp = (inner * (width + 1) + inner * width) // split + width
    block = attention + mlp + rows * width * (width + 1)
    classes = config.num_classes + (config.null_class is not None) if config.num_classes else 0
    embeddings = (patch * config.in_channels + 1 + config.timestep_freq_dim + 1 + width + 1 + classes) * width
    positions = tokens(config) * width if config.pos_embed == "learned" else 0
    final = 2 * width * (width + 1) + (width + 1) * patch * config.out_channels
    return ceil(config.num_hidden_layers / plan.stages) * block + embeddings + positions + final


def _activations(config: DiTConfig, plan: Plan, rows: int, itemsize: int) -> float:
    """Bytes alive in a block: residual stream and its norm in float32; query, key, value and output, or the MLP's."""
    split = plan.ulysses * plan.ring
    pieces = plan.patches or (rows if plan.stages > 1 else 1)
    values = rows / plan.cfg * tokens(config) / split * config.hidden_size
    inner = max(4.0, 2 * config.mlp_ratio / plan.tensor)
    remembered = 2 * ceil(config.num_hidden_layers / plan.stages) * itemsize if plan.patches else 0  # keys and values
    return values * (2 * _FLOAT32 + (1 + inner) * itemsize) / pieces + values * remembered


# --- Costs -----------------------------------------------------------------------------------------------------------


def cost(
    config: DiTConfig,
    plan: Plan,
    machine: Machine = H100,
    steps: int = 50,
    images: int = 1,
    guided: bool = True,
    itemsize: int = 2,
) -> Cost:
    """What a plan costs.

    Args:
        config: with the size of the image, such as `DiTConfig.from_name("DiT-XL/2", image_size=1024)`.
        plan: how the work is split.
        machine: what the GPUs do.
        steps: of an image.
        images: of a replica's batch.
        guided: whether all steps are.
        itemsize: bytes of a weight.

    Raises:
        ValueError: a plan that this model cannot be split by.
    """
    if (reason := misfit(config, plan, images, guided)) is not None:
        raise ValueError(reason)
    rows = images * (2 if guided else 1)
    held = weights(config, plan) * itemsize
    layers = ceil(config.num_hidden_layers / plan.stages)
    read, begin = held / machine.memory_bandwidth, layers * machine.block_seconds

    def computing(share: float) -> float:
        return max(operations(config, plan, rows) * share / (machine.flops * machine.efficiency), read, begin)

    moved = transfers(config, plan, rows, itemsize)
    sending = sum(_seconds(each, machine) for each in moved)
    ahead = 0.0
    if plan.stages == 1:
        step = computing(1) + sending - machine.overlap * min(computing(1), sending)
    elif plan.patches:  # a step begins before the last one has ended; the first one fills the pipeline
        step = plan.patches * computing(1 / plan.patches) + sending
        ahead = (plan.stages - 1) * step
    else:
        pieces = rows // plan.cfg
        between = sum(_seconds(each, machine) for each in moved if each.kind == "send")
        turns = pieces + plan.stages - 1
        step = turns * (computing(1 / pieces) + between / pieces) + sending - between
    latency = steps * step + ahead
    memory = held + _activations(config, plan, rows, itemsize)
    return Cost(step, latency, plan.replicas * images / latency, sum(each.sent for each in moved), memory)


def _seconds(transfer: Transfer, machine: Machine) -> float:
    if transfer.span <= machine.gpus_per_node:
        return transfer.calls * machine.latency + transfer.sent / machine.bandwidth
    return transfer.calls * machine.latency_between + transfer.sent / machine.bandwidth_between


def misfit(config: DiTConfig, plan: Plan, images: int = 1, guided: bool = True) -> str | None:
    """Why a model cannot be split by a plan, in a sentence; None where it can."""
    if not config.modulation_rows:
        return f"The model of costs covers adaLN-Zero and adaLN, not {config.conditioning}."
    if plan.replicas * plan.per_replica < 1 or plan.patches < 0:
        return f"The numbers of a plan are 1 or more, and those of {plan!r} are not."
    if plan.cfg not in (1, 2) or (plan.cfg == 2 and not guided):
        return "Guidance has two halves, which one or two GPUs compute; without guidance there is one."
    if sum(number > 1 for number in (plan.ulysses * plan.ring, plan.tensor, plan.stages)) > 1:
        return "Of tokens, weights and blocks one kind can be split."
    if config.num_attention_heads % plan.ulysses:
        return f"{config.num_attention_heads} heads cannot be shared by {plan.ulysses} GPUs."
    if tokens(config) % (plan.ulysses * plan.ring):
        return f"{tokens(config)} tokens cannot be shared by {plan.ulysses * plan.ring} GPUs."
    if config.hidden_size % plan.tensor:
        return f"A hidden size of {config.hidden_size} cannot be shared by {plan.tensor} GPUs."
    if plan.stages > config.num_hidden_layers:
        return f"{config.num_hidden_layers} blocks cannot make {plan.stages} stages."
    if plan.patches and (plan.stages == 1 or plan.patches < plan.stages):
        return "Patches need stages, and at least as many as there are of these."
    return None


# --- Advice ----------------------------------------------------------------------------------------------------------


def plans(config: DiTConfig, gpus: int, guided: bool = True) -> Iterator[Plan]:
    """Plans that use all of so many GPUs, in powers of two; what does not serve one image makes replicas."""
    powers = [2**power for power in range(gpus.bit_length())]
    ways: list[dict[str, int]] = [{"ulysses": ulysses, "ring": ring} for ulysses in powers for ring in powers]
    for number in powers[1:]:
        ways += [{"tensor": number}, {"stages": number}, {"stages": number, "patches": number}]
    for way in ways:
        for cfg in (1, 2) if guided else (1,):
            plan = Plan(**way, cfg=cfg)
            if gpus % plan.per_replica == 0 and misfit(config, plan, guided=guided) is None:
                yield replace(plan, replicas=gpus // plan.per_replica)


def recommend(
    config: DiTConfig,
    gpus: int,
    machine: Machine = H100,
    objective: Literal["latency", "throughput"] = "latency",
    steps: int = 50,
    images: int = 1,
    guided: bool = True,
    is_exact: bool = True,
) -> Sequence[tuple[Plan, Cost]]:
    """The plans that fit into memory, the best one first.

    Args:
        gpus: all of which are used, as replicas where no image needs them.
        objective: what to put first; the other one decides between equals.
        is_exact: leave out those whose images are not those of one GPU.
        config, machine, steps, images, guided: as for `cost`.

    Raises:
        ValueError: an unknown objective, or nothing fits into memory.
    """
    if objective not in ("latency", "throughput"):
        raise ValueError(f"objective must be latency or throughput, not {objective!r}.")
    found = [(plan, cost(config, plan, machine, steps, images, guided)) for plan in plans(config, gpus, guided)]
    fitting = [(plan, one) for plan, one in found
               if one.memory <= machine.memory and (plan.is_exact or not is_exact)]  # fmt: skip
    if not fitting:
        least = min(one.memory for _, one in found)
        raise ValueError(f"Nothing fits: of {gpus} GPUs the fullest needs {least / 1e9:.0f} GB of memory at least, and "
                         f"one has {machine.memory / 1e9:.0f}.")  # fmt: skip
    signs = (1, -1) if objective == "latency" else (-1, 1)

    def rank(entry: tuple[Plan, Cost]) -> tuple[float, ...]:
        values = (entry[1].latency, entry[1].throughput)
        ordered = values if objective == "latency" else values[::-1]
        return tuple(sign * value for sign, value in zip(signs, ordered, strict=True))

    return sorted(fitting, key=rank)
