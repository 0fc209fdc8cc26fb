"""The serving engine, driven step by step: what shares a batch changes no image, and everybody is served."""

import contextlib
import math
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_hub import DiTPipeline, tables
from dit_hub.export import export_onnx
from dit_hub.schedulers import TableScheduler, switch_scheduler
from dit_hub.serving import engine as engine_module
from dit_hub.serving.engine import Engine
from dit_hub.serving.pace import Pace
from dit_hub.serving.passes import Modulations
from dit_hub.serving.requests import Event, ImageRequest, Job, Pass, QueueFullError
from dit_hub.serving.runner import FairLock, Runner

# Of float32 on a processor, relative (L2): another batch size sums in another order.
ROUNDING = 1e-5

MakePipeline = Callable[..., DiTPipeline]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def alone(pipeline: DiTPipeline, request: ImageRequest, index: int = 0, output_type: str = "latent") -> Any:
    """An image of a request as a pipeline draws it by itself."""
    solo = DiTPipeline(**pipeline.components)
    if request.scheduler is not None:
        solo.scheduler = switch_scheduler(pipeline.scheduler, request.scheduler)
    solo.set_progress_bar_config(disable=True)
    return solo(
        request.label,
        guidance_scale=request.guidance_scale,
        guidance_interval=request.guidance_interval,
        num_inference_steps=request.num_inference_steps,
        eta=request.eta,
        height=request.height,
        width=request.width,
        generator=torch.Generator().manual_seed(request.seed + index),
        output_type=output_type,  # pyright: ignore[reportArgumentType]
    ).images[0]


def check(pipeline: DiTPipeline, jobs: list[Job], rounding: float = ROUNDING) -> None:
    """Every image of the jobs is that of its solo run."""
    for job in jobs:
        assert job.state == "done", job.error
        for index, image in enumerate(job.images):
            expected = alone(pipeline, job.request, index)
            error = (torch.as_tensor(image) - expected).norm() / expected.norm()
            assert error <= rounding, job.request


def latent(label: int | str | None, seed: int, steps: int, **fields: Any) -> ImageRequest:
    return ImageRequest(label, seed=seed, num_inference_steps=steps, output_type="latent", **fields)


CROWD = [
    latent(0, 1, 10),
    latent(1, 2, 100, scheduler="ddim", guidance_scale=1.5),
    latent(2, 3, 33, scheduler="dpm++", guidance_scale=4.0, guidance_interval=(0.2, 0.7)),
    latent(3, 4, 20, scheduler="ddpm", guidance_scale=2.0),
    latent(0, 5, 50, scheduler="ddpm", guidance_scale=1.0, n=2),
    latent(1, 6, 12, scheduler="unipc", guidance_scale=7.5, n=3),
    latent(2, 7, 25, scheduler="ddim", eta=0.7, guidance_interval=(0.0, 0.5)),
    latent(2, 7, 25, scheduler="ddim", eta=0.0),
    latent(3, 8, 15, scheduler="deis", guidance_scale=0.0),
    latent(0, 9, 10, scheduler="heun"),
    latent(1, 10, 10, scheduler="euler", guidance_interval=(0.5, 0.5)),
    latent(2, 11, 8, scheduler="searched"),
    latent(3, 12, 60, scheduler="euler-ancestral", height=16, width=12),
    latent(1, 13, 11, scheduler="dpm++", height=16, width=12, n=2),
]


@pytest.mark.parametrize("fields", [{}, {"learn_sigma": False}, {"conditioning": "in_context"}], ids=str)
def test_images_of_a_mixed_crowd_are_those_of_solo_runs(make_pipeline: MakePipeline, fields: dict[str, Any]) -> None:
    """Requests join and leave at any step; some are cancelled on their way."""
    from diffusers import DDPMScheduler

    kind = "fixed_large" if fields.get("learn_sigma") is False else "learned_range"
    scheduler = DDPMScheduler(clip_sample=False, variance_type=kind)  # pyright: ignore[reportArgumentType]
    pipeline = make_pipeline(scheduler=scheduler, **fields)
    engine = Engine(pipeline, max_batch=9)
    chance, jobs, cancelled = random.Random(0), [], []
    requests = [*CROWD]
    chance.shuffle(requests)
    while requests or engine.waiting or engine.running:
        if requests and chance.random() < 0.2:
            jobs.append(engine.submit(requests.pop()))
            if chance.random() < 0.3:
                cancelled.append(engine.submit(latent(2, 99, 40, scheduler=chance.choice(["ddpm", "unipc"]))))
        if cancelled and chance.random() < 0.05:
            engine.cancel(chance.choice(cancelled))
        engine.step()
        engine.decode()
    assert {job.state for job in cancelled} >= {"cancelled"}
    check(pipeline, jobs)


def test_schedulers_that_clip_or_start_from_less_noise(make_pipeline: MakePipeline) -> None:
    from diffusers import DDPMScheduler

    faint = TableScheduler(TableScheduler.from_name("searched").config.tables, init_noise_sigma=0.8)
    for scheduler in (DDPMScheduler(clip_sample=True), faint):
        pipeline = make_pipeline(scheduler=scheduler, learn_sigma=False)
        engine = Engine(pipeline)
        jobs = [engine.submit(latent(seed, seed, 7 + seed)) for seed in range(3)]
        engine.run()
        check(pipeline, jobs)


def test_a_batch_of_one_row_and_rows_of_a_filled_batch_draw_the_same(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    sizes: list[int] = []
    run, pipeline.transformer.forward = (
        pipeline.transformer.forward,
        lambda *args, **kwargs: (
            sizes.append(len(args[0])),
            run(*args, **kwargs),
        )[1],
    )
    engine = Engine(pipeline, max_batch=100, batch_sizes=[4, 8])
    jobs = [engine.submit(latent(label, label, 3 + label, guidance_scale=1 + label % 2)) for label in range(4)]
    engine.run()
    del pipeline.transformer.forward
    assert set(sizes) == {4, 8}
    check(pipeline, jobs)
    unguided = Engine(pipeline, max_batch=1)
    jobs = [unguided.submit(latent(label, label, 3, guidance_scale=1.0)) for label in range(3)]
    unguided.run()
    check(pipeline, jobs)
    with pytest.raises(ValueError, match="takes 2 rows of a pass"):
        unguided.submit(latent(0, 0, 3, guidance_scale=2.0))


def test_models_without_classes_and_of_velocities_share_passes_too(make_pipeline: MakePipeline) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = make_pipeline(num_classes=0, class_dropout_prob=0.0)
    engine = Engine(pipeline)
    jobs = [engine.submit(latent(None, seed, 4 + seed)) for seed in range(3)]
    engine.run()
    check(pipeline, jobs)
    with pytest.raises(ValueError, match="unconditional"):
        engine.submit(latent(1, 0, 4))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = make_pipeline(scheduler=scheduler, parameterization="flow", learn_sigma=False)
    engine = Engine(pipeline)
    jobs = [engine.submit(latent(seed, seed, 4 + seed, preview_every=2)) for seed in range(3)]
    engine.run()
    check(pipeline, jobs)


def test_decoded_images_are_the_pipelines_own(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(latent=True)
    engine, events = Engine(pipeline), list[Event]()
    job = engine.submit(ImageRequest(2, n=3, seed=5, num_inference_steps=7, preview_every=3), events.append)
    engine.run()
    for index, image in enumerate(job.images):
        assert image is not None
        expected = np.asarray(alone(pipeline, job.request, index, "pil")).astype(int)
        assert image.dtype == np.uint8
        assert np.abs(image - expected).max() <= 1
    assert [event.kind for event in events if event.kind != "preview"] == ["image"] * 3 + ["done"]
    previews = [(event.index, event.step) for event in events if event.kind == "preview"]
    assert sorted(previews) == [(index, step) for index in range(3) for step in (3, 6)]
    assert all(event.image is not None and event.image.shape == (16, 16, 3) for event in events[:-1])


def test_previews_near_the_image(make_pipeline: MakePipeline) -> None:
    """The estimate of the data at the last but one step of many is nearly the image, for every kind of solver."""
    pipeline = make_pipeline()
    for scheduler in ("ddim", "dpm++", "euler", "unipc"):
        engine, events = Engine(pipeline), list[Event]()
        job = engine.submit(
            ImageRequest(1, num_inference_steps=50, preview_every=49, scheduler=scheduler), events.append
        )
        engine.run()
        preview, image = events[0].image, job.images[0]
        assert preview is not None
        assert image is not None
        assert np.abs(preview.astype(int) - image).mean() < 2, scheduler
        blank = np.abs(np.full_like(preview, 128).astype(int) - image).mean()
        assert blank > 20


@pytest.mark.parametrize(("runtime", "precompute"), [("onnxruntime", True), ("onnxruntime", False), ("openvino", True)])
def test_every_runtimes_denoiser_serves(
    make_pipeline: MakePipeline, tmp_path: Path, runtime: str, precompute: bool
) -> None:
    pipeline = make_pipeline(latent=True)
    export_onnx(pipeline, tmp_path, runtime=runtime, precompute=precompute, precision="fp32")
    engine = Engine(DiTPipeline.from_pretrained(tmp_path), max_batch=6)
    jobs = [engine.submit(latent(label, label, 4 + 3 * label, scheduler="ddim")) for label in range(4)]
    jobs += [engine.submit(latent(1, 8, 9, guidance_scale=1.0, scheduler="ddpm"))]
    images = engine.submit(ImageRequest(1, num_inference_steps=4))
    engine.run()
    check(pipeline, jobs, rounding=1e-4)  # of another runtime
    assert images.state == "done"


def test_a_whole_sampler_is_refused(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    export_onnx(make_pipeline(), tmp_path, ["sampler"])
    with pytest.raises(ValueError, match="whole sampler"):
        Engine(DiTPipeline.from_pretrained(tmp_path))


# --- Who is served when ----------------------------------------------------------------------------------------------


class SecondARow(Pace):
    """The pace of a machine that computes a row a second."""

    def note(self, rows: int, seconds: float) -> None:
        super().note(rows, float(rows))


def test_passes_have_no_more_rows_than_are_worth_it() -> None:
    """Where a pass takes time in proportion to its rows, few; where rows cost little beside the pass, all."""

    def useful(own: float, each: float, sizes: Sequence[int]) -> float:
        pace = Pace()
        for number, size in enumerate(sizes):
            slow = 50 if number % 7 == 0 else 1  # something else had the machine
            pace.note(size, slow * (own + each * size))
        return pace.useful_rows

    varied = [1, 4, 2, 16, 8, 3] * 50
    assert useful(0.0, 0.03, varied) == 1
    assert useful(0.0005, 0.001, varied) == 15
    assert useful(0.001, 0.001, varied) == math.inf
    assert useful(0.001, 0.0, varied) == math.inf
    assert useful(0.0, 0.03, [2] * 1000) == math.inf  # nothing to compare with
    assert useful(0.0, 0.03, []) == math.inf


def test_small_requests_overtake_large_ones_and_large_ones_are_served(make_pipeline: MakePipeline) -> None:
    """Under a stream of small requests that alone fills every pass, a large one ends all the same."""
    clock = Clock()
    order: list[str] = []
    engine = Engine(make_pipeline(), max_batch=2, clock=clock)
    engine.submit(latent(0, 0, 5, guidance_scale=1.0))
    engine.run()  # so that the time of a pass is known
    engine._pace = SecondARow()
    for _ in range(8):
        engine._pace.note(1, 1.0)
    engine.submit(latent(0, 0, 40, guidance_scale=1.0), lambda event: order.append(f"large {event.kind}"))
    first_small = engine.submit(latent(0, 1, 4, guidance_scale=1.0), lambda event: order.append(f"small {event.kind}"))
    for number in range(400):
        if number % 2 == 0:
            engine.submit(latent(1, 1, 4, guidance_scale=1.0, n=2))
        engine.step()
        engine.decode()
        clock.now += 1.0
        if "large done" in order:
            break
    assert first_small.state == "done"
    assert order.index("small done") < order.index("large done")
    assert "large done" in order


def test_priority_and_deadlines_decide_who_is_first(make_pipeline: MakePipeline) -> None:
    clock, ended = Clock(), list[str]()
    engine = Engine(make_pipeline(), max_batch=1, clock=clock)
    engine._pace = SecondARow()
    for _ in range(8):
        engine._pace.note(1, 1.0)

    def submit(name: str, **fields: Any) -> Job:
        request = latent(0, 0, 5, guidance_scale=1.0, **fields)
        return engine.submit(request, lambda event: ended.append(name) if event.kind == "done" else None)

    submit("low", priority=-3)
    submit("usual")
    submit("high", priority=3)
    submit("urgent", deadline=1.0)
    late = submit("late", deadline=0.5)
    clock.now = 0.6
    engine.run()
    assert ended == ["urgent", "high", "usual", "low"]
    assert late.state == "failed"
    assert isinstance(late.error, TimeoutError)


def test_a_deadline_that_passes_on_the_way_ends_the_request(make_pipeline: MakePipeline) -> None:
    clock = Clock()
    engine = Engine(make_pipeline(), clock=clock)
    job = engine.submit(latent(0, 0, 10, deadline=3.0))
    other = engine.submit(latent(0, 0, 10))
    for _ in range(5):
        engine.step()
        clock.now += 1
    assert job.state == "failed"
    assert engine.running == 1
    engine.run()
    assert other.state == "done"


def test_cancelled_requests_leave_at_once(make_pipeline: MakePipeline) -> None:
    passes: list[Pass] = []
    engine, events = Engine(make_pipeline(), max_batch=8, observer=passes.append), list[Event]()
    job = engine.submit(latent(0, 0, 10, n=8, guidance_scale=1.0), events.append)
    waiting = engine.submit(latent(0, 0, 10, n=5, guidance_scale=1.0))
    kept = engine.submit(latent(0, 1, 10, guidance_scale=1.0))
    engine.step()
    assert (engine.running, engine.waiting) == (8, 6)
    engine.cancel(job)
    engine.cancel(waiting)
    engine.cancel(waiting)  # it is over already
    assert (engine.running, engine.waiting) == (0, 1)
    engine.run()
    assert [row.images for row in passes] == [8] + [1] * 10
    assert [event.kind for event in events] == ["cancelled"]
    assert kept.state == "done"
    assert engine._state_bytes == 0


# --- Bounds ----------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_come_again(make_pipeline: MakePipeline) -> None:
    engine = Engine(make_pipeline(), max_waiting=4)
    engine.submit(latent(0, 0, 5, n=3))
    with pytest.raises(QueueFullError, match="3 images wait, and 2 more are too many") as refusal:
        engine.submit(latent(0, 0, 5, n=2))
    assert refusal.value.retry_after >= 1
    engine.submit(latent(0, 0, 5))
    engine.run()
    engine.submit(latent(0, 0, 5, n=4))


def test_memory_of_images_in_flight_is_bounded(make_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline()
    bound = 60_000  # of samples of 3 kB with none or many estimates
    monkeypatch.setattr(engine_module, "STATE_BYTES", bound)
    engine = Engine(pipeline, max_batch=64)
    jobs = [engine.submit(latent(0, seed, 20, scheduler=["ddim", "unipc"][seed % 2], n=3)) for seed in range(8)]
    highest = most = 0
    while engine.step() | engine.decode():
        highest = max(highest, engine._state_bytes)
        most = max(most, engine.running)
        rows = [*engine._running, *(row for row, _ in engine._undecoded)]
        held = sum(row.sample.nbytes + sum(past.nbytes for past in row.history) for row in rows)
        assert held <= engine._state_bytes
    assert bound / 2 < highest <= bound
    assert most < 24
    check(pipeline, jobs[:2])
    with pytest.raises(ValueError, match="takes 1250 rows of a pass"):
        engine.submit(latent(0, 0, 5, height=200, width=200))


def test_modulations_are_kept_within_their_bound(make_pipeline: MakePipeline) -> None:
    model = make_pipeline().transformer
    one = model.precompute(torch.tensor([5.0]), torch.tensor([1]))
    modulations = Modulations(model, torch.device("cpu"), most_bytes=3 * one.nbytes)
    calls: list[int] = []
    compute = model.precompute
    model.precompute = lambda *args: (calls.append(len(args[0])), compute(*args))[1]
    first = modulations([(5.0, 1), (6.0, 2), (5.0, 1)])
    assert calls == [2]
    torch.testing.assert_close(first[0], one[0])
    torch.testing.assert_close(first[2], one[0])
    torch.testing.assert_close(modulations([(6.0, 2), (7.0, 0), (8.0, 0), (9.0, 0)])[0], first[1])
    assert calls == [2, 3]
    assert len(modulations._kept) == 3


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_a_class_of_damaged_weights_fails_alone(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.transformer.y_embedder.embedding_table.weight[2] = float("nan")
    engine = Engine(pipeline)
    jobs = [engine.submit(latent(label, label, 6)) for label in (0, 1, 2, 3)]
    engine.run()
    assert [job.state for job in jobs] == ["done", "done", "failed", "done"]
    assert "not finite" in str(jobs[2].error)
    check(pipeline, [jobs[0], jobs[1], jobs[3]])


class Fragile(torch.nn.Module):
    """A denoiser that fails whenever it sees one class, or in batches above a size as for want of memory."""

    def __init__(self, model: Any, bad: int | None = None, most: int = 1000):
        super().__init__()
        self.model, self.bad, self.most = model, bad, most
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def forward(self, hidden_states: Any, timestep: Any, class_labels: Any) -> Any:
        if len(hidden_states) > self.most:
            raise torch.OutOfMemoryError("no memory for this batch")
        if self.bad in class_labels.tolist():
            raise RuntimeError("device assert")
        return self.model(hidden_states, timestep, class_labels)


def test_an_error_in_one_row_fails_that_request_alone(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    fragile = DiTPipeline(Fragile(pipeline.transformer, bad=2), pipeline.scheduler)
    engine = Engine(fragile)
    jobs = [engine.submit(latent(label, label, 6, scheduler="ddpm")) for label in (0, 1, 2, 3)]
    engine.run()
    assert [job.state for job in jobs] == ["done", "done", "failed", "done"]
    assert "device assert" in str(jobs[2].error)
    check(pipeline, [jobs[0], jobs[1], jobs[3]])
    for seed in range(12):  # one after the other is no broken runtime, while others succeed
        engine.submit(latent(2, seed, 2))
        engine.submit(latent(1, seed, 2))
        engine.run()


def test_a_failing_request_of_many_images_stops_nobody_else(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    engine = Engine(DiTPipeline(Fragile(pipeline.transformer, bad=2), pipeline.scheduler))
    bad = engine.submit(latent(2, 0, 6, n=16))
    good = engine.submit(latent(1, 0, 6, n=2))
    engine.run()
    assert (bad.state, good.state) == ("failed", "done")


def test_a_step_that_failed_late_is_repeated_with_the_same_noise(
    make_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may run out after the noise was drawn, in some rows or in all."""
    failures = 0

    def advance(row: Any, sample: torch.Tensor, *arguments: Any) -> torch.Tensor:
        nonlocal failures
        result = tables.advance(row, sample, *arguments)
        if len(sample) > 1 and failures < 6:
            failures += 1
            raise torch.OutOfMemoryError("late")
        return result

    monkeypatch.setattr("dit_hub.serving.passes.advance", advance)
    pipeline = make_pipeline()
    engine = Engine(pipeline)
    jobs = [
        engine.submit(latent(1, seed, 6, scheduler=name, guidance_scale=1.0))
        for seed, name in enumerate(["ddpm", "unipc", "ddpm"])
    ]
    engine.run()
    assert failures == 6
    check(pipeline, jobs)


def test_large_images_count_for_what_they_take(make_pipeline: MakePipeline) -> None:
    passes: list[Pass] = []
    engine = Engine(make_pipeline(), max_batch=8, observer=passes.append)
    side = 2 * engine.pipeline.transformer.config.sample_height_width[0]
    jobs = [engine.submit(latent(0, seed, 3, guidance_scale=1.0, height=side, width=side)) for seed in range(5)]
    engine.run()
    assert {job.state for job in jobs} == {"done"}
    assert max(one.images for one in passes) == 2


def test_requests_that_are_over_are_forgotten(make_pipeline: MakePipeline) -> None:
    engine = Engine(make_pipeline())
    engine.submit(latent(0, 0, 900, deadline=1e6, scheduler="ddim"))
    for seed in range(60):
        engine.submit(latent(0, seed, 1, deadline=1e6 + seed))
        engine.step()
        engine.decode()
    assert len(engine._deadlines) < 30


def test_passes_shrink_where_memory_does_not_suffice(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    engine = Engine(DiTPipeline(Fragile(pipeline.transformer, most=5), pipeline.scheduler), max_batch=16)
    jobs = [engine.submit(latent(1, 0, 6, n=8))]
    engine.run()
    assert engine.max_batch == 4
    check(pipeline, jobs)


def test_a_broken_runtime_is_reported_and_nobody_waits_for_it(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    runner = Runner(DiTPipeline(Fragile(pipeline.transformer, bad=0), pipeline.scheduler))
    jobs: list[Job] = []
    while runner.error is None:
        over = threading.Event()
        with contextlib.suppress(RuntimeError):  # where it stopped meanwhile
            jobs.append(runner.submit(latent(0, 0, 6, n=3), lambda event, over=over: over.set()))
            assert over.wait(timeout=60)
    with pytest.raises(RuntimeError, match="The engine has stopped"):
        runner.submit(latent(0, 0, 6))
    assert len(jobs) < 100
    assert {job.state for job in jobs} == {"failed"}
    for thread in runner._threads:
        thread.join(timeout=60)
    assert "passes in a row failed" in str(runner.error)
    runner.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": 99}, "99"),
        ({"label": "cat"}, "cat"),
        ({"label": None}, "Give a label"),
        ({"n": 0}, "n must be 1 or more"),
        ({"n": 10**9}, "n must be at most"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_interval": (0.7, 0.2)}, "guidance_interval"),
        ({"scheduler": "nobody"}, "There is no scheduler named 'nobody'"),
        ({"scheduler": 5}, "scheduler must be a name, not 5"),
        ({"scheduler": "flow-euler"}, "velocity"),
        ({"scheduler": "dpm++", "eta": 0.5}, "eta 0.5 is for DDIMScheduler"),
        ({"height": 7}, "height 7"),
        ({"priority": 9}, "priority"),
        ({"deadline": -1.0}, "deadline"),
        ({"preview_every": -1}, "preview_every"),
        ({"output_type": "pil"}, "output_type"),
    ],
)
def test_bad_requests_are_one_sentence(make_pipeline: MakePipeline, fields: dict[str, Any], message: str) -> None:
    engine = Engine(make_pipeline())
    with pytest.raises(ValueError, match=message) as refusal:
        engine.submit(ImageRequest(**{"label": 0, **fields}))
    assert "\n" not in str(refusal.value)
    assert not engine.waiting


def test_a_pipeline_whose_scheduler_is_no_table_is_refused_at_once(make_pipeline: MakePipeline) -> None:
    from diffusers import DDIMScheduler

    with pytest.raises(
        ValueError, match=r"set clip_sample=False\. Serve this model with another scheduler, such as ddim"
    ):
        Engine(make_pipeline(scheduler=DDIMScheduler()))


def test_a_model_with_a_cache_is_refused(make_pipeline: MakePipeline) -> None:
    from dit_hub.ecosystem import cache_preset

    pipeline = make_pipeline()
    pipeline.transformer.enable_cache(cache_preset(pipeline.transformer))
    with pytest.raises(ValueError, match="serve the model without it"):
        Engine(pipeline)


# --- Threads ---------------------------------------------------------------------------------------------------------


def test_many_threads_get_their_own_images(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    lock = FairLock()
    runners = [Runner(pipeline, lock, max_batch=6) for _ in range(2)]
    jobs: list[Job] = []

    def user(number: int) -> None:
        over = threading.Event()
        request = latent(number % 4, number, 3 + number % 5)
        job = runners[number % 2].submit(request, lambda event: over.set() if event.kind == "done" else None)
        assert over.wait(timeout=60)
        jobs.append(job)

    threads = [threading.Thread(target=user, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(jobs) == 24
    for runner in runners:
        runner.close()
    check(pipeline, jobs)


def test_closing_finishes_what_was_accepted_or_fails_it(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    runner = Runner(pipeline)
    jobs = [runner.submit(latent(0, seed, 5)) for seed in range(4)]
    runner.close(finish_within=60)
    check(pipeline, jobs)
    with pytest.raises(RuntimeError, match="shutting down"):
        runner.submit(latent(0, 0, 5))
    runner = Runner(pipeline)
    job = runner.submit(latent(0, 0, 1000, n=16))
    runner.close()
    assert job.state == "failed"
    assert "shutting down" in str(job.error)


def test_a_listener_that_fails_hurts_nobody(make_pipeline: MakePipeline) -> None:
    engine = Engine(make_pipeline())

    def fail(event: Event) -> None:
        raise OSError("the reader is gone")

    jobs = [engine.submit(latent(0, 0, 3), fail), engine.submit(latent(1, 1, 3))]
    engine.run()
    assert [job.state for job in jobs] == ["done", "done"]
