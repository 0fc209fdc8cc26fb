"""What a run saves: its checkpoints, from which it resumes, and its result."""

import copy
import logging
import signal
import time
from dataclasses import asdict
from typing import Any, cast

import torch
from diffusers import AutoencoderKL

from ..adapters import merge_adapters
from ..modeling_dit import DiTTransformer
from ..pipeline_dit import DiTPipeline
from .checkpoints import LOGS_FOLDER, Checkpoint, checkpoints, damaged, load_checkpoint, save_checkpoint
from .distilling import student_scheduler
from .ladder import stage_of
from .result import TrainingResult
from .run import Run, TrainingError
from .setup import check_same_recipe, make_scheduler
from .weights import ema_variant, merged_state

logger = logging.getLogger(__name__)


def save_run(run: Run) -> bool:
    """Write a checkpoint; return False if that fails, which does not end the run. All processes must call it."""
    if run.folder is None:
        return False
    tensors, facts = run.weights.state_dict()
    if run.distillation is not None:
        tensors |= run.distillation.state_dict()
    facts |= {"recipe": asdict(run.recipe), "data": run.data, **run.history.state_dict()}
    written = True
    if run.accelerator.is_main_process:
        try:
            if not all(weight.isfinite().all() for weight in tensors["model"].values()):
                raise OSError("the weights are not finite.")
            checkpoint = Checkpoint(run.step, tensors, facts, _empty_pipeline(run))
            save_checkpoint(run.folder, checkpoint, run.recipe.keep_last)
        except OSError as error:
            logger.error("No checkpoint at step %d: %s Training continues.", run.step, error)
            written = False
    run.accelerator.wait_for_everyone()
    return written


def stop_run(run: Run) -> None:
    """Save a checkpoint of a run that was asked to stop.

    Raises:
        TrainingError: it cannot be written.
        KeyboardInterrupt: the run was stopped by Ctrl-C.
    """
    if not save_run(run) and run.folder is not None:
        raise TrainingError(f"Stopped after step {run.step}, and its checkpoint could not be written.")
    if run.asked_to_stop == signal.SIGINT:
        raise KeyboardInterrupt(f"Stopped after step {run.step}, with a checkpoint in {run.folder}.")


def resume_run(run: Run) -> None:
    """Continue from the last checkpoint, if there is one.

    Raises:
        ValueError: it belongs to another recipe or other data, or is damaged, or is not on every machine.
    """
    kept = checkpoints(run.folder) if run.folder else []
    if kept:
        checkpoint = load_checkpoint(kept[-1])
        check_same_recipe(kept[-1], checkpoint.facts, run.recipe, run.data)
        try:
            run.weights.load_state_dict(checkpoint.tensors, checkpoint.facts)
            run.history.load_state_dict(checkpoint.facts)
            run.step = checkpoint.step
            _resume_teacher(run, checkpoint)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise damaged(kept[-1], error) from None
    step = torch.tensor([run.step], device=run.accelerator.device)
    steps: list[int] = cast(Any, run.accelerator.gather(step)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(f"The processes find checkpoints of the steps {', '.join(map(str, steps))}: {run.folder} "
                         "must lie on a disk that all machines share.")  # fmt: skip


def _resume_teacher(run: Run, checkpoint: Checkpoint) -> None:
    """Give a run the teacher of its last step, where that was a former student."""
    stage, _, _ = stage_of(run.recipe, max(run.step - 1, 0), run.last)
    if run.distillation is not None and stage:
        run.distillation.begin(stage, run.weights.whole_model(checkpoint.tensors["teacher"]))


def result_of(run: Run) -> TrainingResult:
    """The result so far. All processes must call it, since sharded weights are gathered."""
    weights, decays = run.weights, run.recipe.ema_decays
    model = weights.whole_model(weights.averaged(decays[0] if decays else None))
    averages = {ema_variant(decay): weights.averaged(decay) for decay in decays[1:]}
    adapted = None
    if run.recipe.lora_rank:
        adapted = None if run.recipe.merge_adapters else copy.deepcopy(model)
        merge_adapters(model)
        averages = {variant: merged_state(weights.whole_model(state)) for variant, state in averages.items()}
    pipeline = DiTPipeline(model, _scheduler(run), _decoder(run), run.dataset.id2label or None)
    if run.base is not None:  # the licence stays with the weights
        pipeline.origin = run.base.origin
    return TrainingResult(
        pipeline,
        run.recipe,
        run.dataset,
        epoch_losses=run.history.mean_losses(),
        seconds=time.perf_counter() - run.started,
        finished=run.step == run.last,
        main_process=run.accelerator.is_main_process,
        processes=run.accelerator.num_processes,
        skipped=run.history.skipped,
        averages=averages,
        adapted=adapted,
        logs=None if run.folder is None else run.folder / LOGS_FOLDER,
    )


def _empty_pipeline(run: Run) -> DiTPipeline | None:
    """A pipeline without weights, to describe a checkpoint; None with adapters, which are not merged yet."""
    if run.recipe.lora_rank:
        return None
    with torch.device("meta"):
        model = DiTTransformer(run.weights.plain.config)
    return DiTPipeline(model, _scheduler(run), None, run.dataset.id2label or None)


def _scheduler(run: Run) -> Any:
    """The scheduler of the pipeline."""
    scheduler = make_scheduler(run.recipe, run.weights.plain.config)
    return student_scheduler(run.recipe, scheduler) if run.recipe.distill else scheduler


def _decoder(run: Run) -> Any:
    """The decoder of the pipeline; loaded when it is needed, so that training has its memory."""
    if run.recipe.vae and run.accelerator.is_main_process:
        return AutoencoderKL.from_pretrained(run.recipe.vae)
    return None if run.base is None else run.base.vae
