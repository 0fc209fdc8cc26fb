"""Sampling for evaluation: many images, each of which depends on the seed and its number alone."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dit_hub.conversion.origin import DEFAULT_VAE

from ..checks import real_number, rising_pair, whole_number
from ..files import file_sha256
from ..labels import Labels, parse_labels
from ..schedulers import default_steps, set_timesteps
from ..sharing import Progress, Worker
from ..vaes import decode_latents
from .provenance import FACTS_FILE, SCHEMA_VERSION, check_same, model_facts, read_facts, run_facts
from .sample_files import ARCHIVE_FILE, SampleFiles

# The paper's number of steps.
STEPS = 250

# Images that the decoder sees at a time.
_DECODED = 8

_LARGEST_SEED = 2**63 - 1


def sample_images(
    pipeline: Any,
    out: str | os.PathLike,
    num: int,
    labels: Labels | Literal["balanced", "random"] | os.PathLike = "balanced",
    seed: int = 0,
    batch_size: int = 64,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    timesteps: Sequence[int] | Literal["official"] | None = None,
    progress: Progress = lambda done, count: None,
) -> Path:
    """Draw images for an evaluation into a folder; a run that was cut resumes with those that are missing.

    The noise and the label of image i depend on the seed and i alone: not on `num`, the batch size, the machine, the
    number of processes or interruptions. Its pixels do so too for the same batch size and device; with another batch
    size sums are computed in another order, which changes a few pixels by one level of 255. The last batch has as many
    images as are left, and keeps them where `num` is raised later.

    Processes that `accelerate launch` or torchrun starts, on one machine or several with a common disk, share the work:
    each draws its own batches, and the last to end writes the archive. Memory does not grow with `num`.

    Args:
        pipeline: a `DiTPipeline` of any runtime, for grey or RGB images or with a decoder.
        out: gets images/00012/012345.png and so on, sampling.json (how the images were made; `"finished": true` at the
            end), and at the end samples.npz in ADM's format: `arr_0` (num, H, W, 3) uint8, and for a model with classes
            `arr_1` (num,) int64.
        num: of images. A folder may be resumed with a larger one.
        labels: "balanced": image i has the class i modulo their number; "random": uniform, by the seed; a text file
            with an id or a name on each line, or a list, with one for each image. Models without classes take none.
        seed: of the noise and the random labels, 0 to 2**63 - 1.
        batch_size: images per forward pass.
        num_inference_steps: None means 250, or the scheduler's own number; see `dit_hub.schedulers.default_steps`.
        guidance_scale: unlike in `DiTPipeline.__call__`, no guidance by default.
        guidance_interval, guidance_channels, timesteps: as for `DiTPipeline.__call__`.
        progress: called before the first batch and after each, with the number of this process's images that are
            there, and of all its own.

    Returns:
        The folder. Where other processes are still at work, samples.npz is not there yet.

    Raises:
        ValueError: a model that draws no images, arguments that it cannot serve, a folder that another process uses or
            that holds something else, or images that were made otherwise.
        OSError: the disk is full; the images that are there stay.
    """
    folder, worker = Path(out), Worker.from_environment()
    num, batch_size = whole_number("num", num, 1), whole_number("batch_size", batch_size, 1)
    seed = whole_number("seed", seed, 0, _LARGEST_SEED)
    _check_draws_images(pipeline)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and samples go to a folder.")
    channels = pipeline.transformer.config.guided_channels if guidance_channels is None else guidance_channels
    if num_inference_steps is None:
        num_inference_steps = default_steps(pipeline.scheduler, STEPS)
    options = {
        "num_inference_steps": num_inference_steps,
        "timesteps": timesteps,
        "guidance_scale": real_number("guidance_scale", guidance_scale),
        "guidance_interval": rising_pair("guidance_interval", guidance_interval),
        "guidance_channels": channels,
    }
    classes = label_of_each(labels, num, seed, pipeline)
    facts = _facts(pipeline, options, num, seed)
    facts["labels"] = None if classes is None else {"policy": _policy(labels), "sha256": _digest(classes)}
    refusal = f"Another process draws samples in {folder}; wait for it to end, or choose another folder."
    with worker.at_work(folder, refusal), _without_bars(pipeline):
        samples = _Samples(folder, worker, pipeline, options, batch_size, classes, facts)
        if not samples.are_finished():
            samples.draw_share(progress)
            samples.finish_if_last()
    return folder


def _facts(pipeline: Any, options: dict[str, Any], num: int, seed: int) -> dict[str, Any]:
    """What sampling.json says of samples, but for their labels and the runs that drew them."""
    steps, scheduler = options["num_inference_steps"], pipeline.scheduler
    set_timesteps(scheduler, steps, options["timesteps"], "cpu")
    height_width = pipeline.transformer.config.sample_height_width
    return {
        "schema_version": SCHEMA_VERSION,
        **model_facts(pipeline),
        "steps": steps,
        "timesteps": [round(timestep, 4) for timestep in scheduler.timesteps.tolist()],
        "guidance": {name: options[f"guidance_{name}"] for name in ("scale", "interval", "channels")},
        "seed": seed,
        "image_size": [side * pipeline.vae_scale_factor for side in height_width],
        "num": num,
    }


def label_of_each(labels: Any, num: int, seed: int, pipeline: Any) -> np.ndarray | None:
    """(num,) int64 class ids; None for a model without classes. Arguments and errors as for `sample_images`."""
    count = pipeline.transformer.config.num_classes
    policy = _policy(labels)
    if not count:
        if policy == "given":
            raise ValueError("This model has no classes; leave the labels out.")
        return None
    if policy == "balanced":
        return np.arange(num) % count
    if policy == "random":
        # numpy keeps the raw numbers of a bit generator the same for ever, and not what `Generator` makes of them. The
        # first classes are more frequent by a share of `count` / 2**64.
        return (np.random.PCG64(seed).random_raw(num) % np.uint64(count)).astype(np.int64)
    if isinstance(labels, (str, os.PathLike)):
        try:
            lines = Path(labels).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The labels are balanced, random or a text file, and {labels} cannot be read as one "
                             f"({error}).") from None  # fmt: skip
        labels = parse_labels([line for line in lines if line.strip()], pipeline.id2label)
    classes = np.array(pipeline.get_label_ids(labels), np.int64)
    if len(classes) < num:
        raise ValueError(f"There are {len(classes)} labels for {num} images; give one for each.")
    return classes[:num]


def noise_seed(seed: int, index: int) -> int:
    """The seed of the generator of all noise of an image.

    PyTorch's generator on processors takes 32 bits, in which hashes of (seed, index) would collide for one pair among
    100,000 images. So only the seed is hashed, and the index is added: up to 2**32 images have different noise.
    """
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return (start + index) % 2**32


class _Samples:
    """The samples of a folder; see `sample_images`.

    Args:
        folder, worker, pipeline, batch_size: as there.
        options: of the pipeline's call.
        classes: (num,) the class of each image; None for a model without classes.
        facts: about the samples, of which those about this run are no part.
    """

    def __init__(
        self,
        folder: Path,
        worker: Worker,
        pipeline: Any,
        options: dict[str, Any],
        batch_size: int,
        classes: np.ndarray | None,
        facts: dict[str, Any],
    ):
        self.folder, self.worker, self.pipeline, self.options = folder, worker, pipeline, options
        self.num, self.seed, self.batch_size, self.classes = facts["num"], facts["seed"], batch_size, classes
        self.facts = json.loads(json.dumps(facts))  # as they are read again
        self.run = run_facts(pipeline, batch_size, worker)
        self.files = SampleFiles(folder, worker, tuple(facts["image_size"]))
        self.files.check_own()
        self._noted = False

    def are_finished(self) -> bool:
        """Whether the archive of these samples is there.

        Raises:
            ValueError: the folder is for other samples.
        """
        noted = read_facts(self.folder)
        if noted is None:
            return False
        check_same(self.folder, noted, self.facts)
        if noted["num"] > self.num:
            raise ValueError(f"{self.folder} is for {noted['num']} images, and this run wants only {self.num}; choose "
                             "another folder.")  # fmt: skip
        labels = None if self.classes is None else _digest(self.classes[: noted["num"]])
        if (noted["labels"] or {}).get("sha256") != labels:
            raise ValueError(f"{self.folder} holds images of other labels; choose another folder.")
        return noted["num"] == self.num and noted["finished"] and (self.folder / ARCHIVE_FILE).is_file()

    def draw_share(self, progress: Progress) -> None:
        """Draw this process's batches, but for those whose images are all there.

        The batches are fixed: images `batch_size` * k and so on. Of one of which an image is missing, all are drawn
        again, so that each is always drawn beside the same others.
        """
        starts = self.worker.share(range(0, self.num, self.batch_size))
        present = self.files.present(self.num)
        count = sum(len(self._window(start)) for start in starts)
        done = sum(int(present[start : start + self.batch_size].sum()) for start in starts)
        progress(done, count)
        for start in starts:
            missing = [index for index in self._window(start) if not present[index]]
            if missing:
                self._draw_again(start, missing)
                done += len(missing)
                progress(done, count)

    def finish_if_last(self) -> None:
        """Write the archive if all images are there and no other process is at it."""
        if not self.files.present(self.num).all():
            return
        with self.worker.as_last(self.folder) as last:
            if not last or self.are_finished():
                return
            self._note()  # of a run that had nothing to draw
            self.files.remove_leftovers()
            self.files.write_archive(self.num, self.classes, self._image)
            self._note(finished=True, sha256=file_sha256(self.folder / ARCHIVE_FILE))

    def _window(self, start: int) -> range:
        return range(start, min(start + self.batch_size, self.num))

    def _image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8; drawn again where its file is damaged."""
        image = self.files.read(index)
        if image is None:
            start = index - index % self.batch_size
            damaged = [other for other in self._window(start) if self.files.read(other) is None]
            image = self._draw_again(start, damaged)[index - start]
        return image

    def _draw_again(self, start: int, wanted: Sequence[int]) -> np.ndarray:
        """Draw a batch, and write the images that are wanted; returns (N, H, W, 3) uint8, all of them."""
        images = self._draw(self._window(start))
        if not self._noted:  # only now, since the pipeline may refuse its arguments
            self._note()
        for index in wanted:
            self.files.write(index, images[index - start])
        return images

    @torch.no_grad()
    def _draw(self, window: range) -> np.ndarray:
        """(N, H, W, 3) uint8 of the images of these numbers."""
        pipeline = self.pipeline
        latents = pipeline(
            None if self.classes is None else self.classes[window.start : window.stop],
            num_images_per_label=1 if self.classes is not None else len(window),
            # On the processor wherever the model computes, so that all machines draw the same noise.
            generator=[torch.Generator().manual_seed(noise_seed(self.seed, index)) for index in window],
            output_type="latent",
            **self.options,
        ).images
        if pipeline.vae is None:
            return _levels(latents)
        # A few at a time: a decoder's activations for 64 images of 256x256 would take 15 GB.
        images = [_levels(decode_latents(pipeline.vae, part)) for part in latents.split(_DECODED)]
        pipeline.maybe_free_model_hooks()
        return np.concatenate(images)

    def _note(self, finished: bool = False, **facts: Any) -> None:
        """Write what is known of the samples, with this run among those that drew them."""
        with self.worker.noting(self.folder):
            noted = read_facts(self.folder) or {}
            runs = noted.get("runs", [])
            runs = runs if self.run in runs else [*runs, self.run]
            text = json.dumps({**self.facts, "runs": runs, "finished": finished, **facts}, indent=1)
            self.worker.write(self.folder / FACTS_FILE, lambda path: path.write_text(text + "\n"))
        self._noted = True


@contextmanager
def _without_bars(pipeline: Any) -> Iterator[None]:
    """Within the block, a pipeline shows no progress of its steps."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def _levels(pixels: Tensor) -> np.ndarray:
    """(N, 1 or 3, H, W) in -1..1 -> (N, H, W, 3) uint8, rounded as the official code does: floor(127.5 x + 128)."""
    levels = (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def _check_draws_images(pipeline: Any) -> None:
    if pipeline.vae is None and not pipeline.transformer.config.draws_pixels:
        raise ValueError(f"This model draws latents of {pipeline.transformer.config.in_channels} channels and the "
                         f"pipeline has no decoder for them; give one, such as {DEFAULT_VAE}.")  # fmt: skip


def _policy(labels: Any) -> str:
    return labels if isinstance(labels, str) and labels in ("balanced", "random") else "given"


def _digest(classes: np.ndarray) -> str:
    """The SHA-256 of labels as little-endian int64."""
    return hashlib.sha256(classes.astype("<i8").tobytes()).hexdigest()
